"""What the resident operators are called with, and what their results are beside the tensors they were called for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...branch.layers import TENSORS_PER_UNIT
from ...branch.read import Unit
from ...native.constants import BIAS, CONV_BIAS, CONV_WEIGHT, RUNNING, WEIGHT
from ..plan import MaybeTensor, MaybeTensors, Plan, activation_codes, norm_codes

# The bit of each of a unit's tensors; running mean and variance come together.
_PRESENT = (WEIGHT, BIAS, RUNNING, 0, CONV_WEIGHT, CONV_BIAS)

_CODE = "resident operators"  # in a plan's memo

Branch = tuple[list[Tensor], list[int], list[float]]


def encode(plan: Plan, tensors: MaybeTensors) -> Branch:
    """A branch as the operators take it (csrc/cpu/resident/engine.h): tensors that are present, integers, numbers."""
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling():
        return present, *encode_units(plan.units, tensors)
    code = plan.memo.get(_CODE)
    if code is None:
        code = plan.memo[_CODE] = encode_units(plan.units, tensors)
    return present, *code


def encode_units(units: Sequence[Unit], tensors: MaybeTensors) -> tuple[list[int], list[float]]:
    """The integers and the numbers of units."""
    integers: list[int] = []
    numbers: list[float] = []
    for index, unit in enumerate(units):
        row = tensors[index * TENSORS_PER_UNIT :][:TENSORS_PER_UNIT]
        bits = sum(bit for bit, tensor in zip(_PRESENT, row, strict=True) if tensor is not None)
        conv = unit.conv
        mode, groups, eps = norm_codes(unit.norm)
        kind, p, q = activation_codes(unit.activation)
        integers += [mode, groups, kind, *([0, 1, 1] if conv is None else [conv.out_channels, *conv.kernel]), bits]
        numbers += [eps, p, q]
    return integers, numbers


def decode_statistics(
    plan: Plan, tensors: MaybeTensors, flat: Tensor, channels: int, used: Sequence[bool]
) -> list[Tensor]:
    """Mean and variance [2, C] of every tracked batch norm, evaluation by evaluation: of those that are `used`."""
    if True not in plan.tracked:
        return []
    sizes: list[int] = []
    kept: list[bool] = []
    width = channels
    for unit, tracks in zip(plan.units, plan.tracked, strict=True):
        if unit.norm is not None and unit.norm.mode == "batch":
            sizes.append(2 * width)
            kept.append(tracks)
        width = width if unit.conv is None else unit.conv.out_channels
    pieces = flat.split(sizes * len(used)) if sizes else ()
    wanted = [keep and each for each in used for keep in kept]
    return [piece.view(2, -1) for piece, keep in zip(pieces, wanted, strict=True) if keep]


def beside(tensors: MaybeTensors, bars: Sequence[Tensor]) -> list[MaybeTensor]:
    """The operator's gradients, spread over all tensors: None where one is absent, or for all if there are none."""
    if not bars:
        return [None] * len(tensors)
    found = iter(bars)
    return [None if tensor is None else next(found) for tensor in tensors]
