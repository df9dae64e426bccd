"""The pull-back of value and tangent together: second order. Formulas: README.md.

At each place: n the value with its tangent ṅ; n̄ and ñ the cotangents of n and ṅ; d = h - mean and τ = t - mean(t).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate_first, activate_second
from .tiles import (
    SIZES,
    chunk_of,
    chunks_of,
    coefficient,
    combination,
    load,
    per_channel,
    set_of,
    store,
    store_parameters,
    store_sums,
    tile,
    value_rows,
)


@triton.jit
def cotangents(
    h, t, cot, total, at, mask, mean, scale, shift, mean_t, slope, p, q, NORMED: tl.constexpr, COUPLED: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d, τ, n̄ and ñ at the places `at`; entries that do not exist have n̄ = ñ = 0."""
    n = load(h + at, mask, ACC)
    centred = load(t + at, mask, ACC)
    d = n
    ndot = centred
    if NORMED:
        d = n - mean[None, :]
        n = d * scale[None, :] + shift[None, :]
        ndot = centred * scale[None, :]
        if COUPLED:
            centred = centred - mean_t[None, :]
            ndot = centred * scale[None, :] + d * slope[None, :]
    beta = load(cot + total + at, mask, ACC)
    first = activate_first(n, p, q, ACT)
    nbar = first * load(cot + at, mask, ACC)
    if ACT >= 3:
        nbar += activate_second(n, p, q, ACT) * ndot * beta
    return d, centred, nbar, first * beta


@triton.jit
def sums(
    h, t, cot, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, start, stop, L, total, cols, column_mask,
    C: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Per column, over the rows from `start` to `stop`: the sums of n̄, n̄ d, ñ, ñ d and ñ τ."""
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    slope = -scale * rstd * mean_xt
    of_value = tl.zeros([PB, CB], ACC)
    of_value_d = tl.zeros([PB, CB], ACC)
    of_tangent = tl.zeros([PB, CB], ACC)
    of_tangent_d = tl.zeros([PB, CB], ACC)
    of_tangent_tau = tl.zeros([PB, CB], ACC)
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, 0, C, True, PB, PLANE)
        d, centred, nbar, nbardot = cotangents(
            h, t, cot, total, begin + offsets, mask, mean, scale, shift, mean_t, slope, p, q, True, COUPLED, ACT, ACC
        )
        of_value += nbar
        of_value_d += nbar * d
        of_tangent += nbardot
        of_tangent_d += nbardot * d
        of_tangent_tau += nbardot * centred
    return (
        tl.sum(of_value, 0), tl.sum(of_value_d, 0), tl.sum(of_tangent, 0), tl.sum(of_tangent_d, 0),
        tl.sum(of_tangent_tau, 0),
    )  # fmt: skip


@triton.jit
def apply(
    h, t, cot, addends, coefs, out, mean, rstd, scale, shift, mean_t, mean_xt, v, dv, c, dc, tc, p, q, s, start, stop,
    L, total, cols, column_mask, C: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr, BOTH: tl.constexpr,
    ACT: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h̄, and `total` entries behind it t̄ if BOTH, else coefs[0] h̄ + sum_i coefs[i + 1] addends[i].

    v, dv, c, dc, tc: means over the set of scale n̄, scale n̄ d, scale ñ, scale ñ d and scale ñ τ.
    """
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    slope = -scale * rstd * mean_xt
    phi = tc - mean_xt * rstd * dc
    along = rstd * rstd * (2.0 * rstd * mean_xt * dc - dv - phi)
    constant = rstd * mean_xt * c - v
    along_tangent = -rstd * rstd * dc
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, total, C, NORMED, PB, PLANE)
        at = begin + offsets
        d, centred, nbar, nbardot = cotangents(
            h, t, cot, total, at, mask, mean, scale, shift, mean_t, slope, p, q, NORMED, COUPLED, ACT, ACC
        )
        hbar = nbar
        tbar = nbardot
        if NORMED:
            hbar = nbar * scale[None, :]
            tbar = nbardot * scale[None, :]
        if COUPLED:
            hbar += d * along[None, :] + constant[None, :] + nbardot * slope[None, :] + centred * along_tangent[None, :]
            tbar += d * along_tangent[None, :] - c[None, :]
        if BOTH:
            store(out + total + at, tbar, mask)
        hbar = hbar * coefficient(coefs, 0, LEARNED, ACC)
        if addends is not None:
            hbar += combination(addends, coefs, at, mask, 1, LEARNED, ACC)
        store(out + at, hbar, mask)


@triton.jit
def weight_gradient(of_value_d, of_tangent_d, of_tangent_tau, rstd, mean_xt):
    """The gradient of the norm's weight, from one set's sums."""
    return rstd * (of_value_d + of_tangent_tau - mean_xt * rstd * of_tangent_d)


@triton.jit(do_not_specialize=SIZES)
def second_sums_kernel(
    h, t, cot, stats, tstats, weight, bias, partial, S, L, total, chunk_rows, eps: tl.float64, p: tl.float64,
    q: tl.float64, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr,
    COUPLED: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[S, chunks, 5, C]: each chunk's sums."""
    s, chunk, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, True, ACC)
    mean_t = tl.zeros([CB], ACC)
    mean_xt = mean_t
    if COUPLED:
        mean_t = per_channel(tstats, 0, s, S, cols, column_mask, C, G)
        mean_xt = per_channel(tstats, 1, s, S, cols, column_mask, C, G)
    v, dv, c, dc, tc = sums(
        h, t, cot, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, start, stop, L, total, cols, column_mask, C, CB,
        PB, PLANE, COUPLED, ACT, ACC,
    )  # fmt: skip
    chunks = chunks_of(L, chunk_rows, PLANE)
    store_sums(partial, s, chunk, chunks, 0, 5, v, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 1, 5, dv, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 2, 5, c, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 3, 5, dc, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 4, 5, tc, cols, column_mask, C)


@triton.jit(do_not_specialize=SIZES)
def second_apply_kernel(
    h, t, cot, addends, coefs, out, stats, tstats, sets, weight, bias, S, L, total, chunk_rows, eps: tl.float64,
    p: tl.float64, q: tl.float64, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr, BOTH: tl.constexpr, ACT: tl.constexpr,
    LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out from the means over each normalised set, `sets` [5, S, G]."""
    s, _, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, NORMED, ACC)
    mean_t = tl.zeros([CB], ACC)
    mean_xt, v, dv, c, dc, tc = mean_t, mean_t, mean_t, mean_t, mean_t, mean_t
    if COUPLED:
        mean_t = per_channel(tstats, 0, s, S, cols, column_mask, C, G)
        mean_xt = per_channel(tstats, 1, s, S, cols, column_mask, C, G)
        v = per_channel(sets, 0, s, S, cols, column_mask, C, G)
        dv = per_channel(sets, 1, s, S, cols, column_mask, C, G)
        c = per_channel(sets, 2, s, S, cols, column_mask, C, G)
        dc = per_channel(sets, 3, s, S, cols, column_mask, C, G)
        tc = per_channel(sets, 4, s, S, cols, column_mask, C, G)
    apply(
        h, t, cot, addends, coefs, out, mean, rstd, scale, shift, mean_t, mean_xt, v, dv, c, dc, tc, p, q, s, start,
        stop, L, total, cols, column_mask, C, NORMED, COUPLED, BOTH, ACT, PB, PLANE, LEARNED, ACC,
    )  # fmt: skip


@triton.jit
def mean_over_set(scale, sums, column_mask, L, CPG: tl.constexpr):
    """The mean of scale times what `sums` sums, as a row."""
    return tl.zeros_like(scale) + tl.sum(tl.where(column_mask, scale * sums, 0.0), 0) / CPG / L


@triton.jit(do_not_specialize=SIZES)
def second_set_kernel(
    h, t, cot, addends, coefs, out, stats, tstats, weight, bias, parameters, S, L, total, eps: tl.float64,
    p: tl.float64, q: tl.float64, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, BOTH: tl.constexpr, ACT: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, and the sample's share of the parameters' gradients, a normalised set to a program."""
    CPG: tl.constexpr = C // G
    s, cols, column_mask = set_of(C, G, CB)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, True, ACC)
    mean_t = per_channel(tstats, 0, s, S, cols, column_mask, C, G)
    mean_xt = per_channel(tstats, 1, s, S, cols, column_mask, C, G)
    v, dv, c, dc, tc = sums(
        h, t, cot, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, 0, L, L, total, cols, column_mask, C, CB, PB,
        PLANE, True, ACT, ACC,
    )  # fmt: skip
    if parameters is not None:
        store_parameters(parameters, s, weight_gradient(dv, dc, tc, rstd, mean_xt), v, cols, column_mask, C)
    v = mean_over_set(scale, v, column_mask, L, CPG)
    dv = mean_over_set(scale, dv, column_mask, L, CPG)
    c = mean_over_set(scale, c, column_mask, L, CPG)
    dc = mean_over_set(scale, dc, column_mask, L, CPG)
    tc = mean_over_set(scale, tc, column_mask, L, CPG)
    apply(
        h, t, cot, addends, coefs, out, mean, rstd, scale, shift, mean_t, mean_xt, v, dv, c, dc, tc, p, q, s, 0, L, L,
        total, cols, column_mask, C, True, True, BOTH, ACT, PB, PLANE, LEARNED, ACC,
    )  # fmt: skip
