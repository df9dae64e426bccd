"""A measured row in words: its names, a line to print as it comes, and the terminal's table."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .header import threads
from .suites import MODES

COLUMNS = (
    "workload",
    "mode",
    "contender",
    "ms (p20–p80)",
    "graph ms",
    "× graph",
    "× eager",
    "× better eager",
    "ceiling",
    "× best other",
    "GFLOP/s",
    "GB/s",
    "roofline",
    "MB",
    "equal",
)

Row = dict[str, Any]


def title(row: Row) -> str:
    """ "ie k1 16@32", with the dtype where it is not float32."""
    parts = [row["workload"], row["variant"], row["shape"], row["dtype"] if row["dtype"] != "float32" else ""]
    return " ".join(part for part in parts if part)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one workload, mode and dtype together, in the order they were measured."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((title(row), row["mode"]), []).append(row)
    return list(found.values())


def markdown_table(
    columns: Sequence[str], lines: Iterable[Sequence[str]], left: int = 2, last: str = "---:"
) -> list[str]:
    """The lines of a table.

    Args:
        columns: their names.
        lines: the entries of each line.
        left: how many columns are aligned to the left; the others are numbers.
        last: the rule of the last column.
    """
    rule = ["---"] * left + ["---:"] * (len(columns) - left - 1) + [last]
    return [f"| {' | '.join(entries)} |" for entries in (columns, rule, *lines)]


def contender(row: Row) -> str:
    """ "eager" or "fused:staged"."""
    return f"{row['contender']}:{row['engine']}" if row["engine"] else row["contender"]


def times(ratio: Row | None, span: bool = False) -> str:
    if not ratio:
        return "–"
    text = f"{ratio['median']:.2f}"
    return f"{text} ({ratio['p20']:.2f}–{ratio['p80']:.2f})" if span else text


def graph(row: Row) -> tuple[str, str]:
    """The time of a replay as a CUDA graph, and its ratio to the better eager layout's replay; "" where none is."""
    found = row.get("graph")
    if not found:
        return "", ""
    if "errors" in found:
        return "failed", ""
    ratio = found["ratio_to_better_eager"]
    return f"{found['median_ms']:.3f}", f"{ratio:.2f}" if ratio else "–"


def cells(row: Row) -> list[str]:
    """One row of the terminal's table."""
    first = [title(row), MODES[row["mode"]], contender(row)]
    if row["errors"]:
        return [*first, row["errors"], *[""] * (len(COLUMNS) - 4)]
    better = row["ratio_to_better_eager"]
    worst = row["equality"]["worst"]
    return [
        *first,
        f"{row['median_ms']:.2f} ({row['p20']:.2f}–{row['p80']:.2f})",
        *graph(row),
        times(row["ratio_to_eager"]),
        times(better, span=True),
        f"{better['ceiling']:.2f}" if better else f"{row['ceiling']:.2f}",
        f"{times(row['ratio_to_best_other'])} {row['ratio_to_best_other']['than']}"
        if row["ratio_to_best_other"]
        else "–",
        f"{row['gflops']:.0f}",
        f"{row['gbs']:.1f}",
        f"{100 * row['fraction_of_roofline']:.0f} %",
        f"{row['peak_mb']:.1f}",
        row["equality"].get("note") or f"{worst:.2g} of allowed",
    ]


def line(row: Row) -> str:
    """One row as one line, to print as it comes."""
    found = cells(row)
    if row["errors"]:
        return f"{found[0]:<24} {found[1]:<15} {found[2]:<16} failed: {row['errors']}"
    replayed = f"graph {found[4]:>7} ms × {found[5]:<6}" if found[4] else ""
    return (
        f"{found[0]:<24} {found[1]:<15} {found[2]:<16} {found[3]:>28} ms  × better eager {found[7]:<18} {replayed}"
        f"ceiling {found[8]:<6} {found[10]:>5} GFLOP/s {found[11]:>5} GB/s {found[13]:>8} MB  {found[14]}"
    )


def rates(head: Row) -> str:
    """The machine's measured rates, in words."""
    products = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in head.get("matmul_gflops", {}).items())
    copies = list(head.get("copy_gbs", {}).values())
    copied = f"{max(copies):.1f} GB/s" if copies else "not measured"
    return f"matrix product {products or 'not measured'}; copy {copied}"


def print_table(head: Row, rows: Sequence[Row]) -> None:
    """A run's rates and, on a terminal with rich, its table; the lines printed before have the same numbers."""
    print(f"{head['device']}, {threads(head)}: {rates(head)}")
    if not sys.stdout.isatty():
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return
    table = Table(show_lines=False)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 4 else "right", overflow="fold")
    previous = None
    for row in rows:
        group = (title(row), row["mode"])
        if previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*cells(row), style="red" if row["errors"] else "bold" if row["contender"] == "fused" else "")
    console = Console()
    Console(width=max(console.width, 190)).print(table)
