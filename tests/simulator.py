"""The test machine of tests/simt as a library: device code of csrc/cuda, run by the CPU in any order."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastode.native import cuda, toolchain

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = CHECKOUT / "tests" / "simt"
DEVICE = CHECKOUT / "csrc" / "cuda"
# The last -O counts: with -O2 a build takes 70 s in place of 50, and the programs' tests a twelfth less.
FLAGS = (*toolchain.FLAGS, "-O1", *toolchain.NATIVE, *toolchain.STABLE_ABI)
KINDS = (
    "launch",
    "block_barrier",
    "cluster_barrier",
    "grid_barrier",
    "warp_barrier",
    "shuffle",
    "mma_bf16",
    "mma_f16",
    "mma_tf32",
    "ldmatrix",
    "ldmatrix_transposed",
    "bank_conflicts",  # turns that ldmatrix needs beyond one for each matrix
)
# In which threads and blocks take their turns: the number of the order, and a seed.
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random 1": (2, 1), "random 2": (2, 2)}
_libraries: list[torch.library.Library] = []


def extra_flags() -> tuple[str, ...]:
    """What the environment adds: to every build, and in FASTODE_SIMT_CXXFLAGS to the machine's alone."""
    return (*toolchain.extra_flags(), *shlex.split(os.environ.get("FASTODE_SIMT_CXXFLAGS", "")))


def sanitized() -> bool:
    """Whether the machine is built under the address sanitizer: `make simt-asan`."""
    return any(flag.startswith("-fsanitize=address") for flag in extra_flags())


def recipe() -> toolchain.Recipe:
    """The build of every file of tests/simt, from these and from the device code that they include."""
    command, version = toolchain.compiler()
    home, extra = Path(torch.__file__).resolve().parent, extra_flags()
    includes = [f"-I{path}" for path in (SOURCES, DEVICE, CHECKOUT / "csrc")]
    torch_includes = ("-isystem", f"{home}/include", "-isystem", f"{home}/include/torch/csrc/api/include")
    hashes = toolchain.source_hash(SOURCES) + toolchain.source_hash(CHECKOUT / "csrc", "cpu", toolchain.AUTOGRAD)
    facts = {
        "sources": hashlib.sha256(hashes.encode()).hexdigest(),
        "torch": torch.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}",
        "compiler": f"{shlex.join(command)}\n{version}",
        "flags": shlex.join((*FLAGS, *extra)),
        "cpu": " ".join(toolchain.cpu_features()),
    }
    return toolchain.Recipe(
        SOURCES,
        tuple(sorted(SOURCES.glob("*.cpp"))),
        command,
        facts,
        (*FLAGS, *includes, *torch_includes, *extra),
        ("-shared", *extra, f"-L{home}/lib", "-ltorch_cpu", "-lc10"),
    )


def build() -> Path:
    """The library's path, built first if need be."""
    return toolchain.build(recipe(), toolchain.cache_directory())


@functools.cache
def load() -> None:
    """Make torch.ops.fastode_simt usable, built first if need be.

    Its operators have the schemas of csrc/ops.cpp: those of them that tests/simt implements are defined.
    """
    library = build()
    namespace = torch.library.Library("fastode_simt", "FRAGMENT")
    implemented = {
        name
        for path in (*SOURCES.glob("*.cpp"), DEVICE / "operators.h")
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    for schema in cuda.schemas(CHECKOUT / "csrc" / "ops.cpp"):
        if schema.split("(")[0] in implemented:
            namespace.define(schema)
    _libraries.append(namespace)
    torch.ops.load_library(str(library))


@contextlib.contextmanager
def _while_set(setting: str, value: tuple[object, ...], usual: tuple[object, ...]) -> Iterator[None]:
    """Call one of the test machine's settings with a value, and in the end with the usual one."""
    load()
    call = getattr(torch.ops.fastode_simt, setting)
    call(*value)
    try:
        yield
    finally:
        call(*usual)


def order(name: str) -> contextlib.AbstractContextManager[None]:
    """Let threads and blocks take their turns in one of ORDERS."""
    return _while_set("set_order", ORDERS[name], ORDERS["forward"])


def blocks(count: int) -> contextlib.AbstractContextManager[None]:
    """Let so many blocks of a program run at a time, and not two."""
    return _while_set("set_blocks", (count,), (2,))


def unasked() -> contextlib.AbstractContextManager[None]:
    """Let the card not say how many blocks of a program run at a time, as after a failure that passes."""
    return _while_set("set_can_be_asked", (False,), (True,))


def without(barrier: str) -> contextlib.AbstractContextManager[None]:
    """Let nobody wait at one of `barriers`: what needs it has to come out wrong in one of ORDERS."""
    return _while_set("leave_out", (barrier,), ("",))


def look_for_needed(places: Iterable[str], seen: set[str], is_right: Callable[[], bool]) -> None:
    """Add to `seen` those of some `barriers` without which something is not right; what it has already is not tried."""
    for barrier in set(places) - seen:
        with without(barrier):
            if not is_right():
                seen.add(barrier)


def barriers(run: Callable[[], object]) -> list[str]:
    """Where in the source, as "file:line", are the barriers that the threads of `run` wait at."""
    load()
    torch.ops.fastode_simt.take_barriers()
    run()
    return sorted(torch.ops.fastode_simt.take_barriers().split())


@contextlib.contextmanager
def quick_float16() -> Iterator[None]:
    """Let the CPU make the gradients of a float16 convolution in float32 and round them once.

    So does oneDNN, but for the weight's it takes five hundred times as long.
    """
    composite, operator = torch._C.DispatchKey.CompositeExplicitAutograd, torch.ops.aten.convolution_backward.default

    def backward(
        cotangent: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
    ) -> list[torch.Tensor | None]:
        if x.dtype != torch.float16:
            return operator._op_dk(composite, cotangent, x, weight, *rest)
        found = operator._op_dk(composite, cotangent.float(), x.float(), weight.float(), *rest)
        return [None if gradient is None else gradient.half() for gradient in found]

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """How many launches, and meetings of each of KINDS, there are until the end; filled in there."""
    load()
    before, counts = torch.ops.fastode_simt.counts(), {}
    yield counts
    after = torch.ops.fastode_simt.counts()
    counts.update(zip(KINDS, (now - then for now, then in zip(after, before, strict=True)), strict=True))


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's copy between NaN, so that a kernel's result shows that it reads out of its bounds."""
    edge = 256  # elements, which keeps the alignment of the storage
    storage = torch.full((tensor.numel() + 2 * edge,), torch.nan, dtype=tensor.dtype)
    return storage[edge:-edge].view(tensor.shape).copy_(tensor)


def probe(
    name: str,
    tensors: list[torch.Tensor],
    *numbers: int,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
    cluster: int = 1,
    cooperative: bool = False,
) -> None:
    """Launch one of the kernels of tests/simt/probes.cuh.

    Raises:
        RuntimeError: what the machine found wrong.
    """
    load()
    how = [blocks, threads, shared, cluster, int(cooperative)]
    torch.ops.fastode_simt.probe(name, tensors, list(numbers), how)


if __name__ == "__main__":
    print(build())
