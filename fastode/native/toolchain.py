"""One build of the C++ operators: what it depends on, its key, the compiler runs, the lock, the cache.

Knows nothing of the package around it, so that setup.py can load this file by itself. nvcc.py beside it says what a
build of the CUDA C++ operators depends on, and is built by the same functions.

Environment: ``CXX`` names the compiler (with arguments if need be, such as ``ccache g++``), ``FASTODE_CXXFLAGS`` adds
flags, ``FASTODE_DEBUG=1`` asks for a debug build, ``FASTODE_CACHE`` names the cache directory,
``FASTODE_LOCK_TIMEOUT`` the seconds to wait for another process that is building, ``MAX_JOBS`` how many files are
compiled at a time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

LIBRARY = "libfastode.so"
# The folders of sources that libraries of their own are built from, by nvcc.py and nodes.py.
CUDA, AUTOGRAD = "cuda", "autograd"
# -ffast-math is left out for good: it would break NaN, inf and the order of sums that the equality rule relies on.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas")
# By the ends of units' names; the rest is compiled at -O3. What only takes operators' arguments apart; doubles, for
# which speed is not asked, with the passes of -O2 that form fused multiply-adds (a twentieth slower than -O2; without
# them a tenth to a quarter, and less exact). What was as fast with a few more passes of -O2, to within a hundredth (31
# calls of blocks and networks, 24 of solutions, on one thread of an AMD EPYC with AVX2): blocks' programs and steps by
# error, pairs with loops over few maps unrolled as well, and with more of their loops turned into vectors the staged
# engine and heads. Norms want all of -O2 (0.995 of -O3's time; with less they take up to a twentieth more), and so do
# convolutions of float32, with those loops (0.997 over six modes of ResNet10; with less a quarter more), and of
# bfloat16 -O3: steps of ResNet10 are 15 % slower without it.
DOUBLES = "-O1 -fexpensive-optimizations"
PROGRAMS = f"{DOUBLES} -fstrict-aliasing -fgcse -fschedule-insns2"
UNROLLED = "-fpeel-loops"
VECTORS = f"{UNROLLED} -ftree-loop-vectorize -ftree-slp-vectorize -fvect-cost-model=dynamic"
LEVEL_OF_UNIT = {
    "ops": "-O1",
    **dict.fromkeys(("_f64", "_double"), DOUBLES),
    **dict.fromkeys(("blocks_f32", "step"), PROGRAMS),
    "skew_f32": f"{PROGRAMS} {UNROLLED}",
    **dict.fromkeys(("head", "norm_act", "sweeps_float"), f"{PROGRAMS} {VECTORS}"),
    **dict.fromkeys(("branch_bf16", "norm_f32", "norm_bf16"), "-O2"),
    **dict.fromkeys(("conv_f32", "plane"), f"-O2 {VECTORS}"),
}
# Half a gigabyte before gcc looks for memory to use again, which is a tenth of what it does over torch's headers.
GCC_HEAP = ("--param=ggc-min-expand=400", "--param=ggc-min-heapsize=524288")
# Every unit of the CPU's operators begins with it, compiled once: most of them would read torch's headers again.
COMMON = "precompiled.h"
# The stable ABI of torch 2.11: one binary serves every later torch.
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
NATIVE = ("-march=native",)
BUILD_TIMEOUT = 600.0  # seconds; only a hung compiler takes longer
LOCK_TIMEOUT = 300.0


@dataclass(frozen=True)
class Level:
    """An instruction set that a prebuilt library is compiled for.

    Args:
        name: in the library's file name.
        flags: of the compiler.
        features: what the CPU must say it has.
    """

    name: str
    flags: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
_AMX = _BF16 | {"amx_tile", "amx_bf16"}
# Best first; which of them runs is chosen when they are loaded. A CPU below the last one compiles instead.
_X86 = (
    Level("amx", ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"), _AMX),
    Level("bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), _BF16),
    Level("avx512", ("-march=x86-64-v4",), _AVX512),
    Level("avx2", ("-march=x86-64-v3",), _AVX2),
)
LEVELS = {"x86_64": _X86, "AMD64": _X86}


# Compiled, or read by people only. Whatever else lies beside the sources may be one, or be included by one.
_NOT_SOURCES = frozenset({".o", ".so", ".md", ".orig", ".rej", ".swp"})
_CONSTANT = re.compile(r"\b(k[A-Z]\w*) = (\d+)\b")


class BuildError(Exception):
    """The operators cannot be had; the message is the one-sentence reason."""


class CompileError(BuildError):
    """The compiler refused, as it will again."""


@dataclass(frozen=True)
class Recipe:
    """Everything a build depends on, and so everything that its key is made from."""

    root: Path
    sources: tuple[Path, ...]
    compiler: tuple[str, ...]
    facts: dict[str, str] = field(hash=False)
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    device_compiler: tuple[str, ...] = ()  # the command line, flags included, that compiles a .cu
    name: str = "the C++ operators"
    common: Path | None = None  # the header to compile first

    def command(self, unit: Path, result: Path) -> list[str]:
        """The command that compiles one translation unit."""
        if unit.suffix == ".cu":
            return [*self.device_compiler, "-c", str(unit), "-o", str(result)]
        level = next((level for end, level in LEVEL_OF_UNIT.items() if unit.stem.endswith(end)), "-O3")
        at = self.compile_flags.index("-O3")
        passes = level.split()
        if len(passes) > 1 and GCC_HEAP[0] not in self.compiler:  # the passes have gcc's names
            passes = ["-O2"]
        flags = (*self.compile_flags[:at], *passes, *self.compile_flags[at + 1 :])
        return [*self.compiler, *flags, "-c", str(unit), "-o", str(result)]

    def precompile(self, header: Path) -> list[str]:
        """The command that compiles a header, for units that include it under its name."""
        return [*self.compiler, *self.compile_flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]

    @property
    def key(self) -> str:
        """The name of this build: equal recipes, and no others, share a library."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:20]


# ---- what a build depends on


def sources(root: Path) -> tuple[Path, ...]:
    """The translation units of the CPU's operators under ``root``; nvcc.py and nodes.py have the others."""
    return tuple(sorted([*root.glob("*.cpp"), *root.glob("cpu/*.cpp")]))


def source_root(package: Path) -> Path | None:
    """The directory of the C++ sources: inside an installed ``package``, beside the package in a checkout."""
    return next((root for root in (package / "csrc", package.parent / "csrc") if any(root.glob("*.cpp"))), None)


def source_hash(root: Path, *without: str) -> str:
    """A hash of every source under ``root``, for whatever device and in whatever language, by path and content.

    Args:
        root: the directory.
        without: the folders and files in it that only other libraries are built from.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix not in _NOT_SOURCES):
        name, content = path.relative_to(root), path.read_bytes()
        if name.parts[0] not in without:
            digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def constants(root: Path) -> dict[str, int]:
    """The numbers that ``constants.h`` under ``root`` states, by name."""
    text = re.sub(r"//[^\n]*", "", (root / "constants.h").read_text())
    return {name: int(value) for name, value in _CONSTANT.findall(text)}


def enumeration(root: Path, name: str) -> dict[str, int]:
    """The members of an enumeration that ``constants.h`` under ``root`` states, in order."""
    text = re.sub(r"//[^\n]*", "", (root / "constants.h").read_text())
    found = re.search(rf"enum {name}\b[^{{]*{{([^}}]*)}}", text)
    assert found is not None, f"constants.h has no enumeration {name}"
    return {member: int(value) for member, value in _CONSTANT.findall(found[1])}


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """The feature flags of this machine's CPU, sorted; the processor's name where the kernel lists none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return tuple(sorted(value.split()))
    return (platform.processor() or platform.machine(),)


# The CPU features that a kernel of this project can make use of, by the names the Linux kernel gives them, and whether
# an engine's speed beside another's depends on them: on the width of its vectors, and on products of bfloat16.
_KERNEL_FEATURES = {
    "sse4_2": False,
    "avx2": True,
    "fma": False,
    "avx512f": True,
    "avx512_bf16": True,
    "avx512_fp16": False,
    "amx_tile": False,
    "amx_bf16": True,
    "asimd": True,
    "bf16": True,
    "sve": True,
}


def kernel_features(telling: bool = False) -> list[str]:
    """This machine's CPU features that kernels can make use of; if `telling`, those that a measured rule is kept by."""
    present = cpu_features()
    return [name for name, tells in _KERNEL_FEATURES.items() if name in present and (tells or not telling)]


def compiler() -> tuple[tuple[str, ...], str]:
    """The C++ compiler's command line and what it says its version is.

    Raises:
        BuildError: there is no C++ compiler, or it does not run.
    """
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
        program = shutil.which(command[0])
        if program:
            line = (program, *command[1:])
            try:
                done = subprocess.run(
                    [*line, "--version"], capture_output=True, text=True, timeout=60, env=environment()
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"the C++ compiler {shlex.join(line)} does not run: {error}") from error
            if done.returncode:
                raise BuildError(f"the C++ compiler {shlex.join(line)} does not run: {done.stderr.strip()[:200]}")
            return (*line, *(GCC_HEAP if "Free Software Foundation" in done.stdout else ())), done.stdout
    where = f"CXX is {wanted!r}, which is not a program" if wanted else "none of g++, clang++, c++ is on PATH"
    raise BuildError(f"no C++ compiler was found ({where})")


def environment() -> dict[str, str]:
    """The compiler's environment: ours, less what is preloaded into us (a sanitizer) and the user's language."""
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return {**kept, "LC_ALL": "C"}


def extra_flags() -> tuple[str, ...]:
    """The flags that the environment adds; where there are some, a prebuilt library is not what was asked for."""
    debug = ("-DFASTODE_DEBUG",) if os.environ.get("FASTODE_DEBUG", "0") not in ("", "0") else ()
    return (*shlex.split(os.environ.get("FASTODE_CXXFLAGS", "")), *debug)


def torch_flags() -> tuple[tuple[str, ...], str]:
    """The flags by which torch's headers, and its libraries, are found."""
    home = Path(torch.__file__).resolve().parent
    headers = ("-isystem", f"{home}/include", "-isystem", f"{home}/include/torch/csrc/api/include")
    return headers, f"-L{home}/lib"


def recipe(root: Path, machine_flags: tuple[str, ...] = NATIVE) -> Recipe:
    """Everything needed to build the sources under ``root``.

    Args:
        root: the directory that holds ``*.cpp`` and ``cpu/*.cpp``.
        machine_flags: the flags that choose the instruction set.

    Raises:
        BuildError: there is no compiler, or there are no sources.
    """
    units = sources(root)
    if not units:
        raise BuildError(f"no C++ sources were found under {root}")
    command, version = compiler()
    extra, (includes, libraries) = extra_flags(), torch_flags()
    compile_flags = (*FLAGS, *machine_flags, *STABLE_ABI, f"-I{root}", *includes, *extra)
    link_flags: tuple[str, ...] = ("-shared", *extra, libraries, "-ltorch_cpu", "-lc10")
    if sys.platform == "darwin":
        link_flags += ("-undefined", "dynamic_lookup")
    facts = {
        "sources": source_hash(root, CUDA, AUTOGRAD),
        "torch": torch.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}",
        "compiler": f"{shlex.join(command)}\n{version}",
        # Where torch and the sources lie is no part of the result: a moved checkout finds its build again.
        "flags": shlex.join((*FLAGS, *machine_flags, *STABLE_ABI, *extra, *map("=".join, LEVEL_OF_UNIT.items()))),
        "cpu": " ".join(cpu_features()),
    }
    common = root / "cpu" / COMMON
    return Recipe(root, units, command, facts, compile_flags, link_flags, common=common if common.exists() else None)


# ---- building


class Progress:
    """How many files are compiled, on stderr: a bar on a terminal, elsewhere a line for every quarter of them.

    Args:
        total: the number of files.
    """

    WIDTH = 30

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()
        if self.terminal:
            self._draw()

    def advance(self) -> None:
        """One more file is compiled."""
        self.done += 1
        if self.terminal:
            self._draw()
        elif 4 * self.done // self.total > 4 * (self.done - 1) // self.total:
            print(f"fastode: compiled {self.done} of {self.total} files in {self._seconds()}", file=sys.stderr)

    def close(self) -> None:
        """What is printed next begins a line of its own."""
        if self.terminal:
            print(file=sys.stderr)

    def _draw(self) -> None:
        bar = "#" * (self.WIDTH * self.done // self.total)
        text = f"\rfastode: [{bar:.<{self.WIDTH}}] {self.done} of {self.total} files, {self._seconds()}"
        print(text, end="", file=sys.stderr, flush=True)

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"


def compile_into(made: Recipe, directory: Path, log: Path, *, announce: bool = False) -> Path:
    """Compile and link ``made`` in ``directory``.

    Args:
        made: what to build.
        directory: for the objects and the library.
        log: for all that the compiler says.
        announce: count the compiled files on stderr.

    Returns:
        The library's path.

    Raises:
        CompileError: the first line of the compiler's error, and where ``log``, the whole output, lies.
    """
    deadline = time.monotonic() + BUILD_TIMEOUT
    stopped = threading.Event()
    log.write_text("")

    def run(command: list[str]) -> str | None:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment(),
                timeout=max(1.0, deadline - time.monotonic()),
            )
            output, failed = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired:
            output, failed = f"error: the compiler ran longer than {BUILD_TIMEOUT:.0f} s", True
        with log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n{output}\n")
        return output if failed else None

    def compile_unit(command: list[str]) -> str | None:
        output = None if stopped.is_set() else run(command)
        if output is not None:
            stopped.set()
        return output

    objects = [directory / f"{unit.relative_to(made.root).as_posix().replace('/', '_')}.o" for unit in made.sources]
    commands = [made.command(unit, object_) for unit, object_ in zip(made.sources, objects, strict=True)]
    progress = Progress(len(commands)) if announce and len(commands) > 1 else None
    errors = []
    if made.common:
        header = Path(shutil.copy(made.common, directory))  # the compiled one must lie beside it
        run(made.precompile(header))  # where that fails, the units read the copy
        commands = [[*command, "-include", str(header)] for command in commands]
    with ThreadPoolExecutor(max_workers=jobs()) as pool:
        for compiled in as_completed([pool.submit(compile_unit, command) for command in commands]):
            if (output := compiled.result()) is not None:
                errors.append(output)
            elif progress and not stopped.is_set():
                progress.advance()
    if progress:
        progress.close()
    library = directory / LIBRARY
    if not errors:
        linked = run([*made.compiler, *map(str, objects), *made.link_flags, "-o", str(library)])
        errors = [linked] if linked is not None else []
    if errors:
        raise CompileError(f"the build failed: {_first_error(errors[0])} (all of it: {log})")
    for left_over in (*objects, *directory.glob(f"{COMMON}*")):
        left_over.unlink()
    return library


def jobs() -> int:
    """How many files to compile at a time: one per core this process may use, unless MAX_JOBS says otherwise."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\b(error|fatal|undefined reference)\b", line, re.IGNORECASE)]
    return (named or lines or ["the compiler said nothing"])[0][:300]


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the file lock at ``path``; the file names the process and the host that hold it.

    Raises:
        BuildError: another process held it for all of ``timeout`` seconds; the message says which.
    """
    import fcntl  # not on every platform, and import fastode must work on all of them

    with path.open("a+") as file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            holder = path.read_text().strip() or "a process that has not named itself"
            if time.monotonic() - start > timeout:
                raise BuildError(f"{holder} has held the build lock {path} for more than {timeout:g} s")
            if not told and time.monotonic() - start > 1.0:
                told = True
                print(f"fastode: waiting for {holder}, which is building the C++ operators", file=sys.stderr)
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            # The file stays: unlinking a lock that others may have open would let two processes hold it.
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


def cache_directory() -> Path:
    """Where built libraries are kept: ``$FASTODE_CACHE``, or ``fastode`` in the user's cache directory."""
    chosen = os.environ.get("FASTODE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastode"


def build(made: Recipe, cache: Path, *, announce: bool = True) -> Path:
    """The library of ``made`` in ``cache``, built there first if it is missing.

    The build happens in a directory of its own that is renamed once it is whole, so a build that fails, or is killed,
    leaves nothing that a later one could take for a library.

    Raises:
        BuildError: with the reason.
    """
    library = cache / made.key / LIBRARY
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{made.key}.lock", float(os.environ.get("FASTODE_LOCK_TIMEOUT") or LOCK_TIMEOUT)):
            if library.exists():
                return library
            if announce:
                files = "1 file" if len(made.sources) == 1 else f"{len(made.sources)} files"
                print(f"fastode: building {made.name} ({files}, once) into {cache}", file=sys.stderr)
            for left_over in cache.glob(f"{made.key}.*/"):  # of a killed process: the lock is ours, so it is nobody's
                shutil.rmtree(left_over, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f"{made.key}.", dir=cache))
            try:
                compile_into(made, work, cache / f"{made.key}.log", announce=announce)
                (work / "recipe.json").write_text(json.dumps(made.facts, indent=1))
                if library.parent.exists():  # a directory without its library: someone tidied by hand
                    shutil.rmtree(library.parent)
                work.rename(library.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"the cache directory {cache} cannot be used: {error}") from error
    return library


# ---- ahead of time


def levels() -> tuple[Level, ...]:
    """What is compiled ahead of time on this machine type, best first."""
    return LEVELS.get(platform.machine(), (Level("generic"),))


def prebuilt_name(root: Path, level: Level) -> str:
    """The file name of a prebuilt library: it names its sources, so an outdated one is not found."""
    return f"libfastode-{source_hash(root, CUDA, AUTOGRAD)[:16]}-{level.name}.so"


def build_ahead(root: Path, package: Path) -> list[Path]:
    """Build the sources under ``root`` at every level into the package directory ``package``; setup.py's part.

    Raises:
        BuildError: with the reason.
    """
    built = []
    for level in levels():
        made = recipe(root, level.flags)
        with tempfile.TemporaryDirectory() as work:
            library = compile_into(made, Path(work), package.parent / "fastode-build.log", announce=True)
            built.append(Path(shutil.move(library, package / prebuilt_name(root, level))))
    return built
