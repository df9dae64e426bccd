"""What the resident engine's programs on a card can run: csrc/cuda, one launch for a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...branch.read import Unit
from ...native import cuda_library
from ...native.constants import MOST_STAGES, MOST_STEPS, MOST_UNITS, TILES, WARPS
from ..engine import Call
from ..plan import Plan
from ..schemes.skew_pair.pair import Pair

DTYPES = (torch.bfloat16, torch.float16)
PAIR_NORMS = 4  # of a skew pair, each with the numbers of a branch's unit


def holds(x: Tensor) -> bool:
    """Whether its operators run there, which read nothing back."""
    return x.device.type == "cuda"


def refuses(call: Call) -> str:
    """Why no program can run a call on CUDA tensors; empty if one can."""
    x = call.inputs[0]
    missing = cuda_library.why_not(x.device.index)
    if missing:
        return missing
    plan = call.program
    if isinstance(plan, Pair):
        return _refuses_pair(plan, call)
    if not isinstance(plan, Plan):
        return "it has no programs of skew fields of linear layers for CUDA"
    # Its coefficients may be all that is trained, which `call.mode` does not see.
    if call.learned and torch.is_grad_enabled():
        return "its programs for CUDA make no gradients of a scheme's coefficients"
    return (
        refuses_input(x)
        or refuses_units(plan, x.shape[1])
        or _refuses_batch_norms(plan, x.dtype)
        or _refuses_size(plan, x, call)
    )


def lacks_programs(call: Call) -> str:
    """Why the programs that a call needs are not there; empty if they are. It has them built where they are not yet."""
    plan, x = call.program, call.inputs[-1]
    if isinstance(plan, Pair):
        kind = "solve" if call.family == "skew_adaptive" else "march"
    else:
        assert isinstance(plan, Plan)
        coupled = any(unit.norm is not None and unit.norm.mode == "batch" for unit in plan.units)
        kind = ("batch_" if coupled else "") + ("descent" if call.family == "ie" else "scheme")
    kinds = (kind, "weight_gradients") if call.mode == "train" else (kind,)
    return cuda_library.no_programs(kinds, x.dtype)


def refuses_input(x: Tensor) -> str:
    """Why there is no program for maps of this kind."""
    reason = _refuses_dtype(x)
    if reason:
        return reason
    channels, height, width = x.shape[1:]
    if height != width or (channels, height) not in TILES:
        sizes = ", ".join([f"{c} at {side}x{side}" for c, side in TILES])
        return f"its programs for CUDA are of {sizes} channels and pixels, and not of {channels} at {height}x{width}"
    return ""


def _refuses_dtype(x: Tensor) -> str:
    return "" if x.dtype in DTYPES else f"its programs for CUDA take bfloat16 and float16, and not {x.dtype}"


def _refuses_pair(pair: Pair, call: Call) -> str:
    """Why there is no program for a call of a skew pair."""
    if call.family == "skew_pair":
        return "its programs for CUDA are of a skew pair's solutions, and not of the pair alone"
    by_error = call.family == "skew_adaptive"
    if by_error and call.exact and call.mode != "forward":
        return "its programs for CUDA make no gradients through the size of every step by error"
    x, weight = call.inputs[-1], call.tensors[0]
    assert weight is not None
    reason = _refuses_dtype(x) or _refuses_pair_shape(pair, weight, x)
    if reason:
        return reason
    if any(norm is not None and norm.mode == "batch" for norm in pair.norms):
        return "a batch norm of the skew pair couples the samples, which it takes one by one"
    if any(pair.tracked):
        return "it has no running statistics of an instance norm"
    if call.stages > MOST_STAGES:
        return f"its programs for CUDA take schemes of {MOST_STAGES} stages at most, and this one has {call.stages}"
    side = x.shape[2] // pair.stride
    channels = min(c for c in _channels_at(side) if c >= _needed_channels(pair, weight))
    needed = pair_shared_bytes(channels, side)
    if by_error and call.mode != "forward":
        needed = solve_shared_bytes(channels, side)
    elif call.mode == "train":
        needed = max(needed, weights_shared_bytes(channels, side, 1))
    return _refuses_bytes(needed, x)


def _refuses_pair_shape(pair: Pair, weight: Tensor, x: Tensor) -> str:
    stride, (height, width) = pair.stride, x.shape[2:]
    if pair.padding != 1 or stride not in (1, 2) or tuple(weight.shape[2:]) != (stride + 2, stride + 2):
        return (
            "its programs for CUDA are of skew pairs with a 3x3 convolution of stride 1, or a 4x4 one of stride 2, and "
            "a padding of 1"
        )
    there = _channels_at(height // stride)
    if height != width or height % stride != 0 or not there:
        sides = ", ".join(f"{side}x{side}" for side in dict.fromkeys(side for _, side in TILES))
        return (
            f"its programs for CUDA are of skew pairs with y of {sides} pixels, and not of "
            f"{height // stride}x{width // stride}"
        )
    needed = _needed_channels(pair, weight)
    if needed > max(there):
        return (
            f"its programs for CUDA have room for {max(there)} channels at {height // stride}x{width // stride}, and "
            f"this skew pair needs {needed}"
        )
    return ""


def _channels_at(side: int) -> list[int]:
    """The channels of the maps of that side that there are programs for."""
    return [channels for channels, pixels in TILES if pixels == side]


def _needed_channels(pair: Pair, weight: Tensor) -> int:
    """Those of a map that y lies in and z, whose pixels that one of y meets lie there as channels."""
    return max(weight.shape[0], weight.shape[1] * pair.stride**2)


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
    needed = shared_bytes(x.shape[1], x.shape[2], len(plan.units))
    if call.mode == "train":
        needed = max(needed, weights_shared_bytes(x.shape[1], x.shape[2], len(plan.units)))
    return _refuses_bytes(needed, x)


def _refuses_bytes(needed: int, x: Tensor) -> str:
    there = cuda_library.shared_bytes(x.device.index)
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


def pair_shared_bytes(channels: int, side: int) -> int:
    """Those of a program for a skew pair: `MarchForward<Tile>::bytes` of csrc/cuda/march.cuh.

    Args:
        channels: of a map that there is a program for, and that the pair lies in.
        side: of the map, in pixels.
    """
    return 9 * channels * channels * 2 + _bytes_beside_weights(channels, side, PAIR_NORMS)


def solve_shared_bytes(channels: int, side: int) -> int:
    """Those of the way back through steps by error: `SolveBackward<Tile>::bytes` of csrc/cuda/solve_backward.cuh.

    Args:
        channels: of a map that there is a program for, and that the pair lies in.
        side: of the map, in pixels.
    """
    statistics, stand, shares = 8 * PAIR_NORMS * channels, 240, 640 * WARPS[channels, side]
    maps = 2 * channels * side * side + _shared_products(channels, side)
    return pair_shared_bytes(channels, side) + statistics + stand + shares + maps


def weights_shared_bytes(channels: int, side: int, units: int) -> int:
    """Those of the program for the convolutions' gradients: `WeightGradients<Tile>::bytes` of csrc/cuda/weights.cuh.

    Args:
        channels: of a map that there is a program for.
        side: of the map, in pixels.
        units: of the branch.
    """
    maps = 3 * channels * side * side * 2
    return _bytes_beside_weights(channels, side, units) + maps + _shared_products(channels, side)


def _shared_products(channels: int, side: int) -> int:
    """Where warps add up their products."""
    return 9 * channels * channels * 4 if WARPS[channels, side] > (channels // 16) ** 2 else 0


def _bytes_beside_weights(channels: int, side: int, units: int) -> int:
    bordered_map = channels * (side + 2) ** 2 * 2
    return bordered_map + 4 * (5 * units * channels + 9 * channels + 3 * 16 * WARPS[channels, side])
