"""How a map is cut into programs: block sizes, warps and chunks, from shapes alone, so that results are reproducible.

README.md derives the numbers; none of them has been tuned on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

# Entries of a program's tile: the fewer, the more numbers it keeps of each in registers.
TILE = {"moments": 2048, "sums": 2048, "second_sums": 1024, "apply": 2048}
# A map without a norm is an array of rows of this width.
FLAT = 2048
ENTRIES_PER_THREAD = {"moments": 8, "sums": 8, "second_sums": 8, "apply": 8}
# Where a program takes a whole set: bytes of each map that it, and each of its threads, holds at a time.
SET_BYTES = {"value": 16384, "cotangent": 16384, "tangent": 16384, "second": 8192}
SET_THREAD_BYTES = {"value": 32, "cotangent": 32, "tangent": 32, "second": 16}
MAX_WARPS = 16
# A row of this many channels is read in whole 128-byte lines in every dtype.
MAX_COLUMNS = 128
# Of an NCHW map a tile has few channels, so that it has long rows of pixels.
PLANE_COLUMNS = 8
# Enough programs to fill a card of 132 to 160 multiprocessors three times.
PROGRAMS = 480
# One program takes a whole set where that is small, or where MIN_SETS fill half a card and each fits its L2 share.
MIN_SETS, SMALL_SET, LARGE_SET = 64, 1 << 14, 1 << 18
# Groups of fewer bytes would fetch 32-byte sectors that are mostly another group's.
MIN_GROUP_BYTES = 16
APPLY_TILES = 2
FINISH_TILE = 2048


@dataclass(frozen=True)
class Geometry:
    """A map [samples, pixels, channels] as normalised sets [samples, groups]; coupled: of the map's own statistics.

    plane: 0 for a channels_last map, the pixels of a plane for an NCHW one.
    """

    samples: int
    pixels: int
    channels: int
    groups: int
    total: int
    normed: bool
    coupled: bool
    plane: int = 0

    @property
    def set_entries(self) -> int:
        return self.pixels * (self.channels // self.groups)


@dataclass(frozen=True)
class Blocks:
    """How one launch cuts a map.

    Attributes:
        columns: channels of a tile.
        rows: pixels of a tile.
        chunk_rows: pixels of a chunk, which is one program's.
        warps: of a program.
        programs: in all.
        chunks: of a sample.
        spans: equal parts of a sample's pixels, each of which is cut into chunks by itself.
    """

    columns: int
    rows: int
    chunk_rows: int
    warps: int
    programs: int
    chunks: int
    spans: int = 1


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _warps(entries: int, per_thread: int) -> int:
    wanted = power_of_two(entries // (32 * per_thread))
    return max(1, min(MAX_WARPS, max(wanted, min(4, entries // 64))))  # four warps finish a small set sooner than fewer


@cache
def one_program_per_set(g: Geometry, itemsize: int) -> bool:
    """Whether a normalised set is swept twice by one program, rather than by three launches."""
    width = g.channels // g.groups
    if g.plane and g.pixels != g.plane:  # sets of several samples, whose planes of one channel lie apart
        return False
    small = g.plane == 0 and g.groups > 1 and width * itemsize < MIN_GROUP_BYTES
    if small or power_of_two(width) > SET_BYTES["second"] // itemsize:
        return False
    return g.set_entries <= SMALL_SET or (g.set_entries <= LARGE_SET and g.samples * g.groups >= MIN_SETS)


@cache
def set_blocks(g: Geometry, kind: str, itemsize: int) -> Blocks:
    """For one program per normalised set."""
    columns = power_of_two(g.channels // g.groups)
    rows = max(1, min(SET_BYTES[kind] // itemsize // columns, power_of_two(g.pixels)))
    return Blocks(
        columns, rows, g.pixels, _warps(rows * columns, SET_THREAD_BYTES[kind] // itemsize), g.samples * g.groups, 1
    )


@cache
def reduce_blocks(g: Geometry, kind: str) -> Blocks:
    """For partial sums: few enough chunks that adding them up is cheap, enough to fill the card."""
    return _chunked(g, kind, lambda rows, columns: -(-PROGRAMS // (g.samples * columns)))


@cache
def apply_blocks(g: Geometry) -> Blocks:
    """For an element-wise sweep: every program has APPLY_TILES tiles, which share the per-channel rows."""
    return _chunked(g, "apply", lambda rows, columns: -(-g.pixels // (APPLY_TILES * rows)))


def _chunked(g: Geometry, kind: str, wanted: Callable[[int, int], int]) -> Blocks:
    most = PLANE_COLUMNS if g.plane else MAX_COLUMNS if g.normed else FLAT
    columns = min(power_of_two(g.channels), most)
    spans = g.pixels // g.plane if g.plane else 1
    length = g.pixels // spans
    rows = max(1, min(TILE[kind] // columns, power_of_two(length)))
    column_blocks = -(-g.channels // columns)
    tiles = -(-length // rows)
    chunks = max(1, min(wanted(rows, column_blocks) // spans, tiles))
    chunk_rows = -(-tiles // chunks) * rows
    chunks = spans * -(-length // chunk_rows)
    warps = _warps(rows * columns, ENTRIES_PER_THREAD[kind])
    return Blocks(columns, rows, chunk_rows, warps, g.samples * chunks * column_blocks, chunks, spans)


@cache
def finish_blocks(g: Geometry, chunks: int) -> tuple[int, int, int, int]:
    """Groups, channels of a group and chunks of a tile, and the number of programs, for adding up chunks."""
    width = power_of_two(g.channels // g.groups)
    groups = max(1, min(power_of_two(g.groups), 16 // width))
    rows = max(1, min(power_of_two(chunks), FINISH_TILE // (groups * width)))
    return groups, width, rows, g.samples * -(-g.groups // groups)
