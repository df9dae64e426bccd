"""norm -> activation and its tangent beside it, stacked along the batch. Formulas: README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, activate_first
from .tiles import SIZES, chunk_of, chunks_of, load, per_channel, set_of, store, store_sums, tile, value_rows


@triton.jit
def sums(
    h, t, mean, s, start, stop, L, cols, column_mask, C: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per column, over the rows from `start` to `stop`: the sums of t and of t (h - mean)."""
    first = tl.zeros([PB, CB], ACC)
    second = tl.zeros([PB, CB], ACC)
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, 0, C, True, PB, PLANE)
        tangent = load(t + begin + offsets, mask, ACC)
        first += tangent
        second += tangent * (load(h + begin + offsets, mask, ACC) - mean[None, :])
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def apply(
    h, t, stacked, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, start, stop, L, total, cols, column_mask,
    C: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The value, and `total` entries behind it the tangent."""
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    slope = -scale * rstd * mean_xt
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, total, C, NORMED, PB, PLANE)
        at = begin + offsets
        n = load(h + at, mask, ACC)
        ndot = load(t + at, mask, ACC)
        if NORMED:
            d = n - mean[None, :]
            n = d * scale[None, :] + shift[None, :]
            ndot = (ndot - mean_t[None, :]) * scale[None, :]
            if COUPLED:
                ndot += d * slope[None, :]
        store(stacked + at, activate(n, p, q, ACT), mask)
        store(stacked + total + at, activate_first(n, p, q, ACT) * ndot, mask)


@triton.jit(do_not_specialize=SIZES)
def tangent_sums_kernel(
    h, t, stats, partial, S, L, chunk_rows, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[S, chunks, 2, C]: each chunk's sums."""
    s, chunk, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean = per_channel(stats, 0, s, S, cols, column_mask, C, G)
    first, second = sums(h, t, mean, s, start, stop, L, cols, column_mask, C, CB, PB, PLANE, ACC)
    chunks = chunks_of(L, chunk_rows, PLANE)
    store_sums(partial, s, chunk, chunks, 0, 2, first, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 1, 2, second, cols, column_mask, C)


@triton.jit(do_not_specialize=SIZES)
def tangent_apply_kernel(
    h, t, stacked, stats, tstats, weight, bias, S, L, total, chunk_rows, eps: tl.float64, p: tl.float64,
    q: tl.float64, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr,
    NORMED: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value and tangent from known statistics of both."""
    s, _, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, NORMED, ACC)
    mean_t = tl.zeros([CB], ACC)
    mean_xt = mean_t
    if COUPLED:
        mean_t = per_channel(tstats, 0, s, S, cols, column_mask, C, G)
        mean_xt = per_channel(tstats, 1, s, S, cols, column_mask, C, G)
    apply(
        h, t, stacked, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, start, stop, L, total, cols, column_mask, C,
        NORMED, COUPLED, ACT, PB, PLANE, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def tangent_set_kernel(
    h, t, stacked, stats, tstats, weight, bias, S, L, total, eps: tl.float64, p: tl.float64, q: tl.float64,
    C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Value, tangent and the tangent's statistics, a normalised set to a program."""
    CPG: tl.constexpr = C // G
    s, cols, column_mask = set_of(C, G, CB)
    mean, rstd, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, True, ACC)
    first, second = sums(h, t, mean, s, 0, L, L, cols, column_mask, C, CB, PB, PLANE, ACC)
    mean_t = tl.zeros([CB], ACC) + tl.sum(first, 0) / CPG / L
    mean_xt = rstd * (tl.sum(second, 0) / CPG / L)
    inside = tl.arange(0, CB)
    tl.store(tstats + tl.program_id(0) + inside, mean_t, mask=inside < 1)
    tl.store(tstats + S * G + tl.program_id(0) + inside, mean_xt, mask=inside < 1)
    apply(
        h, t, stacked, mean, rstd, scale, shift, mean_t, mean_xt, p, q, s, 0, L, L, total, cols, column_mask, C, True,
        True, ACT, PB, PLANE, ACC,
    )  # fmt: skip
