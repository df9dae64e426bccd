"""What the resident operators are called with, and what their results are beside the tensors they were called for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ...branch.layers import TENSORS_PER_UNIT
from ...native.constants import ACTIVATION_CODE, BIAS, CONV_BIAS, CONV_WEIGHT, NORM_CODE, RUNNING, WEIGHT
from ..plan import MaybeTensor, MaybeTensors, Plan

# The bit of each of a unit's tensors; running mean and variance come together.
_PRESENT = (WEIGHT, BIAS, RUNNING, 0, CONV_WEIGHT, CONV_BIAS)

Branch = tuple[list[Tensor], list[int], list[float]]


def encode(plan: Plan, tensors: MaybeTensors) -> Branch:
    """A branch as the operators take it (csrc/cpu/resident/engine.h): tensors that are present, integers, numbers."""
    bits = tuple([sum(bit for bit, t in zip(_PRESENT, row, strict=True) if t is not None) for row in _rows(tensors)])
    return [tensor for tensor in tensors if tensor is not None], *_constants(plan, bits)


def _rows(tensors: MaybeTensors) -> Iterator[MaybeTensors]:
    return (tensors[at : at + TENSORS_PER_UNIT] for at in range(0, len(tensors), TENSORS_PER_UNIT))


def _constants(plan: Plan, bits: tuple[int, ...]) -> tuple[list[int], list[float]]:
    integers: list[int] = []
    numbers: list[float] = []
    for unit, present in zip(plan.units, bits, strict=True):
        norm, act, conv = unit.norm, unit.activation, unit.conv
        integers += [0, 1] if norm is None else [NORM_CODE[norm.mode], norm.groups]
        integers.append(0 if act is None else ACTIVATION_CODE[act.kind])
        integers += [0, 1, 1, present] if conv is None else [conv.out_channels, *conv.kernel, present]
        numbers += [0.0 if norm is None else norm.eps, *((0.0, 0.0) if act is None else (act.p, act.q))]
    return integers, numbers


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


def beside(tensors: MaybeTensors, bars: Sequence[Tensor]) -> list[MaybeTensor]:
    """The operator's gradients, one for each present tensor or none at all, beside all tensors."""
    if not bars:
        return [None] * len(tensors)
    found = iter(bars)
    return [None if tensor is None else next(found) for tensor in tensors]
