"""ODE blocks with steps by error: SOBlock (Huang et al.) at the skew pair's shapes, and ODENet's block."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastode import Solver, nets
from fastode.reference import SOBlock

from . import data
from .bench_skew import SHAPES, pair, shape_name
from .workloads import Inputs, Workload

TOLERANCE = 0.1  # the papers' default
BATCH = {"cpu": 32, "cuda": 100}
# Variant -> how the block is solved, and who else takes part; with the gradient "solver" the reference is torchdiffeq.
SOLVERS: dict[str, tuple[Solver, tuple[str, ...]]] = {
    "dopri5": (Solver("dopri5", TOLERANCE, TOLERANCE), ("torchdiffeq-compile",)),
    "dopri5-constant": (Solver("dopri5", TOLERANCE, TOLERANCE, gradient="constant"), ("torchdiffeq",)),
    "dopri5-exact": (Solver("dopri5", TOLERANCE, TOLERANCE, gradient="exact"), ()),
    "dopri5-0.01": (Solver("dopri5", 0.01, 0.01), ()),
    "bosh3": (Solver("bosh3", TOLERANCE, TOLERANCE), ()),
    "adaptive_heun": (Solver("adaptive_heun", TOLERANCE, TOLERANCE), ()),
    # As constants, because torchode's gradient through its sizes is that of another control.
    "per-sample": (Solver("dopri5", TOLERANCE, TOLERANCE, gradient="constant", per_sample=True), ("torchode",)),
}
ODENET = (64, 8)  # channels and size of the block's map


def block(channels_in: int, channels: int, stride: int, solver: Solver) -> nn.Module:
    """One SOBlock."""
    return SOBlock(pair(channels_in, channels, stride), solver=solver)


def odenet_block() -> nn.Module:
    """A block of ODENet."""
    return nets.odenet(width=ODENET[0], blocks=1).get_submodule("block0")


def inputs(channels: int, size: int, device: str) -> Inputs:
    """The block's input."""
    return (data.feature_maps(BATCH[device], channels, size),)


def workloads() -> list[Workload]:
    """solve: SOBlock by every solver at the skew pair's shapes, and ODENet's block."""
    found = [
        Workload(
            "solve",
            variant,
            shape_name(channels_in, channels, size, stride),
            partial(block, channels_in, channels, stride, solver),
            partial(inputs, channels_in, size),
            rivals=rivals,
            own="fused:auto",
        )
        for variant, (solver, rivals) in SOLVERS.items()
        for channels_in, channels, size, stride in SHAPES
    ]
    channels, size = ODENET
    made = partial(inputs, channels, size)
    found.append(Workload("solve", "odenet", f"{channels}@{size}", odenet_block, made, rivals=(), own="fused:auto"))
    return found
