"""The README's table of a card: whole blocks in one launch, by the recorded results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .header import RESULTS, short_commit
from .printing import groups, markdown_table, title
from .suites import MODES

COLUMNS = ("block", "mode", "better eager, ms", "fastode, ms", "× eager", "× eager, both as CUDA graphs")
NOTHING = "Nothing is recorded of a card yet."
Row = dict[str, Any]


def recorded(results: Path = RESULTS) -> Iterator[tuple[Row, list[Row]]]:
    """The heads of the records of cards that `make gpu` makes against eager, and their rows."""
    for path in sorted(results.glob("*/gpu.json")):
        record = json.loads(path.read_text())
        yield record["header"], record["rows"]


def best(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Of each block and mode the better eager row, and the fastest fused row whose graph was timed too."""
    for group in groups(rows):
        eager = [row for row in group if row["contender"].startswith("eager") and not row["errors"]]
        fused = [row for row in group if row["contender"] == "fused" and not row["errors"] and row.get("graph")]
        if eager and fused:
            yield min(eager, key=lambda row: row["median_ms"]), min(fused, key=lambda row: row["median_ms"])


def line(eager: Row, fused: Row) -> list[str]:
    """A line of the table."""
    return [
        title(fused),
        MODES[fused["mode"]],
        f"{eager['median_ms']:.2f}",
        f"{fused['median_ms']:.2f}",
        f"{fused['ratio_to_better_eager']['median']:.1f}",
        f"{fused['graph']['ratio_to_better_eager']:.1f}",
    ]


def markdown(results: Path = RESULTS) -> str:
    """What stands between the README's markers."""
    parts = []
    for head, rows in recorded(results):
        lines = [line(*pair) for pair in best(rows)]
        parts.append(
            f"{head['device']}, torch {head['versions']['torch']}, batch {rows[0]['batch']}, {head['date'][:10]}, "
            f"commit {short_commit(head['commit'])}:\n\n" + "\n".join(markdown_table(COLUMNS, lines))
        )
    return "\n\n".join(parts or [NOTHING]) + "\n"
