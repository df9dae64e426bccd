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
    apply_shape,
    coefficients,
    feature_map,
    finish_moments,
    finish_sums,
    launch,
    of_float,
    partial_sums,
    set_shape,
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
    x = terms[0]
    unit = Unit(x, norm, groups, eps, act, p, q)
    several = coefs.numel() > 0
    u, a = feature_map(x, None if several else 0), feature_map(x)
    made = unit.statistics() if stats is None else vector(x, 2, 0)
    if not x.numel():
        return u, a, made.fill_(torch.nan)  # no entries have no mean
    written = u if several else None
    scaling = coefs if several else None
    if stats is None and unit.map.coupled:
        if plan.one_program_per_set(unit.map, x.element_size()):
            values, learned = coefficients(scaling, x)
            programs, shape = set_shape(unit, "value")
            launch(
                value_set_kernel, programs, tuple(terms), values, written, a, made, weight, bias, unit.map.samples,
                unit.map.pixels, *unit.numbers, **shape, ACT=act, LEARNED=learned,
            )  # fmt: skip
            return u, a, made
        _moments(unit, terms, scaling, written, made)
        terms, scaling, written = ([u], None, None) if several else (terms, None, None)
    _apply_value(unit, terms, scaling, written, a, made if stats is None else stats, weight, bias)
    return u, a, made


def _apply_value(
    unit: Unit, terms: Maps, coefs: MaybeTensor, u: MaybeTensor, a: Tensor, stats: MaybeTensor, weight: MaybeTensor,
    bias: MaybeTensor,
) -> None:  # fmt: skip
    values, learned = coefficients(coefs, a)
    programs, sizes, shape = apply_shape(unit)
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
    if plan.one_program_per_set(unit.map, x.element_size()):
        values, learned = coefficients(coefs, x)
        programs, shape = set_shape(unit, "value")
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
    partial, chunked, programs, shape = partial_sums(unit, "moments", 2)
    g = unit.map
    launch(
        value_moments_kernel, programs, tuple(terms), values, u, partial, g.pixels, chunked.chunk_rows,
        LEARNED=learned, **shape,
    )  # fmt: skip
    finish_moments(unit, chunked, partial, stats)


def norm_act_vjp(
    h: Tensor, cot: Tensor, stats: Tensor, weight: MaybeTensor, bias: MaybeTensor, addends: Maps, coefs: Tensor,
    param_grads: bool, norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> Triple:  # fmt: skip
    unit = Unit(h, norm, groups, eps, act, p, q)
    out = feature_map(h)
    bars = unit.parameter_bars(param_grads)
    if not h.numel():
        return out, *bars
    g, added = unit.map, tuple(addends) or None
    values, learned = coefficients(coefs, h)
    shares = unit.parameter_shares(bars, param_grads)
    if g.coupled and plan.one_program_per_set(g, h.element_size()):
        programs, shape = set_shape(unit, "cotangent")
        launch(
            cotangent_set_kernel, programs, h, cot, added, values, out, stats, weight, bias, shares, g.samples,
            g.pixels, *unit.numbers, **shape, ACT=act, LEARNED=learned,
        )  # fmt: skip
        unit.add_shares(shares, bars)
        return out, *bars
    sets = vector(h, 2, g.samples, g.groups) if g.coupled else None
    if g.coupled or shares is not None:
        partial, chunked, programs, shape = partial_sums(unit, "sums", 2)
        launch(
            cotangent_sums_kernel, programs, h, cot, stats, weight, bias, partial, g.samples, g.pixels,
            chunked.chunk_rows, *unit.numbers, **shape, ACT=act,
        )  # fmt: skip
        finish_sums(unit, chunked, partial, stats, None, weight, sets, shares, 2)
        unit.add_shares(shares, bars)
    programs, sizes, shape = apply_shape(unit)
    launch(
        cotangent_apply_kernel, programs, h, cot, added, values, out, stats if g.normed else None, sets, weight, bias,
        *sizes, *unit.numbers, **shape, NORMED=g.normed, COUPLED=g.coupled, ACT=act, LEARNED=learned,
    )  # fmt: skip
    return out, *bars


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
    if g.coupled and plan.one_program_per_set(g, h.element_size()):
        programs, shape = set_shape(unit, "tangent")
        launch(
            tangent_set_kernel, programs, h, t, stacked, used, tstats, weight, bias, g.samples, g.pixels, g.total,
            *unit.numbers, **shape, ACT=act,
        )  # fmt: skip
        return stacked, made, tstats
    if g.coupled:
        partial, chunked, programs, shape = partial_sums(unit, "sums", 2)
        launch(
            tangent_sums_kernel, programs, h, t, used, partial, g.samples, g.pixels, chunked.chunk_rows, **shape
        )  # fmt: skip
        finish_sums(unit, chunked, partial, used, None, None, tstats, None, 2, tangent=True)
    programs, sizes, shape = apply_shape(unit)
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
    bars = unit.parameter_bars(param_grads)
    if not h.numel():
        return out, *bars
    g, added = unit.map, tuple(addends) or None
    values, learned = coefficients(coefs, h)
    shares = unit.parameter_shares(bars, param_grads)
    met = tstats if g.coupled else None
    if g.coupled and plan.one_program_per_set(g, h.element_size()):
        programs, shape = set_shape(unit, "second")
        launch(
            second_set_kernel, programs, h, t, cot, added, values, out, stats, met, weight, bias, shares, g.samples,
            g.pixels, g.total, *unit.numbers, **shape, BOTH=tangent, ACT=act, LEARNED=learned,
        )  # fmt: skip
        unit.add_shares(shares, bars)
        return out, *bars
    sets = vector(h, 5, g.samples, g.groups) if g.coupled else None
    if g.coupled or shares is not None:
        partial, chunked, programs, shape = partial_sums(unit, "second_sums", 5)
        launch(
            second_sums_kernel, programs, h, t, cot, stats, met, weight, bias, partial, g.samples, g.pixels, g.total,
            chunked.chunk_rows, *unit.numbers, **shape, COUPLED=g.coupled, ACT=act,
        )  # fmt: skip
        finish_sums(unit, chunked, partial, stats, met, weight, sets, shares, 5)
        unit.add_shares(shares, bars)
    programs, sizes, shape = apply_shape(unit)
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
__all__ = ["BATCH", "FIXED", "GROUP", "NONE", "OPERATORS", *(operator.__name__ for operator in OPERATORS)]
