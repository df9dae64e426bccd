"""`python -m benchmarks.report`: makes the pages' tables and the plots from the recorded results."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import card, networks, overhead, targets
from .contenders import BASELINES
from .header import RESULTS, ROOT, short_commit, threads
from .printing import contender, graph, groups, markdown_table, rates, times, title
from .suites import MODES

PAGE, README = ROOT / "docs" / "measured.md", ROOT / "README.md"
PAGE_COLUMNS = (
    "block",
    "mode",
    "eager ms",
    "eager-cl ms",
    "fused ms",
    "engine",
    "× better eager (p20–p80)",
    "ceiling",
    "× compiled",
    "roofline",
    "memory",
)
# Of a record with replays as CUDA graphs, whose times are the card's own.
GRAPH_COLUMNS = ("eager graph ms", "graph ms", "× graph")

Row = dict[str, Any]


def recorded(folder: Path) -> list[Path]:
    """Every file of timed contenders below a folder, sorted."""
    return sorted(path for path in folder.glob("*/*.json") if _is_record(path))


def _is_record(path: Path) -> bool:
    found = json.loads(path.read_text())
    return isinstance(found, dict) and {"header", "rows"} <= set(found) and all("contender" in r for r in found["rows"])


def _page_lines(rows: Sequence[Row], graphs: bool) -> Iterable[list[str]]:
    # A card's times may be hundredths of a millisecond.
    digits = 3 if graphs else 1
    for group in groups(rows):
        by_name = {contender(row): row for row in group}

        def milliseconds(name: str, by_name: dict[str, Row] = by_name) -> str:
            row = by_name.get(name)
            return "–" if row is None else "failed" if row["errors"] else f"{row['median_ms']:.{digits}f}"

        for row in group:
            if row["contender"] != "fused":
                continue
            first = [f"{title(row)}", MODES[row["mode"]], milliseconds("eager"), milliseconds("eager-cl")]
            if row["errors"]:
                blank = [""] * (4 + (len(GRAPH_COLUMNS) if graphs else 0))
                yield [*first, "failed", row["engine"], row["errors"].replace("|", "/"), *blank]
                continue
            better, compiled = row["ratio_to_better_eager"], row["ratio_to_best_compiled"]
            yield [
                *first,
                f"{row['median_ms']:.{digits}f}",
                row["engine"],
                times(better, span=True),
                *([_eager_graph(group), *graph(row)] if graphs else []),
                f"{better['ceiling']:.2f}" if better else "–",
                f"{times(compiled)} {compiled['than']}" if compiled else "–",
                f"{100 * row['fraction_of_roofline']:.0f} %",
                f"{100 * better['memory']:.0f} %" if better and better["memory"] else "–",
            ]


def _eager_graph(group: Iterable[Row]) -> str:
    """The replay of the better eager layout."""
    found = [row["graph"] for row in group if row["contender"] in BASELINES and "median_ms" in row.get("graph", {})]
    return f"{min(each['median_ms'] for each in found):.3f}" if found else "–"


def page_table(rows: Sequence[Row]) -> list[str]:
    """The project's own rows as lines of a markdown table; with replays as CUDA graphs where there are some."""
    graphs = any("graph" in row for row in rows)
    place = PAGE_COLUMNS.index("ceiling")
    columns = (*PAGE_COLUMNS[:place], *GRAPH_COLUMNS, *PAGE_COLUMNS[place:]) if graphs else PAGE_COLUMNS
    return markdown_table(columns, _page_lines(rows, graphs))


def _parts(head: Row) -> bool:
    """Whether a record is a part of a suite that is reported as a whole."""
    return bool(head["suite"].startswith(tuple(f"{suite}-" for suite in targets.SUITES)))


def _means(rows: Iterable[Row]) -> list[list[str]]:
    """Geometric means of the best engine's ratios over a family's shapes."""
    found: dict[tuple[str, str], list[Row]] = {}
    for group in groups(rows):
        fused = [row for row in group if row["contender"] == "fused" and not row["errors"]]
        if fused:
            best = min(fused, key=lambda row: row["median_ms"])
            family = " ".join(part for part in (best["workload"], best["variant"]) if part)
            found.setdefault((family, best["mode"]), []).append(best)

    def mean(entries: list[Row], ratio: str, key: str) -> str:
        values = [row[ratio][key] for row in entries if row[ratio] and row[ratio][key]]
        return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else "–"

    return [
        [
            family,
            MODES[mode],
            str(len(entries)),
            mean(entries, "ratio_to_better_eager", "median"),
            mean(entries, "ratio_to_better_eager", "ceiling"),
            mean(entries, "ratio_to_best_compiled", "median"),
            mean(entries, "ratio_to_better_eager", "memory"),
        ]
        for (family, mode), entries in found.items()
    ]


def markdown(results: Path = RESULTS, page: Path = PAGE) -> str:
    """What stands between the page's markers: for each recorded file its machine, its table and its plot."""
    parts: list[str] = []
    for folder in targets.recorded_in(results):
        parts += [*_targets_of(folder, page), ""]
    for path in recorded(results):
        found = json.loads(path.read_text())
        head, rows = found["header"], found["rows"]
        if _parts(head):
            continue
        parts += [
            f"**{head['device']}**, {threads(head)}, torch {head['versions']['torch']}, "
            f"{head['date'][:10]}, commit {short_commit(head['commit'])}; {rates(head)} ({_link(path, page)}).",
            "",
        ]
        if head["suite"].startswith("all"):
            columns = ("blocks", "mode", "shapes", "× better eager", "ceiling", "× compiled", "memory ×")
            parts += [*markdown_table(columns, _means(rows)), ""]
        else:
            parts += [*page_table(rows), ""]
        parts += [f"![{head['suite']} suite]({_from(path.with_suffix('.png'), page)})", ""]
    for path in sorted(results.glob("*/overhead.json")):
        found = json.loads(path.read_text())
        parts += [
            f"**Overhead of a call**, one float32 image of {overhead.CHANNELS} channels, "
            f"{overhead.SIZE}×{overhead.SIZE}, less is better: {_measured_on(path, found['header'], page)}.",
            "",
            *overhead.table(found["results"]),
            "",
        ]
    return "\n".join(parts) if parts else "No results are recorded yet.\n"


def _from(path: Path, page: Path) -> str:
    """The address of a file for a link on a page."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _link(path: Path, page: Path) -> str:
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"[`{name}`]({_from(path, page)})"


def _measured_on(path: Path, head: Row, page: Path) -> str:
    """The machine, versions, date and commit of a record, and a link to it."""
    return (
        f"{head['device']}, {threads(head)}, torch {head['versions']['torch']}, {head['date'][:10]}, "
        f"commit {short_commit(head['commit'])} ({_link(path, page)})"
    )


def _when(records: Iterable[tuple[Row, list[Row]]]) -> str:
    """The dates and commits of the parts of a suite."""
    heads = [head for head, _ in records]
    dates, commits = ({head["date"][:10] for head in heads}, {short_commit(head["commit"]) for head in heads})
    return f"{', '.join(sorted(dates))}, commit{'s' * (len(commits) > 1)} {' and '.join(sorted(commits))}"


def _targets_of(folder: Path, page: Path) -> list[str]:
    """A device's geometric means beside what is asked of them, and where every row stands."""
    records = targets.records(folder)
    found = targets.lines(row for _, rows in records for row in rows)
    head = records[0][0]
    return [
        f"**{head['device']}**, {threads(head)}, torch {head['versions']['torch']}, {_when(records)}: "
        f"geometric means over each family, and what is asked of them; {targets.summary(found)} "
        f"([every row]({_from(folder / 'targets.md', page)})).",
        "",
        *targets.means_table(found),
    ]


def plots(paths: Iterable[Path]) -> list[Path]:
    """Draw each recorded file beside it, but for parts of suites; nothing without matplotlib.

    Returns:
        The files drawn; each carries the digest of the record it was drawn from.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for path in paths:
        found = json.loads(path.read_text())
        if _parts(found["header"]):
            continue
        bars = [
            (row, ratio)
            for row in found["rows"]
            if row["contender"] not in BASELINES and not row["errors"] and (ratio := row["ratio_to_better_eager"])
        ]
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * max(len(bars), 4)), layout="constrained")
        names = sorted({contender(row) for row, _ in bars})
        colours = {name: f"C{i}" for i, name in enumerate(names)}
        for place, (row, ratio) in enumerate(bars):
            spread = [[ratio["median"] - ratio["p20"]], [ratio["p80"] - ratio["median"]]]
            axes.barh(place, ratio["median"], xerr=spread, color=colours[contender(row)], error_kw={"lw": 1})
            axes.plot(ratio["ceiling"], place, "k|", markersize=9)
        axes.axvline(1, color="grey", lw=1)
        axes.set_yticks(range(len(bars)), [f"{title(row)}, {MODES[row['mode']]}" for row, _ in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("times faster than the better eager layout (bar: p20–p80; tick: ceiling)")
        axes.legend(handles=[pyplot.Rectangle((0, 0), 1, 1, color=colours[n], label=n) for n in names], fontsize=8)
        head = found["header"]
        axes.set_title(f"{head['device']}, {threads(head)}, {head['date'][:10]}", fontsize=9)
        target = path.with_suffix(".png")
        figure.savefig(target, dpi=110, metadata={"Description": digest(path), "Software": None})
        pyplot.close(figure)
        drawn.append(target)
    return drawn


def digest(path: Path) -> str:
    """The SHA-256 of a record, by which a plot says what it was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def between(text: str, name: str = "benchmarks") -> tuple[str, str, str]:
    """A page in three: up to and with the first marker, what stands between, and from the second marker on.

    Args:
        text: of the page.
        name: of the markers.

    Raises:
        ValueError: the markers are not there, or not in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        raise ValueError(f"the page must contain {begin} and after it {end}, got neither in this order")
    first += len(begin)
    return text[:first], text[first:last], text[last:]


def update(page: Path, made: str, name: str = "benchmarks") -> bool:
    """Rewrite what stands between a page's markers; returns whether that changed it."""
    text = page.read_text()
    before, _, after = between(text, name)
    new = f"{before}\n{made}{after}"
    page.write_text(new)
    return new != text


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the plots, write the targets and rewrite the pages' tables; or print the targets.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="has what is measured of blocks")
    parser.add_argument("--readme", type=Path, default=README, help="has a row for each network")
    parser.add_argument("--targets", action="store_true", help="write the targets, and print them; nothing else")
    arguments = parser.parse_args(argv)
    results, page, readme = arguments.results, arguments.page, arguments.readme
    written = targets.write(results)
    if arguments.targets:
        print(
            "\n".join(path.read_text() for path in written) or "No row of the suites `cpu` and `networks` is recorded."
        )
        return 0
    for path in [*written, *plots(recorded(results))]:
        print(f"written: {path}")
    changed = [
        (page, update(page, markdown(results, page))),
        (readme, update(readme, networks.markdown(results), "networks")),
        (readme, update(readme, card.markdown(results), "card")),
    ]
    for path, rewritten in changed:
        print(f"{path}: {'rewritten' if rewritten else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
