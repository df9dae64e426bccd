"""Sweeps through a branch with fused convolutions: the contracts of `Sweeps`, a kernel to a convolution.

The tangent sweeps are the staged engine's. No value is rounded more often than there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...branch.layers import TENSORS_PER_UNIT, Conv
from ..maps import cast, fixed_statistics, lowered, norm_tensors
from ..plan import CONV_BIAS, CONV_WEIGHT, Gradients, MaybeTensors, Plan, Record
from ..staged.sweeps import dual, pull_dual
from ..triton import convolution as fused
from ..triton import launch as launching
from ..triton.convolution import Made, Operand, convolution, value_of, weight_gradient
from ..triton.cotangent import cotangent_apply_kernel
from ..triton.launch import Unit


class Evaluated(NamedTuple):
    """f at a point: its combination with other maps, f itself if kept, the records, the combination's statistics."""

    out: Tensor
    image: Tensor | None
    records: list[Record]
    stats: Tensor | None


def evaluate(
    branch: Plan, tensors: MaybeTensors, point: Tensor, stats: Tensor | None, terms: Sequence[Tensor] = (),
    coefs: Tensor | None = None, keep: bool = False, next_stats: bool = False,
) -> Evaluated:  # fmt: skip
    """coefs[0] f(point) + sum_i coefs[i + 1] terms[i], in one kernel for each convolution.

    Args:
        branch: f.
        tensors: of f.
        point: where.
        stats: of the point, for the first unit, if they are known.
        terms: what is combined with f(point).
        coefs: float64, on the host or learned.
        keep: whether f(point) is wanted by itself.
        next_stats: whether the combination's statistics are wanted, as those of a point.
    """
    records = [Record(point, stats if stats is not None else _given(branch, tensors, 0, point), None)]
    last = len(branch.units) - 1
    for index in range(last):
        made = _convolve(branch, tensors, index, records[-1], index + 1)
        records[-1] = _met(records[-1], made)
        next_met = made.stats if made.stats is not None else _given(branch, tensors, index + 1, made.out)
        records.append(Record(made.out, next_met, None))
    lower = _multiplied(branch, records[-1].h)
    dtype = lower
    for term in terms:
        dtype = torch.promote_types(dtype, term.dtype)
    made = _convolve(branch, tensors, last, records[-1], 0 if next_stats else None, terms, coefs, keep, dtype)
    records[-1] = _met(records[-1], made)
    found = made.stats
    if next_stats and found is None:
        found = _given(branch, tensors, 0, made.out)
    return Evaluated(made.out, made.image, records, found)


def revisit(
    branch: Plan, tensors: MaybeTensors, point: Tensor, statistics: Sequence[Tensor], image: bool = False
) -> tuple[list[Record], Tensor | None]:
    """As `Sweeps.revisit`."""
    records = [Record(point, statistics[0], None)]
    last = len(branch.units) - 1
    for index in range(last):
        made = _convolve(branch, tensors, index, records[-1], None)
        records.append(Record(made.out, statistics[index + 1], None))
    return records, _convolve(branch, tensors, last, records[-1], None).out if image else None


def pull(
    branch: Plan, tensors: MaybeTensors, records: list[Record], cot: Tensor, addends: Sequence[Tensor], coefs: Tensor,
    grads: Gradients | None, scale: float = 1.0, need_point: bool = True,
) -> Tensor | None:  # fmt: skip
    """As `Sweeps.pull`."""
    left = Operand(cot)
    for index in range(len(branch.units) - 1, -1, -1):
        record, at = records.pop(), index * TENSORS_PER_UNIT
        first = index == 0
        conv, weight = _conv(branch, tensors, index)
        lower = _multiplied(branch, record.h)
        here = _operand(branch, tensors, index, record)
        if grads is not None and (grads.wants(at + CONV_WEIGHT) or grads.wants(at + CONV_BIAS)):
            weight_bar, bias_bar = weight_gradient(
                here, left, conv.kernel, conv.dilation, grads.wants(at + CONV_BIAS), lower
            )
            grads.add(at + CONV_WEIGHT, weight_bar, scale)
            if bias_bar is not None:
                grads.add(at + CONV_BIAS, bias_bar, scale)
        norm_grads = grads is not None and grads.wants_norm(at)
        if first and not (need_point or norm_grads):
            return None
        weight = lowered(branch.lower, weight)
        own, own_coefs = (tuple(addends), coefs) if first else ((), None)
        own = tuple(cast(term, record.h.dtype) for term in own)
        if here.unit is None:
            left = Operand(
                convolution(
                    left, weight, None, conv.dilation, own, own_coefs, lower=lower, dtype=record.h.dtype,
                    transposed=True,
                ).out
            )  # fmt: skip
            continue
        pulled = fused.pull(left, weight, here, conv.dilation, own, own_coefs, norm_grads, lower)
        left = pulled.operand
        if grads is not None and pulled.bars is not None:
            grads.add_norm(at, *pulled.bars, scale)
        if first and pulled.waits:
            return pull_set(left, own, coefs)
    return left.x


def pull_set(pulled: Operand, addends: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """coefs[0] h̄ + sum_i coefs[i + 1] addends[i] where h̄ waited for sums: a last sweep over the map."""
    unit = pulled.unit
    assert unit is not None
    out = launching.feature_map(unit.x)
    values, learned = launching.coefficients(coefs, unit.x)
    programs, sizes, shape = unit.layout.apply_shape
    launching.launch(
        cotangent_apply_kernel, programs, unit.x, pulled.x, tuple(addends) or None, values, out, pulled.stats,
        pulled.sets, pulled.weight, pulled.bias, *sizes, *unit.numbers, **shape, NORMED=True,
        COUPLED=unit.map.coupled, ACT=0, LEARNED=learned,
    )  # fmt: skip
    return out


def _met(record: Record, made: Made) -> Record:
    """The record with the statistics that the convolution met."""
    return record if made.own is None else record._replace(stats=made.own)


def _multiplied(branch: Plan, h: Tensor) -> torch.dtype:
    """The dtype in which the convolutions of a branch multiply."""
    return branch.lower or h.dtype


def _conv(branch: Plan, tensors: MaybeTensors, index: int) -> tuple[Conv, Tensor]:
    """A unit's convolution, and its weight."""
    conv, weight = branch.units[index].conv, tensors[index * TENSORS_PER_UNIT + CONV_WEIGHT]
    assert conv is not None and weight is not None
    return conv, weight


def _given(branch: Plan, tensors: MaybeTensors, index: int, x: Tensor) -> Tensor:
    """A unit's fixed statistics, or an empty tensor where it has none."""
    given = fixed_statistics(tensors, index * TENSORS_PER_UNIT, x.dtype)
    return x.new_empty(0, dtype=torch.float32) if given is None else given


def _operand(branch: Plan, tensors: MaybeTensors, index: int, record: Record) -> Operand:
    """What the convolution of a unit reads."""
    weight, bias = norm_tensors(tensors, index * TENSORS_PER_UNIT, record.h.dtype)
    unit = Unit(record.h, *branch.codes(index))
    return value_of(unit, record.stats if record.stats.numel() else None, weight, bias)


def _convolve(
    branch: Plan, tensors: MaybeTensors, index: int, record: Record, next_unit: int | None,
    terms: Sequence[Tensor] = (), coefs: Tensor | None = None, keep: bool = False, dtype: torch.dtype | None = None,
) -> Made:  # fmt: skip
    """A unit's norm, activation and convolution, and the statistics with which `next_unit` normalises the result."""
    conv, weight = _conv(branch, tensors, index)
    bias = tensors[index * TENSORS_PER_UNIT + CONV_BIAS]
    norm = None if next_unit is None else branch.codes(next_unit)[:2]
    if norm is not None and norm[0] not in (launching.GROUP, launching.BATCH):
        norm = None
    return convolution(
        _operand(branch, tensors, index, record), lowered(branch.lower, weight),
        None if bias is None else lowered(branch.lower, bias), conv.dilation, terms, coefs, keep, norm,
        _multiplied(branch, record.h), dtype,
    )  # fmt: skip


__all__ = ["Evaluated", "dual", "evaluate", "pull", "pull_dual", "pull_set", "revisit"]
