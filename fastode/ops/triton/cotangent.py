"""norm -> activation, pulled back: the cotangent of the input and of the norm's parameters. Formulas: README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate_first
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
def centred_cotangent(
    h, cot, at, mask, mean, scale, shift, p, q, NORMED: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr
):
    """h - mean, and the cotangent of the norm's output n."""
    d = load(h + at, mask, ACC)
    n = d
    if NORMED:
        d = d - mean[None, :]
        n = d * scale[None, :] + shift[None, :]
    return d, activate_first(n, p, q, ACT) * load(cot + at, mask, ACC)


@triton.jit
def sums(
    h, cot, mean, scale, shift, p, q, s, start, stop, L, cols, column_mask, C: tl.constexpr, CB: tl.constexpr,
    PB: tl.constexpr, PLANE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per column, over the rows from `start` to `stop`: the sums of n̄ and of n̄ (h - mean)."""
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    first = tl.zeros([PB, CB], ACC)
    second = tl.zeros([PB, CB], ACC)
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, 0, C, True, PB, PLANE)
        d, nbar = centred_cotangent(h, cot, begin + offsets, mask, mean, scale, shift, p, q, True, ACT, ACC)
        first += nbar
        second += nbar * d
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def apply(
    h, cot, addends, coefs, out, mean, rstd, scale, shift, mean_v, mean_dv, p, q, s, start, stop, L, total, cols,
    column_mask, C: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = coefs[0] h̄ + sum_i coefs[i + 1] addends[i]; mean_v and mean_dv: of v = scale n̄ and of (h - mean) v."""
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    along = -rstd * rstd * mean_dv
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, total, C, NORMED, PB, PLANE)
        at = begin + offsets
        d, hbar = centred_cotangent(h, cot, at, mask, mean, scale, shift, p, q, NORMED, ACT, ACC)
        if NORMED:
            hbar = hbar * scale[None, :]
        if COUPLED:
            hbar = hbar + d * along[None, :] - mean_v[None, :]
        hbar = hbar * coefficient(coefs, 0, LEARNED, ACC)
        if addends is not None:
            hbar += combination(addends, coefs, at, mask, 1, LEARNED, ACC)
        store(out + at, hbar, mask)


@triton.jit(do_not_specialize=SIZES)
def cotangent_sums_kernel(
    h, cot, stats, weight, bias, partial, S, L, chunk_rows, eps: tl.float64, p: tl.float64, q: tl.float64,
    C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[S, chunks, 2, C]: each chunk's sums."""
    s, chunk, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, _, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, True, ACC)
    first, second = sums(
        h, cot, mean, scale, shift, p, q, s, start, stop, L, cols, column_mask, C, CB, PB, PLANE, ACT, ACC
    )  # fmt: skip
    chunks = chunks_of(L, chunk_rows, PLANE)
    store_sums(partial, s, chunk, chunks, 0, 2, first, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 1, 2, second, cols, column_mask, C)


@triton.jit(do_not_specialize=SIZES)
def cotangent_apply_kernel(
    h, cot, addends, coefs, out, stats, sets, weight, bias, S, L, total, chunk_rows, eps: tl.float64, p: tl.float64,
    q: tl.float64, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr,
    NORMED: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out from the means over each normalised set, `sets` [2, S, G]."""
    s, _, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, NORMED, ACC)
    mean_v = mean
    mean_dv = mean
    if COUPLED:
        mean_v = per_channel(sets, 0, s, S, cols, column_mask, C, G)
        mean_dv = per_channel(sets, 1, s, S, cols, column_mask, C, G)
    apply(
        h, cot, addends, coefs, out, mean, rstd, scale, shift, mean_v, mean_dv, p, q, s, start, stop, L, total, cols,
        column_mask, C, NORMED, COUPLED, ACT, PB, PLANE, LEARNED, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def cotangent_set_kernel(
    h, cot, addends, coefs, out, stats, weight, bias, parameters, S, L, eps: tl.float64, p: tl.float64, q: tl.float64,
    C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, ACT: tl.constexpr,
    LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, and the sample's share of the parameters' gradients, a normalised set to a program."""
    CPG: tl.constexpr = C // G
    s, cols, column_mask = set_of(C, G, CB)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, True, ACC)
    first, second = sums(h, cot, mean, scale, shift, p, q, s, 0, L, L, cols, column_mask, C, CB, PB, PLANE, ACT, ACC)
    if parameters is not None:
        store_parameters(parameters, s, rstd * second, first, cols, column_mask, C)
    zero = tl.zeros([CB], ACC)
    mean_v = zero + tl.sum(tl.where(column_mask, scale * first, 0.0), 0) / CPG / L
    mean_dv = zero + tl.sum(tl.where(column_mask, scale * second, 0.0), 0) / CPG / L
    apply(
        h, cot, addends, coefs, out, mean, rstd, scale, shift, mean_v, mean_dv, p, q, s, 0, L, L, 0, cols,
        column_mask, C, True, True, ACT, PB, PLANE, LEARNED, ACC,
    )  # fmt: skip
