"""The README's table: each network of fastode.nets, its paper and blocks, and what the records say of its speed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import bench_nets
from .header import RESULTS, short_commit, threads
from .printing import markdown_table

Row = dict[str, Any]
# By workload: a network as a user trains it, and as the suite "cpu" has it.
MEASURED = {"networks": ("train", "attack_step"), "nets": ("train", "pgd_step")}
# Of a column, whether it is of training steps, and its dtype.
RATIOS = {
    "× eager, training step": (True, "float32"),
    "× eager, attack step": (False, "float32"),
    "autocast to bfloat16: training step": (True, "autocast"),
    "autocast to bfloat16: attack step": (False, "autocast"),
}
COLUMNS = ("paper", "blocks", "network", *RATIOS)


@dataclass(frozen=True)
class Network:
    """A function of fastode.nets.

    Attributes:
        name: of the function.
        paper: its number in docs/papers.md, whose link is in PAPERS.
        blocks: of which it is made, in words.
    """

    name: str
    paper: int
    blocks: str


PAPERS = {
    1: ("Li et al. 2020", "https://proceedings.mlr.press/v119/li20e.html"),
    2: ("Kim et al. 2020", "https://arxiv.org/abs/2010.10047"),
    3: ("Huang et al. 2020", "https://arxiv.org/abs/2009.13145"),
    4: ("Natural Robustness 2020", "https://arxiv.org/abs/2012.02452"),
}
NETWORKS = (
    Network("ie_resnet18", 1, "`IESkip`, `ResBlock`"),
    Network("ie_resnet34", 1, "`IESkip`, `ResBlock`"),
    Network("ie_resnet50", 1, "`IESkip`, `ResBlock` on bottlenecks"),
    Network("wide_resnet34_10", 1, "`IESkip`, `ResBlock`"),
    Network("resnet18", 1, "`ResBlock`"),
    Network("resnet34", 1, "`ResBlock`"),
    Network("resnet50", 1, "`ResBlock` on bottlenecks"),
    Network("sw_resnet58", 1, "`ShuOsher`: two steps with the same weights"),
    Network("sspnet", 2, "`SSP2`, `SSP3`, `Midpoint`, `Ark` or `ResBlock`"),
    Network("sspnet_mnist", 2, "the same"),
    Network("sonet", 3, "`SOBlock` on `SkewPair`, `SOClassifier`"),
    Network("soblock_resnet10", 3, "`SOBlock` on `SkewPair`, `ResBlock`"),
    Network("odenet", 3, "`ODEBlock` on `TimeConv2d`"),
    Network("resnet10", 3, "`ResBlock`"),
    Network("resnet56", 4, "`ResBlock` with step h"),
    Network("polynet", 4, "`PolyBlock`, `ResBlock`"),
    Network("fractalnet", 4, "`FractalBlock`"),
    Network("revnet", 4, "`RevBlock` in `RevSequence`, `ResBlock`"),
    Network("neural_ode_mnist", 4, "`ODEBlock` on `TimeConv2d`"),
    Network("neural_ode_cifar", 4, "the same"),
)


def name_of(make: Callable[..., Any]) -> str:
    """The function of fastode.nets by which a network of the benchmarks is made."""
    function = make.func if isinstance(make, functools.partial) else make
    return str(function.__name__)


def network_of(row: Row) -> str:
    """The function of fastode.nets that made a row's network; of others' networks the name of theirs."""
    variant = row["variant"]
    make = bench_nets.WHOLE[variant].make if row["workload"] == "networks" else bench_nets.NETWORKS[variant][0]
    return name_of(make)


def recorded(results: Path) -> list[tuple[Row, Row]]:
    """The head and row of every training step and attack's step of a network that left the engine to the project.

    Of a network that is measured as a user trains it there are these rows alone.
    """
    found, names = [], {network.name for network in NETWORKS}
    for path in sorted([*results.glob("*/cpu-*.json"), *results.glob("*/networks-*.json")]):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            ours = (row["contender"], row["engine"]) == ("fused", "auto") and not row["errors"]
            if ours and row["mode"] in MEASURED.get(row["workload"], ()) and network_of(row) in names:
                found.append((record["header"], row))
    whole = {network_of(row) for _, row in found if row["workload"] == "networks"}
    return [(head, row) for head, row in found if row["workload"] == "networks" or network_of(row) not in whole]


def _cell(found: Sequence[tuple[Row, Row]], name: str, train: bool, dtype: str) -> str:
    """The ratios of a network's variants, with the machine where there are several."""
    several = len({_machine(head) for head, _ in found}) > 1
    words = [
        f"{row['ratio_to_better_eager']['median']:.2f} (`{row['variant']}`{f', {_machine(head)}' if several else ''})"
        for head, row in found
        if (row["mode"] == "train", row["dtype"], network_of(row)) == (train, dtype, name)
    ]
    return ", ".join(words) or "not measured"


def _machine(head: Row) -> str:
    return f"{head['device']}, {threads(head)}"


def _measured_on(heads: Iterable[Row]) -> list[str]:
    """The machines, versions, dates and commits of records, each once."""
    found = {
        f"{_machine(head)}, torch {head['versions']['torch']}, {head['date'][:10]}, "
        f"commit {short_commit(head['commit'])}": None
        for head in heads
    }
    return list(found)


def _paper(number: int) -> str:
    name, address = PAPERS[number]
    return f"[{name}]({address})"


def markdown(results: Path = RESULTS) -> str:
    """What stands between the README's markers."""
    found = recorded(results)
    lines = [
        [_paper(network.paper), network.blocks, f"`{network.name}`"]
        + [_cell(found, network.name, *column) for column in RATIOS.values()]
        for network in NETWORKS
    ]
    table = markdown_table(COLUMNS, lines, left=3)
    batches = sorted({f"{row['dtype']}, {row['batch']} images" for _, row in found})
    where = "; ".join([*batches, *_measured_on(head for head, _ in found)]) if found else "nothing is recorded yet"
    return "\n".join([*table, "", f"Measured: {where}.", ""])
