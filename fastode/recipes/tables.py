"""What a run found, as tables: for a terminal, for a page, and as CSV; and whether the paper's orders are in it."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plan import Claim, Network, Plan, Table

__all__ = ["Verdict", "csv_text", "heading", "markdown", "mean_of", "said", "spread_of", "terminal", "verdicts"]

Results = dict[str, Any]
Value = float | str


def values_of(results: Results, network: str, column: str) -> list[Value]:
    """What each seed that is done found, in the order of the seeds."""
    cells = results["cells"].get(network, {})
    found = [cells[seed]["values"].get(column) for seed in sorted(cells, key=int)]
    return [value for value in found if value is not None]


def mean_of(values: Sequence[Value]) -> float | None:
    """The mean over seeds; None where there is no number."""
    numbers = [value for value in values if not isinstance(value, str)]
    return statistics.fmean(numbers) if numbers else None


def spread_of(values: Sequence[Value]) -> float | None:
    """The standard deviation over seeds; None with fewer than two."""
    numbers = [value for value in values if not isinstance(value, str)]
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def _ours(values: Sequence[Value]) -> str:
    if not values:
        return "–"
    if isinstance(values[0], str):
        return values[0]
    mean, spread = mean_of(values), spread_of(values)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _papers(table: Table, network: Network, column: str) -> str:
    value = table.paper.get(network.paper or network.name, {}).get(column)
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.2f}"


def _rows(table: Table, plan: Plan, results: Results) -> list[list[str]]:
    """The table's head and lines; a column of the paper's numbers stands before each of ours, where it has any."""
    head, known = ["network"], []
    for column in table.columns:
        with_paper = any(column in row for row in table.paper.values())
        known.append((column, with_paper))
        head += [f"{column}, paper", f"{column}, here"] if with_paper else [f"{column}, here"]
    rows = [head]
    for network in plan.networks:
        found = [values_of(results, network.name, column) for column in table.columns]
        if not any(found):
            continue
        line = [network.name]
        for (column, with_paper), values in zip(known, found, strict=True):
            line += [_papers(table, network, column), _ours(values)] if with_paper else [_ours(values)]
        rows.append(line)
    return rows


def terminal(table: Table, plan: Plan, results: Results) -> str:
    """The table in columns, under the paper's name for it."""
    rows = _rows(table, plan, results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([f"{table.name}: {table.title} ({table.unit})", *lines, *([table.note] if table.note else [])])


def markdown(table: Table, plan: Plan, results: Results) -> list[str]:
    """The lines of the table on a page."""
    head, *lines = _rows(table, plan, results)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *lines)]


def csv_text(table: Table, plan: Plan, results: Results) -> str:
    """A line for each number: network, column, seed, value, and the paper's."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "column", "seed", "value", "paper"])
    for network in plan.networks:
        for column in table.columns:
            for seed, cell in sorted(results["cells"].get(network.name, {}).items(), key=lambda item: int(item[0])):
                if column in cell["values"]:
                    paper = table.paper.get(network.paper or network.name, {}).get(column, "")
                    writer.writerow([network.name, column, seed, cell["values"][column], paper])
    return out.getvalue()


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def heading(plan: Plan, results: Results) -> str:
    """What was run, and how far it is the paper's experiment."""
    settings = results["settings"]
    size = "The paper's size" if settings["paper"] else "Quick size, not the paper's"
    blocks = "fused blocks" if settings["fused"] else "reference blocks"
    lines = [
        f"{settings['recipe']}: {settings['title']} ({settings['citation']}).",
        f"{size}: {settings['data']}; {_counted(settings['epochs'], 'epoch')}, {settings['images']} images attacked, "
        f"{_counted(settings['seeds'], 'seed')}, {blocks} on {settings['device']}. "
        f"{plan.time if settings['paper'] else f'Time on two cores: {plan.time}'}",
    ]
    return "\n".join([*lines, *([plan.note] if plan.note else [])])


@dataclass(frozen=True)
class Verdict:
    """Whether an order of the paper is in the results.

    Attributes:
        claim: the order.
        column: of the table.
        seeds: in how many of them it is.
        of: how many there are.
        word: "yes" or "no" where every step of the order is larger than twice its standard error over the seeds, or one
            goes the other way by as much; else "undecided". With one seed it is that seed's.
    """

    claim: Claim
    column: str
    seeds: int
    of: int
    word: str

    def __str__(self) -> str:
        return f"{self.column} {self.word} ({self.seeds} of {_counted(self.of, 'seed')})"


def verdicts(plan: Plan, results: Results) -> list[Verdict]:
    """Each claim of the plan, where all its numbers are there."""
    found = []
    for claim in plan.claims:
        for column in claim.columns:
            cells = [results["cells"].get(row, {}) for row in claim.rows]
            seeds = sorted(set.intersection(*(set(cell) for cell in cells)), key=int)
            lines = [[cell[seed]["values"].get(column) for cell in cells] for seed in seeds]
            steps = [[b - a for a, b in itertools.pairwise(line)] for line in lines if None not in line]
            if steps:
                appears = sum(min(line) > 0 for line in steps)
                found.append(Verdict(claim, column, appears, len(steps), _word(steps)))
    return found


def _word(steps: Sequence[Sequence[float]]) -> str:
    """Of the steps of an order, a line for each seed."""
    sizes = []  # of each step's mean, less or more its doubtful part
    for values in zip(*steps, strict=True):
        doubt = 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        sizes.append((mean - doubt, mean + doubt))
    if all(low > 0 for low, _ in sizes):
        return "yes"
    alone = len(steps) == 1  # where a step of zero is none
    return "no" if any(high < 0 or (alone and high <= 0) for _, high in sizes) else "undecided"


def said(plan: Plan, results: Results) -> list[str]:
    """A line for each claim: for each column whether the order is there, and in how many seeds."""
    lines: dict[str, list[str]] = {}
    for verdict in verdicts(plan, results):
        lines.setdefault(verdict.claim.words, []).append(str(verdict))
    return [f"{words}: {', '.join(found)}" for words, found in lines.items()]
