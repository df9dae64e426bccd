"""Where the resident engine is slower than the staged one on the CPU, so that "auto" leaves it: a measured rule.

`python -m benchmarks.choose` measures both engines in turns over channels, sizes and batches, and writes the rule with
the points that support it to a file of ops/resident/rules, one for each kind of CPU. On a kind without a file the
bounds of `DEFAULT` stand in, which are reasoned and not measured.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...branch.layers import Conv
from ...native.toolchain import kernel_features
from ...tracing import is_exporting
from ..engine import ODE_SOLUTION

FOLDER = Path(__file__).resolve().parent / "rules"
# A "chain3" is a chain of 3×3 convolutions of stride 1 over even sides alone, of which there are at least two.
FAMILIES = ("ie", "shu_osher", "skew_pair", "skew_solution", "chain", "chain3")
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
    small_channels: int | None = None  # of that map where it is no larger than `small_kb`, whatever the bounds above
    small_kb: int | None = None

    def beyond(self, channels: int, pixels: int, itemsize: int, batch: int | None, threads: int) -> str:
        """Which bound a call is beyond, as the start of a sentence; empty where it is within all of them.

        A batch of None is of a size that must not be looked at.
        """
        size = channels * pixels * itemsize
        if batch is not None:
            for few in self.few:
                if batch < few.below * threads:
                    return few.beyond(channels, size)
        if self.small_channels is not None and not _over(channels, size, self.small_channels, self.small_kb):
            return ""
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
        if self.small_channels is not None:
            own.append(f"or at most {self.small_channels} channels and {self.small_kb} KB")
        return ", ".join([*own, *[few.describe() for few in self.few]]) or "always"


SLOWER = "it was measured to be slower than plain PyTorch"  # the end of a sentence
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
        # Of the skew blocks only those with sample-local norms are measured; the rule of chains is for all of them.
        other = own
        if family.startswith("skew"):
            other = f"{family} sample {dtype}"
        if family == "chain3":
            other = f"chain {norms} {dtype}"
        return self.lines.get(own, self.lines.get(other, stand_in(family, dtype)))


def stand_in(family: str, dtype: str) -> Line:
    """The line of blocks of which none is measured on CPUs of this kind."""
    if family.startswith("chain"):
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


def half_is_fast(batch: int | None, lines: Sequence[Line], channels: int, pixels: int) -> bool:
    """Whether a call within one of some lines is as fast though threads are idle, half of them at most."""
    if batch is None or 2 * batch < threads():
        return False
    return any(not line.beyond(channels, pixels, 4, None, threads()) for line in lines)


def few_for_threads(batch: int | None) -> str:
    """That threads are left without a sample, as the start of a sentence; empty where they are not."""
    return "with fewer samples than threads" if batch is not None and batch < threads() else ""


def in_words() -> list[str]:
    """The rule in force, a line for each kind of block."""
    lines = dict(_rule.lines)
    for family, dtype in itertools.product(FAMILIES, DTYPES):
        of_family = any(f"{family} {norms} {dtype}" in lines for norms in NORMS)
        if not of_family and (family, dtype) != ("chain", "bfloat16") and family != "chain3":
            lines[f"{family} {dtype}"] = stand_in(family, dtype)
    rows = [f"  {name:<32}{line.describe()}{f': {line.why}' if line.why else ''}" for name, line in lines.items()]
    rows.append(f"  {ODE_SOLUTION:<32}{SOLUTION.describe()}")
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


def may_be_filtered(conv: Conv, height: int, width: int) -> bool:
    """Whether a convolution of inputs of these sides is 3×3 of stride 1 over even ones, as filtering asks."""
    kind = not conv.mean and conv.kernel == (3, 3) and conv.stride == (1, 1)
    return kind and height % 2 == 0 and width % 2 == 0


def saved_products(height: int, width: int) -> int:
    """Products that filtering saves for each pair of channels, in one sample: `winograd_saves` of csrc/cpu."""
    return (3 * height - 2) * (3 * width - 2) - 4 * height * width


def on_tiles() -> bool:
    """Whether bfloat16 is multiplied on AMX tiles."""
    return _tiles


def multiplies_pairs() -> bool:
    """Whether bfloat16 is multiplied by AVX-512's dot products, and not on AMX tiles."""
    return _products and not _tiles


def multiplies_widened() -> bool:
    """Whether PyTorch has but slow convolutions in bfloat16 for this CPU, and the rule has lines for such maps."""
    return not _has_wide_registers and not _tiles and not _products and "chain sample bfloat16" in _rule.lines


def filters_early() -> bool:
    """Whether 3×3 convolutions are filtered as CPUs without AVX-512 do, and the rule has lines for chains of them."""
    return not _has_wide_registers and "chain3 batch float32" in _rule.lines


def is_large_contiguous(x: torch.Tensor, entries: int) -> bool:
    """Whether x has more entries than that, and is not in channels_last."""
    known = samples(x) is not None
    return known and not x.is_contiguous(memory_format=torch.channels_last) and x.numel() > entries


# Of steps of one evaluation with batch norms: samples and pixels for each thread, below both of which PyTorch was
# faster, on one thread of an AMD EPYC, 2026-11-27. In a network such a block packs its weights anew.
FEW_OF_STEPS = (8, 512)


def too_few(x: torch.Tensor, few: tuple[int, int]) -> str:
    """That there are neither so many samples nor pixels for each thread, as the start of a sentence; else empty."""
    batch, (least, pixels) = samples(x), few
    if batch is None or batch >= least * threads() or batch * x.shape[2] * x.shape[3] >= pixels * threads():
        return ""
    return f"with fewer than {least} samples and {pixels} pixels for each thread"


def slower_than_eager(
    x: torch.Tensor,
    coupled: bool,
    channels: int,
    pixels: int,
    few: tuple[int, int] = (0, 0),
    family: str = "chain",
) -> str:
    """Why a call with one evaluation of its branch is taken to be slower than plain PyTorch; empty where it is not.

    Args:
        x: the input [N, C, H, W] on the CPU.
        coupled: whether a norm takes its statistics over the batch.
        channels: of the widest map.
        pixels: as `slower` has them.
        few: how many samples or pixels for each thread are enough; one sample at least is, as threads take samples.
        family: "chain" or "chain3".
    """
    beyond = few_for_threads(samples(x)) or too_few(x, few)
    if beyond:
        return f"{beyond} {SLOWER}"
    return slower(family, coupled, x, channels, pixels, " than plain PyTorch")


def slower_linear(family: str, weight: torch.Tensor) -> str:
    """Why the field of two matrix products, or a solution, is taken to be slower than the reference's; empty if not."""
    most = MOST_LINEAR_KB[family]
    if weight.numel() * weight.element_size() <= most * 1024:
        return ""
    return f"with a matrix of more than {most} KB it was measured to be slower than the reference"
