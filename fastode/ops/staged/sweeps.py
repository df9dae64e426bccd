"""Sweeps through a branch: its value, its pull-back, its tangent beside its value, and the pull-back of both.

A branch is a tuple of units and a flat list of tensors (fastode/branch). Convolutions are ATen's; what stands between
two of them is one operator of csrc (fastode/ops/README.md). Every feature map in here is dense channels_last.

Under autocast a convolution sees its input and weight in the lower precision, everything else stays in the precision in
which it arrives, and a cotangent has its tensor's dtype: the rules that autograd applies to the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...branch.layers import TENSORS_PER_UNIT, Conv
from ...branch.read import Unit
from ...native.cuda import operators
from ..maps import (
    accumulator,
    cast,
    channels_last,
    coefficients,
    combine,
    few,
    few_addends,
    fixed_statistics,
    in_dtype,
    lowered,
    norm_tensors,
    promoted,
)
from ..plan import CONV_BIAS, CONV_WEIGHT, Gradients, MaybeTensors, Plan, Record


def value(
    plan: Plan,
    tensors: MaybeTensors,
    terms: Sequence[Tensor],
    coefs: Tensor | None = None,
    shifts: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Record]]:
    """f at the combination of `terms`: that combination, f of it, and the records (without convolution inputs).

    Without coefs f is taken at the one term itself. `shifts` [1, C, H, W] are added to what a unit's convolution gives.
    """
    if coefs is not None:
        terms, coefs = few(promoted(terms), coefs)
    point = terms[0]
    records: list[Record] = []
    for index in range(len(plan.units)):
        u, a, stats = _pass(plan, tensors, index, terms, coefs, None)
        point = u if index == 0 else point
        records.append(Record(u, stats, None))
        image = _convolve(plan, tensors, index, a)
        if shifts and index in shifts:
            image.add_(shifts[index])
        terms, coefs = [image], None
    return point, terms[0], records


def revisit(
    plan: Plan, tensors: MaybeTensors, point: Tensor, statistics: Sequence[Tensor], image: bool = False
) -> tuple[list[Record], Tensor | None]:
    """What `pull` needs of f's evaluation at `point`; and f(point), if `image`: without it one convolution less."""
    records: list[Record] = []
    h = point
    last = len(plan.units) - 1
    for index in range(last + 1):
        _, a, _ = _pass(plan, tensors, index, [h], None, statistics[index])
        records.append(Record(h, statistics[index], a if index == last else None))
        if index < last or image:
            h = _convolve(plan, tensors, index, a)
    return records, h if image else None


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
    cotangents: dict[int, Tensor] | None = None,
) -> Tensor | None:
    """coefs[0] J(y)ᵀ cot + sum_i coefs[i + 1] addends[i]; parameter gradients, times `scale`, are added to `grads`.

    It empties `records`. `cotangents` gets those of the images of convolutions that see the time, summed over samples.
    """
    addends, coefs = few_addends(addends, coefs)
    for index in range(len(plan.units) - 1, -1, -1):
        # Each record is freed as soon as it is used: a backward's memory peaks here.
        unit, record, at = plan.units[index], records.pop(), index * TENSORS_PER_UNIT
        first = index == 0
        norm_grads = grads is not None and grads.wants_norm(at)
        needed = not first or need_point or norm_grads
        if unit.conv is not None:
            a = record.a
            if a is None and grads is not None and grads.wants(at + CONV_WEIGHT):
                _, a, _ = _pass(plan, tensors, index, [record.h], None, record.stats)
            elif a is None:
                a = record.h  # without a weight gradient only its shape is asked for
            if cotangents is not None and unit.conv.sees_time:
                cotangents[index] = cot.sum(0)
            cot = _convolve_back(plan, tensors, index, a, cot, needed, grads, scale)
            record = record._replace(a=None)
            del a
        if not needed:
            return None
        if _has_pass(unit):
            weight, bias = norm_tensors(tensors, at, record.h.dtype)
            cot, wbar, bbar = operators(cot).norm_act_vjp(
                record.h,
                cast(cot, record.h.dtype),
                record.stats,
                weight,
                bias,
                in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                *plan.codes(index),
            )
            if grads is not None and norm_grads:
                grads.add_norm(at, wbar, bbar, scale)
        elif first:
            cot = combine([cot, *addends], coefs)
    return cot


def dual(
    plan: Plan, tensors: MaybeTensors, point: Tensor, tangent: Tensor, statistics: Sequence[Tensor]
) -> tuple[Tensor, list[Record]]:
    """The value f(point) and the tangent J(point) tangent, stacked along the batch, and the records."""
    samples = point.shape[0]
    records: list[Record] = []
    h, t = point, tangent
    last = len(plan.units) - 1
    for index in range(last + 1):
        a, tstats = _dual_pass(plan, tensors, index, h, t, statistics[index])
        records.append(Record(h, statistics[index], a if index == last else None, t, tstats))
        stacked = _convolve(plan, tensors, index, a, with_bias=False)
        bias = tensors[index * TENSORS_PER_UNIT + CONV_BIAS]
        if bias is not None:
            stacked[:samples].add_(cast(bias, stacked.dtype).view(1, -1, 1, 1))
        h, t = stacked[:samples], stacked[samples:]
    return stacked, records


def push(plan: Plan, tensors: MaybeTensors, records: Sequence[Record], tangent: Tensor) -> Tensor:
    """J(y) tangent, at the point whose evaluation `records` are of; they stay as they are."""
    samples, t = tangent.shape[0], tangent
    for index, record in enumerate(records):
        if _has_pass(plan.units[index]):
            stacked, _ = _dual_pass(plan, tensors, index, record.h, t, record.stats)
            t = stacked[samples:]
        t = _convolve(plan, tensors, index, t, with_bias=False)
    return t


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
    """∇_y of ⟨cot[:N], f(y)⟩ + ⟨cot[N:], J(y) t⟩ at fixed t: coefs[0] times it + sum_i coefs[i + 1] addends[i].

    It empties `records`.
    """
    samples = records[0].h.shape[0]
    for index in range(len(plan.units) - 1, -1, -1):
        unit, record, at = plan.units[index], records.pop(), index * TENSORS_PER_UNIT
        tangent = record.t
        assert tangent is not None
        first = index == 0
        if unit.conv is not None:
            a = record.a
            if a is None and grads is not None and grads.wants(at + CONV_WEIGHT):
                a, _ = _dual_pass(plan, tensors, index, record.h, tangent, record.stats)
            elif a is None:  # only its shape is asked for
                h = record.h
                shape = (2 * samples, *h.shape[1:])
                a = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
            cot = _convolve_back(plan, tensors, index, a, cot, True, grads, scale, samples)
            record = record._replace(a=None)
            del a
        if _has_pass(unit):
            norm_grads = grads is not None and grads.wants_norm(at)
            weight, bias = norm_tensors(tensors, at, record.h.dtype)
            cot, wbar, bbar = operators(cot).norm_act_second(
                record.h,
                cast(tangent, record.h.dtype),
                cast(cot, record.h.dtype),
                record.stats,
                record.tstats,
                weight,
                bias,
                in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                not first,
                *plan.codes(index),
            )
            if grads is not None and norm_grads:
                grads.add_norm(at, wbar, bbar, scale)
        elif first:
            cot = combine([cot[:samples], *addends], coefs)
    return cot


def _has_pass(unit: Unit) -> bool:
    return unit.norm is not None or unit.activation is not None


def _pass(
    plan: Plan,
    tensors: MaybeTensors,
    index: int,
    terms: Sequence[Tensor],
    coefs: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The combination of `terms` (without coefs the one term itself), a unit's norm and activation of it, and the
    norm's statistics (given or made).
    """
    unit, at = plan.units[index], index * TENSORS_PER_UNIT
    if coefs is not None and not _has_pass(unit):
        terms, coefs = [combine(terms, coefs)], None
    x = terms[0]
    if not _has_pass(unit):
        return x, x, x.new_empty(0, dtype=accumulator(x.dtype))
    if statistics is None and unit.norm is not None and unit.norm.mode == "fixed":
        statistics = fixed_statistics(tensors, at, x.dtype)
    weight, bias = norm_tensors(tensors, at, x.dtype)
    u, a, made = operators(x).norm_act(
        terms, coefficients() if coefs is None else coefs, weight, bias, statistics, *plan.codes(index)
    )
    return x if coefs is None else u, a, made if statistics is None else statistics


def _dual_pass(
    plan: Plan, tensors: MaybeTensors, index: int, h: Tensor, t: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """A unit's norm and activation of h beside their tangent along t, stacked, and the statistics of the tangent."""
    unit, at = plan.units[index], index * TENSORS_PER_UNIT
    t = cast(t, h.dtype)
    if not _has_pass(unit):
        return torch.cat([h, t]), statistics
    weight, bias = norm_tensors(tensors, at, h.dtype)
    a, _, tstats = operators(h).norm_act_dual(h, t, weight, bias, statistics, *plan.codes(index))
    return a, tstats


def _convolve(plan: Plan, tensors: MaybeTensors, index: int, a: Tensor, with_bias: bool = True) -> Tensor:
    conv, at = plan.units[index].conv, index * TENSORS_PER_UNIT
    if conv is None:
        return a
    if conv.mean:
        return channels_last(_average(conv, a))
    weight, bias = tensors[at + CONV_WEIGHT], tensors[at + CONV_BIAS] if with_bias else None
    assert weight is not None
    out = torch.ops.aten.convolution.default(
        lowered(plan.lower, a),
        lowered(plan.lower, weight),
        None if bias is None else lowered(plan.lower, bias),
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
    )
    return channels_last(out)


def _convolve_back(
    plan: Plan,
    tensors: MaybeTensors,
    index: int,
    a: Tensor,
    cot: Tensor,
    need_input: bool,
    grads: Gradients | None,
    scale: float,
    bias_samples: int | None = None,
) -> Tensor:
    """The cotangent of the convolution's input `a`; weight and bias gradients go to `grads`.

    `bias_samples`: the bias was added to the first so many samples of a stacked batch; None for all.
    """
    conv, at = plan.units[index].conv, index * TENSORS_PER_UNIT
    assert conv is not None
    if conv.mean:
        return channels_last(_average_back(conv, a, cast(cot, a.dtype)))
    weight = tensors[at + CONV_WEIGHT]
    assert weight is not None
    need_weight = grads is not None and grads.wants(at + CONV_WEIGHT)
    lower = lowered(plan.lower, a)
    cot = cast(cot, lower.dtype)
    a_bar, weight_bar, _ = torch.ops.aten.convolution_backward.default(
        cot,
        lower,
        lowered(plan.lower, weight),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (need_input, need_weight, False),
    )
    if grads is not None and need_weight:
        grads.add(at + CONV_WEIGHT, weight_bar, scale)
    if grads is not None and grads.wants(at + CONV_BIAS):
        grads.add(at + CONV_BIAS, cot[:bias_samples].sum((0, 2, 3)), scale)
    return cast(channels_last(a_bar), a.dtype) if need_input else cot


def _average(conv: Conv, a: Tensor) -> Tensor:
    """The mean over each window, and channels of zeros behind it."""
    out = a if conv.kernel == conv.stride == (1, 1) else torch.ops.aten.avg_pool2d.default(a, conv.kernel, conv.stride)
    return torch.ops.aten.constant_pad_nd.default(out, [0, 0, 0, 0, 0, conv.added]) if conv.added else out


def _average_back(conv: Conv, a: Tensor, cot: Tensor) -> Tensor:
    """The cotangent of its input `a`."""
    cot = cot[:, : a.shape[1]] if conv.added else cot
    if conv.kernel == conv.stride == (1, 1):
        return cot
    return torch.ops.aten.avg_pool2d_backward.default(
        channels_last(cot), a, conv.kernel, conv.stride, (0, 0), False, True, None
    )
