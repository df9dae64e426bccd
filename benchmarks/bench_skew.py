"""The skew pair of SONet (Huang et al.) alone, and one ODE block with it, solved by Euler and by the 3/8 rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastode.reference import SkewPair, SOBlock

from . import data
from .workloads import BATCH, Inputs, Workload

# (channels in, channels out, size in, stride)
SHAPES = ((3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 32, 2))
SOLVERS = ("euler", "rk4")


def shape_name(channels_in: int, channels: int, size: int, stride: int) -> str:
    """ "64@32", "3-64@32" or "64-128@32-16": input to output."""
    width = f"{channels}" if channels == channels_in else f"{channels_in}-{channels}"
    return f"{width}@{size}" if stride == 1 else f"{width}@{size}-{size // stride}"


def pair(channels_in: int, channels: int, stride: int) -> nn.Module:
    """The pair with SONet's norms and activation: GroupNorm(min(8, C)) before and after, LeakyReLU between."""
    return SkewPair(channels_in, channels, stride=stride, norm="group")


def pair_inputs(channels_in: int, channels: int, size: int, stride: int) -> Callable[[str], Inputs]:
    """(y, z): y of the output's shape, z of the input's."""

    def inputs(device: str) -> Inputs:
        return data.feature_maps(BATCH, channels, size // stride), data.feature_maps(BATCH, channels_in, size)

    return inputs


def block(channels_in: int, channels: int, stride: int, solver: str) -> nn.Module:
    """One SOBlock, a single step of a fixed-step solver."""
    return SOBlock(pair(channels_in, channels, stride), solver=solver)


def block_inputs(channels_in: int, size: int) -> Callable[[str], Inputs]:
    """The block's input z(0)."""

    def inputs(device: str) -> Inputs:
        return (data.feature_maps(BATCH, channels_in, size),)

    return inputs


def workloads() -> list[Workload]:
    """skew: the pair, then SOBlock with euler and rk4."""
    found = []
    for channels_in, channels, size, stride in SHAPES:
        name = shape_name(channels_in, channels, size, stride)
        found.append(
            Workload(
                "skew",
                "pair",
                name,
                partial(pair, channels_in, channels, stride),
                pair_inputs(channels_in, channels, size, stride),
                default=stride == 1,
            )
        )
        found += [
            Workload(
                "skew",
                f"soblock-{solver}",
                name,
                partial(block, channels_in, channels, stride, solver),
                block_inputs(channels_in, size),
                rivals=("compile", "compile-cl", "torchdiffeq", "torchode"),
            )
            for solver in SOLVERS
        ]
    return found
