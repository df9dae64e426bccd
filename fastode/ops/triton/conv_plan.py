"""How a convolution is cut into programs, from its shape alone. README.md has the reasons; none was tuned on a card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .plan import power_of_two

LEAST = 16  # the smallest side of a product that Triton gives to tensor cores

# Of a block of a convolution's result, where a program does not have a whole sample.
PIXELS, CHANNELS = 128, 64
STEP_BYTES = 128  # of one row of the left tile in a step of the loop: a full line of memory
TILE_BYTES = 1 << 15  # of the left tile of a step, at most
SHARED_BYTES = 96 << 10  # of all tiles that are loaded ahead, so that two programs share a multiprocessor

SET_ACCUMULATORS = 1 << 14  # of a program that has a whole sample, at most
THREAD_ACCUMULATORS = 32  # the rest of a thread's registers are for addresses, masks and what is stored
THREAD_BYTES = 128  # of the left tile that a thread loads, normalises and activates
MAX_WARPS = 16

# A skew pair's program that makes both halves: channels of y and z together at most, pixels of y, warps at most.
PAIR_CHANNELS, PAIR_PIXELS, PAIR_WARPS = 128, 64, 8

REGISTERS = 1 << 16  # of a multiprocessor
THREAD_REGISTERS = 224  # that a thread may use
PAIR_REGISTERS = 255  # that a thread of a skew pair may use: all that the hardware addresses

# A weight gradient: rows of a tile (taps by channels), pixels of a step, and programs in all.
WEIGHT_ROWS, WEIGHT_PIXELS, WEIGHT_PROGRAMS = 128, 64, 264
# The sum over its chunks: entries of a tile, and columns of it.
SUM_TILE, SUM_COLUMNS = 2048, 64


@dataclass(frozen=True)
class Product:
    """Blocks of one convolution.

    Attributes:
        spans: parts of the pixels that share no block: the samples, or one part that is all of them.
        pixels: of a span.
        rows: pixels of a block, BM.
        columns: output channels of a block, BN.
        step: columns of the left matrix of a step, BK.
        padded: channels of a tap, CP.
        warps: of a program.
        stages: steps whose tiles are loaded at a time, ahead of their use.
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
        """Whether each span is one program's, with all its channels: then it can take their statistics itself."""
        return self.blocks == 1 and self.programs == self.spans


def _warps(accumulators: int, left_bytes: int, tensor_cores: bool = True) -> int:
    each = THREAD_ACCUMULATORS if tensor_cores else THREAD_ACCUMULATORS // 2
    threads = max(accumulators // each, left_bytes // THREAD_BYTES)
    return max(4, min(MAX_WARPS, threads // 32))


def registers(warps: int, most: int = THREAD_REGISTERS) -> int:
    """The registers that a thread may use where a program has so many warps."""
    return min(most, REGISTERS // (32 * warps))


def _stages(entries: int, itemsize: int) -> int:
    return max(1, min(3, SHARED_BYTES // (entries * itemsize)))


@cache
def product(
    samples: int, pixels: int, channels_in: int, channels_out: int, taps: int, itemsize: int, by_sample: bool,
    coupled: bool, tensor_cores: bool = True,
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
        coupled: whether its result is normalised next: a block that holds a whole set saves the launch of its sums.
        tensor_cores: whether they do the product; without them a thread keeps what it multiplies in registers.
    """
    spans, length = (samples, pixels) if by_sample else (1, samples * pixels)
    columns = max(LEAST, min(power_of_two(channels_out), CHANNELS))
    whole = max(LEAST, power_of_two(length))
    rows = min(whole, PIXELS * max(1, 32 // columns))
    fits = whole * columns <= SET_ACCUMULATORS and whole * LEAST * itemsize <= TILE_BYTES
    if coupled and by_sample and columns >= channels_out and fits:
        rows = whole
    padded = power_of_two(channels_in)
    step = LEAST if not tensor_cores else STEP_BYTES // itemsize
    step = min(step, power_of_two(taps * padded), TILE_BYTES // (rows * itemsize))
    step = max(LEAST, step)
    stages = _stages(step * (rows + columns), itemsize)
    blocks = -(-length // rows)
    programs = spans * blocks * -(-channels_out // columns)
    warps = _warps(rows * columns, rows * step * itemsize, tensor_cores)
    return Product(spans, length, rows, columns, step, padded, warps, stages, blocks, programs)


@dataclass(frozen=True)
class PairProduct:
    """Blocks of a skew pair, `rows` pixels of y each.

    Attributes:
        spans: as of a Product.
        pixels: of y in a span.
        rows: pixels of y of a block, BM.
        shared: whether a program makes both halves, from the same tiles of the weight.
        columns: channels of y and of z of a block, BNY and BNZ.
        steps: columns of a step that reads y and of one that reads z, BKY and BKZ.
        padded: channels of a tap, CYP and CZP.
        warps: of a program.
        stages: steps whose tiles are loaded at a time, ahead of their use.
        blocks: of a span.
        programs: in all.
    """

    spans: int
    pixels: int
    rows: int
    shared: bool
    columns: tuple[int, int]
    steps: tuple[int, int]
    padded: tuple[int, int]
    warps: int
    stages: int
    blocks: int
    programs: int


@cache
def pair_product(
    samples: int, pixels: int, channels: tuple[int, int], taps: int, itemsize: int, by_sample: bool,
    wanted: tuple[bool, bool], sharing: bool, tensor_cores: bool = True,
) -> PairProduct:  # fmt: skip
    """The blocks of a skew pair.

    Args:
        samples: N.
        pixels: of a sample of y.
        channels: of y and of z.
        taps: of the kernel.
        itemsize: bytes of what is multiplied.
        by_sample: whether something in it belongs to single samples.
        wanted: which halves are made, y's and z's.
        sharing: whether both halves may be one program's.
        tensor_cores: as of `product`.
    """
    spans, length = (samples, pixels) if by_sample else (1, samples * pixels)
    padded = (power_of_two(channels[0]), power_of_two(channels[1]))
    whole = (max(LEAST, padded[0]), max(LEAST, padded[1]))
    shared = sharing and all(wanted) and sum(whole) <= PAIR_CHANNELS
    least = max(LEAST, power_of_two(length))
    if shared:
        columns = steps = whole
        accumulators, widest = sum(whole), max(whole)
        rows = min(least, PAIR_PIXELS)
    else:
        columns = (min(whole[0], CHANNELS), min(whole[1], CHANNELS))
        accumulators, rows = max(columns), min(least, PIXELS if tensor_cores else PAIR_PIXELS)
        limit = min(STEP_BYTES // itemsize, TILE_BYTES // (rows * itemsize)) if tensor_cores else LEAST
        steps = (max(LEAST, min(limit, taps * padded[0])), max(LEAST, min(limit, taps * padded[1])))
        steps = (power_of_two(steps[0]), power_of_two(steps[1]))
        widest = max(steps)
    stages = _stages((rows + max(columns)) * widest, itemsize)
    blocks = -(-length // rows)
    warps = _warps(rows * accumulators, rows * widest * itemsize, tensor_cores)
    warps = power_of_two(min(PAIR_WARPS, warps))
    column_blocks = sum(-(-c // n) for c, n, made in zip(channels, columns, wanted, strict=True) if made)
    return PairProduct(
        spans, length, rows, shared, columns, steps, padded, warps, stages, blocks,
        spans * blocks * (1 if shared else column_blocks),
    )  # fmt: skip


@dataclass(frozen=True)
class WeightProduct:
    """Blocks of one weight gradient: tiles of `rows` (taps by channels) and `columns`, summed over a chunk of pixels.

    Attributes:
        spans: as of a Product.
        length: pixels of a span.
        rows: of a tile, taps by input channels.
        columns: of a tile, output channels.
        pixels: of a step.
        padded: channels of a tap.
        warps: of a program.
        stages: as of a Product.
        chunks: of all pixels.
        chunk_blocks: steps of a chunk.
        programs: in all.
    """

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
    samples: int, pixels: int, channels_in: int, channels_out: int, taps: int, itemsize: int, by_sample: bool,
    tensor_cores: bool = True,
) -> WeightProduct:  # fmt: skip
    """The blocks of a weight gradient; arguments as of `product`."""
    spans, length = (samples, pixels) if by_sample else (1, samples * pixels)
    padded = power_of_two(channels_in)
    columns = max(LEAST, min(power_of_two(channels_out), CHANNELS))
    rows = max(LEAST, min(power_of_two(taps * padded), WEIGHT_ROWS))
    step = max(LEAST, min(WEIGHT_PIXELS if tensor_cores else LEAST, power_of_two(length)))
    tiles = -(-taps * padded // rows) * -(-channels_out // columns)
    blocks = spans * -(-length // step)
    chunks = max(1, min(blocks, WEIGHT_PROGRAMS // tiles))
    chunk_blocks = -(-blocks // chunks)
    chunks = -(-blocks // chunk_blocks)
    stages = _stages(step * (rows + columns), itemsize)
    warps = _warps(rows * columns, rows * step * itemsize, tensor_cores)
    return WeightProduct(
        spans, length, rows, columns, step, padded, warps, stages, chunks, chunk_blocks, chunks * tiles
    )
