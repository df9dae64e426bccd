"""Sweeps through a branch: its value, its pull-back, its tangent beside its value, and the pull-back of both.

A branch is a tuple of units and a flat list of tensors (fastode/branch.py). Convolutions are ATen's; what stands
between two of them is one operator of csrc (fastode/ops/README.md). Every feature map in here is dense channels_last.

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

# The operators' codes, as csrc/cpu numbers them.
NORM_CODE = {"group": 1, "batch": 2, "fixed": 3}
ACTIVATION_CODE = {"relu": 1, "leaky_relu": 2, "tanh": 3, "softplus": 4, "elu": 5, "silu": 6}
NORM_WEIGHT, NORM_BIAS, MEAN, VARIANCE, CONV_WEIGHT, CONV_BIAS = range(TENSORS_PER_UNIT)

# csrc/cpu/norm_act.h, kMaxTerms
_MOST_TERMS = 16

MaybeTensors = Sequence[Tensor | None]
Codes = tuple[int, int, float, int, float, float]


@dataclass(frozen=True)
class Plan:
    """A branch as constants: its units, whose norms keep running statistics, and autocast's dtype where it is on.

    fused: whether its convolutions are those of fastode/ops/triton/convolution.py, which read and write for the passes.
    """

    units: tuple[Unit, ...]
    tracked: tuple[bool, ...]
    lower: torch.dtype | None
    fused: bool = False


class Record(NamedTuple):
    """What a sweep leaves behind of one unit: input, statistics and convolution input; tangents where there are any."""

    h: Tensor
    stats: Tensor
    a: Tensor | None
    t: Tensor | None = None
    tstats: Tensor | None = None


def statistics_of(records: Sequence[Record]) -> list[Tensor]:
    """The statistics that the norms of one evaluation met, one for each unit."""
    return [record.stats for record in records]


def tracked_statistics(plan: Plan, statistics: Sequence[Tensor]) -> list[Tensor]:
    """Of the statistics that evaluations of the branch met, those that update running statistics, in order."""
    units = len(plan.units)
    return [stats for index, stats in enumerate(statistics) if plan.tracked[index % units]]


def channels_last(x: Tensor) -> Tensor:
    """x in dense channels_last memory: what every operator takes."""
    return x.contiguous(memory_format=torch.channels_last)


def like_reference(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format that element-wise PyTorch gives a result of x."""
    wanted = torch.empty_like(x, dtype=y.dtype)
    if y.stride() == wanted.stride():
        return y
    if torch.compiler.is_compiling():  # torch 2.11 traces a zero gradient for a result that is written in place
        return torch.ops.aten.copy.default(wanted, y)
    return wanted.copy_(y)


def coefficients(*values: float) -> Tensor:
    """Coefficients as the operators take them."""
    return torch.tensor(values, dtype=torch.float64)


def combine(terms: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The sum of coefs[i] terms[i], in the dtype that PyTorch promotes the terms to."""
    terms, coefs = _few(promoted(terms), coefs)
    return torch.ops.fastode.combine(terms, coefs, 0, 0.0, 0.0)


def dots(v: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The inner products of v with each term, in the accumulator's dtype."""
    terms = _in_dtype(terms, v.dtype)
    starts = range(0, len(terms), _MOST_TERMS)
    return torch.cat([torch.ops.fastode.dots(v, terms[start : start + _MOST_TERMS]) for start in starts])


def combine_pair(first: Sequence[Tensor], second: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """Two combinations stacked along the batch; coefs are the first's, then the second's."""
    terms = promoted([*first, *second])
    return torch.ops.fastode.combine_pair(terms[: len(first)], terms[len(first) :], coefs)


def value(
    plan: Plan, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: Tensor
) -> tuple[Tensor, Tensor, list[Record]]:
    """f at the combination of `terms`: that combination, f of it, and the records (without convolution inputs)."""
    terms, coefs = _few(promoted(terms), coefs)
    point = terms[0]
    records: list[Record] = []
    for index in range(len(plan.units)):
        u, a, stats = _pass(plan, tensors, index, terms, coefs, None)
        point = u if index == 0 else point
        records.append(Record(u, stats, None))
        terms = [_convolve(plan, tensors, index, a)]
    return point, terms[0], records


def revisit(
    plan: Plan, tensors: MaybeTensors, point: Tensor, statistics: Sequence[Tensor], image: bool = False
) -> tuple[list[Record], Tensor | None]:
    """What `pull` needs of f's evaluation at `point`; and f(point), if `image`: without it one convolution less."""
    if plan.fused:
        from .triton import conv_sweeps

        return conv_sweeps.revisit(plan, tensors, point, statistics, image)
    records: list[Record] = []
    h = point
    last = len(plan.units) - 1
    for index in range(last + 1):
        _, a, _ = _pass(plan, tensors, index, [h], coefficients(1.0), statistics[index])
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
) -> Tensor | None:
    """coefs[0] J(y)ᵀ cot + sum_i coefs[i + 1] addends[i]; parameter gradients, times `scale`, are added to `grads`.

    It empties `records`.
    """
    if plan.fused:
        from .triton import conv_sweeps

        return conv_sweeps.pull_branch(plan, tensors, records, cot, addends, coefs, grads, scale, need_point)
    if len(addends) > _MOST_TERMS:
        addends, coefs = [combine(addends, coefs[1:])], torch.cat([coefs[:1], torch.ones_like(coefs[:1])])
    for index in range(len(plan.units) - 1, -1, -1):
        # What is behind is let go at once: a backward's peak memory is made here.
        unit, record, at = plan.units[index], records.pop(), index * TENSORS_PER_UNIT
        first = index == 0
        norm_grads = grads is not None and (grads.wants(at + NORM_WEIGHT) or grads.wants(at + NORM_BIAS))
        needed = not first or need_point or norm_grads
        if unit.conv is not None:
            a = record.a
            if a is None and grads is not None and grads.wants(at + CONV_WEIGHT):
                _, a, _ = _pass(plan, tensors, index, [record.h], coefficients(1.0), record.stats)
            elif a is None:
                a = record.h  # without a weight gradient only its shape is asked for
            cot = _convolve_back(plan, tensors, index, a, cot, needed, grads, scale)
            record = record._replace(a=None)
            del a
        if not needed:
            return None
        if _has_pass(unit):
            weight, bias = norm_tensors(tensors, at, record.h)
            cot, wbar, bbar = torch.ops.fastode.norm_act_vjp(
                record.h,
                cot.to(record.h.dtype),
                record.stats,
                weight,
                bias,
                _in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                *codes(unit),
            )
            if norm_grads:
                grads.add(at + NORM_WEIGHT, wbar, scale)
                grads.add(at + NORM_BIAS, bbar, scale)
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
    """∇_y of ⟨cot[:N], f(y)⟩ + ⟨cot[N:], J(y) t⟩ at fixed t: coefs[0] times it + sum_i coefs[i + 1] addends[i].

    It empties `records`.
    """
    samples = records[0].h.shape[0]
    for index in range(len(plan.units) - 1, -1, -1):
        unit, record, at = plan.units[index], records.pop(), index * TENSORS_PER_UNIT
        first = index == 0
        if unit.conv is not None:
            a = record.a
            if a is None and grads is not None and grads.wants(at + CONV_WEIGHT):
                a, _ = _dual_pass(plan, tensors, index, record.h, record.t, record.stats)
            elif a is None:  # only its shape is asked for
                h = record.h
                shape = (2 * samples, *h.shape[1:])
                a = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
            cot = _convolve_back(plan, tensors, index, a, cot, True, grads, scale, samples)
            record = record._replace(a=None)
            del a
        if _has_pass(unit):
            norm_grads = grads is not None and (grads.wants(at + NORM_WEIGHT) or grads.wants(at + NORM_BIAS))
            weight, bias = norm_tensors(tensors, at, record.h)
            cot, wbar, bbar = torch.ops.fastode.norm_act_second(
                record.h,
                record.t.to(record.h.dtype),
                cot.to(record.h.dtype),
                record.stats,
                record.tstats,
                weight,
                bias,
                _in_dtype(addends, record.h.dtype) if first else [],
                coefs if first else coefficients(1.0),
                norm_grads,
                not first,
                *codes(unit),
            )
            if norm_grads:
                grads.add(at + NORM_WEIGHT, wbar, scale)
                grads.add(at + NORM_BIAS, bbar, scale)
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


def codes(unit: Unit) -> Codes:
    norm, act = unit.norm, unit.activation
    head = (0, 1, 0.0) if norm is None else (NORM_CODE[norm.mode], norm.groups, norm.eps)
    return (*head, 0, 0.0, 0.0) if act is None else (*head, ACTIVATION_CODE[act.kind], act.p, act.q)


def _pass(
    plan: Plan, tensors: MaybeTensors, index: int, terms: Sequence[Tensor], coefs: Tensor, statistics: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The combination of `terms`, a unit's norm and activation of it, and the norm's statistics (given or made)."""
    unit, at, x = plan.units[index], index * TENSORS_PER_UNIT, terms[0]
    if not _has_pass(unit):
        u = x if len(terms) == 1 else combine(terms, coefs)
        return u, u, x.new_empty(0, dtype=_accumulator(x))
    if statistics is None and unit.norm is not None and unit.norm.mode == "fixed":
        statistics = torch.stack((tensors[at + MEAN], tensors[at + VARIANCE])).to(_accumulator(x))
    weight, bias = norm_tensors(tensors, at, x)
    u, a, made = torch.ops.fastode.norm_act(terms, coefs, weight, bias, statistics, *codes(unit))
    return x if len(terms) == 1 else u, a, made if statistics is None else statistics


def _dual_pass(
    plan: Plan, tensors: MaybeTensors, index: int, h: Tensor, t: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """A unit's norm and activation of h beside their tangent along t, stacked, and the statistics of the tangent."""
    unit, at = plan.units[index], index * TENSORS_PER_UNIT
    t = t.to(h.dtype)
    if not _has_pass(unit):
        return torch.cat([h, t]), statistics
    weight, bias = norm_tensors(tensors, at, h)
    a, _, tstats = torch.ops.fastode.norm_act_dual(h, t, weight, bias, statistics, *codes(unit))
    return a, tstats


def norm_tensors(tensors: MaybeTensors, at: int, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight and bias in the accumulator's dtype."""
    weight, bias = tensors[at + NORM_WEIGHT], tensors[at + NORM_BIAS]
    dtype = _accumulator(h)
    return (
        None if weight is None else weight.to(dtype).contiguous(),
        None if bias is None else bias.to(dtype).contiguous(),
    )


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _few(terms: list[Tensor], coefs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same sum in no more terms than one operator takes."""
    while len(terms) > _MOST_TERMS:
        head = torch.ops.fastode.combine(terms[:_MOST_TERMS], coefs[:_MOST_TERMS], 0, 0.0, 0.0)
        terms, coefs = [head, *terms[_MOST_TERMS:]], torch.cat([torch.ones_like(coefs[:1]), coefs[_MOST_TERMS:]])
    return terms, coefs


def promoted(terms: Sequence[Tensor]) -> list[Tensor]:
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return _in_dtype(terms, dtype)


def _in_dtype(terms: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [term if term.dtype == dtype else term.to(dtype) for term in terms]


def lowered(plan: Plan, tensor: Tensor) -> Tensor:
    """The tensor as a convolution under autocast sees it; autocast leaves float64 alone."""
    return tensor if plan.lower is None or tensor.dtype == torch.float64 else tensor.to(plan.lower)


def _convolve(plan: Plan, tensors: MaybeTensors, index: int, a: Tensor, with_bias: bool = True) -> Tensor:
    conv, at = plan.units[index].conv, index * TENSORS_PER_UNIT
    if conv is None:
        return a
    bias = tensors[at + CONV_BIAS] if with_bias else None
    out = torch.ops.aten.convolution.default(
        lowered(plan, a),
        lowered(plan, tensors[at + CONV_WEIGHT]),
        None if bias is None else lowered(plan, bias),
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

    `bias_samples` says to how much of a stacked batch the bias was added.
    """
    conv, at = plan.units[index].conv, index * TENSORS_PER_UNIT
    need_weight = grads is not None and grads.wants(at + CONV_WEIGHT)
    lower = lowered(plan, a)
    cot = cot.to(lower.dtype)
    a_bar, weight_bar, _ = torch.ops.aten.convolution_backward.default(
        cot,
        lower,
        lowered(plan, tensors[at + CONV_WEIGHT]),
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
        grads.add(at + CONV_WEIGHT, weight_bar, scale)
    if grads is not None and grads.wants(at + CONV_BIAS):
        grads.add(at + CONV_BIAS, cot[:bias_samples].sum((0, 2, 3)), scale)
    return channels_last(a_bar).to(a.dtype) if need_input else cot
