"""A convolution as one product of matrices: which pixels and taps a program reads, and the product. See README.md.

An output pixel (i, j) reads the input at (STEP i + dy, STEP j + dx). In a column of the kernel tap t = 0 … TH - 1 has
dy = dy0 + DYT t, and its weight is in row kh0 + KHT t of the kernel; dx likewise. The columns of the left matrix are
the taps with their channels, in CP, a power of two, places each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .activation import activate
from .tiles import affine_rows, load, per_channel, reciprocal_deviation

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# What an operand is made of: the map itself; act(norm(map)); the cotangent of a norm's input.
PLAIN, VALUE, PULLED = (tl.constexpr(code) for code in range(3))


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b. Interpreted, bfloat16 is widened first: NumPy would multiply its bits as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def pixels_of(block, L, OH, OW, BM: tl.constexpr):
    """This block's rows, which of them exist, the first one's sample, and each row's sample from there on, i and j."""
    rows = block * BM + tl.arange(0, BM)
    sample = rows // (OH * OW)
    inside = rows - sample * (OH * OW)
    first = block * BM // (OH * OW)
    i = inside // OW
    return rows < L, first, sample - first, i, inside - i * OW


@triton.jit
def norm_rows(
    stats, sets, weight, bias, eps, s, S, cols, column_mask, KIND: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    NORMED: tl.constexpr, COUPLED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per channel: mean, scale, and of VALUE the shift, of PULLED the factor of h - mean; and what is taken away."""
    mean = tl.zeros(cols.shape, ACC)
    rstd = mean + 1.0
    along, away = mean, mean
    if NORMED:
        mean = per_channel(stats, 0, s, S, cols, column_mask, C, G)
        rstd = reciprocal_deviation(per_channel(stats, 1, s, S, cols, column_mask, C, G), eps, ACC)
    scale, shift = affine_rows(rstd, weight, bias, cols, column_mask)
    if KIND == PULLED:
        if COUPLED:
            along = -rstd * rstd * per_channel(sets, 1, s, S, cols, column_mask, C, G)
            away = per_channel(sets, 0, s, S, cols, column_mask, C, G)
        return mean, scale, along, away
    else:
        return mean, scale, shift, away


@triton.jit
def operand(
    x, h, at, mask, mean, scale, third, away, p, q, KIND: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The operand at the places `at`, zero where the mask is false: padding is of the finished map."""
    if KIND == PLAIN:
        return tl.load(x + at, mask=mask, other=0.0).to(DOT)
    else:
        value = load(x + at, mask, ACC)
        if KIND == VALUE:
            if NORMED:
                value = (value - mean) * scale + third
            value = tl.where(mask, activate(value, tl.full([], p, ACC), tl.full([], q, ACC), ACT), 0.0)
        else:
            if NORMED:
                value = value * scale
            if COUPLED:
                value = value + (load(h + at, mask, ACC) - mean) * third - away
                value = tl.where(mask, value, 0.0)
        return value.to(DOT)


@triton.jit
def gather(
    k, base, i, j, exists, IH, IW, dy0, dx0, CI: tl.constexpr, CP: tl.constexpr, TW: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, DYT: tl.constexpr, DXT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns k … k + BK of the left matrix: offsets [BM, BK] from the first sample's start, which of them exist,
    their taps, channels and which columns exist.
    """
    ONE_TAP: tl.constexpr = BK <= CP
    if ONE_TAP:
        tap = k // CP
        channel = k - tap * CP + tl.arange(0, BK)
    else:
        column = k + tl.arange(0, BK)
        tap = column // CP
        channel = column - tap * CP
    dy = dy0 + DYT * (tap // TW)
    dx = dx0 + DXT * (tap % TW)
    shift = (dy * IW + dx) * CI + channel
    offsets = (base + i * (STEP * IW) + j * STEP)[:, None] * CI + shift[None, :]
    if ONE_TAP:
        y, x = i * STEP + dy, j * STEP + dx
        reached = (exists & (y >= 0) & (y < IH) & (x >= 0) & (x < IW))[:, None]
    else:
        y, x = (i * STEP)[:, None] + dy[None, :], (j * STEP)[:, None] + dx[None, :]
        reached = exists[:, None] & (y >= 0) & (y < IH) & (x >= 0) & (x < IW)
    columns = (channel < CI) & (tap < TAPS)
    return offsets, reached & columns[None, :], tap, channel, columns


@triton.jit
def weight_tile(
    weight, tap, channel, columns, out, out_mask, kh0, kw0, CI: tl.constexpr, CO: tl.constexpr, TW: tl.constexpr,
    KW: tl.constexpr, KTAPS: tl.constexpr, KHT: tl.constexpr, KWT: tl.constexpr, TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """[BK, BN] of a weight that lies as [out, kernel's rows, its columns, in]; TRANSPOSED: out and in change places."""
    place = (kh0 + KHT * (tap // TW)) * KW + kw0 + KWT * (tap % TW)
    if TRANSPOSED:
        at = ((channel * KTAPS + place) * CO)[:, None] + out[None, :]
    else:
        at = (place * CI + channel)[:, None] + (out * (KTAPS * CI))[None, :]
    return tl.load(weight + at, mask=columns[:, None] & out_mask[None, :], other=0.0).to(DOT)


@triton.jit
def convolve(
    total, x, h, weight, stats, sets, norm_weight, norm_bias, eps, p, q, s, S, base, i, j, exists, IH, IW, dy0, dx0,
    kh0, kw0, out, out_mask, KIND: tl.constexpr, CI: tl.constexpr, CP: tl.constexpr, CO: tl.constexpr,
    G: tl.constexpr, NORMED: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, TH: tl.constexpr,
    TW: tl.constexpr, KW: tl.constexpr, KTAPS: tl.constexpr, STEP: tl.constexpr, DYT: tl.constexpr, DXT: tl.constexpr,
    KHT: tl.constexpr, KWT: tl.constexpr, TRANSPOSED: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the sum over taps and channels, [BM, BN]; x and h start at the block's first sample."""
    TAPS: tl.constexpr = TH * TW
    HOISTED: tl.constexpr = BK >= CP  # every step of the loop then has the same channels
    if HOISTED:
        fixed = tl.arange(0, BK) % CP
        mean, scale, third, away = norm_rows(
            stats, sets, norm_weight, norm_bias, eps, s, S, fixed, fixed < CI, KIND, CI, G, NORMED, COUPLED, ACC
        )
    for k in range(0, TAPS * CP, BK):
        offsets, mask, tap, channel, columns = gather(
            k, base, i, j, exists, IH, IW, dy0, dx0, CI, CP, TW, TAPS, STEP, DYT, DXT, BK
        )
        if not HOISTED:
            mean, scale, third, away = norm_rows(
                stats, sets, norm_weight, norm_bias, eps, s, S, channel, columns, KIND, CI, G, NORMED, COUPLED, ACC
            )
        a = operand(
            x, h, offsets, mask, mean[None, :], scale[None, :], third[None, :], away[None, :], p, q, KIND, NORMED,
            COUPLED, ACT, ACC, DOT,
        )  # fmt: skip
        b = weight_tile(
            weight, tap, channel, columns, out, out_mask, kh0, kw0, CI, CO, TW, KW, KTAPS, KHT, KWT, TRANSPOSED, DOT
        )
        total = multiply(a, b, total, PRECISION)
    return total
