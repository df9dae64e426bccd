"""The skew pair's kernel: W ẑ and Wᵀ ŷ in one launch, with what is read and made of them. Derivation: README.md.

A program has BM pixels of y and the STRIDE² pixels of z under each. It takes these by parity, the remainder of their
coordinates by STRIDE: a tap of the kernel belongs to one parity, so that it is read once for both halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .gather import PLAIN, VALUE, convolve, gather, multiply, norm_rows, operand, pixels_of, weight_tile
from .product import block_moments
from .tiles import SIZES, load, per_channel, store, store_sums


@triton.jit
def first_tap(parity, PAD: tl.constexpr, STRIDE: tl.constexpr):
    """For the pixels of z of one parity, along one side: where in y the first tap reads, and its row in the kernel."""
    row = (parity + PAD) % STRIDE
    return (parity + PAD - row) // STRIDE, row


@triton.jit
def store_half(
    total, factor, damping, x, at, mask, stats, weight, bias, eps, p, q, image, out, h, partial, s, norm_s, norm_S,
    chunk, chunks, rows, cols, col_mask, C: tl.constexpr, G: tl.constexpr, NORMED: tl.constexpr, DAMPED: tl.constexpr,
    ACT: tl.constexpr, PULL: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """v = factor total + damping norm(x): σ(v) to `out` and v to `image`; or, PULL, v, a norm's cotangent, to `out`.

    `partial` gets the block's sums: the moments of `out`, or those that a cotangent needs.
    """
    value = total * tl.full([], factor, ACC)
    if DAMPED:
        READ: tl.constexpr = NORMED and not PULL
        mean, scale, shift, away = norm_rows(
            stats, None, weight, bias, eps, norm_s, norm_S, cols, col_mask, VALUE, C, G, READ, False, ACC
        )
        state = operand(
            x, x, at, mask, mean[None, :], scale[None, :], shift[None, :], away[None, :], 0.0, 0.0,
            VALUE if READ else PLAIN, READ, False, 0, ACC, ACC,
        )  # fmt: skip
        value += tl.full([], damping, ACC) * state
    if PULL:
        store(out + at, value, mask)
        if SUMS:
            d = load(h + at, mask, ACC) - per_channel(stats, 0, norm_s, norm_S, cols, col_mask, C, G)[None, :]
            store_sums(partial, s, chunk, chunks, 0, 2, tl.sum(value, 0), cols, col_mask, C)
            store_sums(partial, s, chunk, chunks, 1, 2, tl.sum(value * d, 0), cols, col_mask, C)
    else:
        if image is not None:
            store(image + at, value, mask)
        value = activate(value, tl.full([], p, ACC), tl.full([], q, ACC), ACT)
        store(out + at, value, mask)
        if SUMS:
            mean, squares = block_moments(value.to(out.dtype.element_ty).to(ACC), mask, rows)
            store_sums(partial, s, chunk, chunks, 0, 2, mean, cols, col_mask, C)
            store_sums(partial, s, chunk, chunks, 1, 2, squares, cols, col_mask, C)


@triton.jit
def both_products(
    total_y, total_z, y, z, weight, mean_y, scale_y, shift_y, mean_z, scale_z, shift_z, base_y, base_z, i, j, exists,
    HY, WY, up, left, kh0, kw0, cols_y, KIND_Y: tl.constexpr, KIND_Z: tl.constexpr, CY: tl.constexpr, CZ: tl.constexpr,
    K: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr, BNY: tl.constexpr, BNZ: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total_y + W ẑ over the taps of one parity, and total_z + Wᵀ ŷ at its pixels: a tile of the weight for both."""
    SIDE: tl.constexpr = K // STRIDE
    TAPS: tl.constexpr = SIDE * SIDE
    for tap in range(0, TAPS):
        offsets, mask, _, channel, columns = gather(
            tap * BNZ, base_z, i, j, exists, HY * STRIDE, WY * STRIDE, kh0 - PAD, kw0 - PAD, CZ, BNZ, SIDE, TAPS,
            STRIDE, STRIDE, STRIDE, BNZ,
        )  # fmt: skip
        of_z = operand(
            z, z, offsets, mask, mean_z[None, :], scale_z[None, :], shift_z[None, :], mean_z[None, :], 0.0, 0.0,
            KIND_Z, KIND_Z == VALUE, False, 0, ACC, DOT,
        )  # fmt: skip
        w = weight_tile(
            weight, tap, channel, columns, cols_y, cols_y < CY, kh0, kw0, CZ, CY, SIDE, K, K * K, STRIDE, STRIDE,
            False, DOT,
        )  # fmt: skip
        total_y = multiply(of_z, w, total_y, PRECISION)
        offsets, mask, _, _, _ = gather(
            tap * BNY, base_y, i, j, exists, HY, WY, up, left, CY, BNY, SIDE, TAPS, 1, -1, -1, BNY
        )
        of_y = operand(
            y, y, offsets, mask, mean_y[None, :], scale_y[None, :], shift_y[None, :], mean_y[None, :], 0.0, 0.0,
            KIND_Y, KIND_Y == VALUE, False, 0, ACC, DOT,
        )  # fmt: skip
        total_z = multiply(of_y, tl.trans(w), total_z, PRECISION)
    return total_y, total_z


@triton.jit(do_not_specialize=(*SIZES, "HY", "WY"))
def pair_kernel(
    y, z, weight, stats_y, weight_y, bias_y, stats_z, weight_z, bias_z, image_y, image_z, out_y, out_z, h_y, h_z,
    partial_y, partial_z, S, L, HY, WY, eps_y: tl.float64, eps_z: tl.float64, factor_y: tl.float64,
    factor_z: tl.float64, damping_y: tl.float64, damping_z: tl.float64, p: tl.float64, q: tl.float64, CY: tl.constexpr,
    CYP: tl.constexpr, CZ: tl.constexpr, CZP: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr,
    G_Y: tl.constexpr, NORMED_Y: tl.constexpr, SAMPLED_Y: tl.constexpr, G_Z: tl.constexpr, NORMED_Z: tl.constexpr,
    SAMPLED_Z: tl.constexpr, DAMPED_Y: tl.constexpr, DAMPED_Z: tl.constexpr, SUMS_Y: tl.constexpr,
    SUMS_Z: tl.constexpr, ACT: tl.constexpr, PULL: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr,
    BNY: tl.constexpr, BNZ: tl.constexpr, BKY: tl.constexpr, BKZ: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """factor_y W ẑ + damping_y ŷ and factor_z Wᵀ ŷ + damping_z ẑ, those of them that have an `out`.

    SHARED: a program makes both, from the same tiles of the weight; else a block of columns of one of them. A column
    of y's result is one of CY, BNY of them to a program, and a step reads BKZ columns of z's taps; z's likewise.
    """
    SIDE: tl.constexpr = K // STRIDE  # taps of a parity, along one side
    PARITIES: tl.constexpr = STRIDE * STRIDE
    KIND_Y: tl.constexpr = VALUE if NORMED_Y and not PULL else PLAIN
    KIND_Z: tl.constexpr = VALUE if NORMED_Z and not PULL else PLAIN
    BLOCKS_Y: tl.constexpr = (CY + BNY - 1) // BNY if out_y is not None else 0
    BLOCKS_Z: tl.constexpr = (CZ + BNZ - 1) // BNZ if out_z is not None else 0
    COLUMN_BLOCKS: tl.constexpr = 1 if SHARED else BLOCKS_Y + BLOCKS_Z
    FIRST_Z: tl.constexpr = 0 if SHARED else BLOCKS_Y  # the first program of z's half
    pid = tl.program_id(0)
    column_block = pid % COLUMN_BLOCKS
    blocks = tl.cdiv(L, BM)
    block = pid // COLUMN_BLOCKS % blocks
    s = pid // COLUMN_BLOCKS // blocks
    sy, SY = s if SAMPLED_Y else 0, S if SAMPLED_Y else 1
    sz, SZ = s if SAMPLED_Z else 0, S if SAMPLED_Z else 1
    exists, first, sample, i, j = pixels_of(block, L, HY, WY, BM)
    start = s.to(tl.int64) * L + first * (HY * WY)
    HZ, WZ = HY * STRIDE, WY * STRIDE
    base_y, base_z = sample * (HY * WY), sample * (HZ * WZ)
    y += start * CY
    z += start * (PARITIES * CZ)
    if out_y is not None:
        out_y += start * CY
    if out_z is not None:
        out_z += start * (PARITIES * CZ)
    if image_y is not None:
        image_y += start * CY
    if image_z is not None:
        image_z += start * (PARITIES * CZ)
    if h_y is not None:
        h_y += start * CY
    if h_z is not None:
        h_z += start * (PARITIES * CZ)
    rows = tl.minimum(L - block * BM, BM).to(ACC)
    cols_y = column_block * BNY + tl.arange(0, BNY)
    cols_z = (column_block - FIRST_Z) * BNZ + tl.arange(0, BNZ)
    at_y = (base_y + i * WY + j)[:, None] * CY + cols_y[None, :]
    mask_y, mask_z = exists[:, None] & (cols_y < CY)[None, :], exists[:, None] & (cols_z < CZ)[None, :]
    total_y = tl.zeros([BM, BNY], ACC)
    if SHARED:
        mean_y, scale_y, shift_y, _ = norm_rows(
            stats_y, None, weight_y, bias_y, eps_y, sy, SY, cols_y, cols_y < CY, VALUE, CY, G_Y, KIND_Y == VALUE,
            False, ACC,
        )  # fmt: skip
        mean_z, scale_z, shift_z, _ = norm_rows(
            stats_z, None, weight_z, bias_z, eps_z, sz, SZ, cols_z, cols_z < CZ, VALUE, CZ, G_Z, KIND_Z == VALUE,
            False, ACC,
        )  # fmt: skip
    if BLOCKS_Y > 0 and not SHARED:  # noqa: SIM102 (a constant, then a number of the program)
        if column_block < BLOCKS_Y:
            total_y = convolve(
                total_y, z, z, weight, stats_z, None, weight_z, bias_z, eps_z, 0.0, 0.0, sz, SZ, base_z, i, j, exists,
                HZ, WZ, -PAD, -PAD, 0, 0, cols_y, cols_y < CY, KIND_Z, CZ, CZP, CY, G_Z, KIND_Z == VALUE, False, 0, K,
                K, K, K * K, STRIDE, 1, 1, 1, 1, False, BKZ, ACC, DOT, PRECISION,
            )  # fmt: skip
    if out_z is not None:  # noqa: SIM102
        if column_block >= FIRST_Z:
            for parity in range(0, PARITIES):
                up, kh0 = first_tap(parity // STRIDE, PAD, STRIDE)
                left, kw0 = first_tap(parity % STRIDE, PAD, STRIDE)
                total_z = tl.zeros([BM, BNZ], ACC)
                if SHARED:
                    total_y, total_z = both_products(
                        total_y, total_z, y, z, weight, mean_y, scale_y, shift_y, mean_z, scale_z, shift_z, base_y,
                        base_z, i, j, exists, HY, WY, up, left, kh0, kw0, cols_y, KIND_Y, KIND_Z, CY, CZ, K, PAD,
                        STRIDE, BNY, BNZ, ACC, DOT, PRECISION,
                    )  # fmt: skip
                else:
                    total_z = convolve(
                        total_z, y, y, weight, stats_y, None, weight_y, bias_y, eps_y, 0.0, 0.0, sy, SY, base_y, i, j,
                        exists, HY, WY, up, left, kh0, kw0, cols_z, cols_z < CZ, KIND_Y, CY, CYP, CZ, G_Y,
                        KIND_Y == VALUE, False, 0, SIDE, SIDE, K, K * K, 1, -1, -1, STRIDE, STRIDE, True, BKY, ACC, DOT,
                        PRECISION,
                    )  # fmt: skip
                row = base_z + (i * STRIDE + parity // STRIDE) * WZ + j * STRIDE + parity % STRIDE
                store_half(
                    total_z, factor_z, damping_z, z, row[:, None] * CZ + cols_z[None, :], mask_z, stats_z, weight_z,
                    bias_z, eps_z, p, q, image_z, out_z, h_z, partial_z, s, sz, SZ,
                    parity * blocks + block, PARITIES * blocks, rows, cols_z, cols_z < CZ, CZ, G_Z, NORMED_Z, DAMPED_Z,
                    ACT, PULL, SUMS_Z, ACC,
                )  # fmt: skip
    if out_y is not None:  # noqa: SIM102
        if column_block < BLOCKS_Y:
            store_half(
                total_y, factor_y, damping_y, y, at_y, mask_y, stats_y, weight_y, bias_y, eps_y, p, q, image_y,
                out_y, h_y, partial_y, s, sy, SY, block, blocks, rows, cols_y, cols_y < CY, CY, G_Y,
                NORMED_Y, DAMPED_Y, ACT, PULL, SUMS_Y, ACC,
            )  # fmt: skip
