"""Sweeps through a branch: its value, its pull-back, its tangent beside its value, and the pull-back of both.

A branch is a tuple of units and a flat list of tensors (fastode/branch.py). Convolutions are ATen's; what stands between
two of them is one operator of csrc (fastode/ops/README.md). Every feature map in here is dense channels_last.

Under autocast a convolution sees its input and weight in the lower precision, everything else stays in the precision in
which it arrives, and a cotangent has its tensor's dtype: the rules that autograd applies to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..branch import TENSORS_PER_UNIT, Unit

_NORM_CODE = {"group": 1, "batch": 2, "fixed": 3}
_ACTIVATION_CODE = {"relu": 1, "leaky_relu": 2, "tanh": 3, "softplus": 4, "elu": 5, "silu": 6}
_NORM_WEIGHT, _NORM_BIAS, _MEAN, _VARIANCE, _CONV_WEIGHT, _CONV_BIAS = range(TENSORS_PER_UNIT)

MaybeTensors = Sequence[Tensor | None]
Codes = tuple[int, int, float, int, float, float]


@dataclass(frozen=True)
class Plan:
    """A branch as constants: its units, whose norms keep running statistics, and autocast's dtype where it is on."""

    units: tuple[Unit, ...]
    tracked: tuple[bool, ...]
    lower: torch.dtype | None


class Record(NamedTuple):
    """What a sweep leaves behind of one unit: input, statistics and convolution input; tangents where there are any."""

    h: Tensor
    stats: Tensor | None
    a: Tensor | None
    t: Tensor | None = None
    tstats: Tensor | None = None


def tracked_statistics(plan: Plan, records: Sequence[Record]) -> list[Tensor]:
    """The statistics with which an evaluation of the branch updates running statistics."""
    return [record.stats for record, tracked in zip(records, plan.tracked, strict=True) if tracked]


def channels_last(x: Tensor) -> Tensor:
    """x in dense channels_last memory: what every operator takes."""
    return x.contiguous(memory_format=torch.channels_last)


def like_reference(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format that element-wise PyTorch gives a result of x."""
    wanted = torch.empty_like(x, dtype=y.dtype)
    return y if y.stride() == wanted.stride() else wanted.copy_(y)


def coefficients(*values: float) -> Tensor:
    """Coefficients as the operators take them."""
    return torch.tensor(values, dtype=torch.float64)


def combine(terms: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The sum of coefs[i] terms[i], in the dtype that PyTorch promotes the terms to."""
    return torch.ops.fastode.combine(_promoted(terms), coefs, 0, 0.0, 0.0)


def value(
    plan: Plan, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor, list[Record]]:
    """f at the combination of `terms`: that combination, f of it, and the records (without convolution inputs if not keep)."""
    terms = _promoted(terms)
    point = terms[0]
    records: list[Record] = []
    for index, unit in enumerate(plan.units):
        at = index * TENSORS_PER_UNIT
        if _has_pass(unit):
            weight, bias, given = _norm_tensors(unit, tensors, at, terms[0])
            u, a, made = torch.ops.fastode.norm_act(terms, coefs, weight, bias, given, *_codes(unit))
            h, stats = terms[0] if len(terms) == 1 else u, made if given is None else given
        else:
            h = a = terms[0] if len(terms) == 1 else combine(terms, coefs)
            stats = None
        if index == 0:
            point = h
        records.append(Record(h, stats, a if keep else None))
        terms = [_convolve(plan, unit, a, tensors[at + _CONV_WEIGHT], tensors[at + _CONV_BIAS])]
    return point, terms[0], records


def pull(
    plan: Plan,
    tensors: MaybeTensors,
    records: list[Record],
    cot: Tensor,
    addends: Sequence[Tensor],
    coefs: Tensor,
    grads: Gradients | None,
    scale: float = 1.0,
    need_point: bool = True,
) -> Tensor | None:
    """coefs[0] J(y)ᵀ cot + sum_i coefs[i + 1] addends[i]; parameter gradients, times `scale`, are added to `grads`."""
    for index in range(len(plan.units) - 1, -1, -1):
        unit, record, at = plan.units[index], records[index], index * TENSORS_PER_UNIT
        first = index == 0
        norm_grads = grads is not None and (grads.wants(at + _NORM_WEIGHT) or grads.wants(at + _NORM_BIAS))
        needed = not first or need_point or norm_grads
        if unit.conv is not None:
            a = record.a if record.a is not None else _again(unit, tensors, at, record)
            cot = _convolve_back(plan, unit, a, tensors[at + _CONV_WEIGHT], cot, needed, grads, at, scale)
        if not needed:
            return None
        if _has_pass(unit):
            weight, bias, _ = _norm_tensors(unit, tensors, at, record.h)
            cot, wbar, bbar = torch.ops.fastode.norm_act_vjp(
                record.h,
                cot,
                _or_empty(record.stats, record.h),
                weight,
                bias,
                _in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                *_codes(unit),
            )
            if norm_grads:
                grads.add(at + _NORM_WEIGHT, wbar, scale)
                grads.add(at + _NORM_BIAS, bbar, scale)
        elif first:
            cot = combine([cot, *addends], coefs)
    return cot


def dual(
    plan: Plan, tensors: MaybeTensors, point: Tensor, tangent: Tensor
) -> tuple[Tensor, list[Record]]:
    """The value f(point) and the tangent J(point) tangent, stacked along the batch, and the records."""
    h, t = point, tangent
    samples = point.shape[0]
    records: list[Record] = []
    stacked = point
    for index, unit in enumerate(plan.units):
        at = index * TENSORS_PER_UNIT
        stats = tstats = None
        if _has_pass(unit):
            weight, bias, given = _norm_tensors(unit, tensors, at, h)
            a, made, tstats = torch.ops.fastode.norm_act_dual(h, t.to(h.dtype), weight, bias, given, *_codes(unit))
            stats = made if given is None else given
        else:
            a = stacked if index else torch.cat([h, t.to(h.dtype)])
        records.append(Record(h, stats, a, t, tstats))
        stacked = _convolve(plan, unit, a, tensors[at + _CONV_WEIGHT], None)
        bias = tensors[at + _CONV_BIAS]
        if bias is not None:
            stacked[:samples].add_(bias.to(stacked.dtype).view(1, -1, 1, 1))
        h, t = stacked[:samples], stacked[samples:]
    return stacked, records


def pull_dual(
    plan: Plan,
    tensors: MaybeTensors,
    records: list[Record],
    cot: Tensor,
    addends: Sequence[Tensor],
    coefs: Tensor,
    grads: Gradients | None,
    scale: float,
) -> Tensor:
    """∇_y of ⟨cot[:N], f(y)⟩ + ⟨cot[N:], J(y) t⟩ at fixed t: coefs[0] times it + sum_i coefs[i + 1] addends[i]."""
    samples = records[0].h.shape[0]
    for index in range(len(plan.units) - 1, -1, -1):
        unit, record, at = plan.units[index], records[index], index * TENSORS_PER_UNIT
        first = index == 0
        if unit.conv is not None:
            cot = _convolve_back(plan, unit, record.a, tensors[at + _CONV_WEIGHT], cot, True, grads, at, scale, samples)
        if _has_pass(unit):
            norm_grads = grads is not None and (grads.wants(at + _NORM_WEIGHT) or grads.wants(at + _NORM_BIAS))
            weight, bias, _ = _norm_tensors(unit, tensors, at, record.h)
            cot, wbar, bbar = torch.ops.fastode.norm_act_second(
                record.h,
                record.t.to(record.h.dtype),
                cot,
                _or_empty(record.stats, record.h),
                record.tstats,
                weight,
                bias,
                _in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                not first,
                *_codes(unit),
            )
            if norm_grads:
                grads.add(at + _NORM_WEIGHT, wbar, scale)
                grads.add(at + _NORM_BIAS, bbar, scale)
        elif first:
            cot = combine([cot[:samples], *addends], coefs)
    return cot


class Gradients:
    """The parameter gradients of a backward pass, summed as the sweeps find them; only those that are wanted."""

    def __init__(self, tensors: MaybeTensors, wanted: Sequence[bool]) -> None:
        self.tensors = tensors
        self.wanted = wanted
        self.sums: list[Tensor | None] = [None] * len(wanted)

    def wants(self, index: int) -> bool:
        return self.wanted[index]

    def add(self, index: int, gradient: Tensor, scale: float) -> None:
        if not self.wanted[index]:
            return
        if scale != 1.0:
            gradient = gradient * scale
        present = self.sums[index]
        self.sums[index] = gradient if present is None else present + gradient

    def result(self) -> list[Tensor | None]:
        pairs = zip(self.sums, self.tensors, strict=True)
        return [None if g is None else g.to(tensor.dtype) for g, tensor in pairs]


def _has_pass(unit: Unit) -> bool:
    return unit.norm is not None or unit.activation is not None


def _codes(unit: Unit) -> Codes:
    norm, act = unit.norm, unit.activation
    head = (0, 1, 0.0) if norm is None else (_NORM_CODE[norm.mode], norm.groups, norm.eps)
    return (*head, 0, 0.0, 0.0) if act is None else (*head, _ACTIVATION_CODE[act.kind], act.p, act.q)


def _norm_tensors(
    unit: Unit, tensors: MaybeTensors, at: int, h: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias and fixed statistics in the accumulator's dtype."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    weight, bias, mean, variance = tensors[at : at + 4]
    fixed = None
    if unit.norm is not None and unit.norm.mode == "fixed":
        fixed = torch.stack((mean, variance)).to(dtype)
    return _plain(weight, dtype), _plain(bias, dtype), fixed


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _again(unit: Unit, tensors: MaybeTensors, at: int, record: Record) -> Tensor:
    """The convolution's input, from the unit's input and its statistics."""
    if not _has_pass(unit):
        return record.h
    weight, bias, _ = _norm_tensors(unit, tensors, at, record.h)
    return torch.ops.fastode.norm_act([record.h], coefficients(1.0), weight, bias, record.stats, *_codes(unit))[1]


def _or_empty(stats: Tensor | None, h: Tensor) -> Tensor:
    return h.new_empty(0) if stats is None else stats


def _promoted(terms: Sequence[Tensor]) -> list[Tensor]:
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return _in_dtype(terms, dtype)


def _in_dtype(terms: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [term if term.dtype == dtype else term.to(dtype) for term in terms]


def _lowered(plan: Plan, tensor: Tensor) -> Tensor:
    """The tensor as a convolution under autocast sees it; autocast leaves float64 alone."""
    return tensor if plan.lower is None or tensor.dtype == torch.float64 else tensor.to(plan.lower)


def _convolve(plan: Plan, unit: Unit, a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    conv = unit.conv
    if conv is None or weight is None:
        return a
    out = torch.ops.aten.convolution.default(
        _lowered(plan, a),
        _lowered(plan, weight),
        None if bias is None else _lowered(plan, bias),
        (1, 1),
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
    )
    return channels_last(out)


def _convolve_back(
    plan: Plan,
    unit: Unit,
    a: Tensor,
    weight: Tensor,
    cot: Tensor,
    need_input: bool,
    grads: Gradients | None,
    at: int,
    scale: float,
    bias_samples: int | None = None,
) -> Tensor:
    """The cotangent of the convolution's input; weight and bias gradients go to `grads`.

    `bias_samples` says how much of a stacked batch the bias was added to.
    """
    conv = unit.conv
    need_weight = grads is not None and grads.wants(at + _CONV_WEIGHT)
    need_bias = grads is not None and grads.wants(at + _CONV_BIAS)
    lower_a, lower_weight = _lowered(plan, a), _lowered(plan, weight)
    cot = cot.to(lower_a.dtype)
    a_bar, weight_bar, _ = torch.ops.aten.convolution_backward.default(
        cot,
        lower_a,
        lower_weight,
        None,
        (1, 1),
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (need_input, need_weight, False),
    )
    if need_weight:
        grads.add(at + _CONV_WEIGHT, weight_bar, scale)
    if need_bias:
        grads.add(at + _CONV_BIAS, cot[:bias_samples].sum((0, 2, 3)), scale)
    return channels_last(a_bar).to(a.dtype) if need_input else cot
