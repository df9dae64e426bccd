"""What the resident operators are called with, and what their results are beside the tensors they were called for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...branch.layers import TENSORS_PER_UNIT
from ...branch.read import Unit
from ...native.constants import BIAS, CONV_BIAS, CONV_WEIGHT, RUNNING, WEIGHT
from ..met import Met, Places
from ..plan import MaybeTensor, MaybeTensors, Plan, activation_codes, norm_codes

# The bit of each of a unit's tensors; running mean and variance come together.
_PRESENT = (WEIGHT, BIAS, RUNNING, 0, CONV_WEIGHT, CONV_BIAS)

_CODE, _PLACES = "resident operators", "resident statistics"  # in a plan's memo

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


def encode_again(ctx: Any, tensors: MaybeTensors, encode: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """What a backward's operator takes of its constants, behind the tensors that are present.

    Args:
        ctx: the Function's context, in whose `code` forward may have left what follows these tensors.
        tensors: the block's.
        encode: makes both anew.
    """
    if ctx.code is None:
        return encode()
    return [tensor for tensor in tensors if tensor is not None], *ctx.code


def present_bits(tensors: MaybeTensors, at: int, count: int) -> int:
    """The bits of those of a unit's first `count` tensors that are present; the unit's begin at `at`."""
    bits = 0
    for bit in _PRESENT[:count]:
        if bit and tensors[at] is not None:
            bits += bit
        at += 1
    return bits


def encode_units(units: Sequence[Unit], tensors: MaybeTensors) -> tuple[list[int], list[float]]:
    """The integers and the numbers of units."""
    integers: list[int] = []
    numbers: list[float] = []
    for index, unit in enumerate(units):
        bits = present_bits(tensors, index * TENSORS_PER_UNIT, TENSORS_PER_UNIT)
        conv = unit.conv
        mode, groups, eps = norm_codes(unit.norm)
        kind, p, q = activation_codes(unit.activation)
        integers += [mode, groups, kind, *([0, 1, 1] if conv is None else [conv.out_channels, *conv.kernel]), bits]
        numbers += [eps, p, q]
    return integers, numbers


def tracks(plans: Sequence[Plan]) -> bool:
    """Whether a norm of them updates running statistics."""
    return any(True in plan.tracked for plan in plans)


def places_of(plans: Sequence[Plan], used: Sequence[bool] = (True,)) -> Places:
    """Where an operator writes what the tracked batch norms meet, in each evaluation that is `used`.

    Args:
        plans: one, or a chain's lead, branch and shortcut.
        used: of each evaluation that the operator makes, whether the block makes it.
    """
    row, size = [], 0
    for plan in plans:
        for unit, tracked in zip(plan.units, plan.tracked, strict=True):
            if unit.norm is not None and unit.norm.mode == "batch":
                width = unit.norm.channels or 0
                if tracked:
                    row.append((size, width))
                size += 2 * width
    return Places([(index * size + at, width) for index, keep in enumerate(used) if keep for at, width in row])


def met_by(plans: Sequence[Plan], memo: dict[str, Any], flat: Tensor, used: Sequence[bool] = (True,)) -> list[Met]:
    """What the tracked batch norms have met, in one entry; none where there are none. Its places are kept in a memo."""
    places = memo.get(_PLACES)
    if places is None:
        places = memo[_PLACES] = places_of(plans, used)
    return [Met(flat, places)] if places else []


def beside(tensors: MaybeTensors, bars: Sequence[Tensor]) -> list[MaybeTensor]:
    """The operator's gradients, spread over all tensors: None where one is absent, or for all if there are none."""
    if not bars:
        return [None] * len(tensors)
    found = iter(bars)
    return [None if tensor is None else next(found) for tensor in tensors]
