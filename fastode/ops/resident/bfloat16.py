"""Where the resident engine is slower than plain PyTorch on bfloat16 maps, and under autocast: bounds found by hand.

Those of skew pairs are in pairs.py. What each was measured on stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...branch.layers import Conv
from . import rule
from .rule import Few, Line

# Under autocast, beside plain PyTorch, on an AMD EPYC with dot products of bfloat16. Float32 maps, by family: this
# engine multiplies them in float32; on AMX tiles PyTorch's bfloat16 is faster still. One thread and two, 2026-11-29,
# 500 random blocks from 4x4 to 32x32: IE-Skips of 64 and 96 channels 0.95 to 5.4, of 128 0.76 to 2.8; schemes, those of
# one evaluation too, of 32 and 64 channels 1.02 to 6, of 128 0.68 to 2; of 64 and an odd side 0.75 to 1.5. With fewer
# samples than threads 64 channels at 32x32 had 0.82 to 1.35, 96 0.81 to 1.3.
FLOAT32_MAPS = {
    "ie": Line(most_channels=96, few=(Few(1, 64),)),
    "shu_osher": Line(most_channels=64, few=(Few(1, 64, 64),)),
}
FROM_ODD = 64
IN_FLOAT32 = "multiplying float32 maps in float32, where autocast has bfloat16, "
# Bfloat16 maps, one thread, 2026-11-27: 1.04 to 5 up to 128 channels, 0.8 to 1.2 at 256, 0.6 to 1.06 at 512; schemes of
# one evaluation 0.99 to 2.8 up to 128, of 4 to 32 samples.
BFLOAT16_MAPS = Line(most_channels=128)
# Chains on bfloat16 maps, multiplied by those dot products: 16 channels at least, or a vector is mostly empty. Steps
# and forwards of benchmarks.choose's blocks up to 160 channels, with four samples for each of two threads of an AMD
# EPYC and more, 2026-11-28: 0.94 to 2.4, median 1.17. With fewer, whose weights are packed for little and which a
# network finds in no cache: blocks and single convolutions of 128 channels from 8x8 to 16x16, batch norms, group norms
# and none, either layout, one and two samples for each of two threads, 2026-11-29: 1.04 to 1.6 in 95 of 96, one 0.95.
PAIRED_CHAIN = (16, Line(most_channels=160, few=(Few(4, 128),)))
# In channels_last wider ones, too: with bfloat16 weights the halving blocks of benchmarks.choose to 320 channels at
# 16x16, 2026-11-29: 0.96 to 1.6, and residual blocks and convolutions of 256 with one sample for each thread 0.96 to
# 1.5; under autocast few samples of 256 channels at 4x4 and 8x8 1.0 to 1.5, from one for each thread.
LAST_CHAIN = Line(most_channels=320, most_kb=1024, few=(Few(2, 256),))
FEW_CAST_LAST, FEW_CAST_BELOW = Line(most_channels=256, most_kb=64), 8
# One sample for two threads, of which one is idle: 90 blocks and single convolutions from 8x8 to 32x32, all norms, both
# layouts, two threads, 2026-11-29: 1.0 to 1.7; of 128 channels at 16x16 0.89 to 1.3.
HALF_IDLE = (Line(most_channels=96, most_kb=256), Line(most_channels=128, most_kb=64))
# With fewer channels where there is a norm, and no kernel larger than 3x3 or of stride 2 reads so few: two threads of
# an AMD EPYC, 2026-11-28, 8 to 64 samples from 8x8 to 64x64, steps, attacks' steps and forwards. Blocks of two
# convolutions of 4 to 12 channels: 1.4 to 4.5. One convolution of an image's three channels at most: 0.95 to 2.7,
# median 1.5, and from 96x96 to 224x224 0.83 to 2.4; of 8 and 12 channels 0.93 to 2.5. Without a norm 0.75 to 1.4,
# kernels of 5x5 0.5 to 1.4, of stride 2 0.7 to 1.4.
IMAGE_CHANNELS, MOST_IMAGE_PIXELS = 3, 64 * 64
# Maps whose rows are no whole rows of tiles, of so many channels and more, with norms and without: 14x14 and 28x28, 8
# to 64 samples, there 0.76 to 1.1 (but for norms of several groups in channels_last, 1.3 to 1.5), below 0.92 to 1.6.
UNEVEN = (128, 32)
# Wider ones with batch norms and small maps, one thread, 2026-11-27: 1.05 to 1.3 at 256.
COUPLED_CHAIN = Line(most_channels=256, most_kb=32, few=(Few(8, 0),))
# Wider ones whose float32 weights autocast has PyTorch cast: blocks that halve 192 to 320 channels from 4x4 to 16x16, 8
# to 64 samples, two threads, 2026-11-29: steps 0.96 to 1.75, attacks' 1.08 to 2.1, forwards 1.01 to 2.1.
CAST_CHAIN = Line(most_channels=320, most_kb=256, few=(Few(8, 0),))
# Of blocks whose convolutions are all filtered (`is_filtered`), 128 to 512 channels from 4x4 to 28x28, 4 to 64 samples,
# two threads, 2026-11-29: steps 0.96 to 1.8, attacks' 1.07 to 1.8, forwards 1.05 to 1.84. In contiguous memory, from 32
# channels, 1.1 to 2 up to 256, at 512 0.89 to 1.3.
FILTERED, FILTERED_CONTIGUOUS = 512, 256  # channels at most
# On AMX tiles, on one thread of an Intel Xeon, 2026-11-27, of 25 blocks of benchmarks.choose from 16 to 512 channels,
# 4 to 64 pixels a side and 2 to 64 samples: steps 1.15 to 2.1, attacks' steps 1.2 to 2.7, forwards 1.04 to 2.6 (one of
# 784 KB 0.83, in four other runs 0.99 to 1.3, with two threads 1.1 to 1.3); with 4 samples of 256 and 512 channels
# steps were 0.91 and 0.94, and 8 channels' forward 0.74.
TILED_CHAIN = (16, Line(most_channels=512, most_kb=784, few=(Few(8, 255, 784),)))

# Explicit schemes on bfloat16 maps in channels_last whose rows are no whole rows of tiles, of so many channels and
# more, with more multiply-adds of an evaluation for each thread: 0.82 to 0.98 at 7x7 and 14x14, of fewer 1.0 to 1.6.
# Norms of several groups of few channels take PyTorch longer: 1.2 to 1.9. Two threads of an AMD EPYC, 2026-11-29.
UNEVEN_SCHEME = (96, 150_000_000)


def in_words() -> list[tuple[str, str]]:
    """The bounds in force, by what they are of."""
    if rule.multiplies_widened():
        return []  # all are the rule's lines
    least, chain = TILED_CHAIN if rule.on_tiles() else PAIRED_CHAIN
    rows = [
        ("one-step blocks, autocast", BFLOAT16_MAPS.describe()),
        ("chain, bfloat16 maps", f"{least} channels at least, and {chain.describe()}"),
    ]
    if rule.on_tiles():
        return rows
    narrower = f"several convolutions; or one of at most {IMAGE_CHANNELS} channels and {MOST_IMAGE_PIXELS} pixels"
    return [
        *rows,
        ("the same, norms, narrower", f"of kernels up to 3x3 and stride 1: {narrower}"),
        ("the same, batch norms, wider", COUPLED_CHAIN.describe()),
        ("the same, autocast, wider", CAST_CHAIN.describe()),
        ("the same, channels_last", LAST_CHAIN.describe()),
        (
            "the same, autocast, few",
            f"in channels_last, {FEW_CAST_LAST.describe()}, with fewer than {FEW_CAST_BELOW} samples for each thread",
        ),
        ("the same, a sample for 2 threads", ", or ".join(line.describe() for line in HALF_IDLE)),
        ("filtered, bfloat16 maps", f"every convolution 3x3 of stride 1 on even sides, at most {FILTERED} channels"),
        ("the same, not channels_last", f"at most {FILTERED_CONTIGUOUS} channels"),
        *[(f"{family}, float32, autocast", line.describe()) for family, line in FLOAT32_MAPS.items()],
    ]


def slower(family: str, x: torch.Tensor, channels: int) -> str:
    """Why the resident engine is taken to be slower than plain PyTorch under autocast; empty if not.

    Args:
        family: "ie" or "shu_osher".
        x: the input [N, C, H, W], float32 or bfloat16.
        channels: of the widest map of the branch.
    """
    why, line = "under autocast ", BFLOAT16_MAPS
    if x.dtype == torch.float32:
        why, line = IN_FLOAT32, FLOAT32_MAPS[family]
        if rule.on_tiles():
            return f"{why}it is expected to be slower than plain PyTorch"
    beyond = line.beyond(channels, x.shape[2] * x.shape[3], 4, x.shape[0], rule.threads())
    odd = x.shape[2] % 2 > 0 or x.shape[3] % 2 > 0
    if not beyond and x.dtype == torch.float32 and family == "shu_osher" and channels >= FROM_ODD and odd:
        beyond = f"with {FROM_ODD} channels and more and an odd side"
    return f"{why}{beyond} {rule.SLOWER}" if beyond else ""


def slower_scheme(x: torch.Tensor, channels: int, narrow_groups: bool, products: int) -> str:
    """Why a scheme on bfloat16 maps is taken to be slower than plain PyTorch; empty if not.

    Args:
        x: the input [N, C, H, W].
        channels: of the widest map.
        narrow_groups: whether a norm has several groups of few channels.
        products: multiply-adds of an evaluation.
    """
    (wide, most), last = UNEVEN_SCHEME, x.is_contiguous(memory_format=torch.channels_last)
    if not rule.multiplies_pairs() or narrow_groups or channels < wide or fills_tiles(x.shape[3]) or not last:
        return ""
    if rule.samples(x) is None or products <= most * min(rule.threads(), 2):
        return ""
    beyond = f"with {wide} channels and more of widths that are no multiple of 16 and do not divide 32, and more than"
    return f"{beyond} {most} multiply-adds for each thread, {rule.SLOWER}"


@dataclass(frozen=True)
class OneEvaluation:
    """What a rule knows of a chain, or of another block with one evaluation of its branch.

    Args:
        fewest: channels of the narrowest map that a convolution reads.
        widest: channels of the widest map.
        pixels: of a map of so many channels that is as large as the largest.
        uneven: channels of the widest map whose rows are no whole rows of tiles (`fills_tiles`); 0: there is none.
        convolutions: how many there are; 0 where kernels larger than 3x3, or of stride 2, read few channels.
        normed: whether there is a norm.
        coupled: whether a norm takes its statistics over the batch.
    """

    fewest: int
    widest: int
    pixels: int
    uneven: int = 0
    convolutions: int = 0
    normed: bool = True
    coupled: bool = False


def is_filtered(conv: Conv, height: int, width: int, samples: int) -> bool:
    """Whether a convolution of stride 1 of bfloat16 maps is filtered, as suits_narrow_winograd of csrc/cpu says.

    Args:
        conv: the convolution.
        height: of its input in pixels.
        width: of its input in pixels.
        samples: of the batch.
    """
    channels = min(conv.in_channels, conv.out_channels)
    if channels <= 16 or not rule.may_be_filtered(conv, height, width):
        return False
    counted = channels * channels // 32 if channels < 32 else min(channels, 64)
    return samples * rule.saved_products(height, width) * counted >= 100_000


def is_filtered_whole(x: torch.Tensor, convs: Sequence[tuple[Conv, int, int]]) -> bool:
    """Whether all convolutions, of so high and wide inputs, are filtered, and that is fast.

    Args:
        x: the input [N, C, H, W].
        convs: each with its input's height and width in pixels.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    batch, most = rule.samples(x), (FILTERED if last else FILTERED_CONTIGUOUS)
    if not rule.multiplies_pairs() or batch is None or rule.few_for_threads(batch) or not convs:
        return False
    return all(
        max(conv.in_channels, conv.out_channels) <= most and is_filtered(conv, height, width, batch)
        for conv, height, width in convs
    )


def fills_tiles(width: int) -> bool:
    """Whether rows of a map, or of maps that lie together, are whole tiles' rows in products of bfloat16."""
    return width % 16 == 0 or 32 % width == 0


def slower_chain(x: torch.Tensor, chain: OneEvaluation, *, casts: bool = False) -> str:
    """Why a chain is taken to be slower than plain PyTorch on bfloat16 maps; empty if not.

    Args:
        x: the input [N, C, H, W].
        chain: what is known of it.
        casts: whether plain PyTorch casts the weights at every call, as under autocast.
    """
    if rule.multiplies_widened():
        return rule.slower("chain", chain.coupled, x, chain.widest, chain.pixels, " than plain PyTorch")
    if not rule.on_tiles() and not rule.multiplies_pairs():
        return "on bfloat16 maps it was measured on CPUs that multiply them, and not on this kind"
    least, line = TILED_CHAIN if rule.on_tiles() else PAIRED_CHAIN
    batch = rule.samples(x)
    lines = [line] if rule.on_tiles() else _paired_lines(x, chain, line, casts=casts)
    over = [each.beyond(chain.widest, chain.pixels, 4, batch, rule.threads()) for each in lines]
    beyond = _few_for_threads(batch, chain) or _of_few_channels(x, least, chain) or ("" if "" in over else over[-1])
    if not beyond and not rule.on_tiles():
        beyond = _of_little_gain(chain)
    return f"on bfloat16 maps {beyond} {rule.SLOWER}" if beyond else ""


def _paired_lines(x: torch.Tensor, chain: OneEvaluation, line: Line, *, casts: bool) -> list[Line]:
    """The lines of which one is enough to take a chain, the one that says why it is left last."""
    batch, wide = rule.samples(x), chain.widest > (line.most_channels or 0)
    few = batch is not None and batch < FEW_CAST_BELOW * rule.threads()
    last = batch is not None and x.is_contiguous(memory_format=torch.channels_last)
    wider = ((chain.coupled, COUPLED_CHAIN), (casts, CAST_CHAIN))
    usual = [each for holds, each in wider if holds and wide] or [line]
    in_last = ((not casts, LAST_CHAIN), (casts and few, FEW_CAST_LAST))
    return [each for holds, each in in_last if holds and last] + usual


def _few_for_threads(batch: int | None, chain: OneEvaluation) -> str:
    """`rule.few_for_threads`, but for what is as fast with half of the threads."""
    if not rule.on_tiles() and rule.half_is_fast(batch, HALF_IDLE, chain.widest, chain.pixels):
        return ""
    return rule.few_for_threads(batch)


def _of_few_channels(x: torch.Tensor, least: int, chain: OneEvaluation) -> str:
    if chain.fewest >= least:
        return ""
    beyond = f"with fewer than {least} channels"
    if rule.on_tiles() or not chain.normed or chain.convolutions == 0:
        return beyond
    if chain.convolutions > 1:
        return ""
    if chain.fewest > IMAGE_CHANNELS:
        return beyond
    return f"{beyond} and more than {MOST_IMAGE_PIXELS} pixels" if x.shape[2] * x.shape[3] > MOST_IMAGE_PIXELS else ""


def _of_little_gain(chain: OneEvaluation) -> str:
    """Where the convolutions are slower than PyTorch's."""
    most = UNEVEN[0 if chain.normed else 1]
    if chain.uneven >= most:
        return f"with {most} channels and more of widths that are no multiple of 16 and do not divide 32"
    return ""
