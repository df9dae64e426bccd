"""Blocks of one evaluation on float32 maps, on CPUs with AVX2 and no AVX-512: what their rule's lines do not tell.

The lines (rule.py) bound channels and bytes, for one sample for two threads, one for each, and full batches. Between
them it counts whether 3×3 convolutions are filtered, which needs enough samples (csrc/cpu/resident/winograd.h). All
numbers are ratios of eager's time to the engine's, in the slowest of forward, attack's and training step, on two
threads of an AMD EPYC (Zen 2), 2026-11-30, commit 668f7f1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...branch.layers import Conv
from ..plan import Plan
from . import rule
from .rule import Line

Map = tuple[int, int, int]  # channels, height and width
Convolution = tuple[Conv, Map, Map]  # with its input and its output

FEWEST = 16  # channels that are filtered
# Of more channels than this a 3×3 convolution over even sides that is not filtered is no faster than PyTorch's:
# residual blocks of 256 to 512 channels at 4×4 and 8×8 0.74 to 1.04 where one is not, 0.98 to 1.52 where all are; of
# 160 channels and fewer 0.96 to 2.4 from one sample for two threads on. Blocks that halve the size gain by the others:
# to 256 channels at 4×4 0.92 to 1.5, to 320 and more 0.83 to 1.08.
NARROW, NARROW_HALVING = 160, 256
# Products that are saved for each pair of channels, over all samples, from which on the engine filters.
WORTH = 640
# One sample for two threads, as the lines' blocks of 16 to 64 channels have it: 1.0 to 3.9.
HALF_IDLE = Line(most_channels=64, most_kb=256)
# Bottlenecks: chains of stride 1 of which half of the convolutions or more are 1×1. From 64 channels at 56×56 to 1024
# at 14×14, one sample for each thread and more, 0.94 to 1.43, median 1.12; 1024 at 8×8 0.93 to 1.05.
BOTTLENECK = Line(most_channels=1024, most_kb=3136, small_channels=640, small_kb=1024, least_pixels=196)
# Those that halve the size, to 8×8 and 7×7 most: of 256 channels and more 0.82 to 1.1, of 128 and fewer 1.2 to 1.5.
HALVING_BOTTLENECK = Line(most_channels=128)
# 1×1 convolutions alone, and a single one that is 1×1 or halves the size. With norms, of 128 channels and fewer 0.95 to
# 2.8 but for one of stride 2 with 32 samples (0.82), of more 0.77 to 1.5; without any, to 64 channels and 64 KB 1.1 to
# 2.1, of more 0.69 to 1.4.
POINTWISE = Line(most_channels=128)
BARE_POINTWISE = Line(most_channels=64, most_kb=64)


def convolutions(plans: Sequence[Plan], x: Tensor) -> list[Convolution]:
    """Every convolution, or mean, of a branch, or of a chain's plans: all but the first begin where that ends."""
    found = []
    start = (x.shape[1], x.shape[2], x.shape[3])
    for index, plan in enumerate(plans):
        now = start
        for unit in plan.units:
            if unit.conv is not None:
                before, (height, width) = now, unit.conv.size_after(now[1], now[2])
                now = (unit.conv.channels_after(before[0]) or 0, height, width)
                found.append((unit.conv, before, now))
        if index == 0:
            start = now
    return found


def slower(
    x: Tensor,
    found: Sequence[Convolution],
    normed: bool,
    coupled: bool,
    widest: int,
    pixels: int,
    few: tuple[int, int] = (0, 0),
) -> str:
    """Why a call in float32 or float64 is taken to be slower than plain PyTorch, on any CPU; empty where it is not.

    Args:
        x: the input [N, C, H, W] on the CPU.
        found: the convolutions.
        normed: whether there is a norm.
        coupled: whether a norm takes its statistics over the batch.
        widest: channels of the widest map.
        pixels: of a map of so many channels that is as large as the largest.
        few: how many samples or pixels for each thread are enough where these bounds do not say more.
    """
    family = "chain3" if _is_even(found) else "chain"
    if x.dtype != torch.float32 or not rule.filters_early():
        return rule.slower_than_eager(x, coupled, widest, pixels, few, family)
    batch, bounds = rule.samples(x), _line_of(found, normed)
    beyond = "" if rule.half_is_fast(batch, (HALF_IDLE,), widest, pixels) else rule.few_for_threads(batch)
    narrow = NARROW_HALVING if _halves(found) else NARROW
    if not beyond and widest > narrow:
        beyond = _unfiltered(batch, found, narrow)
        if not beyond and bounds is not BOTTLENECK and not all(_saves(each) for each in found):
            beyond = rule.too_few(x, few)
    if not beyond and bounds is not None:
        over = bounds.beyond(widest, pixels, 4, batch, rule.threads())
        beyond = f"with so many 1×1 or halving convolutions {over}" if over else ""
    if beyond:
        return f"{beyond} {rule.SLOWER}"
    if bounds is BOTTLENECK:
        return ""
    return rule.slower(family, coupled, x, widest, pixels, " than plain PyTorch")


def in_words() -> list[tuple[str, str]]:
    """The bounds in words, each with what it is of."""
    if not rule.filters_early():
        return []
    filtered = f"with more than {NARROW} channels, {NARROW_HALVING} where the size is halved, only filtered"
    return [
        ("3×3 of a chain float32", filtered),
        ("bottleneck float32", BOTTLENECK.describe()),
        ("halving bottleneck float32", HALVING_BOTTLENECK.describe()),
        ("1×1 and norm float32", POINTWISE.describe()),
        ("1×1 float32", BARE_POINTWISE.describe()),
    ]


def _is_even(found: Sequence[Convolution]) -> bool:
    """Whether there are two convolutions at least, all of them 3×3 of stride 1, in no few channels, over even sides."""
    return len(found) > 1 and all(_may_be_filtered(each) for each in found)


def _line_of(found: Sequence[Convolution], normed: bool) -> Line | None:
    """The bounds of what has little to filter; None of what keeps the rule's lines."""
    points = sum(conv.kernel == (1, 1) for conv, _, _ in found)
    halving = _halves(found)
    if points == len(found) or (len(found) == 1 and halving):
        return POINTWISE if normed else BARE_POINTWISE
    if 2 * points < len(found):
        return None
    return HALVING_BOTTLENECK if halving else BOTTLENECK


def _halves(found: Sequence[Convolution]) -> bool:
    return any(conv.stride != (1, 1) for conv, _, _ in found)


def _unfiltered(batch: int | None, found: Sequence[Convolution], narrow: int) -> str:
    """Which wide convolution has too few samples to be filtered, as the start of a sentence; empty if none has."""
    for each in found:
        _, (inputs, height, width), (outputs, _, _) = each
        if batch is not None and max(inputs, outputs) > narrow and _saves(each):
            needed = -(-WORTH // rule.saved_products(height, width))
            if batch < needed:
                return f"with more than {narrow} channels and fewer than {needed} samples of {height}×{width}"
    return ""


def _may_be_filtered(each: Convolution) -> bool:
    conv, (inputs, height, width), (outputs, _, _) = each
    return min(inputs, outputs) >= FEWEST and rule.may_be_filtered(conv, height, width)


def _saves(each: Convolution) -> bool:
    """Whether filtering saves products: of maps of 2×2 it saves none."""
    return _may_be_filtered(each) and rule.saved_products(*each[1][1:]) > 0
