"""The figure of a table: bars by column, or lines over its columns or its rows, with the paper's numbers as crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plan import Network, Plan, Table
from .records import replaced
from .tables import Results, mean_of, spread_of, values_of

__all__ = ["draw"]


def draw(table: Table, plan: Plan, results: Results, path: Path, mark: str = "") -> bool:
    """Draw a table.

    Args:
        table: what.
        plan: of which.
        results: of a run.
        path: of the picture.
        mark: what the picture says of itself.

    Returns:
        Whether it was drawn: without matplotlib, or where nothing is done yet, there is none.

    Raises:
        OSError: it could not be written.
    """
    networks = [network for network in plan.networks if results["cells"].get(network.name)]
    if not table.axis or not networks:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    count = len(table.columns) if table.axis == "bars" else 1
    figure = Figure(figsize=(max(6.0, min(14.0, 1.6 * count + 2)), 4.2), layout="constrained")
    axes = figure.subplots()
    {"bars": _bars, "columns": _over_columns, "rows": _over_rows}[table.axis](axes, table, networks, results)
    axes.set_ylabel(table.unit)
    axes.set_title(f"{table.name}: {table.title}", fontsize=10)
    axes.legend(fontsize=8)
    metadata = {"Description": mark, "Software": None}
    replaced(path, lambda beside: figure.savefig(beside, dpi=110, metadata=metadata))
    return True


def _found(results: Results, network: Network, column: str) -> tuple[float, float]:
    values = values_of(results, network.name, column)
    mean, spread = mean_of(values), spread_of(values)
    return float("nan") if mean is None else mean, spread or 0.0


def _papers(table: Table, network: Network, column: str) -> float:
    value = table.paper.get(network.paper or network.name, {}).get(column)
    return float("nan") if value is None or isinstance(value, str) else value


def _bars(axes: Any, table: Table, networks: list[Network], results: Results) -> None:
    width, columns = 0.8 / len(networks), table.columns
    crosses: tuple[list[float], list[float]] = ([], [])
    for index, network in enumerate(networks):
        places = [place + width * (index - (len(networks) - 1) / 2) for place in range(len(columns))]
        means, spreads = zip(*(_found(results, network, column) for column in columns), strict=True)
        axes.bar(places, means, width=0.92 * width, yerr=spreads if any(spreads) else None, label=network.name)
        crosses[0].extend(places)
        crosses[1].extend(_papers(table, network, column) for column in columns)
    if any(value == value for value in crosses[1]):
        axes.plot(*crosses, "kx", markersize=5, label="the paper's")
    axes.set_xticks(range(len(columns)), columns)


def _over_columns(axes: Any, table: Table, networks: list[Network], results: Results) -> None:
    for network in networks:
        means, spreads = zip(*(_found(results, network, column) for column in table.columns), strict=True)
        axes.errorbar(table.columns, means, yerr=spreads, marker="o", capsize=2, label=network.name)
    axes.tick_params(axis="x", rotation=30)


def _over_rows(axes: Any, table: Table, networks: list[Network], results: Results) -> None:
    names = [network.name for network in networks]
    for column in table.columns:
        means, spreads = zip(*(_found(results, network, column) for network in networks), strict=True)
        axes.errorbar(names, means, yerr=spreads, marker="o", capsize=2, label=column)
    axes.tick_params(axis="x", rotation=30)
