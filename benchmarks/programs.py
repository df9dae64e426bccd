"""The CUDA programs of csrc/cuda: the blocks that launch them at every size, and what a call has launched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastode.native.constants import TILES
from fastode.testing import sample_input

from . import bench_ie, bench_rk, bench_skew, header
from .workloads import Workload, maps

# The families that have programs, by id and variant: running statistics, or a norm of each sample by itself; then batch
# norm in training, which has programs of its own.
BLOCKS: dict[tuple[str, str], Callable[[int], nn.Module]] = {
    ("ssp3", "eval"): partial(bench_rk.block, "ssp3"),
    ("ie", "k1"): lambda channels: bench_ie.block(channels, "layer", 1, False),
    ("res", "eval"): partial(bench_rk.block, "res"),
    ("ssp3", ""): partial(bench_rk.block, "ssp3"),
    ("ie-bn", "k1"): lambda channels: bench_ie.block(channels, "batch", 1, False),
    ("soblock", "rk4"): lambda channels: bench_skew.block(channels, channels, 1, "rk4"),
    ("soblock", "stride2"): lambda channels: bench_skew.block(channels // 4, channels // 2, 2, "rk4"),
    ("soblock", "dopri5"): lambda channels: bench_skew.block(channels, channels, 1, "dopri5"),
}
HALVING = ("stride2",)  # variants whose images have a fourth of a program's channels on twice its side
MODES = ("forward", "input_grad", "train")
# A call launches one program forwards, one more for the gradient of the input, and two for those of the parameters, one
# where the backward multiplies maps itself.
LAUNCHES = {"forward": 1, "input_grad": 2, "train": 4}
MULTIPLYING = ("dopri5",)
TIMED = (("ssp3", "eval"), ("ie", "k1"), ("soblock", "rk4"))
# Each program once, and once in part of its map.
SANITIZED = (*TIMED, ("ssp3", ""), ("ie-bn", "k1"), ("soblock", "stride2"), ("soblock", "dopri5"))
PAPERS = ((16, 32), (64, 8), (32, 16))  # the sizes of the papers' networks
# Of a judged input: more than a card of 132 multiprocessors has blocks of the larger programs, so that some take two.
# Not many more, for the truth that they are judged by takes float64.
SAMPLES = 150
_PROGRAM = re.compile(r"^struct (\w+)(?: : [\w<>]+)? \{|^  static FASTODE_DEVICE void (run)\(", re.MULTILINE)
_KERNEL = re.compile(r"fastode::device::kernel<fastode::device::(\w+)")
_MANGLED = re.compile(r"^_ZN7fastode6device6kernelINS0_(\d+)(\w+)")


def workload(id: str, variant: str, channels: int, side: int) -> Workload:
    """A family's block at one size, with the images of every other workload of that size."""
    statistics = "eval" if variant == "eval" else "train"
    build = partial(BLOCKS[id, variant], channels)
    image = (channels // 4, 2 * side) if variant in HALVING else (channels, side)
    return Workload(id, variant, f"{channels}@{side}", build, maps(*image), statistics=statistics)


def workloads() -> list[Workload]:
    """Every family at every size for which there are programs: the papers' sizes first."""
    sizes = dict.fromkeys([*(size for size in PAPERS if size in TILES), *TILES])
    return [workload(*named, *size) for size in sizes for named in BLOCKS]


def timed(sizes: int = len(PAPERS)) -> list[Workload]:
    """What is timed: at so many of the papers' sizes."""
    return [w for w in workloads()[: len(BLOCKS) * sizes] if (w.id, w.variant) in TIMED]


def many(channels: int, side: int) -> Tensor:
    """A map of more samples than some programs have blocks at a time.

    Returns:
        float32 [SAMPLES, channels, side, side].
    """
    return sample_input(SAMPLES, channels, side, side)


def names() -> set[str]:
    """The CUDA programs of the project, by the names of their structures; read from the sources."""
    found, last = set(), ""
    for path in sorted((header.ROOT / "csrc" / "cuda").glob("*.cuh")):
        for name, runs in _PROGRAM.findall(path.read_text()):
            last = name or last
            if runs:
                found.add(last)
    return found


def name_of(kernel: str) -> str:
    """The program of a kernel as the profiler names it, demangled or not; "" of any other kernel.

    Example:
        >>> name_of("void fastode::device::kernel<fastode::device::SchemeForward<Tile<...>>, Call>(Call)")
        'SchemeForward'
        >>> name_of("_ZN7fastode6device6kernelINS0_13SchemeForwardINS0_4TileI")
        'SchemeForward'
        >>> name_of("void at::native::vectorized_elementwise_kernel<4>")
        ''
    """
    if found := _KERNEL.search(kernel):
        return found[1]
    mangled = _MANGLED.match(kernel)
    return mangled[2][: int(mangled[1])] if mangled else ""


def launched(run: Callable[[], object]) -> dict[str, int]:
    """How often a call on a card launches each program, by torch.profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return dict(Counter(name for event in profile.events() if (name := name_of(event.name))))


def count_is_wrong(launches: dict[str, int], mode: str, variant: str = "") -> str:
    """What is wrong with the number of launches of a call of a variant, in a sentence; "" where it is right.

    Example:
        >>> count_is_wrong({"SchemeForward": 1}, "forward")
        ''
        >>> count_is_wrong({"SchemeForward": 1}, "input_grad")
        'input_grad launched 1 programs (SchemeForward) and not 2'
    """
    count, expected = sum(launches.values()), LAUNCHES[mode] - (mode == "train" and variant in MULTIPLYING)
    if count == expected:
        return ""
    return f"{mode} launched {count} programs ({', '.join(sorted(launches)) or 'none'}) and not {expected}"
