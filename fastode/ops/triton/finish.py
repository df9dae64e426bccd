"""From the chunks' per-channel sums to the numbers of each normalised set, and to the parameters' gradients.

A program has one of the S samples and GB of its groups; chunks are summed RB at a time, in double and in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .second import weight_gradient
from .tiles import SIZES, reciprocal_deviation, store_parameters


@triton.jit
def groups_of(C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, CPGB: tl.constexpr):
    """This program's sample and groups; channels [GB, CPGB] of these, and which of them exist."""
    CPG: tl.constexpr = C // G
    BLOCKS: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    group = (pid % BLOCKS) * GB + tl.arange(0, GB)
    inside = tl.arange(0, CPGB)
    channel = group[:, None] * CPG + inside[None, :]
    return pid // BLOCKS, group, channel, (group < G)[:, None] & (inside < CPG)[None, :]


@triton.jit
def chunk_tile(partial, s, start, chunks, which, K: tl.constexpr, channel, mask, C: tl.constexpr, RB: tl.constexpr):
    """Sum `which` of the chunks from `start` on, [RB, GB, CPGB] in double, and which of these chunks exist."""
    chunk = start + tl.arange(0, RB)
    at = (s * chunks + chunk)[:, None, None] * (K * C) + which * C + channel[None, :, :]
    exists = (chunk < chunks)[:, None, None] & mask[None, :, :]
    return tl.load(partial + at, mask=exists, other=0.0).to(tl.float64), chunk


@triton.jit
def total_of(
    partial, s, chunks, which, K: tl.constexpr, channel, mask, C: tl.constexpr, RB: tl.constexpr, ACC: tl.constexpr
):
    """One sum over all chunks, [GB, CPGB]."""
    total = tl.zeros(channel.shape, tl.float64)
    for start in range(0, chunks, RB):
        total += tl.sum(chunk_tile(partial, s, start, chunks, which, K, channel, mask, C, RB)[0], 0)
    return total.to(ACC)


@triton.jit
def chunk_count(L, chunk_rows, spans):
    """How many chunks L pixels are in, cut span by span, all of which are equally long."""
    return spans * tl.cdiv(L // spans, chunk_rows)


@triton.jit
def rows_in(chunk, chunks, L, chunk_rows, spans):
    """The pixels of each chunk, in double; none where there is no such chunk."""
    length = L // spans
    inside = chunk % tl.cdiv(length, chunk_rows)
    return tl.where(chunk < chunks, tl.minimum(length - inside * chunk_rows, chunk_rows), 0).to(tl.float64)


@triton.jit(do_not_specialize=SIZES)
def finish_moments_kernel(
    partial, stats, S, L, chunk_rows, spans, C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, CPGB: tl.constexpr,
    RB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The chunks' means and squares about them, merged into `stats` [2, S, G]."""
    s, group, channel, mask = groups_of(C, G, GB, CPGB)
    chunks = chunk_count(L, chunk_rows, spans)
    entries = (L * (C // G)).to(tl.float64)
    total = tl.zeros(channel.shape, tl.float64)
    for start in range(0, chunks, RB):
        mean, chunk = chunk_tile(partial, s, start, chunks, 0, 2, channel, mask, C, RB)
        rows = rows_in(chunk, chunks, L, chunk_rows, spans)
        total += tl.sum(mean * rows[:, None, None], 0)
    merged = tl.sum(total, 1) / entries
    total = tl.zeros(channel.shape, tl.float64)
    for start in range(0, chunks, RB):
        mean, chunk = chunk_tile(partial, s, start, chunks, 0, 2, channel, mask, C, RB)
        squares, _ = chunk_tile(partial, s, start, chunks, 1, 2, channel, mask, C, RB)
        rows = rows_in(chunk, chunks, L, chunk_rows, spans)
        off = tl.where(mask[None, :, :], mean - merged[None, :, None], 0.0)
        total += tl.sum(squares + off * off * rows[:, None, None], 0)
    variance = tl.sum(total, 1) / entries
    tl.store(stats + s * G + group, merged.to(ACC), mask=group < G)
    tl.store(stats + (S + s) * G + group, variance.to(ACC), mask=group < G)


@triton.jit
def set_statistics(stats, s, S, channel, group, mask, eps, G: tl.constexpr, ACC: tl.constexpr):
    """rstd of each channel's set, [GB, CPGB]."""
    variance = tl.load(stats + (S + s) * G + group, mask=group < G, other=0.0)
    return tl.zeros(channel.shape, ACC) + reciprocal_deviation(variance, eps, ACC)[:, None]


@triton.jit
def store_set_mean(sets, which: tl.constexpr, s, S, group, scale, total, entries, G: tl.constexpr):
    """sets[which, s, group] = the mean of scale times what `total` sums."""
    tl.store(sets + (which * S + s) * G + group, tl.sum(scale * total, 1) / entries, mask=group < G)


@triton.jit(do_not_specialize=SIZES)
def finish_sums_kernel(
    partial, stats, tstats, weight, sets, parameters, S, L, chunk_rows, spans, eps: tl.float64, C: tl.constexpr,
    G: tl.constexpr, GB: tl.constexpr, CPGB: tl.constexpr, RB: tl.constexpr, K: tl.constexpr, TANGENT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The means over each set, `sets` [K, S, G], and the samples' shares of the parameters' gradients, [S, C] each.

    The sums are those of a cotangent (K = 2), of second order (K = 5) or, if TANGENT, of t and t (h - mean), whose
    means are those of t and x̂ t.
    """
    s, group, channel, mask = groups_of(C, G, GB, CPGB)
    chunks = chunk_count(L, chunk_rows, spans)
    entries = (L * (C // G)).to(ACC)
    rstd = set_statistics(stats, s, S, channel, group, mask, eps, G, ACC)
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + channel, mask=mask, other=0.0)
    first = total_of(partial, s, chunks, 0, K, channel, mask, C, RB, ACC)
    second = total_of(partial, s, chunks, 1, K, channel, mask, C, RB, ACC)
    if TANGENT:
        store_set_mean(sets, 0, s, S, group, 1.0, first, entries, G)
        store_set_mean(sets, 1, s, S, group, rstd, second, entries, G)
    else:
        if sets is not None:
            store_set_mean(sets, 0, s, S, group, scale, first, entries, G)
            store_set_mean(sets, 1, s, S, group, scale, second, entries, G)
        weight_bar = rstd * second
        if K == 5:
            third = total_of(partial, s, chunks, 2, K, channel, mask, C, RB, ACC)
            fourth = total_of(partial, s, chunks, 3, K, channel, mask, C, RB, ACC)
            fifth = total_of(partial, s, chunks, 4, K, channel, mask, C, RB, ACC)
            mean_xt = tl.zeros(channel.shape, ACC)
            if sets is not None:
                store_set_mean(sets, 2, s, S, group, scale, third, entries, G)
                store_set_mean(sets, 3, s, S, group, scale, fourth, entries, G)
                store_set_mean(sets, 4, s, S, group, scale, fifth, entries, G)
                mean_xt += tl.load(tstats + (S + s) * G + group, mask=group < G, other=0.0)[:, None]
            weight_bar = weight_gradient(second, fourth, fifth, rstd, mean_xt)
        if parameters is not None:
            store_parameters(parameters, s, weight_bar, first, channel, mask, C)


@triton.jit(do_not_specialize=SIZES)
def sum_samples_kernel(parameters, outs, S, C: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr):
    """Two arrays [S, C] -> two arrays [C]: the samples' shares of the parameters' gradients, in double and in order."""
    cols = tl.program_id(0) * CB + tl.arange(0, CB)
    for which in tl.static_range(2):
        total = tl.zeros([RB, CB], tl.float64)
        for start in range(0, S, RB):
            rows = start + tl.arange(0, RB)
            mask = (rows < S)[:, None] & (cols < C)[None, :]
            total += tl.load(parameters[which] + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float64)
        tl.store(outs[which] + cols, tl.sum(total, 0).to(outs[which].dtype.element_ty), mask=cols < C)
