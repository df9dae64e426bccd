"""What the project set out to reach, and what the recorded rows of the suites "cpu" and "networks" reach of it.

A ratio is asked to reach its figure, or SHARE of the ceiling where that is less: no version can pass the ceiling, which
is the other contender's time over that of the least FLOPs at the matrix product's rate of the same rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .printing import markdown_table
from .suites import MODES
from .workloads import BLOCK_MODES

Row = dict[str, Any]

SHARE = 0.75
SHARE_OF_NETWORKS = 0.88  # of those of the suite "networks"
SUITES = ("cpu", "networks")
NOTHING = "No row of the suites `cpu` and `networks` is recorded here."
EAGER, COMPILED, MEMORY_EAGER, MEMORY_COMPILED, MATMUL, OTHER = (
    "better eager", "compiled", "memory of better eager", "memory of compiled", "matrix product", "best other",
)  # fmt: skip
BLOCKS = ("ie", "ssp2", "ssp3", "ark", "skew")
# (dtype, kind of workload) -> mode -> against -> figure.
_SPEED = {EAGER: 3.0, COMPILED: 2.0}
_MEMORY = {MEMORY_EAGER: 0.35, MEMORY_COMPILED: 0.5}
_EXPLICIT = {
    "forward": _SPEED,
    "input_grad": _SPEED,
    "train": {EAGER: 2.5, COMPILED: 1.8, **_MEMORY},
}
_LOWER = {"forward": {EAGER: 2.5}, "train": {EAGER: 2.5}}
FIGURES: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("float32", "ie"): {**_EXPLICIT, "train": {EAGER: 4.0, COMPILED: 2.0, **_MEMORY}},
    **{("float32", kind): _EXPLICIT for kind in ("ssp2", "ssp3", "ark", "skew")},
    ("float32", "nets"): {"train": {EAGER: 2.2}, "pgd_step": {EAGER: 2.5}},
    ("float32", "conv"): {"forward": {MATMUL: 1.0}},
    **{("bfloat16", kind): _LOWER for kind in BLOCKS},
    ("float32", "solve"): {
        "forward": {EAGER: 3.2},
        "input_grad": {EAGER: 4.0},
        "train": {EAGER: 3.5, MEMORY_EAGER: 0.4},
    },
}
# (workload, variant) that is asked for this alone, and (workload, shape) for this beside the rest; mode -> as above.
VARIANTS: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("solve", "per-sample"): {mode: {OTHER: 3.0} for mode in BLOCK_MODES},
    ("nets", "sonet-32"): {"train": {EAGER: 3.0}},
    ("nets", "soblock-resnet10-32"): {"train": {EAGER: 1.8}},
    ("nets", "odenet"): {"train": {EAGER: 2.0}},
}
SHAPES: dict[tuple[str, str], dict[str, dict[str, float]]] = {("solve", "3-64@32"): {"forward": {EAGER: 4.0}}}
# The suite "networks", by dtype and variant; mode -> figure, against the better eager layout in the same mode, under
# autocast too. What stands in neither of these is asked not to be slower, all against the best compiled COMPILED_WHOLE.
WHOLE: dict[str, dict[str, dict[str, float]]] = {
    "float32": {
        "ie-resnet-1-18-w16": {"train": 3.0, "attack_step": 3.2, "adv_train": 2.2, "trades": 2.2},
        "ie-resnet-1-18-w64": {"train": 1.5, "attack_step": 1.7},
        "sspnet-3": {"train": 1.8, "attack_step": 2.0, "adv_train": 1.7, "trades": 1.7},
        "resnet10-w32": {"train": 1.3, "attack_step": 1.4},
        "soblock-resnet10-w32": {"train": 2.0, "attack_step": 2.0},
    },
    "autocast": {
        **{f"ie-resnet-1-18-{width}": {"train": 2.5, "attack_step": 2.5} for width in ("w16", "w64")},
        "sspnet-3": {"train": 1.8, "attack_step": 1.8},
        "resnet10-w32": {"train": 1.5, "attack_step": 1.5},
    },
}
COMPILED_WHOLE = 1.4
# Of whole networks and bare convolutions the figure itself is asked, whatever the ceiling.
UNCAPPED = ("nets", "conv")
COLUMNS = ("block", "shape", "mode", "against", "asked", "reached", "p20–p80", "ceiling", "")
MEANS = ("block", "mode", "against", "shapes", "asked", "reached", "ceiling", "")


@dataclass(frozen=True)
class Line:
    """One thing asked: of a row, or of the geometric mean over a family's shapes.

    Attributes:
        family: "ie k1", with the dtype where it is not float32.
        shape: "16@32"; the number of shapes for a mean.
        mode: as recorded.
        against: one of the names above.
        asked: the figure or the share of the ceiling.
        reached: the median of the paired ratios, or the ratio of the peaks; None where the row failed.
        span: p20 and p80 of the paired ratios, where it is one of speed.
        ceiling: of the contender compared with; None where there is none.
        note: why there is nothing to compare.
        figure: what was asked before a ceiling lowered it.
    """

    family: str
    shape: str
    mode: str
    against: str
    asked: float
    reached: float | None
    span: tuple[float, float] | None = None
    ceiling: float | None = None
    note: str = ""
    figure: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether what was asked is reached; less is better for memory."""
        if self.reached is None:
            return False
        return self.reached <= self.asked if "memory" in self.against else self.reached >= self.asked


def records(folder: Path) -> list[tuple[Row, list[Row]]]:
    """The heads and rows of every recorded part of the suites in a device's folder."""
    found = [json.loads(path.read_text()) for suite in SUITES for path in sorted(folder.glob(f"{suite}-*.json"))]
    return [(record["header"], record["rows"]) for record in found]


def lines(rows: Iterable[Row]) -> list[Line]:
    """What is asked of each row that left the engine to the project, in the order of FIGURES."""
    rows = list(rows)
    asked = [
        row
        for (dtype, kind), modes in FIGURES.items()
        for row in rows
        if (row["dtype"], row["workload"]) == (dtype, kind) and row["mode"] in modes
    ]
    asked += [row for row in rows if row["workload"] == "networks" and row["dtype"] in WHOLE]
    found = []
    for row in asked:
        if row["contender"] == "fused" and row["engine"] == "auto":
            for against, figure in figures(row).items():
                line = _line(row, against, figure, rows)
                found += [line] if line else []
    return found


def figures(row: Row) -> dict[str, float]:
    """What is asked of a row, by what it is compared with."""
    kind, mode = row["workload"], row["mode"]
    if kind == "networks":
        return {EAGER: WHOLE[row["dtype"]].get(row["variant"], {}).get(mode, 1.0), COMPILED: COMPILED_WHOLE}
    if row["dtype"] == "float32" and (kind, row["variant"]) in VARIANTS:
        return VARIANTS[kind, row["variant"]].get(mode, {})
    figure = FIGURES[row["dtype"], kind][mode]
    return figure | SHAPES.get((kind, row["shape"]), {}).get(mode, {}) if row["dtype"] == "float32" else figure


def _line(row: Row, against: str, figure: float, rows: Sequence[Row]) -> Line | None:
    family = " ".join(
        part for part in (row["workload"], row["variant"], row["dtype"] if row["dtype"] != "float32" else "") if part
    )
    first = (family, row["shape"], row["mode"], against)
    if row["errors"]:
        return Line(*first, figure, None, note=row["errors"], figure=figure)
    if against == MATMUL:
        return Line(*first, figure, row["fraction_of_matmul"], figure=figure)
    name = "ratio_to_better_eager"
    if against == OTHER:
        name = "ratio_to_best_other"
    if against in (COMPILED, MEMORY_COMPILED):
        name = "ratio_to_vjp_compile" if row["workload"] == "ie" else "ratio_to_best_compiled"
    ratio = row[name]
    if ratio is None:
        rivals = [r for r in rows if _same(r, row) and "compile" in r["contender"]]
        note = "; ".join(r["errors"] for r in rivals)
        return Line(*first, figure, None, note=note, figure=figure) if rivals else None
    if against in (MEMORY_EAGER, MEMORY_COMPILED):
        return Line(*first, figure, ratio["memory"], figure=figure)
    share = SHARE_OF_NETWORKS if row["workload"] == "networks" else SHARE
    asked = figure if row["workload"] in UNCAPPED else min(figure, share * ratio["ceiling"])
    return Line(*first, asked, ratio["median"], (ratio["p20"], ratio["p80"]), ratio["ceiling"], figure=figure)


def _same(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("workload", "variant", "shape", "mode", "dtype"))


def means(found: Iterable[Line]) -> list[Line]:
    """The geometric means over a family's shapes, in each mode against each: asked as a row is, of the means."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in found:
        groups.setdefault((line.family, line.mode, line.against), []).append(line)
    made = []
    for (family, mode, against), group in groups.items():
        if len(group) < 2:
            continue
        figure = _mean(group, lambda line: line.figure)
        assert figure is not None
        reached, ceiling = (_mean(group, key) for key in (lambda line: line.reached, lambda line: line.ceiling))
        asked = figure if ceiling is None or family.split()[0] in UNCAPPED else min(figure, SHARE * ceiling)
        made.append(Line(family, str(len(group)), mode, against, asked, reached, None, ceiling))
    return made


def _mean(group: Sequence[Line], of: Callable[[Line], float | None]) -> float | None:
    """The geometric mean; None unless every line has the value."""
    values = [value for line in group if (value := of(line))]
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if len(values) == len(group) else None


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _verdict(line: Line) -> str:
    return f"no: {line.note.replace('|', '/')}" if line.note else "yes" if line.ok else "**no**"


def means_table(found: Sequence[Line]) -> list[str]:
    """The geometric means as lines of a markdown table, none where there are none, as of whole networks."""
    cells = []
    for mean in means(found):
        first = (mean.family, MODES[mean.mode], mean.against, mean.shape)
        cells.append((*first, _number(mean.asked), _number(mean.reached), _number(mean.ceiling), _verdict(mean)))
    return markdown_table(MEANS, cells, left=3, last="---") if cells else []


def lines_table(found: Iterable[Line]) -> list[str]:
    """Every line of a row as lines of a markdown table."""
    cells = []
    for line in found:
        span = f"{line.span[0]:.2f}–{line.span[1]:.2f}" if line.span else "–"
        first = (line.family, line.shape, MODES[line.mode], line.against)
        cells.append((*first, _number(line.asked), _number(line.reached), span, _number(line.ceiling), _verdict(line)))
    return markdown_table(COLUMNS, cells, left=4, last="---")


def summary(found: Sequence[Line]) -> str:
    """How many of the lines and of the means reach what is asked, in words."""
    of_means = means(found)
    return (
        f"{sum(line.ok for line in found)} of {len(found)} rows and {sum(line.ok for line in of_means)} of "
        f"{len(of_means)} geometric means reach what is asked"
    )


NOTE_OF_NETWORKS = (
    "",
    f"Those of the suite `networks` are asked for their figure, or {SHARE_OF_NETWORKS:g} of the ceiling where that is",
    "less; `autocast` is float32 under autocast to bfloat16, beside eager under autocast.",
)


def lines_of(folder: Path) -> list[str]:
    """A device's targets as lines of markdown: what is asked, the geometric means, every row; made from its records."""
    found_records = records(folder)
    found = lines(row for _, rows in found_records for row in rows)
    if not found:
        return [NOTHING]
    heads = [head for head, _ in found_records]
    files = [f"{suite}-*.json" for suite in SUITES if any(head["suite"].startswith(suite) for head in heads)]
    made = sorted({f"{head['commit'][:10]} ({head['date'][:10]})" for head in heads})
    return [
        f"# Targets on {heads[0]['device']}, {heads[0]['threads']} threads",
        "",
        f"Made by `python -m benchmarks.report` from the records `{'`, `'.join(files)}` beside it, "
        f"of commit {', '.join(made)}.",
        f"{summary(found)}.",
        "",
        "A ratio of speed is the median of paired ratios to the other contender: the faster layout of the reference,",
        "or the fastest compiled one (for IE-Skip `vjp-compile`). It is asked to reach its figure, or "
        f"{SHARE:g} of its ceiling",
        "where that is less. Memory is the ratio of the peaks of a training step. Networks and bare convolutions are",
        "asked for their figure whatever the ceiling; the latter's ratio is to the matrix product's rate of the same",
        "rounds.",
        *(NOTE_OF_NETWORKS if "networks-*.json" in files else ()),
        "",
        "## Geometric means over a family's shapes",
        "",
        *means_table(found),
        "",
        "## Every row",
        "",
        *lines_table(found),
    ]


def recorded_in(results: Path) -> list[Path]:
    """The folders of the devices that have records of these suites."""
    return sorted({path.parent for suite in SUITES for path in results.glob(f"*/{suite}-*.json")})


def write(results: Path) -> list[Path]:
    """Write targets.md beside the records of every device that has some; returns the files."""
    written = []
    for folder in recorded_in(results):
        path = folder / "targets.md"
        path.write_text("\n".join(lines_of(folder)) + "\n")
        written.append(path)
    return written
