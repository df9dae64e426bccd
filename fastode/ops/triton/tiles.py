"""What every kernel shares: which part of the map a program has, and the per-channel rows of a norm.

A map is [S, L, C]: S samples of L pixels. GroupNorm: S = N, L = H W. BatchNorm in training is the same with
S = 1, L = N H W and one channel in a group; fixed statistics likewise. Without a norm the map is a flat array, C is
only a width, and `total` cuts off the last row.

PLANE is 0 where the map is channels_last, and H W where it is NCHW: then a tile has pixels of one sample only.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton would otherwise compile a kernel again where one of these is 1 or a multiple of 16.
SIZES = ("S", "L", "chunk_rows", "spans", "count")


@triton.jit
def coefficient(coefs, i: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr):
    """coefs[i]: loaded where it is a tensor on the device, else an argument of the kernel."""
    if LEARNED:
        return tl.load(coefs + i).to(ACC)
    else:
        return tl.full([], coefs[i], ACC)


@triton.jit
def combination(terms, coefs, at, mask, FIRST: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr):
    """sum_i coefs[FIRST + i] terms[i] at the places `at`."""
    total = coefficient(coefs, FIRST, LEARNED, ACC) * load(terms[0] + at, mask, ACC)
    for i in tl.static_range(1, len(terms)):
        total += coefficient(coefs, FIRST + i, LEARNED, ACC) * load(terms[i] + at, mask, ACC)
    return total


@triton.jit
def load(pointers, mask, ACC: tl.constexpr):
    """Entries in the accumulator's type: no arithmetic is done in bfloat16."""
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(pointers, value, mask):
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def chunks_of(L, chunk_rows, PLANE: tl.constexpr):
    """How many chunks L pixels are in; of an NCHW map none has pixels of two samples."""
    if PLANE == 0:
        return tl.cdiv(L, chunk_rows)
    else:
        return (L // PLANE) * tl.cdiv(PLANE, chunk_rows)


@triton.jit
def chunk_of(L, chunk_rows, C: tl.constexpr, CB: tl.constexpr, PLANE: tl.constexpr):
    """This program's sample, chunk, first and last row, columns and their mask; programs are [S, chunks, C / CB]."""
    COLUMN_BLOCKS: tl.constexpr = (C + CB - 1) // CB
    chunks = chunks_of(L, chunk_rows, PLANE)
    pid = tl.program_id(0)
    cols = (pid % COLUMN_BLOCKS) * CB + tl.arange(0, CB)
    chunk = (pid // COLUMN_BLOCKS) % chunks
    if PLANE == 0:
        start = chunk * chunk_rows
        stop = tl.minimum(start + chunk_rows, L)
    else:
        of_sample = tl.cdiv(PLANE, chunk_rows)
        first = chunk // of_sample * PLANE
        start = first + chunk % of_sample * chunk_rows
        stop = tl.minimum(start + chunk_rows, first + PLANE)
    return pid // COLUMN_BLOCKS // chunks, chunk, start, stop, cols, cols < C


@triton.jit
def set_of(C: tl.constexpr, G: tl.constexpr, CB: tl.constexpr):
    """This program's sample, columns and their mask: programs run over the normalised sets [S, G]."""
    CPG: tl.constexpr = C // G
    pid = tl.program_id(0)
    inside = tl.arange(0, CB)
    return pid // G, (pid % G) * CPG + inside, inside < CPG


@triton.jit
def tile(
    s, row, L, cols, column_mask, total, C: tl.constexpr, NORMED: tl.constexpr, PB: tl.constexpr, PLANE: tl.constexpr
):
    """Where [PB, CB] entries from `row` on are, as (scalar start, offsets from it), and which of them exist."""
    rows = tl.arange(0, PB)
    if PLANE == 0:
        start = (s.to(tl.int64) * L + row) * C
        offsets = rows[:, None] * C + cols[None, :]
        exists = (row + rows < L)[:, None] & column_mask[None, :] if NORMED else offsets < total - start
    else:
        first = row // PLANE * PLANE  # of this sample
        inside = tl.multiple_of(row - first, PB)  # chunks are whole tiles
        start = (s.to(tl.int64) * L + first) * C + inside
        offsets = rows[:, None] + (cols * PLANE)[None, :]
        exists = (inside + rows < PLANE)[:, None] & column_mask[None, :]
    return start, offsets, exists


@triton.jit
def per_channel(values, which: tl.constexpr, s, S, cols, column_mask, C: tl.constexpr, G: tl.constexpr):
    """values[which, s, group of each column] of an array [.., S, G]."""
    return tl.load(values + (which * S + s) * G + cols // (C // G), mask=column_mask, other=0.0)


@triton.jit
def value_rows(
    stats, weight, bias, eps, s, S, cols, column_mask,
    C: tl.constexpr, G: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of the value map n = (h - mean) * scale + shift: mean, rstd, scale, shift."""
    if NORMED:
        mean = per_channel(stats, 0, s, S, cols, column_mask, C, G)
        rstd = reciprocal_deviation(per_channel(stats, 1, s, S, cols, column_mask, C, G), eps, ACC)
    else:
        mean = tl.zeros(cols.shape, ACC)
        rstd = mean + 1.0
    scale, shift = affine_rows(rstd, weight, bias, cols, column_mask)
    return mean, rstd, scale, shift


@triton.jit
def reciprocal_deviation(variance, eps, ACC: tl.constexpr):
    return 1.0 / tl.sqrt(variance + tl.full([], eps, ACC))


@triton.jit
def affine_rows(rstd, weight, bias, cols, column_mask):
    """rstd times the norm's weight, and its bias."""
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + cols, mask=column_mask, other=0.0)
    shift = tl.zeros_like(rstd)
    if bias is not None:
        shift = tl.load(bias + cols, mask=column_mask, other=0.0)
    return scale, shift


@triton.jit
def welford(h, mean, squares, mask, count):
    """Running mean and squares about it, entry by entry, after tile `count`: no digit is lost to a large mean."""
    off = tl.where(mask, h - mean, 0.0)
    mean += off * (1.0 / count)
    squares += tl.where(mask, off * (h - mean), 0.0)
    return mean, squares


@triton.jit
def merge_rows(mean, squares, rows_seen, PB: tl.constexpr):
    """The tile's running moments, merged over its PB rows: per column, over `rows_seen` pixels."""
    seen = ((rows_seen - tl.arange(0, PB) + PB - 1) // PB).to(mean.dtype)[:, None]
    merged = tl.sum(mean * seen, 0) / rows_seen
    off = mean - merged[None, :]
    return merged, tl.sum(squares + seen * off * off, 0)


@triton.jit
def store_sums(partial, s, chunk, chunks, which: tl.constexpr, K: tl.constexpr, sums, cols, mask, C: tl.constexpr):
    """One of K per-channel sums of one chunk, into [S, chunks, K, C]."""
    tl.store(partial + (((s * chunks + chunk) * K + which) * C + cols), sums, mask=mask)


@triton.jit
def store_parameters(parameters, s, weight_bar, bias_bar, cols, mask, C: tl.constexpr):
    """One sample's gradients of the norm's weight and bias, into two arrays [S, C]."""
    tl.store(parameters[0] + s * C + cols, weight_bar, mask=mask)
    tl.store(parameters[1] + s * C + cols, bias_bar, mask=mask)
