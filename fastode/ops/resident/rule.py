"""Where the resident engine is slower than the staged one on the CPU, so that "auto" leaves it: a measured rule.

`python -m benchmarks.choose` measures both engines in turns over channels, sizes and batches, and writes the rule with
the points that support it to a file of ops/resident/rules, one for each kind of CPU. On a kind without a file the
bounds of `DEFAULT` stand in, which are reasoned and not measured.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...native.toolchain import kernel_features
from ...tracing import is_exporting
from ..engine import ODE_SOLUTION

FOLDER = Path(__file__).resolve().parent / "rules"
FAMILIES = ("ie", "shu_osher", "skew_pair", "skew_solution", "chain")
NORMS = ("sample", "batch")
DTYPES = ("float32", "float64", "bfloat16")


def _over(channels: int, size: int, most_channels: int | None, most_kb: int | None) -> str:
    """Which of two bounds a map of so many channels, and bytes of a sample, is over; empty where it is over none."""
    if most_channels is not None and channels > most_channels:
        return f"more than {most_channels} channels"
    if most_kb is not None and size > most_kb * 1024:
        return f"a feature map of one sample of more than {most_kb} KB"
    return ""


@dataclass(frozen=True)
class Few:
    """The bounds of calls of few samples, in place of a line's own; inclusive.

    Args:
        below: there are fewer samples for each thread than this.
        most_channels: of the branch's widest map; 0: none are taken.
        most_kb: of that map of one sample, None where there is no bound.
    """

    below: float
    most_channels: int
    most_kb: int | None = None

    def beyond(self, channels: int, size: int) -> str:
        """`Line.beyond` of a call of few samples, with the map's size in bytes."""
        few = f"with fewer than {self.below:g} samples for each thread"
        if self.most_channels == 0:
            return few
        over = _over(channels, size, self.most_channels, self.most_kb)
        return f"{few} and {over}" if over else ""

    def describe(self) -> str:
        """The bounds in words."""
        if self.most_channels == 0:
            return f"at least {self.below:g} samples for each thread"
        size = "" if self.most_kb is None else f" and {self.most_kb} KB"
        return f"with fewer than {self.below:g} samples for each thread at most {self.most_channels} channels{size}"


@dataclass(frozen=True)
class Line:
    """Where "auto" takes the resident engine: up to these bounds, each of them inclusive, None where there is none."""

    most_channels: int | None = None  # of the branch's widest map
    most_kb: int | None = None  # of that map of one sample, as the engine keeps it
    least_pixels: int | None = None  # of a map, H times W
    least_channels: int | None = None  # of the branch's widest map
    few: tuple[Few, ...] = ()  # the fewest first: a call takes the first that it is of
    why: str = ""

    def beyond(self, channels: int, pixels: int, itemsize: int, batch: int | None, threads: int) -> str:
        """Which bound a call is beyond, as the start of a sentence; empty where it is within all of them.

        A batch of None is of a size that must not be looked at.
        """
        size = channels * pixels * itemsize
        if batch is not None:
            for few in self.few:
                if batch < few.below * threads:
                    return few.beyond(channels, size)
        over = _over(channels, size, self.most_channels, self.most_kb)
        if over:
            return f"with {over}"
        if self.least_pixels is not None and pixels < self.least_pixels:
            return f"with fewer than {self.least_pixels} pixels"
        if self.least_channels is not None and channels < self.least_channels:
            return f"with fewer than {self.least_channels} channels"
        return ""

    def describe(self) -> str:
        """The bounds in words."""
        bounds = {
            "at most {} channels": self.most_channels,
            "at most {} KB for a feature map of one sample": self.most_kb,
            "at least {} pixels": self.least_pixels,
            "at least {} channels": self.least_channels,
        }
        own = [text.format(value) for text, value in bounds.items() if value is not None]
        return ", ".join([*own, *[few.describe() for few in self.few]]) or "always"


NEVER = Line(most_channels=0)
# Past 128 channels a convolution's weights no longer stay in 2 MB of L2; past 256 KB the maps of a backward do not.
DEFAULT = Line(most_channels=128, most_kb=256)
# With AVX-512 that costs less than it gains. On one thread of an AMD EPYC, 2026-11-27: of 44 float32 blocks and batches
# from 128 channels at 16×16 to 512 at 4×4 and 64 at 64×64 resident was faster in all steps (1.2 to 2.2), attacks' steps
# (1.2 to 2.4) and all but two forwards (0.91 to 2.1); of 10 float64 blocks 1.0 to 4.4, but for one forward.
WIDE = Line(most_channels=512, most_kb=1024)
# Of a single map's solution, on one thread of an AMD EPYC: 1.1 to 11 times staged at all of 11 shapes, of which 512
# channels at 4×4 are the widest and 64 at 48×48 the largest.
SOLUTION = Line(most_channels=512, most_kb=640)
# Of chains, of which plain PyTorch runs the rest: the blocks of benchmarks.choose in float32 on one thread of that CPU,
# 16 to 512 channels. Within, 31 of 32 shapes are faster with 32 samples, in the mean of a step, an attack's step and a
# forward (0.97 to 2.4, median 1.3). A few samples of many channels are not worth the packing of the weights: in a
# network, which finds them in no cache, with two threads, 64 channels were as fast with one sample for each thread,
# wider ones with four.
CHAIN = Line(most_channels=512, most_kb=256, few=(Few(4, 127, 256),))
# From so many channels on, maps with an odd side, or of fewer pixels than FLAT, whose pixels are more than this and no
# multiple of it. Convolutions of 3×3 over even sides have fewer products (csrc/cpu/resident/winograd.h): with two
# threads of an Intel Xeon, 2026-11-28, steps, attacks' steps and forwards of post-activation blocks of 8 and 32 samples
# were 1.27 to 1.72 times as fast as eager's with 128 and 256 channels at 10×10 and 14×14, 0.97 to 1.23 with 512 at
# 14×14; of bottlenecks 1.12 to 1.7. Others: 256 at 6×6 0.88 to 1.38, 128 at 9×9 and 15×15 0.96 to 1.34. Maps of 7×7
# have a tile of their own: 128 and 256 channels 0.97 to 1.37, 512 0.6 to 1.2.
UNEVEN = (128, 16)
FLAT = 64
SEVENS = (49, 256)  # pixels of such a map, and up to how many channels it is as fast as an even one


@dataclass(frozen=True)
class Rule:
    """The lines, by "family norms dtype", and where they come from."""

    lines: Mapping[str, Line]
    source: str
    measured: bool

    def line(self, family: str, norms: str, dtype: str) -> Line:
        """The line of a family of blocks, of norms that couple the batch or do not, and of a dtype."""
        own = f"{family} {norms} {dtype}"
        # Of the skew blocks only those with sample-local norms are measured.
        other = f"{family} sample {dtype}" if family.startswith("skew") else own
        return self.lines.get(own, self.lines.get(other, stand_in(family, dtype)))


def stand_in(family: str, dtype: str) -> Line:
    """The line of blocks of which none is measured on CPUs of this kind."""
    if family == "chain":
        return CHAIN
    return WIDE if family in ("ie", "shu_osher") and dtype != "bfloat16" and _has_wide_registers else DEFAULT


def cpu_kind() -> str:
    """What a measured rule holds for: the machine type and the instructions that the engine makes use of."""
    return " ".join([platform.machine(), *kernel_features(telling=True)])


def path_of(kind: str, folder: Path = FOLDER) -> Path:
    """The file that the rule for a kind of CPU is kept in.

    Example:
        >>> path_of("x86_64 avx2").name
        'x86_64-avx2.json'
    """
    return folder / f"{kind.replace(' ', '-')}.json"


def read(folder: Path = FOLDER, kind: str | None = None) -> Rule:
    """The rule that `benchmarks.choose` wrote for a kind of CPU, or the reasoned one with why that is taken.

    Args:
        folder: of the files, one for each kind.
        kind: this machine's if None.
    """
    kind = cpu_kind() if kind is None else kind
    path = path_of(kind, folder)
    try:
        found = json.loads(path.read_text())
        lines = from_json(found["rule"])
        measured_on = found["measured_on"]
        place = "{device}, {threads} threads, torch {torch}, {date}, commit {commit:.12}".format(**measured_on)
        if measured_on["kind"] != kind:
            raise ValueError(f"it is for {measured_on['kind']}")
    except FileNotFoundError:
        kinds = ", ".join(sorted(file.stem.replace("-", " ") for file in folder.glob("*.json"))) or "no CPU"
        return Rule({}, f"reasoned, not measured: there are rules for {kinds}, and this is {kind}", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Rule({}, f"reasoned, not measured: {path} cannot be read ({type(error).__name__}: {error})", False)
    return Rule(lines, f"measured on {place}", True)


def as_json(lines: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """Lines as a file holds them."""
    found = {name: asdict(line) | {"few": [asdict(few) for few in line.few]} for name, line in lines.items()}
    return {
        name: {key: value for key, value in line.items() if value not in (None, [])} for name, line in found.items()
    }


def from_json(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Line]:
    """Lines from what a file holds."""
    return {
        name: Line(**(dict(line) | {"few": tuple(Few(**few) for few in line.get("few", ()))}))
        for name, line in lines.items()
    }


# Under autocast, beside plain PyTorch, on an AMD EPYC with dot products of bfloat16. Float32 maps, by family: this
# engine multiplies them in float32; on AMX tiles PyTorch's bfloat16 is faster still. One thread and two, 2026-11-29,
# 500 random blocks from 4x4 to 32x32: IE-Skips of 64 and 96 channels 0.95 to 5.4, of 128 0.76 to 2.8; schemes, those of
# one evaluation too, of 32 and 64 channels 1.02 to 6, of 128 0.68 to 2; of 64 and an odd side 0.75 to 1.5. With fewer
# samples than threads 64 channels at 32x32 had 0.82 to 1.35, 96 0.81 to 1.3.
LOWERED = {
    "ie": Line(most_channels=96, few=(Few(1, 64),)),
    "shu_osher": Line(most_channels=64, few=(Few(1, 64, 64),)),
}
LOWERED_ODD = 64
# Bfloat16 maps, one thread, 2026-11-27: 1.04 to 5 up to 128 channels, 0.8 to 1.2 at 256, 0.6 to 1.06 at 512; schemes of
# one evaluation 0.99 to 2.8 up to 128, of 4 to 32 samples.
LOWERED_MAPS = Line(most_channels=128)
# Chains on bfloat16 maps, multiplied by those dot products: 16 channels at least, or a vector is mostly empty. Steps
# and forwards of benchmarks.choose's blocks up to 160 channels, with four samples for each of two threads of an AMD
# EPYC and more, 2026-11-28: 0.94 to 2.4, median 1.17. With fewer the weights, which a network finds in no cache, are
# packed for little.
LOWERED_CHAIN = (16, Line(most_channels=160, few=(Few(4, 127),)))
# With fewer channels where there is a norm, and no kernel larger than 3x3 or of stride 2 reads so few: two threads of
# an AMD EPYC, 2026-11-28, 8 to 64 samples from 8x8 to 64x64, steps, attacks' steps and forwards. Blocks of two
# convolutions of 4 to 12 channels: 1.4 to 4.5. One convolution of an image's three channels at most: 0.95 to 2.7,
# median 1.5, and from 96x96 to 224x224 0.83 to 2.4; of 8 and 12 channels 0.93 to 2.5. Without a norm 0.75 to 1.4,
# kernels of 5x5 0.5 to 1.4, of stride 2 0.7 to 1.4.
IMAGE_CHANNELS, LOWERED_IMAGE = 3, 64 * 64
# Maps whose rows are no whole rows of tiles, of so many channels and more, with norms and without: 14x14 and 28x28, 8
# to 64 samples, there 0.76 to 1.1 (but for norms of several groups in channels_last, 1.3 to 1.5), below 0.92 to 1.6.
LOWERED_UNEVEN = (128, 32)
# Without norms, and in contiguous memory, of more entries 0.88 to 1.0, of fewer 1.1 to 1.7.
UNNORMED_CONTIGUOUS = 3 << 17
# Wider ones with batch norms and small maps, one thread, 2026-11-27: 1.05 to 1.3 at 256.
LOWERED_COUPLED_CHAIN = Line(most_channels=256, most_kb=32, few=(Few(8, 0),))
# Wider ones whose float32 weights autocast has PyTorch cast: blocks of 256 channels at 8x8 with 32 and 64 samples, two
# threads, 2026-11-28: steps 1.01 to 1.25, forwards 0.98 to 1.12; of ResNet10, from 16x16, 1.04 to 1.11. At 16x16 0.95
# to 1.05, and 512 channels' steps 0.8 to 1.03.
LOWERED_CAST_CHAIN = Line(most_channels=256, most_kb=128, few=(Few(16, 0),))
# On AMX tiles, on one thread of an Intel Xeon, 2026-11-27, of 25 blocks of benchmarks.choose from 16 to 512 channels,
# 4 to 64 pixels a side and 2 to 64 samples: steps 1.15 to 2.1, attacks' steps 1.2 to 2.7, forwards 1.04 to 2.6 (one of
# 784 KB 0.83, in four other runs 0.99 to 1.3, with two threads 1.1 to 1.3); with 4 samples of 256 and 512 channels
# steps were 0.91 and 0.94, and 8 channels' forward 0.74.
TILED_CHAIN = (16, Line(most_channels=512, most_kb=784, few=(Few(8, 255, 784),)))

# Of a matrix W, in KB: a sample's products read all of it, where PyTorch's read it once for many samples. Solves by
# error gain by what is between the products. Measured on one thread of an AMD EPYC, 2026-11-27.
MOST_LINEAR_KB = {"linear_adaptive": 1024, "linear_solution": 48, "skew_linear": 24}

# Read once and here, because a traced call must not read files.
_rule = read()
_has_wide_registers = "avx512f" in cpu_kind()
_tiles = "amx_bf16" in kernel_features()
_products = "avx512_bf16" in kernel_features()
_threads = torch.get_num_threads()  # as read at the last untraced call: a tracer cannot ask


def measured() -> bool:
    """Whether the lines were measured on CPUs of this kind."""
    return _rule.measured


def threads() -> int:
    """How many threads the engines' loops have."""
    global _threads
    if not torch.compiler.is_compiling():
        _threads = torch.get_num_threads()
    return _threads


def samples(x: torch.Tensor) -> int | None:
    """How many samples a rule may look at: None where a call is exported, which would then hold for that size alone."""
    return None if is_exporting() else x.shape[0]


def few_for_threads(batch: int | None) -> str:
    """That threads are left without a sample, as the start of a sentence; empty where they are not."""
    return "with fewer samples than threads" if batch is not None and batch < threads() else ""


def in_words() -> list[str]:
    """The rule in force, a line for each kind of block."""
    lines = dict(_rule.lines)
    for family, dtype in itertools.product(FAMILIES, DTYPES):
        of_family = any(f"{family} {norms} {dtype}" in lines for norms in NORMS)
        if not of_family and (family, dtype) != ("chain", "bfloat16"):
            lines[f"{family} {dtype}"] = stand_in(family, dtype)
    rows = [f"  {name:<32}{line.describe()}{f': {line.why}' if line.why else ''}" for name, line in lines.items()]
    rows.append(f"  {ODE_SOLUTION:<32}{SOLUTION.describe()}")
    rows.append(f"  {'one-step blocks, autocast':<32}{LOWERED_MAPS.describe()}")
    least, chain = TILED_CHAIN if _tiles else LOWERED_CHAIN
    rows.append(f"  {'chain, bfloat16 maps':<32}{least} channels at least, and {chain.describe()}")
    if not _tiles:
        narrower = f"several convolutions; or one of at most {IMAGE_CHANNELS} channels and {LOWERED_IMAGE} pixels"
        rows.append(f"  {'the same, with norms, narrower':<32}of kernels up to 3x3 and stride 1: {narrower}")
        rows.append(f"  {'the same, with batch norms, wider':<32}{LOWERED_COUPLED_CHAIN.describe()}")
        rows.append(f"  {'the same, under autocast, wider':<32}{LOWERED_CAST_CHAIN.describe()}")
    return [f'where "auto" takes resident before staged on the CPU ({_rule.source})', *rows]


def slower(
    family: str,
    coupled: bool,
    x: torch.Tensor,
    channels: int,
    pixels: int | None = None,
    than: str = " than the others",
) -> str:
    """Why the resident engine is taken to be slower than what runs in its place; empty where it is not.

    Args:
        family: of the block, one of `FAMILIES` or "ode_solution".
        coupled: whether a norm takes its statistics over the batch.
        x: the input [N, C, H, W] on the CPU.
        channels: of the widest map of the branch.
        pixels: of a map of so many channels that is as large as the branch's largest; x's own if None.
        than: what it would be slower than, in words.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    norms = NORMS[1 if coupled else 0]  # torch 2.11 does not trace a bool as an index
    solution = family == ODE_SOLUTION
    line = SOLUTION if solution else _rule.line(family, norms, dtype)
    itemsize = 8 if x.dtype == torch.float64 else 4  # bfloat16 is counted as float32
    area = x.shape[2] * x.shape[3] if pixels is None else pixels
    beyond = line.beyond(channels, area, itemsize, samples(x), threads())
    if not beyond:
        return ""
    if solution:
        return f"{beyond} it was not measured"
    here = _rule.measured and line not in (DEFAULT, WIDE, CHAIN)
    verdict = "was measured to be slower" if here else "is expected to be slower"
    return f"{beyond} it {verdict}{than}"


def is_uneven(channels: int, height: int, width: int) -> bool:
    """Whether a chain with such a float32 map was measured to be slower than plain PyTorch: see `UNEVEN`."""
    (wide, even), (sevens, widest), pixels = UNEVEN, SEVENS, height * width
    if channels < wide or pixels <= even or pixels % even == 0 or (pixels == sevens and channels <= widest):
        return False
    return height % 2 > 0 or width % 2 > 0 or pixels < FLAT


def slower_lowered(family: str, x: torch.Tensor, channels: int) -> str:
    """Why the resident engine is taken to be slower than plain PyTorch under autocast; empty if not.

    Args:
        family: "ie" or "shu_osher".
        x: the input [N, C, H, W], float32 or bfloat16.
        channels: of the widest map of the branch.
    """
    why, line = "under autocast ", LOWERED_MAPS
    if x.dtype == torch.float32:
        why, line = "multiplying float32 maps in float32, where autocast has bfloat16, ", LOWERED[family]
        if _tiles:
            return f"{why}it is expected to be slower than plain PyTorch"
    beyond = line.beyond(channels, x.shape[2] * x.shape[3], 4, x.shape[0], threads())
    odd = x.shape[2] % 2 > 0 or x.shape[3] % 2 > 0
    if not beyond and x.dtype == torch.float32 and family == "shu_osher" and channels >= LOWERED_ODD and odd:
        beyond = f"with {LOWERED_ODD} channels and more and an odd side"
    return f"{why}{beyond} it was measured to be slower than plain PyTorch" if beyond else ""


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


def fills_tiles(width: int) -> bool:
    """Whether rows of a map, or of maps that lie together, are whole tiles' rows in products of bfloat16."""
    return width % 16 == 0 or 32 % width == 0


def multiplies_pairs() -> bool:
    """Whether bfloat16 is multiplied by AVX-512's dot products, and not on AMX tiles."""
    return _products and not _tiles


def slower_lowered_chain(x: torch.Tensor, chain: OneEvaluation, *, casts: bool = False) -> str:
    """Why a chain is taken to be slower than plain PyTorch on bfloat16 maps; empty if not.

    Args:
        x: the input [N, C, H, W].
        chain: what is known of it.
        casts: whether plain PyTorch casts the weights at every call, as under autocast.
    """
    if not _tiles and not _products:
        return "on bfloat16 maps it was measured on CPUs that multiply them, and not on this kind"
    least, line = TILED_CHAIN if _tiles else LOWERED_CHAIN
    batch = samples(x)
    lines = [line]
    if not _tiles and chain.widest > (line.most_channels or 0):
        wider = ((chain.coupled, LOWERED_COUPLED_CHAIN), (casts, LOWERED_CAST_CHAIN))
        lines = [each for holds, each in wider if holds] or lines
    over = [each.beyond(chain.widest, chain.pixels, 4, batch, threads()) for each in lines]
    beyond = few_for_threads(batch) or _of_few_channels(x, least, chain) or ("" if "" in over else over[-1])
    if not beyond and not _tiles:
        beyond = _of_little_gain(x, chain)
    return f"on bfloat16 maps {beyond} it was measured to be slower than plain PyTorch" if beyond else ""


def _of_few_channels(x: torch.Tensor, least: int, chain: OneEvaluation) -> str:
    if chain.fewest >= least:
        return ""
    beyond = f"with fewer than {least} channels"
    if _tiles or not chain.normed or chain.convolutions == 0:
        return beyond
    if chain.convolutions > 1:
        return ""
    if chain.fewest > IMAGE_CHANNELS:
        return beyond
    return f"{beyond} and more than {LOWERED_IMAGE} pixels" if x.shape[2] * x.shape[3] > LOWERED_IMAGE else ""


def _of_little_gain(x: torch.Tensor, chain: OneEvaluation) -> str:
    """Where the convolutions are slower than PyTorch's, or nothing beside them is faster."""
    most = LOWERED_UNEVEN[0 if chain.normed else 1]
    if chain.uneven >= most:
        return f"with {most} channels and more of widths that are no multiple of 16 and do not divide 32"
    if chain.normed or not is_large_contiguous(x, UNNORMED_CONTIGUOUS):
        return ""
    return f"without norms, with more than {UNNORMED_CONTIGUOUS} entries not in channels_last,"


def is_large_contiguous(x: torch.Tensor, entries: int) -> bool:
    """Whether x has more entries than that, and is not in channels_last."""
    known = samples(x) is not None
    return known and not x.is_contiguous(memory_format=torch.channels_last) and x.numel() > entries


# Of steps of one evaluation with batch norms: samples and pixels for each thread, below both of which PyTorch was
# faster, on one thread of an AMD EPYC, 2026-11-27. In a network such a block packs its weights anew.
FEW_OF_STEPS = (8, 512)


def slower_than_eager(x: torch.Tensor, coupled: bool, channels: int, pixels: int, few: tuple[int, int] = (0, 0)) -> str:
    """Why a call with one evaluation of its branch is taken to be slower than plain PyTorch; empty where it is not.

    Args:
        x: the input [N, C, H, W] on the CPU.
        coupled: whether a norm takes its statistics over the batch.
        channels: of the widest map.
        pixels: as `slower` has them.
        few: how many samples or pixels for each thread are enough; one sample at least is, as threads take samples.
    """
    batch = samples(x)
    beyond = few_for_threads(batch)
    if not beyond and batch is not None:
        places = batch * x.shape[2] * x.shape[3]
        if batch < few[0] * threads() and places < few[1] * threads():
            beyond = f"with fewer than {few[0]} samples and {few[1]} pixels for each thread"
    if beyond:
        return f"{beyond} it was measured to be slower than plain PyTorch"
    return slower("chain", coupled, x, channels, pixels, " than plain PyTorch")


def slower_linear(family: str, weight: torch.Tensor) -> str:
    """Why the field of two matrix products, or a solution, is taken to be slower than the reference's; empty if not."""
    most = MOST_LINEAR_KB[family]
    if weight.numel() * weight.element_size() <= most * 1024:
        return ""
    return f"with a matrix of more than {most} KB it was measured to be slower than the reference"
