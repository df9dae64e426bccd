"""A convolution's weight gradient: a product over pixels, by chunks that are added in a fixed order. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .gather import gather, multiply, norm_rows, operand, pixels_of
from .product import GEOMETRY


@triton.jit(do_not_specialize=(*GEOMETRY, "chunk_blocks", "entries"))
def weight_gradient_kernel(
    x, h_in, stats_in, sets_in, weight_in, bias_in, g, h, stats, sets, norm_weight, norm_bias, partial, S, L, IH, IW,
    OH, OW, chunk_blocks, entries, eps_in: tl.float64, p_in: tl.float64, q_in: tl.float64, eps: tl.float64,
    p: tl.float64, q: tl.float64, KIND_IN: tl.constexpr, CI: tl.constexpr, CP: tl.constexpr, G_IN: tl.constexpr,
    NORMED_IN: tl.constexpr, COUPLED_IN: tl.constexpr, ACT_IN: tl.constexpr, SAMPLED_IN: tl.constexpr,
    KIND: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr,
    ACT: tl.constexpr, SAMPLED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BIAS: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk's share of BK taps and channels by BN channels; partial [chunks, entries]: weight, then bias.

    x is the convolution's input, g its output's cotangent, each as an operand of gather.py.
    """
    ROW_BLOCKS: tl.constexpr = (KH * KW * CP + BK - 1) // BK
    COLUMN_BLOCKS: tl.constexpr = (CO + BN - 1) // BN
    pid = tl.program_id(0)
    k = (pid % ROW_BLOCKS) * BK
    cols = (pid // ROW_BLOCKS % COLUMN_BLOCKS) * BN + tl.arange(0, BN)
    col_mask = cols < CO
    chunk = pid // ROW_BLOCKS // COLUMN_BLOCKS
    blocks = tl.cdiv(L, BP)
    total = tl.zeros([BK, BN], ACC)
    sums = tl.zeros([BP, BN], ACC)
    column = k + tl.arange(0, BK)
    channel = column % CP
    tap = column // CP
    columns = (channel < CI) & (tap < KH * KW)
    for unit in range(chunk * chunk_blocks, tl.minimum((chunk + 1) * chunk_blocks, S * blocks)):
        s, block = unit // blocks, unit % blocks
        exists, first, sample, i, j = pixels_of(block, L, OH, OW, BP)
        start = (s.to(tl.int64) * L // (OH * OW) + first) * (IH * IW) * CI
        mean, scale, third, away = norm_rows(
            stats_in, sets_in, weight_in, bias_in, eps_in, s if SAMPLED_IN else 0, S if SAMPLED_IN else 1, channel,
            columns, KIND_IN, CI, G_IN, NORMED_IN, COUPLED_IN, ACC,
        )  # fmt: skip
        offsets, mask, _, _, _ = gather(
            k, sample * (IH * IW), i, j, exists, IH, IW, -PH, -PW, CI, CP, KW, KH * KW, STEP, DH, DW, BK
        )
        a = operand(
            x + start, h_in + start, offsets, mask, mean[None, :], scale[None, :],
            third[None, :], away[None, :], p_in, q_in, KIND_IN, NORMED_IN, COUPLED_IN, ACT_IN, ACC, DOT,
        )  # fmt: skip
        mean, scale, third, away = norm_rows(
            stats, sets, norm_weight, norm_bias, eps, s if SAMPLED else 0, S if SAMPLED else 1, cols, col_mask, KIND,
            CO, G, NORMED, COUPLED, ACC,
        )  # fmt: skip
        start = (s.to(tl.int64) * L + block * BP) * CO
        b = operand(
            g + start, h + start, tl.arange(0, BP)[:, None] * CO + cols[None, :],
            exists[:, None] & col_mask[None, :], mean[None, :], scale[None, :], third[None, :], away[None, :], p, q,
            KIND, NORMED, COUPLED, ACT, ACC, DOT,
        )  # fmt: skip
        total = multiply(tl.trans(a), b, total, PRECISION)
        if BIAS:
            sums += b.to(ACC)
    at = (cols * (KH * KW))[None, :] * CI + (tap * CI + channel)[:, None]
    row = partial + chunk.to(tl.int64) * entries
    tl.store(row + at, total, mask=columns[:, None] & col_mask[None, :])
    if BIAS:
        tl.store(row + KH * KW * CI * CO + cols, tl.sum(sums, 0), mask=col_mask & (pid % ROW_BLOCKS == 0))


@triton.jit(do_not_specialize=("chunks", "entries"))
def sum_chunks_kernel(partial, out, chunks, entries, BLOCK: tl.constexpr, RB: tl.constexpr):
    """[chunks, entries] -> [entries], in double and in the chunks' order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([RB, BLOCK], tl.float64)
    for start in range(0, chunks, RB):
        rows = start + tl.arange(0, RB)
        mask = (rows < chunks)[:, None] & (at < entries)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * entries + at[None, :], mask=mask, other=0.0).to(
            tl.float64
        )
    tl.store(out + at, tl.sum(total, 0), mask=at < entries)
