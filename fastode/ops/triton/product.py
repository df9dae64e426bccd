"""The convolution's kernel: what is read, multiplied and made of the result in one program. Derivation: README.md."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate_first
from .gather import convolve, norm_rows, pixels_of
from .tiles import SIZES, combination, load, per_channel, reciprocal_deviation, store, store_parameters, store_sums
from .value import moments

# A program's sums over its block: none, a row for finish.py to add up, or, of a whole set, the final numbers.
NO_SUMS, BLOCK_SUMS, SET_SUMS = (tl.constexpr(code) for code in range(3))
GEOMETRY = (*SIZES, "IH", "IW", "OH", "OW")


@triton.jit
def over_group(values, cols, C: tl.constexpr, G: tl.constexpr):
    """For each channel the sum over its group, where a program has every channel; those beyond C are zero."""
    CPG: tl.constexpr = C // G
    if G == 1:
        return tl.zeros_like(values) + tl.sum(values[:, None], 0)  # Triton 3.6 cannot compile sum(values) for sm_100
    elif CPG == 1:
        return values
    else:
        same = (cols // CPG)[:, None] == (cols // CPG)[None, :]
        return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def block_moments(value, mask, rows):
    """Per column: mean and squares about it of the `rows` rows that exist."""
    mean = tl.sum(tl.where(mask, value, 0.0), 0) / rows
    off = tl.where(mask, value - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0)


@triton.jit
def store_set(mean, squares, rows, made, s, S, cols, col_mask, C: tl.constexpr, G: tl.constexpr):
    """A sample's statistics, [2, S, G], from the moments of all its channels over `rows` pixels."""
    CPG: tl.constexpr = C // G
    middle = over_group(mean, cols, C, G) / CPG
    off = mean - middle
    squares = tl.where(col_mask, squares + rows * off * off, 0.0)
    variance = over_group(squares, cols, C, G) / CPG / rows
    first = col_mask & (cols % CPG == 0)
    tl.store(made + s * G + cols // CPG, middle, mask=first)
    tl.store(made + (S + s) * G + cols // CPG, variance, mask=first)


@triton.jit
def store_moments(
    value, mask, rows, partial, made, s, S, block, blocks, cols, col_mask, SUMS: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """The block's moments to `partial` [S, blocks, 2, C] or, where it holds whole sets, their statistics to `made`."""
    mean, squares = block_moments(value, mask, rows)
    if SUMS == BLOCK_SUMS:
        store_sums(partial, s, block, blocks, 0, 2, mean, cols, col_mask, C)
        store_sums(partial, s, block, blocks, 1, 2, squares, cols, col_mask, C)
    else:
        store_set(mean, squares, rows, made, s, S, cols, col_mask, C, G)


@triton.jit
def store_value(
    total, bias, image, out, terms, coefs, at, mask, cols, col_mask, LEARNED: tl.constexpr, ACC: tl.constexpr
):
    """image = total + bias; out = coefs[0] image + sum_i coefs[i + 1] terms[i]. Returns out as it is stored."""
    if bias is not None:
        total = total + tl.load(bias + cols, mask=col_mask, other=0.0).to(ACC)[None, :]
    if image is not None:
        store(image + at, total, mask)
    if coefs is not None:
        total = total * (tl.load(coefs).to(ACC) if LEARNED else tl.full([], coefs[0], ACC))
        if terms is not None:
            total += combination(terms, coefs, at, mask, 1, LEARNED, ACC)
    store(out + at, total, mask)
    return total.to(out.dtype.element_ty).to(ACC)


@triton.jit
def store_pulled(
    total, h, out, terms, coefs, stats, weight, bias, partial, made, eps, p, q, s, S, norm_s, norm_S, block, blocks,
    rows, at, mask, cols, col_mask, C: tl.constexpr, G: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr,
    ACT: tl.constexpr, SUMS: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """n̄ = act'(norm(h)) total where h̄ waits for other blocks, else coefs[0] h̄ + sum_i coefs[i + 1] terms[i]."""
    mean = tl.zeros(cols.shape, ACC)
    rstd = mean + 1.0
    p, q = tl.full([], p, ACC), tl.full([], q, ACC)
    mean, scale, shift, _ = norm_rows(
        stats, None, weight, bias, eps, norm_s, norm_S, cols, col_mask, 1, C, G, NORMED, False, ACC
    )
    d = load(h + at, mask, ACC) - mean[None, :]
    nbar = activate_first(d * scale[None, :] + shift[None, :] if NORMED else d, p, q, ACT) * total
    if SUMS != 0:
        first = tl.sum(nbar, 0)
        second = tl.sum(nbar * d, 0)
        if SUMS == BLOCK_SUMS:
            store_sums(partial, s, block, blocks, 0, 2, first, cols, col_mask, C)
            store_sums(partial, s, block, blocks, 1, 2, second, cols, col_mask, C)
        rstd = reciprocal_deviation(per_channel(stats, 1, norm_s, norm_S, cols, col_mask, C, G), eps, ACC)
        if SUMS == SET_SUMS and made is not None:
            store_parameters(made, s, rstd * second, first, cols, col_mask, C)
    if SUMS != BLOCK_SUMS or not COUPLED:
        hbar = nbar * scale[None, :]
        if COUPLED:
            entries = rows * (C // G)
            along = rstd * rstd * over_group(tl.where(col_mask, scale * second, 0.0), cols, C, G) / entries
            away = over_group(tl.where(col_mask, scale * first, 0.0), cols, C, G) / entries
            hbar = hbar - (load(h + at, mask, ACC) - mean[None, :]) * along[None, :] - away[None, :]  # d is not kept
        if coefs is not None:
            hbar = hbar * (tl.load(coefs).to(ACC) if LEARNED else tl.full([], coefs[0], ACC))
            if terms is not None:
                hbar += combination(terms, coefs, at, mask, 1, LEARNED, ACC)
        nbar = hbar
    store(out + at, nbar, mask)


@triton.jit(do_not_specialize=GEOMETRY)
def convolution_kernel(
    x, h_in, weight, stats_in, sets_in, weight_in, bias_in, bias, image, out, terms, coefs, h, stats, norm_weight,
    norm_bias, partial, made, S, L, IH, IW, eps_in: tl.float64, p_in: tl.float64, q_in: tl.float64, eps: tl.float64,
    p: tl.float64, q: tl.float64, KIND_IN: tl.constexpr, CI: tl.constexpr, CP: tl.constexpr, G_IN: tl.constexpr,
    NORMED_IN: tl.constexpr, COUPLED_IN: tl.constexpr, ACT_IN: tl.constexpr, SAMPLED_IN: tl.constexpr,
    CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr, PULL: tl.constexpr, G: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr,
    ACT: tl.constexpr, SAMPLED: tl.constexpr, SUMS: tl.constexpr, LEARNED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    OWN: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """A block of BM pixels and BN channels of one convolution of stride 1; programs are [S, blocks, CO / BN].

    OWN: a program has a whole sample and first computes the statistics of the input itself, PB pixels at a time.
    """
    COLUMN_BLOCKS: tl.constexpr = (CO + BN - 1) // BN
    pid = tl.program_id(0)
    blocks = tl.cdiv(L, BM)
    cols = (pid % COLUMN_BLOCKS) * BN + tl.arange(0, BN)
    col_mask = cols < CO
    block = (pid // COLUMN_BLOCKS) % blocks
    s = pid // COLUMN_BLOCKS // blocks
    exists, first, sample, i, j = pixels_of(block, L, IH, IW, BM)
    start = s.to(tl.int64) * L + first * (IH * IW)
    if OWN:
        channel = tl.arange(0, CP)
        mean, squares = moments((x,), None, None, s, 0, L, L, channel, channel < CI, CI, CP, PB, 0, False, ACC)
        store_set(mean, squares, L.to(ACC), stats_in, s, S, channel, channel < CI, CI, G_IN)
        tl.debug_barrier()  # they are read again by this program's own threads
    total = convolve(
        tl.zeros([BM, BN], ACC), x + start * CI, h_in + start * CI, weight, stats_in, sets_in,
        weight_in, bias_in, eps_in, p_in, q_in, s if SAMPLED_IN else 0, S if SAMPLED_IN else 1,
        sample * (IH * IW), i, j, exists, IH, IW, -DH * (KH // 2), -DW * (KW // 2), KH - 1 if TRANSPOSED else 0,
        KW - 1 if TRANSPOSED else 0, cols, col_mask, KIND_IN, CI, CP, CO, G_IN, NORMED_IN, COUPLED_IN, ACT_IN, KH, KW,
        KW, KH * KW, 1, DH, DW, -1 if TRANSPOSED else 1, -1 if TRANSPOSED else 1, TRANSPOSED, BK, ACC, DOT, PRECISION,
    )  # fmt: skip
    at = (s.to(tl.int64) * L + block * BM) * CO + (tl.arange(0, BM)[:, None] * CO + cols[None, :])
    mask = exists[:, None] & col_mask[None, :]
    rows = tl.minimum(L - block * BM, BM).to(ACC)
    if PULL:
        store_pulled(
            total, h, out, terms, coefs, stats, norm_weight, norm_bias, partial, made, eps, p, q, s, S,
            s if SAMPLED else 0, S if SAMPLED else 1, block, blocks, rows, at, mask, cols, col_mask, CO, G, NORMED,
            COUPLED, ACT, SUMS, LEARNED, ACC,
        )  # fmt: skip
    else:
        value = store_value(total, bias, image, out, terms, coefs, at, mask, cols, col_mask, LEARNED, ACC)
        if SUMS != 0:
            store_moments(
                value, mask, rows, partial, made, s, S, block, blocks, cols, col_mask, SUMS, CO, G
            )  # fmt: skip
