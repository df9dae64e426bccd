"""How a convolution is cut into programs, from its shape alone. README.md has the reasons; none was tuned on a card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .plan import power_of_two

# The least sides of a tensor core's product, as Triton takes them.
LEAST = 16
# Pixels of a block, where a normalised set does not fit into one; output channels of a block.
PIXELS, CHANNELS = 128, 128
# Bytes of a step's columns, of its left tile, and of all tiles that a program has on the way.
STEP_BYTES, TILE_BYTES, SHARED_BYTES = 128, 1 << 15, 96 << 10
# Accumulators of a program that has a whole set, and of a thread.
SET_ACCUMULATORS, THREAD_ACCUMULATORS = 1 << 14, 32
MAX_WARPS = 16
# Of a weight gradient: rows (taps and channels), pixels of a step, and programs in all.
WEIGHT_ROWS, WEIGHT_PIXELS, WEIGHT_PROGRAMS = 128, 64, 264
SUM_TILE, SUM_COLUMNS = 2048, 64


@dataclass(frozen=True)
class Product:
    """Blocks of one convolution.

    Attributes:
        spans: how many parts the pixels are in, none of which shares a block with another: samples, or one.
        pixels: of a span.
        rows: pixels of a block, BM.
        columns: output channels of a block, BN.
        step: columns of the left matrix of a step, BK.
        padded: channels of a tap, CP.
        warps: of a program.
        stages: steps whose tiles are on the way at a time.
        blocks: of a span.
        programs: in all.
    """

    spans: int
    pixels: int
    rows: int
    columns: int
    step: int
    padded: int
    warps: int
    stages: int
    blocks: int
    programs: int

    @property
    def alone(self) -> bool:
        """Whether a program has every channel of a span."""
        return self.blocks == 1 and self.programs == self.spans


def _warps(rows: int, columns: int) -> int:
    return max(4, min(MAX_WARPS, rows * columns // (32 * THREAD_ACCUMULATORS)))


def _stages(entries: int, itemsize: int) -> int:
    return max(1, min(3, SHARED_BYTES // (entries * itemsize)))


@cache
def product(
    samples: int, pixels: int, channels_in: int, channels_out: int, taps: int, itemsize: int, by_sample: bool,
    coupled: bool, halves: int = 1,
) -> Product:  # fmt: skip
    """The blocks of a convolution.

    Args:
        samples: N.
        pixels: of a sample's output.
        channels_in: of a tap.
        channels_out: of the output.
        taps: of the kernel.
        itemsize: bytes of what is multiplied.
        by_sample: whether something in it belongs to single samples, as GroupNorm's statistics.
        coupled: whether its result is normalised, so that a block that holds a set saves a launch.
        halves: accumulators of a program for each of its places.
    """
    spans, length = (samples, pixels) if by_sample else (1, samples * pixels)
    columns = max(LEAST, min(power_of_two(channels_out), CHANNELS // halves))
    whole = max(LEAST, power_of_two(length))
    rows = min(whole, PIXELS * max(1, 32 // columns))
    fits = whole * columns * halves <= SET_ACCUMULATORS and whole * LEAST * itemsize <= TILE_BYTES
    if coupled and by_sample and columns >= channels_out and fits:
        rows = whole
    padded = power_of_two(channels_in)
    step = min(STEP_BYTES // itemsize, power_of_two(taps * padded), TILE_BYTES // (rows * itemsize))
    step = max(LEAST, step)
    stages = _stages(step * (rows + columns), itemsize)
    blocks = -(-length // rows)
    programs = spans * blocks * -(-channels_out // columns)
    return Product(spans, length, rows, columns, step, padded, _warps(rows, columns * halves), stages, blocks, programs)


@dataclass(frozen=True)
class WeightProduct:
    """Blocks of one weight gradient: `rows` of taps and channels by `columns`, `pixels` a step, `chunks` of pixels."""

    spans: int
    length: int
    rows: int
    columns: int
    pixels: int
    padded: int
    warps: int
    stages: int
    chunks: int
    chunk_blocks: int
    programs: int


@cache
def weight_product(
    samples: int, pixels: int, channels_in: int, channels_out: int, taps: int, itemsize: int, by_sample: bool
) -> WeightProduct:
    """The blocks of a weight gradient; arguments as of `product`."""
    spans, length = (samples, pixels) if by_sample else (1, samples * pixels)
    padded = power_of_two(channels_in)
    columns = max(LEAST, min(power_of_two(channels_out), CHANNELS // 2))
    rows = max(LEAST, min(power_of_two(taps * padded), WEIGHT_ROWS))
    step = max(LEAST, min(WEIGHT_PIXELS, power_of_two(length)))
    tiles = -(-taps * padded // rows) * -(-channels_out // columns)
    blocks = spans * -(-length // step)
    chunks = max(1, min(blocks, WEIGHT_PROGRAMS // tiles))
    chunk_blocks = -(-blocks // chunks)
    chunks = -(-blocks // chunk_blocks)
    stages = _stages(step * (rows + columns), itemsize)
    return WeightProduct(
        spans, length, rows, columns, step, padded, _warps(rows, columns), stages, chunks, chunk_blocks, chunks * tiles
    )
