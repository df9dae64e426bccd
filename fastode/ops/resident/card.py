"""What the resident engine's programs on a card can run: csrc/cuda, one launch for a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...branch.read import Unit
from ...native import cuda_library
from ...native.constants import MOST_STAGES, MOST_STEPS, MOST_UNITS, TILES, WARPS
from ..engine import Call
from ..plan import Plan

DTYPES = (torch.bfloat16, torch.float16)


def refuses(call: Call) -> str:
    """Why no program can run a call on CUDA tensors; empty if one can."""
    x = call.inputs[0]
    missing = cuda_library.why_not(x.device.index)
    if missing:
        return missing
    plan = call.program
    if not isinstance(plan, Plan):
        return "it has no programs of skew fields for CUDA"
    # Its coefficients may be all that is trained, which `call.mode` does not see.
    if call.learned and torch.is_grad_enabled():
        return "its programs for CUDA make no gradients of a scheme's coefficients"
    return (
        refuses_input(x)
        or refuses_units(plan, x.shape[1])
        or _refuses_batch_norms(plan, x.dtype)
        or _refuses_size(plan, x, call)
    )


def refuses_input(x: Tensor) -> str:
    """Why there is no program for maps of this kind."""
    if x.dtype not in DTYPES:
        return f"its programs for CUDA take bfloat16 and float16, and not {x.dtype}"
    channels, height, width = x.shape[1:]
    if height != width or (channels, height) not in TILES:
        sizes = ", ".join([f"{c} at {side}x{side}" for c, side in TILES])
        return f"its programs for CUDA are of {sizes} channels and pixels, and not of {channels} at {height}x{width}"
    return ""


def refuses_units(plan: Plan, channels: int) -> str:
    """Why there is no program for a branch of these units."""
    for unit, tracks in zip(plan.units, plan.tracked, strict=True):
        if not _is_plain_convolution(unit, channels):
            return f"its programs for CUDA are of units that end in a 3x3 convolution of {channels} channels to as many"
        if unit.norm is not None and unit.norm.mode == "group" and tracks:
            return "it has no running statistics of an instance norm"
    return ""


def _refuses_batch_norms(plan: Plan, dtype: torch.dtype) -> str:
    """Why there is no program for the branch's batch norms in training, which couple the samples."""
    modes = {unit.norm.mode for unit in plan.units if unit.norm is not None}
    if "batch" not in modes:
        return ""
    if dtype != torch.bfloat16:
        return f"its programs for CUDA take batch norms in training in bfloat16 only, and not in {dtype}"
    if "group" in modes:
        return "its programs for CUDA take no batch norm in training beside a norm of each sample by itself"
    return ""


def _is_plain_convolution(unit: Unit, channels: int) -> bool:
    conv = unit.conv
    return (
        conv is not None
        and conv.out_channels == channels
        and tuple(conv.kernel) == (3, 3)
        and tuple(conv.dilation) == (1, 1)
        and conv.groups == 1
    )


def _refuses_size(plan: Plan, x: Tensor, call: Call) -> str:
    most = min(MOST_UNITS, TILES[x.shape[1], x.shape[2]])
    if len(plan.units) > most:
        return f"its program for such maps has room for {most} units, and the branch has {len(plan.units)}"
    if call.family == "ie":
        if call.mode == "train" and call.stages > MOST_STEPS:
            return f"its programs for CUDA train IE-Skips of {MOST_STEPS} steps at most, and this one has {call.stages}"
    elif call.stages > MOST_STAGES:
        return f"its programs for CUDA take schemes of {MOST_STAGES} stages at most, and this one has {call.stages}"
    needed, there = shared_bytes(x.shape[1], x.shape[2], len(plan.units)), cuda_library.shared_bytes(x.device.index)
    if call.mode == "train":
        needed = max(needed, weights_shared_bytes(x.shape[1], x.shape[2], len(plan.units)))
    if there is not None and needed > there:
        return f"its program for such maps needs {needed} bytes of shared memory, and a block has {there} on this card"
    return ""


def shared_bytes(channels: int, side: int, units: int) -> int:
    """The bytes of shared memory of a program's block: `Memory<Tile>::bytes` of csrc/cuda/memory.cuh.

    Args:
        channels: of a map that there is a program for.
        side: of the map, in pixels.
        units: of the branch.
    """
    return units * 9 * channels * channels * 2 + _bytes_beside_weights(channels, side, units)


def weights_shared_bytes(channels: int, side: int, units: int) -> int:
    """Those of the program for the convolutions' gradients: `WeightGradients<Tile>::bytes` of csrc/cuda/weights.cuh.

    Args:
        channels: of a map that there is a program for.
        side: of the map, in pixels.
        units: of the branch.
    """
    shared_out = WARPS[channels, side] > (channels // 16) ** 2  # warps add up their products
    return (
        _bytes_beside_weights(channels, side, units)
        + 3 * channels * side * side * 2
        + shared_out * 9 * channels * channels * 4
    )


def _bytes_beside_weights(channels: int, side: int, units: int) -> int:
    bordered_map = channels * (side + 2) ** 2 * 2
    return bordered_map + 4 * (5 * units * channels + 9 * channels + 3 * 16 * WARPS[channels, side])
