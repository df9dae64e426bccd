"""`python -m benchmarks.kernels`: what the Triton kernels compile to, without a card.

The operators are called on meta tensors of the papers' shapes; their launches are recorded and compiled as a card of
each architecture would compile them. ptxas, which Triton ships, tells registers, spills and shared memory. Nothing is
timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastode.ops.triton import launch as launching
from fastode.ops.triton import passes

from . import convolutions, header, inside
from .convolutions import CONVOLUTIONS, PAIRS, Convolution, SkewPair

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RELU, SILU = 1, 6
_GLOBAL = re.compile(r"(?:ld|st)\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[bfus](\d+)")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*0x(\w+)")
_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


@dataclass(frozen=True)
class Maps:
    """What the operators are launched on.

    Attributes:
        name: in the table.
        shape: [N, C, H, W].
        norm: its code, as in the operators' schemas.
        groups: of GroupNorm.
        activations: codes; SiLU has the longest derivatives.
        layout: of the maps.
    """

    name: str
    shape: tuple[int, int, int, int]
    norm: int
    groups: int = 1
    activations: tuple[int, ...] = (RELU,)
    layout: torch.memory_format = torch.channels_last


MAPS = (
    Maps("64 channels, 32×32, one group", (128, 64, 32, 32), passes.GROUP, 1, (RELU, SILU)),
    Maps("64 channels, 32×32, batch", (128, 64, 32, 32), passes.BATCH, 1, (RELU, SILU)),
    Maps("64 channels, 32×32, no norm", (128, 64, 32, 32), passes.NONE, 1, (RELU, SILU)),
    Maps("512 channels, 7×7, one group", (128, 512, 7, 7), passes.GROUP),
    Maps("64 channels, 7×7, 8 groups", (128, 64, 7, 7), passes.GROUP, 8),
    Maps("64 channels, 32×32, 32 groups", (128, 64, 32, 32), passes.GROUP, 32),
    Maps("64 channels, 112×112, one group", (8, 64, 112, 112), passes.GROUP, 1),
    Maps("16 channels, 32×32, batch", (128, 16, 32, 32), passes.BATCH),
    Maps("64 channels, 32×32, fixed", (128, 64, 32, 32), passes.FIXED),
    Maps("64 channels, 32×32, one group, NCHW", (128, 64, 32, 32), passes.GROUP, layout=torch.contiguous_format),
    Maps("64 channels, 32×32, batch, NCHW", (128, 64, 32, 32), passes.BATCH, layout=torch.contiguous_format),
)
# The engine's own defaults on the papers' maps: what the tests compile.
DEFAULTS = MAPS[:3]


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded: a kernel, its arguments and constants."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int


@contextmanager
def recording(architecture: int = 90) -> Iterator[list[Launch]]:
    """Collect the launches that the operators would make on a card, instead of making them."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
        launches.append(Launch(kernel, arguments, tuple(constants.items()), warps))

    assumed, launching.ASSUMED = launching.ASSUMED, architecture
    try:
        with inside.launches_replaced(lambda real: record):
            yield launches
    finally:
        launching.ASSUMED = assumed


def maps_moved(arguments: Sequence[Any], like: Tensor) -> float:
    """How many maps a launch moves, counted in `like`, each map once: what it reads again comes from cache."""
    flat = [each for given in arguments for each in (given if isinstance(given, tuple) else (given,))]
    maps = {id(t): t for t in flat if isinstance(t, Tensor) and t.shape[1:] == like.shape[1:]}
    return sum(t.numel() * t.itemsize for t in maps.values()) / (like.numel() * like.itemsize)


def _map(maps: Maps, dtype: torch.dtype, samples: int = 1) -> Tensor:
    shape = (samples * maps.shape[0], *maps.shape[1:])
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=maps.layout)


def operators(maps: Maps, dtype: torch.dtype, act: int) -> dict[str, Callable[[], Any]]:
    """Each operator as a block's forward or backward calls it, by name."""
    x, twice, channels = _map(maps, dtype), _map(maps, dtype, 2), maps.shape[1]
    none, one, two, three = (torch.ones(k, dtype=torch.float64) for k in range(4))
    w = None if maps.norm == passes.NONE else torch.empty(channels, device="meta")
    sets = (2, maps.shape[0], maps.groups) if maps.norm == passes.GROUP else (2, channels)
    stats = torch.empty(sets, device="meta")
    given = stats if maps.norm == passes.FIXED else None
    codes = (maps.norm, maps.groups, 1e-5, act, 1.0, 20.0)
    return {
        "norm_act": lambda: passes.norm_act([x], none, w, w, given, *codes),
        "norm_act of two terms": lambda: passes.norm_act([x, x], two, w, w, given, *codes),
        "norm_act again": lambda: passes.norm_act([x], none, w, w, stats, *codes),
        "norm_act_vjp": lambda: passes.norm_act_vjp(x, x, stats, w, w, [], one, False, *codes),
        "norm_act_vjp, parameters": lambda: passes.norm_act_vjp(x, x, stats, w, w, [], one, True, *codes),
        "norm_act_vjp of two addends": lambda: passes.norm_act_vjp(x, x, stats, w, w, [x, x], three, True, *codes),
        "norm_act_dual": lambda: passes.norm_act_dual(x, x, w, w, stats, *codes),
        "norm_act_second": lambda: passes.norm_act_second(
            x, x, twice, stats, stats, w, w, [], one, True, True, *codes
        ),
        "norm_act_second of two addends": lambda: passes.norm_act_second(
            x, x, twice, stats, stats, w, w, [x, x], three, True, False, *codes
        ),
        "combine": lambda: passes.combine([x, x, x], three, 0, 0.0, 0.0),
        "combine_pair": lambda: passes.combine_pair([x, x], [x], three),
        "dots": lambda: passes.dots(x, [x, x]),
    }  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A row of the table.

    Attributes:
        kernel: its name.
        configuration: the first maps, dtype and operator that launch it so.
        architecture: as in sm_90.
        warps: of a program.
        registers: of a thread.
        spills: bytes stored to and loaded from local memory.
        shared: bytes of shared memory of a program.
        widest: bits of the widest access to global memory of a thread.
        tensor_core: the instruction, "" where there is none.
    """

    kernel: str
    configuration: str
    architecture: int
    warps: int
    registers: int
    spills: int
    shared: int
    widest: int
    tensor_core: str


def source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a launch, specialised as it would be, and the options."""
    kernel, backend = launch.kernel, make_backend(target)
    keywords = dict(launch.constants) | {"num_warps": launch.warps, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def compile_offline(launch: Launch, configuration: str, architecture: int) -> Compiled:
    """One launch's kernel for one architecture."""
    target = GPUTarget("cuda", architecture, 32)
    what, options = source(launch, target)
    compiled = triton.compile(what, target=target, options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"--gpu-name={sm_arch_from_capability(architecture)}"
        command = [get_ptxas(architecture).path, "-v", name, file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    widths = [int(count or 1) * int(bits) for count, bits in _GLOBAL.findall(ptx)]
    widths += [8 * int(size, 16) for size in _COPY.findall(ptx)]
    return Compiled(
        launch.kernel.__name__,
        configuration,
        architecture,
        launch.warps,
        int(re.findall(r"Used (\d+) registers", log)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        compiled.metadata.shared,
        max(widths, default=0),
        next(iter(_TENSOR_CORE.findall(ptx)), ""),
    )


Call = tuple[str, Callable[[], Any]]
Wanted = tuple[Launch, str, int]


def distinct(calls: Iterable[Call], architectures: Sequence[int]) -> list[Wanted]:
    """The launches of some calls that compile to different code, each with the first configuration that makes it."""
    found: dict[str, Wanted] = {}
    for configuration, call in calls:
        for architecture in architectures:
            with recording(architecture) as recorded:
                call()
            for launch in recorded:
                key, _ = source(launch, GPUTarget("cuda", architecture, 32))
                known = f"{key.hash()} {launch.warps} {architecture}"
                found.setdefault(known, (launch, configuration, architecture))
    return list(found.values())


def launches(
    maps: Sequence[Maps], dtypes: Sequence[torch.dtype], architectures: Sequence[int] = ARCHITECTURES
) -> list[Wanted]:
    """Every different launch of the operators, with the first configuration that makes it."""
    calls = (
        (f"{each.name}, {str(dtype).removeprefix('torch.')}, {'silu' if act == SILU else 'relu'}: {operator}", call)
        for each in maps
        for dtype in dtypes
        for act in each.activations
        for operator, call in operators(each, dtype, act).items()
    )
    return distinct(calls, architectures)


def convolution_launches(
    chosen: Iterable[tuple[str, Convolution | SkewPair]], architectures: Sequence[int] = ARCHITECTURES
) -> list[Wanted]:
    """Every different launch of the fused convolutions, with the first configuration that makes it."""
    calls = (
        (f"{each.name}, {dtype}: {operator}", partial(convolutions.call_allowed, dtype, call))
        for dtype, each in chosen
        for operator, call in convolutions.operators(each, dtype).items()
    )
    return distinct(calls, architectures)


_remembered: list[Wanted] = []


def _remember(todo: list[Wanted]) -> None:
    _remembered[:] = todo


def _compile_remembered(number: int) -> Compiled:
    return compile_offline(*_remembered[number])


def markdown(rows: Sequence[Compiled]) -> str:
    """The table: a line for each kernel and architecture with the largest of its configurations, then every one."""
    head = (
        "| kernel | architecture | configurations | registers | spilled bytes | shared bytes | access bits |"
        " tensor cores |\n|---|---|--:|--:|--:|--:|--:|---|"
    )
    lines = [
        "Compiled, not timed. Largest over the configurations, and the narrowest of their widest accesses.",
        "",
        head,
    ]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        for architecture in dict.fromkeys(row.architecture for row in rows):
            own = [row for row in rows if (row.kernel, row.architecture) == (kernel, architecture)]
            cells = [
                kernel, f"sm_{architecture}", len(own), max(r.registers for r in own), max(r.spills for r in own),
                max(r.shared for r in own), min(r.widest for r in own),
                ", ".join(sorted({r.tensor_core or "none" for r in own})),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| kernel | configuration | architecture | warps | registers | spilled bytes | shared bytes |"]
    lines.append("|---|---|---|--:|--:|--:|--:|")
    for r in rows:
        cells = [r.kernel, r.configuration, f"sm_{r.architecture}", r.warps, r.registers, r.spills, r.shared]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything and write the table.

    Returns:
        0 if no kernel spills, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--results", type=Path, default=header.RESULTS / "offline")
    folder = parser.parse_args(argv).results
    about = {"commit": header.commit(), "versions": header.versions()}
    todo = launches(MAPS, DTYPES)
    todo += convolution_launches((dtype, each) for each in (*CONVOLUTIONS, *PAIRS) for dtype in each.dtypes)
    print(f"{len(todo)} kernels for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}", flush=True)
    rows: list[Compiled] = []
    # A recorded launch cannot be pickled: forked processes inherit the list and are sent numbers.
    with multiprocessing.get_context("fork").Pool(initializer=_remember, initargs=(todo,)) as pool:
        for done, row in enumerate(pool.imap(_compile_remembered, range(len(todo))), 1):
            rows.append(row)
            if done % 100 == 0:
                print(f"{done} compiled", flush=True)
    rows.sort(key=lambda row: (row.kernel, row.configuration, row.architecture))
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    (folder / "kernels.json").write_text(f'{{"header": {json.dumps(about)},\n"results": [\n{lines}\n]}}\n')
    (folder / "kernels.md").write_text(markdown(rows))
    spilling = [row for row in rows if row.spills]
    print(f"{len(rows)} rows in {folder}; {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
