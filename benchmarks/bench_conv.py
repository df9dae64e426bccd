"""Bare convolutions: eight 3x3 ones in a row inside a residual block, so that reading x and writing y matter little."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastode.reference import ResBlock

from .workloads import Workload, maps

SHAPES = ((16, 32), (32, 16), (64, 8))
IN_A_ROW = 8


def block(channels: int) -> nn.Module:
    """x + f(x) with a branch of convolutions only."""
    return ResBlock(nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(IN_A_ROW))))


def workloads() -> list[Workload]:
    """conv: what a convolution of an engine reaches, beside the matrix product of the same rounds."""
    return [
        Workload("conv", f"{IN_A_ROW} in a row", f"{channels}@{size}", partial(block, channels), maps(channels, size))
        for channels, size in SHAPES
    ]
