"""`python -m benchmarks.reversible`: the peak memory of a training step against the depth of a reversible chain.

Writes the record, docs/reversible.md and its plot; half a minute on one core. Memory is that of torch's allocator, and
the same on a busy machine; nothing is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastode
from fastode import nets
from fastode.reference import PreActBranch, RevBlock, RevSequence
from fastode.testing import sample_input

from . import experiments, header
from .memory import peak_bytes
from .printing import markdown_table

NAME = "reversible"
DEPTHS = (1, 2, 4, 8, 16, 32)
CHANNELS, SIDE, BATCH = 32, 32, 16
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet56": nets.resnet56, "revnet": nets.revnet}
WAYS = ("reference", "fused")


def chain(depth: int) -> RevSequence:
    """Blocks of two convolutions with batch norm in each branch."""
    half = CHANNELS // 2
    return RevSequence(*(RevBlock(PreActBranch(half), PreActBranch(half)) for _ in range(depth)))


def peaks(make: Callable[[], nn.Module], channels: int, side: int, batch: int) -> dict[str, int]:
    """Bytes at the fullest moment of a forward and backward, gradients included, as the reference and fused.

    Args:
        make: the module.
        channels: of its input.
        side: of its input.
        batch: its samples.

    Returns:
        The peak of each of WAYS.
    """
    torch.manual_seed(0)
    plain = make()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    found = {}
    for way, module in zip(WAYS, (plain, fused), strict=True):
        x = sample_input(batch, channels, side, side).requires_grad_()

        def step(module: nn.Module = module, x: torch.Tensor = x) -> None:
            module(x).square().mean().backward()

        step()  # what is built and read once is there
        module.zero_grad(set_to_none=True)
        x.grad = None
        found[way] = peak_bytes(step)
    return found


def run(
    path: Path, depths: Sequence[int] = DEPTHS, batch: int = BATCH, networks: Sequence[str] = tuple(NETWORKS)
) -> None:
    """Make the experiment and its record."""
    chains = [{"blocks": depth, **peaks(partial(chain, depth), CHANNELS, SIDE, batch)} for depth in depths]
    whole = [{"network": name, **peaks(NETWORKS[name], 3, SIDE, batch)} for name in networks]
    record = {
        "header": header.header(torch.device("cpu"), NAME),
        "map": batch * CHANNELS * SIDE * SIDE * 4,
        "batch": batch,
        "chains": chains,
        "networks": whole,
    }
    experiments.save(path, record)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def markdown(record: experiments.Record) -> str:
    """The page."""
    lines = [[str(row["blocks"]), *(_mib(row[way]) for way in WAYS)] for row in record["chains"]]
    networks = [[f"`nets.{row['network']}`", *(_mib(row[way]) for way in WAYS)] for row in record["networks"]]
    return "\n".join(
        [
            "# What a reversible chain keeps",
            "",
            "The inputs of `RevBlock`, y₁ = x₁ + f(x₂) and y₂ = x₂ + g(y₁), follow from its outputs: x₂ = y₂ − g(y₁),",
            "x₁ = y₁ − f(x₂). So the backward of a fused `RevSequence` keeps the last block's output, and makes every",
            "other map again on its way: each branch's forward runs twice, so that a training step has four passes of",
            "each convolution where the reference has three.",
            "",
            f"![peak memory by depth]({NAME}.png)",
            "",
            "The fullest moment of a forward and backward, with all gradients, in MiB:",
            "",
            *markdown_table(("blocks", *WAYS), lines, left=1),
            "",
            "Chains of blocks whose branches are norm, ReLU, convolution, twice, on half of "
            f"{CHANNELS} channels at {SIDE}×{SIDE}, {record['batch']} samples, float32;",
            f"one map has {_mib(record['map'])} MiB. Fused, what grows from two blocks on is parameters' gradients.",
            "",
            "Whole networks, the same samples:",
            "",
            *markdown_table(("network", *WAYS), networks, left=1),
            "",
            "A gradient of a gradient needs the maps, and is refused: `fastode.unfuse(model)` has it. Under hooks on",
            "modules, cached parametrizations, `torch.compile` and transforms of `torch.func` a fused chain runs as",
            "the reference, and keeps them all. Random numbers (dropout), autocast and buffers are those of the",
            "forward (of buffers other than those of norms each evaluation keeps a copy: spectral norm's vectors);",
            "running statistics are updated once, and hooks of parameters run once. What a branch keeps elsewhere",
            "than in its buffers, and both reads and changes, is not seen.",
            f"Made by `python -m benchmarks.reversible`: {experiments.made_on(record['header'])}.",
            "",
        ]
    )


def fill(axes: Sequence[Any], records: Sequence[experiments.Record]) -> None:
    """The plot."""
    (axis,), (record,) = axes, records
    for way in WAYS:
        sizes = [row[way] / 2**20 for row in record["chains"]]
        axis.loglog([row["blocks"] for row in record["chains"]], sizes, marker="o", markersize=3, label=way)
    axis.set_xlabel("blocks")
    axis.set_ylabel("MiB of a training step")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()


def report(path: Path, pages: Path = experiments.PAGES) -> None:
    """The page and the plot, from the record."""
    experiments.write_page(NAME, markdown(experiments.load(path)), pages)
    experiments.draw([path], pages / f"{NAME}.png", 1, fill)


if __name__ == "__main__":
    experiments.command(NAME, __doc__, run, report)
