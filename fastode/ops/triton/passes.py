"""The operators of csrc/ops.cpp on a GPU: allocate, choose the launches, launch. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan
from .cotangent import cotangent_apply_kernel, cotangent_set_kernel, cotangent_sums_kernel
from .launch import (
    BATCH,
    FIXED,
    GROUP,
    NONE,
    MaybeTensor,
    Pair,
    Unit,
    coefficients,
    feature_map,
    finish_moments,
    finish_sums,
    launch,
    of_float,
    partial_sums,
    vector,
)
from .second import second_apply_kernel, second_set_kernel, second_sums_kernel
from .tangent import tangent_apply_kernel, tangent_set_kernel, tangent_sums_kernel
from .value import (
    combine_pair_kernel,
    dots_finish_kernel,
    dots_partial_kernel,
    set_moments_kernel,
    value_apply_kernel,
    value_moments_kernel,
    value_set_kernel,
)

Maps = Sequence[Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def combine(terms: Maps, coefs: Tensor, act: int, p: float, q: float) -> Tensor:
    unit = Unit(terms[0], NONE, 1, 0.0, act, p, q)
    a = feature_map(terms[0])
    if a.numel():
        _apply_value(unit, terms, coefs, None, a, None, None, None)
    return a


def combine_pair(first: Maps, second: Maps, coefs: Tensor) -> Tensor:
    x = first[0]
    out = feature_map(x, 2 * x.shape[0])
    if x.numel():
        values, learned = coefficients(coefs, x)
        block = plan.FLAT
        programs = 2 * -(-x.numel() // block)
        launch(
            combine_pair_kernel, programs, tuple(first), tuple(second), values, out, x.numel(),
            LEARNED=learned, BLOCK=block, warps=8, **of_float(x),
        )  # fmt: skip
    return out


def norm_act(
    terms: Maps, coefs: Tensor, weight: MaybeTensor, bias: MaybeTensor, stats: MaybeTensor,
    norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> Triple:  # fmt: skip
    u, a, made = _norm_act(terms, coefs, weight, bias, stats, norm, groups, eps, act, p, q)
    x = terms[0]
    return feature_map(x, 0) if u is None else u, a, vector(x, 2, 0) if made is None else made


def _norm_act(
    terms: Maps, coefs: Tensor, weight: MaybeTensor, bias: MaybeTensor, stats: MaybeTensor,
    norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> tuple[MaybeTensor, Tensor, MaybeTensor]:  # fmt: skip
    """`norm_act` with None for the combination of one term and for statistics that are given."""
    x = terms[0]
    unit = Unit(x, norm, groups, eps, act, p, q)
    several = coefs.numel() > 0
    u, a = feature_map(x) if several else None, feature_map(x)
    made = unit.statistics() if stats is None else None
    if not x.numel():
        return u, a, None if made is None else made.fill_(torch.nan)  # no entries have no mean
    written = u
    scaling = coefs if several else None
    if made is not None and unit.map.coupled:
        if unit.layout.one_program_per_set:
            values, learned = coefficients(scaling, x)
            programs, shape = unit.layout.set_shape("value")
            launch(
                value_set_kernel, programs, tuple(terms), values, written, a, made, weight, bias, unit.map.samples,
                unit.map.pixels, *unit.numbers, **shape, ACT=act, LEARNED=learned,
            )  # fmt: skip
            return u, a, made
        _moments(unit, terms, scaling, written, made)
        terms, scaling, written = (terms if u is None else [u]), None, None
    _apply_value(unit, terms, scaling, written, a, made if stats is None else stats, weight, bias)
    return u, a, made


def _apply_value(
    unit: Unit, terms: Maps, coefs: MaybeTensor, u: MaybeTensor, a: Tensor, stats: MaybeTensor, weight: MaybeTensor,
    bias: MaybeTensor,
) -> None:  # fmt: skip
    values, learned = coefficients(coefs, a)
    programs, sizes, shape = unit.layout.apply_shape
    launch(
        value_apply_kernel, programs, tuple(terms), values, u, a, stats, weight, bias, *sizes, *unit.numbers, **shape,
        NORMED=unit.map.normed, ACT=unit.act, LEARNED=learned,
    )  # fmt: skip


def statistics(terms: Maps, coefs: MaybeTensor, norm: int, groups: int) -> Pair:
    """A combination, or without coefficients a map, and its statistics for a norm that takes its own."""
    x = terms[0]
    unit = Unit(x, norm, groups, 0.0, 0, 0.0, 0.0)
    u = x if coefs is None else feature_map(x)
    written, stats = None if coefs is None else u, unit.statistics()
    if unit.layout.one_program_per_set:
        values, learned = coefficients(coefs, x)
        programs, shape = unit.layout.set_shape("value")
        launch(
            set_moments_kernel, programs, tuple(terms), values, written, stats, unit.map.samples, unit.map.pixels,
            **shape, LEARNED=learned,
        )  # fmt: skip
    else:
        _moments(unit, terms, coefs, written, stats)
    return u, stats


def _moments(unit: Unit, terms: Maps, coefs: MaybeTensor, u: MaybeTensor, stats: Tensor) -> None:
    """The map's own statistics, by chunks; writes the combination to u."""
    values, learned = coefficients(coefs, stats if coefs is None else terms[0])
    partial, chunked, shape = partial_sums(unit, "moments", 2)
    g = unit.map
    launch(
        value_moments_kernel, chunked.programs, tuple(terms), values, u, partial, g.pixels, chunked.chunk_rows,
        LEARNED=learned, **shape,
    )  # fmt: skip
    finish_moments(unit, chunked, partial, stats)


def norm_act_vjp(
    h: Tensor, cot: Tensor, stats: Tensor, weight: MaybeTensor, bias: MaybeTensor, addends: Maps, coefs: Tensor,
    param_grads: bool, norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> Triple:  # fmt: skip
    out, weight_bar, bias_bar = _norm_act_vjp(
        h, cot, stats, weight, bias, addends, coefs, param_grads, norm, groups, eps, act, p, q
    )
    if weight_bar is None or bias_bar is None:
        weight_bar, bias_bar = vector(h, 0), vector(h, 0)
    return out, weight_bar, bias_bar


def _norm_act_vjp(
    h: Tensor, cot: Tensor, stats: Tensor, weight: MaybeTensor, bias: MaybeTensor, addends: Maps, coefs: Tensor,
    param_grads: bool, norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> tuple[Tensor, MaybeTensor, MaybeTensor]:  # fmt: skip
    """`norm_act_vjp` with None for gradients that are not wanted."""
    unit = Unit(h, norm, groups, eps, act, p, q)
    out = feature_map(h)
    bars = unit.parameter_bars() if param_grads else None
    found = (None, None) if bars is None else bars
    if not h.numel():
        return out, *found
    g, added = unit.map, tuple(addends) or None
    values, learned = coefficients(coefs, h)
    shares = unit.parameter_shares(bars)
    if g.coupled and unit.layout.one_program_per_set:
        programs, shape = unit.layout.set_shape("cotangent")
        launch(
            cotangent_set_kernel, programs, h, cot, added, values, out, stats, weight, bias, shares, g.samples,
            g.pixels, *unit.numbers, **shape, ACT=act, LEARNED=learned,
        )  # fmt: skip
        unit.add_shares(shares, bars)
        return out, *found
    sets = vector(h, 2, g.samples, g.groups) if g.coupled else None
    if g.coupled or shares is not None:
        partial, chunked, shape = partial_sums(unit, "sums", 2)
        launch(
            cotangent_sums_kernel, chunked.programs, h, cot, stats, weight, bias, partial, g.samples, g.pixels,
            chunked.chunk_rows, *unit.numbers, **shape, ACT=act,
        )  # fmt: skip
        finish_sums(unit, chunked, partial, stats, None, weight, sets, shares, 2)
        unit.add_shares(shares, bars)
    programs, sizes, shape = unit.layout.apply_shape
    launch(
        cotangent_apply_kernel, programs, h, cot, added, values, out, stats if g.normed else None, sets, weight, bias,
        *sizes, *unit.numbers, **shape, NORMED=g.normed, COUPLED=g.coupled, ACT=act, LEARNED=learned,
    )  # fmt: skip
    return out, *found


def norm_act_dual(
    h: Tensor, t: Tensor, weight: MaybeTensor, bias: MaybeTensor, stats: MaybeTensor,
    norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> Triple:  # fmt: skip
    unit = Unit(h, norm, groups, eps, act, p, q)
    g = unit.map
    stacked = feature_map(h, 2 * h.shape[0])
    made = unit.statistics() if stats is None else vector(h, 2, 0)
    tstats = unit.statistics() if norm in (GROUP, BATCH) else vector(h, 2, 0)
    if not h.numel():
        return stacked, made.fill_(torch.nan), tstats.fill_(torch.nan)
    if stats is None and g.coupled:
        _moments(unit, [h], None, None, made)
    used = made if stats is None else stats
    if g.coupled and unit.layout.one_program_per_set:
        programs, shape = unit.layout.set_shape("tangent")
        launch(
            tangent_set_kernel, programs, h, t, stacked, used, tstats, weight, bias, g.samples, g.pixels, g.total,
            *unit.numbers, **shape, ACT=act,
        )  # fmt: skip
        return stacked, made, tstats
    if g.coupled:
        partial, chunked, shape = partial_sums(unit, "sums", 2)
        launch(
            tangent_sums_kernel, chunked.programs, h, t, used, partial, g.samples, g.pixels, chunked.chunk_rows, **shape
        )  # fmt: skip
        finish_sums(unit, chunked, partial, used, None, None, tstats, None, 2, tangent=True)
    programs, sizes, shape = unit.layout.apply_shape
    launch(
        tangent_apply_kernel, programs, h, t, stacked, used if g.normed else None, tstats if g.coupled else None,
        weight, bias, *sizes, *unit.numbers, **shape, NORMED=g.normed, COUPLED=g.coupled, ACT=act,
    )  # fmt: skip
    return stacked, made, tstats


def norm_act_second(
    h: Tensor, t: Tensor, cot: Tensor, stats: Tensor, tstats: Tensor, weight: MaybeTensor, bias: MaybeTensor,
    addends: Maps, coefs: Tensor, param_grads: bool, tangent: bool,
    norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> Triple:  # fmt: skip
    unit = Unit(h, norm, groups, eps, act, p, q)
    out = feature_map(h, (2 if tangent else 1) * h.shape[0])
    wanted = unit.parameter_bars() if param_grads else None
    bars = (vector(h, 0), vector(h, 0)) if wanted is None else wanted
    if not h.numel():
        return out, *bars
    g, added = unit.map, tuple(addends) or None
    values, learned = coefficients(coefs, h)
    shares = unit.parameter_shares(wanted)
    met = tstats if g.coupled else None
    if g.coupled and unit.layout.one_program_per_set:
        programs, shape = unit.layout.set_shape("second")
        launch(
            second_set_kernel, programs, h, t, cot, added, values, out, stats, met, weight, bias, shares, g.samples,
            g.pixels, g.total, *unit.numbers, **shape, BOTH=tangent, ACT=act, LEARNED=learned,
        )  # fmt: skip
        unit.add_shares(shares, wanted)
        return out, *bars
    sets = vector(h, 5, g.samples, g.groups) if g.coupled else None
    if g.coupled or shares is not None:
        partial, chunked, shape = partial_sums(unit, "second_sums", 5)
        launch(
            second_sums_kernel, chunked.programs, h, t, cot, stats, met, weight, bias, partial, g.samples, g.pixels,
            g.total, chunked.chunk_rows, *unit.numbers, **shape, COUPLED=g.coupled, ACT=act,
        )  # fmt: skip
        finish_sums(unit, chunked, partial, stats, met, weight, sets, shares, 5)
        unit.add_shares(shares, wanted)
    programs, sizes, shape = unit.layout.apply_shape
    launch(
        second_apply_kernel, programs, h, t, cot, added, values, out, stats if g.normed else None, met, sets, weight,
        bias, *sizes, *unit.numbers, **shape, NORMED=g.normed, COUPLED=g.coupled, BOTH=tangent, ACT=act,
        LEARNED=learned,
    )  # fmt: skip
    return out, *bars


def dots(v: Tensor, terms: Maps) -> Tensor:
    out = vector(v, len(terms))
    if not v.numel():
        return out.zero_()
    block = plan.FLAT
    programs = -(-v.numel() // block)
    partial = vector(v, len(terms), programs)
    launch(dots_partial_kernel, programs, v, tuple(terms), partial, v.numel(), BLOCK=block, warps=8, **of_float(v))
    launch(dots_finish_kernel, len(terms), partial, out, programs, BLOCK=min(1024, plan.power_of_two(programs)))
    return out


OPERATORS = (combine, combine_pair, norm_act, norm_act_vjp, norm_act_dual, norm_act_second, dots)
# What stands for them where they are called from Python, which need not have a tensor in every place.
DIRECT = {operator.__name__: operator for operator in OPERATORS} | {
    "norm_act": _norm_act,
    "norm_act_vjp": _norm_act_vjp,
}
__all__ = ["BATCH", "DIRECT", "FIXED", "GROUP", "NONE", "OPERATORS", *(operator.__name__ for operator in OPERATORS)]
