"""norm -> activation of a combination: its statistics, and the value. Formulas: README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .tiles import (
    SIZES,
    affine_rows,
    chunk_of,
    chunks_of,
    combination,
    load,
    merge_rows,
    reciprocal_deviation,
    set_of,
    store,
    store_sums,
    tile,
    value_rows,
    welford,
)


@triton.jit
def point(terms, coefs, u, at, mask, LEARNED: tl.constexpr, ACC: tl.constexpr):
    """The combination, also written to `u` if wanted, and then as rounded there; without coefs a term."""
    h = load(terms[0] + at, mask, ACC) if coefs is None else combination(terms, coefs, at, mask, 0, LEARNED, ACC)
    if u is not None:
        store(u + at, h, mask)
        h = h.to(u.dtype.element_ty).to(ACC)
    return h


@triton.jit
def moments(
    terms, coefs, u, s, start, stop, L, cols, column_mask, C: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per column: mean and squares about it, over the rows from `start` to `stop`."""
    mean = tl.zeros([PB, CB], ACC)
    squares = tl.zeros([PB, CB], ACC)
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, 0, C, True, PB, PLANE)
        h = point(terms, coefs, u, begin + offsets, mask, LEARNED, ACC)
        count = (row - start) // PB + 1
        mean, squares = welford(h, mean, squares, mask, count.to(ACC))
    return merge_rows(mean, squares, stop - start, PB)


@triton.jit
def apply(
    terms, coefs, u, a, mean, scale, shift, p, q, s, start, stop, L, total, cols, column_mask, C: tl.constexpr,
    NORMED: tl.constexpr, ACT: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, LEARNED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """a = act((h - mean) * scale + shift) over the rows from `start` to `stop`."""
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    for row in range(start, stop, PB):
        begin, offsets, mask = tile(s, row, L, cols, column_mask, total, C, NORMED, PB, PLANE)
        h = point(terms, coefs, u, begin + offsets, mask, LEARNED, ACC)
        if NORMED:
            h = (h - mean[None, :]) * scale[None, :] + shift[None, :]
        store(a + begin + offsets, activate(h, p, q, ACT), mask)


@triton.jit(do_not_specialize=SIZES)
def value_moments_kernel(
    terms, coefs, u, partial, L, chunk_rows,
    C: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[S, chunks, 2, C]: each chunk's mean and squares about it; writes u."""
    s, chunk, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, squares = moments(terms, coefs, u, s, start, stop, L, cols, column_mask, C, CB, PB, PLANE, LEARNED, ACC)
    chunks = chunks_of(L, chunk_rows, PLANE)
    store_sums(partial, s, chunk, chunks, 0, 2, mean, cols, column_mask, C)
    store_sums(partial, s, chunk, chunks, 1, 2, squares, cols, column_mask, C)


@triton.jit(do_not_specialize=SIZES)
def value_apply_kernel(
    terms, coefs, u, a, stats, weight, bias, S, L, total, chunk_rows, eps: tl.float64, p: tl.float64, q: tl.float64,
    C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, NORMED: tl.constexpr,
    ACT: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u and a from known statistics."""
    s, _, start, stop, cols, column_mask = chunk_of(L, chunk_rows, C, CB, PLANE)
    mean, _, scale, shift = value_rows(stats, weight, bias, eps, s, S, cols, column_mask, C, G, NORMED, ACC)
    apply(
        terms, coefs, u, a, mean, scale, shift, p, q, s, start, stop, L, total, cols, column_mask, C, NORMED, ACT, PB,
        PLANE, LEARNED, ACC,
    )  # fmt: skip


@triton.jit
def set_moments(
    terms, coefs, u, stats, s, S, L, cols, column_mask, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr,
    PB: tl.constexpr, PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and variance of this program's set, also written to `stats`."""
    CPG: tl.constexpr = C // G
    means, squares = moments(terms, coefs, u, s, 0, L, L, cols, column_mask, C, CB, PB, PLANE, LEARNED, ACC)
    mean = tl.sum(tl.where(column_mask, means, 0.0), 0) / CPG
    off = means - mean
    variance = tl.sum(tl.where(column_mask, squares + off * off * L, 0.0), 0) / CPG / L
    tl.store(stats + tl.program_id(0), mean)
    tl.store(stats + S * G + tl.program_id(0), variance)
    return mean, variance


@triton.jit(do_not_specialize=SIZES)
def set_moments_kernel(
    terms, coefs, u, stats, S, L, C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    PLANE: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u and its statistics alone, a normalised set to a program."""
    s, cols, column_mask = set_of(C, G, CB)
    set_moments(terms, coefs, u, stats, s, S, L, cols, column_mask, C, G, CB, PB, PLANE, LEARNED, ACC)


@triton.jit(do_not_specialize=SIZES)
def value_set_kernel(
    terms, coefs, u, a, stats, weight, bias, S, L, eps: tl.float64, p: tl.float64, q: tl.float64,
    C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr, ACT: tl.constexpr,
    LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u, a and the statistics, a normalised set to a program: the second sweep finds the set in cache."""
    s, cols, column_mask = set_of(C, G, CB)
    mean, variance = set_moments(
        terms, coefs, u, stats, s, S, L, cols, column_mask, C, G, CB, PB, PLANE, LEARNED, ACC
    )  # fmt: skip
    rstd = tl.zeros([CB], ACC) + reciprocal_deviation(variance, eps, ACC)
    scale, shift = affine_rows(rstd, weight, bias, cols, column_mask)
    mean_row = tl.zeros([CB], ACC) + mean
    if u is None:
        apply(
            terms, coefs, None, a, mean_row, scale, shift, p, q, s, 0, L, L, 0, cols, column_mask, C, True, ACT, PB,
            PLANE, LEARNED, ACC,
        )  # fmt: skip
    else:
        tl.debug_barrier()  # u was written by this program's own threads
        apply(
            (u,), None, None, a, mean_row, scale, shift, p, q, s, 0, L, L, 0, cols, column_mask, C, True, ACT, PB,
            PLANE, LEARNED, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def combine_pair_kernel(
    first, second, coefs, out, total, LEARNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Two combinations one after the other; the first half of the programs makes the first."""
    blocks = tl.cdiv(total, BLOCK)
    block = tl.program_id(0) % blocks
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    if tl.program_id(0) < blocks:
        store(out + at, combination(first, coefs, at, mask, 0, LEARNED, ACC), mask)
    else:
        store(out + total + at, combination(second, coefs, at, mask, len(first), LEARNED, ACC), mask)


@triton.jit(do_not_specialize=SIZES)
def dots_partial_kernel(v, terms, partial, total, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """[terms, programs]: each block's inner products of v with the terms."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    cotangent = load(v + at, mask, ACC)
    for i in tl.static_range(len(terms)):
        product = tl.sum(cotangent * load(terms[i] + at, mask, ACC), 0)
        tl.store(partial + i * tl.num_programs(0) + tl.program_id(0), product)


@triton.jit(do_not_specialize=SIZES)
def dots_finish_kernel(partial, out, count, BLOCK: tl.constexpr):
    """A term to a program: the sum of its blocks' products, in double and in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + tl.program_id(0) * count + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(total, 0).to(out.dtype.element_ty))
