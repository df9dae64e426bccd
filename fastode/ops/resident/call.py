"""What the resident operators are called with, and what they can be called for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._constants import ACTIVATION_CODE, BIAS, CONV_BIAS, CONV_WEIGHT, NORM_CODE, RUNNING, WEIGHT
from ...branch import TENSORS_PER_UNIT, Unit
from ..sweeps import MaybeTensors, Plan

# The bit of each of a unit's tensors; running mean and variance come together.
_PRESENT = (WEIGHT, BIAS, RUNNING, 0, CONV_WEIGHT, CONV_BIAS)

Branch = tuple[list[Tensor], list[int], list[float]]


def why_not(
    units: Sequence[Unit], tracked: Sequence[bool], tensors: MaybeTensors, x: Tensor | None, lower: torch.dtype | None
) -> str:
    """Why the resident engine cannot run a branch on x (or on any input); empty if it can.

    Args:
        units: the branch.
        tracked: for each unit, whether its norm updates running statistics.
        tensors: six for each unit.
        x: the input, or None.
        lower: the dtype of autocast, None where it is off.
    """
    for unit, tracks in zip(units, tracked, strict=True):
        conv, norm = unit.conv, unit.norm
        if conv is not None and (conv.groups != 1 or tuple(conv.dilation) != (1, 1)):
            return "it has kernels for convolutions without groups and dilation only"
        if norm is not None and norm.mode == "group" and tracks:
            return "it has no running statistics of an instance norm"
    if lower is not None:
        return "it does not lower convolutions as autocast asks"
    if x is None:
        return ""
    if any(tensor is not None and tensor.dtype != x.dtype for tensor in tensors):
        return "its parameters are not of the input's dtype"
    return ""


def encode(plan: Plan, tensors: MaybeTensors) -> Branch:
    """A branch as the operators take it (csrc/cpu/resident/engine.h): tensors that are present, integers, numbers."""
    present: list[Tensor] = []
    integers: list[int] = []
    numbers: list[float] = []
    for index, unit in enumerate(plan.units):
        row = tensors[index * TENSORS_PER_UNIT : (index + 1) * TENSORS_PER_UNIT]
        norm, act, conv = unit.norm, unit.activation, unit.conv
        bits = sum(bit for bit, tensor in zip(_PRESENT, row, strict=True) if tensor is not None)
        integers += [0, 1] if norm is None else [NORM_CODE[norm.mode], norm.groups]
        integers.append(0 if act is None else ACTIVATION_CODE[act.kind])
        integers += [0, 1, 1, bits] if conv is None else [conv.out_channels, *conv.kernel, bits]
        numbers += [0.0 if norm is None else norm.eps, *((0.0, 0.0) if act is None else (act.p, act.q))]
        present += [tensor for tensor in row if tensor is not None]
    return present, integers, numbers


def decode_statistics(plan: Plan, tensors: MaybeTensors, flat: Tensor, channels: int, evaluations: int) -> list[Tensor]:
    """Mean and variance [2, C] of every tracked batch norm, evaluation by evaluation."""
    sizes: list[int] = []
    kept: list[bool] = []
    width = channels
    for unit, tracks in zip(plan.units, plan.tracked, strict=True):
        if unit.norm is not None and unit.norm.mode == "batch":
            sizes.append(2 * width)
            kept.append(tracks)
        width = width if unit.conv is None else unit.conv.out_channels
    pieces = flat.split(sizes * evaluations) if sizes else ()
    return [piece.view(2, -1) for piece, keep in zip(pieces, kept * evaluations, strict=True) if keep]


def align_gradients(tensors: MaybeTensors, bars: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The operator's gradients, one for each present tensor, beside all tensors; None where none is wanted."""
    found = iter(bars)
    beside = [None if tensor is None else next(found) for tensor in tensors]
    return [bar if want else None for bar, want in zip(beside, wanted, strict=True)]
