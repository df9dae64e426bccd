"""`make slower [SECONDS=...]`: random blocks under "auto" beside eager, for where the rule of choice is wrong.

The rule is drawn from a few blocks at many sizes (choose.py). This goes the other way: every family, norm, activation,
memory format and dtype at sizes of the papers' networks, and prints each block that "auto" makes slower than eager.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch import choice
from fastode.testing import sample_input

from . import drawn, header, timing, workloads

BELOW = 0.95  # of eager's speed
ROUNDS, AGAIN = 3, 9  # of a first measurement, and of one that is slower
MOST_ENTRIES = 1 << 22  # of an input
CHANNELS, SIDES, BATCHES = (8, 16, 16, 32, 32, 64, 64, 128, 256), (4, 8, 8, 14, 16, 16, 28, 32, 32), (2, 8, 32, 64)
DTYPES = ("float32", "bfloat16", "autocast", "autocast of bfloat16 maps")
ACTIVATIONS = {name: drawn.ACTIVATIONS[name] for name in ("relu", "leaky_relu", "tanh", "silu", "gelu")}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "group": lambda channels: nn.GroupNorm(max(channels // 8, 1), channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


class Lowered(nn.Module):
    """A block under autocast; its output stays bfloat16, which `contenders.Autocast` makes float32 for a loss."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Any:
        """The block's outputs."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(*inputs)


@dataclass(frozen=True)
class Case:
    """A block, its inputs, and what they are in words."""

    text: str
    block: nn.Module
    inputs: tuple[Tensor, ...]


Layers = Callable[[int], list[nn.Module]]


def _before(channels: int, norm: Layers, bias: bool) -> nn.Module:
    """A branch of two units that begin with a norm and an activation."""
    units = [[*norm(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=bias)] for _ in range(2)]
    return nn.Sequential(*itertools.chain(*units))


def _behind(channels: int, out: int, norm: Layers, stride: int) -> list[nn.Module]:
    """Two convolutions with a norm and an activation behind each."""
    return [
        *(nn.Conv2d(channels, out, 3, stride, 1), *norm(out)),
        *(nn.Conv2d(out, out, 3, padding=1), *norm(out)),
    ]


def _bottleneck(channels: int, norm: Layers, stride: int) -> nn.Module:
    """A residual block with an activation behind its sum, of a 1×1, a 3×3 and a 1×1 convolution; stride 2 halves."""
    inner, out = max(channels // 4, 4), channels * stride
    branch = nn.Sequential(
        *(nn.Conv2d(channels, inner, 1), *norm(inner), nn.Conv2d(inner, inner, 3, stride, 1), *norm(inner)),
        *(nn.Conv2d(inner, out, 1), *norm(out)[:-1]),
    )
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), *norm(out)[:-1]) if stride > 1 else None
    return reference.ResBlock(branch, shortcut=shortcut, post_activation=nn.ReLU())


FAMILIES: dict[str, Callable[[int, Layers, bool], nn.Module]] = {
    "IESkip": lambda c, norm, bias: reference.IESkip(_before(c, norm, bias)),
    "SSP2": lambda c, norm, bias: reference.SSP2(_before(c, norm, bias)),
    "SSP3": lambda c, norm, bias: reference.SSP3(_before(c, norm, bias)),
    "ResBlock": lambda c, norm, bias: reference.ResBlock(_before(c, norm, bias)),
    "halving ResBlock": lambda c, norm, bias: reference.ResBlock(
        nn.Sequential(*_behind(c, 2 * c, norm, 2)[:-1]), shortcut=nn.Conv2d(c, 2 * c, 1, 2), post_activation=nn.ReLU()
    ),
    "bottleneck": lambda c, norm, bias: _bottleneck(4 * c, norm, 1),
    "halving bottleneck": lambda c, norm, bias: _bottleneck(4 * c, norm, 2),
    "Chain": lambda c, norm, bias: reference.Chain(*_behind(c, c, norm, 1)),
    "stem": lambda c, norm, bias: reference.Chain(nn.Conv2d(3, c, 3, padding=1), *norm(c)),
}
PAIRS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SkewPair": lambda pair: pair,
    "SOBlock by RK4": lambda pair: reference.SOBlock(pair, solver="rk4"),
}


def draw_case(seed: int, index: int, dtypes: Sequence[str] = DTYPES) -> Case:
    """The case of a seed and an index, the same on every call."""
    draw = random.Random(f"{seed} {index}")
    family, dtype = draw.choice([*FAMILIES, *PAIRS]), draw.choice(dtypes)
    norm, activation = draw.choice(list(NORMS)), draw.choice(list(ACTIVATIONS))
    layout = draw.choice(("channels_last", "channels_last", "contiguous"))
    while True:
        channels, side, batch = draw.choice(CHANNELS), draw.choice(SIDES), draw.choice(BATCHES)
        # Of fewer channels PyTorch's own shortcut writes beside its memory (docs/pytorch-faults.md, 4).
        if family.startswith("halving") and channels < 16:
            continue
        wide = 4 * channels if family.endswith("bottleneck") else channels
        if wide * side * side * batch <= MOST_ENTRIES and channels * side < 256 * 16:
            break
    torch.manual_seed(seed)
    if family in PAIRS:
        norm = "layer" if norm == "batch" else norm  # which would couple the samples of a solution
        block = PAIRS[family](reference.SkewPair(channels, channels, norm=norm))
    else:
        layers: Layers = lambda width: [NORMS[norm](width), ACTIVATIONS[activation]()]  # noqa: E731
        block = FAMILIES[family](channels, layers, norm == "none")
    given = torch.bfloat16 if "bfloat16" in dtype else torch.float32
    block.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if layout == "channels_last":
        block.to(memory_format=torch.channels_last)
    width, count = 3 if family == "stem" else wide, 2 if family == "SkewPair" else 1
    inputs = tuple(sample_input(batch, width, side, side, dtype=given, layout=layout, seed=i) for i in range(count))
    words = f"{family}, {norm} norm, {activation}, {wide}@{side}, batch {batch}, {layout}, {dtype}"
    return Case(words, Lowered(block) if dtype.startswith("autocast") else block, inputs)


def ratios(case: Case, rounds: int = ROUNDS) -> dict[str, float]:
    """Eager's time in that of the fused block, in each mode: the median of interleaved rounds."""
    found = {}
    for mode in workloads.BLOCK_MODES:
        fused = copy.deepcopy(case.block)
        fastode.fuse(fused)
        turns = {
            name: workloads.work(module, case.inputs, mode).run
            for name, module in (("eager", copy.deepcopy(case.block)), ("auto", fused))
        }
        times = timing.interleave(turns, timing.Clock(), seconds=0.0, rounds=(rounds, rounds))
        if times.errors:
            raise RuntimeError(f"{case.text}: {times.errors}")
        found[mode] = times.ratio("auto", "eager").median
    return found


def engines(case: Case) -> list[str]:
    """The engines that "auto" takes."""
    fused = copy.deepcopy(case.block)
    fastode.fuse(fused)
    with choice.recording() as used:
        fused(*case.inputs)
    return sorted({*used.values()})


def slower(seed: int, indices: Iterator[int], until: float, below: float, dtypes: Sequence[str]) -> tuple[int, int]:
    """Measure cases until a time and print each that is slower: how many were measured, and how many are slower."""
    lowest: list[float] = []
    for index in indices:
        if time.monotonic() > until:
            break
        case = draw_case(seed, index, dtypes)
        found = ratios(case)
        if min(found.values()) < below:
            found = ratios(case, AGAIN)
        lowest.append(min(found.values()))
        if lowest[-1] < below:
            modes = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in found.items())
            print(f"{modes}: {case.text}, by {' and '.join(engines(case))} (--index {index})", flush=True)
    count = sum(ratio < below for ratio in lowest)
    if lowest:
        middle = statistics.median(lowest)
        print(f"{len(lowest)} blocks, {count} with a mode below {below:g} of eager's speed; median {middle:.2f}")
    return len(lowest), count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a block is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slower", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--index", type=int, help="that case alone")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--below", type=float, default=BELOW, help="of eager's speed, what is printed")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    cpu = header.device_name(torch.device("cpu"))
    print(f"seed {asked.seed}, {asked.threads} threads, {cpu}, torch {torch.__version__}", flush=True)
    indices = itertools.count() if asked.index is None else iter([asked.index])
    _, count = slower(asked.seed, indices, time.monotonic() + asked.seconds, asked.below, asked.dtypes)
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main())
