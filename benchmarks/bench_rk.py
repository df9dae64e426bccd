"""The SSP networks' blocks (Kim et al. 2020), explicit Runge-Kutta schemes over a BatchNorm branch, and ResBlock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastode.reference import SSP2, SSP3, Ark, Midpoint, PreActBranch, ResBlock

from .workloads import Workload, maps

SHAPES = ((16, 32), (32, 16), (64, 8))
DEFAULT = ((16, 32), (64, 8))
BLOCKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ssp2": SSP2, "ssp3": SSP3, "ark": Ark, "midpoint": Midpoint, "res": ResBlock,
}  # fmt: skip


def block(kind: str, channels: int) -> nn.Module:
    """A block of the SSP networks at a fixed width."""
    return BLOCKS[kind](PreActBranch(channels))


def workloads() -> list[Workload]:
    """ssp2, ssp3, ark, midpoint and res, with the batch's statistics and with running ones."""
    return [
        Workload(
            kind,
            "" if statistics == "train" else "eval",
            f"{channels}@{size}",
            partial(block, kind, channels),
            maps(channels, size),
            statistics=statistics,
            default=kind == "ssp3" and statistics == "train" and (channels, size) in DEFAULT,
        )
        for kind in BLOCKS
        for statistics in ("train", "eval")
        for channels, size in SHAPES
    ]
