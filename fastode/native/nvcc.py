"""The build of the CUDA C++ operators and of their programs: which nvcc, which architectures, recipes and keys.

The operators are a library beside the CPU's, so that one that cannot be built leaves the others as they are. The
programs that they launch are libraries, too, one for each kind and dtype, so that a call waits for its own only. All
are compiled, locked and kept by toolchain.py's functions, and like that file setup.py loads this one without the
package.

Environment: ``CUDA_HOME`` names the toolkit, ``FASTODE_CUDA_ARCHITECTURES`` the architectures (``80;90a``) in place of
those of the cards that are there, and nvcc itself reads ``NVCC_PREPEND_FLAGS`` and ``NVCC_APPEND_FLAGS``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import toolchain
from .toolchain import BuildError, Recipe

NAME = "the CUDA operators"
# What is built ahead of time; of a card's own generation there is at most one.
PREBUILT = ("80", "90a", "100")
OLDEST = (8, 0)  # the first capability with tensor cores for bfloat16
FLAGS = ("-O3", "-std=c++20", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas")
# torch's CUDA library is found through libtorch, where there is one: a torch for the CPU loads the result, too.
LINK_FLAGS = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
PROGRAM_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lpthread", "-lrt")
# Of csrc/cuda: the operators, and what hands them the programs of a library.
OPERATORS, GIVEN = "ops_cuda.cpp", "given.cpp"
KINDS = ("scheme", "descent", "batch_scheme", "batch_descent", "march", "solve", "weight_gradients")
TYPES = {"bfloat16": "BFloat16", "float16": "Float16"}  # as csrc/cuda names them, by its numbers
_NVCC_READS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_ARCHITECTURE = re.compile(r"(?:sm_)?(\d{2,3}[af]?)")


class NothingToBuildWith(BuildError):
    """There is no nvcc, or no card for which there is code: nothing has failed, and nothing was tried."""


class Part(NamedTuple):
    """A library of programs.

    Args:
        kind: how the names of its .cu files begin.
        dtype: of the maps, as "bfloat16".
    """

    kind: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.dtype}"


# Batch norms are trained in bfloat16 alone.
PARTS = tuple(
    Part(kind, dtype) for dtype in TYPES for kind in KINDS if dtype == "bfloat16" or not kind.startswith("batch_")
)


@dataclass(frozen=True)
class Nvcc:
    """A compiler for device code.

    Attributes:
        path: of the program.
        version: all that it says its version is.
        release: of CUDA, as (13, 0).
    """

    path: str
    version: str
    release: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc of CUDA {'.'.join(map(str, self.release))} ({self.path})"


def find() -> Nvcc:
    """The nvcc of CUDA_HOME, else of PATH, of the package nvidia-cuda-nvcc, or of /usr/local/cuda.

    Raises:
        NothingToBuildWith: there is none.
        BuildError: it does not run.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        path = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if path is None:
            raise NothingToBuildWith(f"no nvcc was found (CUDA_HOME is {home!r}, which has no bin/nvcc)")
    else:
        path = shutil.which("nvcc") or _packaged() or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if path is None:
            raise NothingToBuildWith(
                "no nvcc was found (CUDA_HOME is not set, and it is neither on PATH, nor in the package "
                "nvidia-cuda-nvcc, nor in /usr/local/cuda)"
            )
    said = _run([path, "--version"])
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise BuildError(f"{path} does not say its release: {said.strip()[:200]}")
    return Nvcc(path, said, (int(release[1]), int(release[2])))


def _packaged() -> str | None:
    """The nvcc of the package nvidia-cuda-nvcc, the one of torch's CUDA first."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (spec.submodule_search_locations if spec is not None else None) or ()]
    found = sorted((path for folder in folders for path in folder.glob("cu*/bin/nvcc")), reverse=True)
    own = f"cu{(torch.version.cuda or '').partition('.')[0]}"
    return next((str(p) for p in sorted(found, key=lambda p: p.parts[-3] != own) if os.access(p, os.X_OK)), None)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            env=toolchain.environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} does not run: {done.stdout.strip()[:200]}")
    return done.stdout


# ---- for which cards


def capabilities() -> list[tuple[int, int]]:
    """Of the cards that torch sees."""
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def native(capability: tuple[int, int]) -> str:
    """The architecture that code for a card is compiled for: on Hopper with the instructions that it alone has."""
    return f"{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a card runs code that was compiled for an architecture: of its own generation, and not newer."""
    number = int(architecture.rstrip("af"))
    built, exact = divmod(number, 10), not architecture.isdigit()
    return built == capability if exact else built[0] == capability[0] and built[1] <= capability[1]


def covers(architectures: Iterable[str], cards: Iterable[tuple[int, int]]) -> bool:
    """Whether each card new enough for the kernels runs code for one of the architectures."""
    known = tuple(architectures)
    return all(any(runs_on(each, card) for each in known) for card in cards if card >= OLDEST)


def architectures() -> tuple[str, ...]:
    """What to compile for: what FASTODE_CUDA_ARCHITECTURES names, else the cards that are there.

    Raises:
        NothingToBuildWith: there is no card that has kernels.
        BuildError: the variable does not name architectures, or none of the card.
    """
    cards, wanted = capabilities(), os.environ.get("FASTODE_CUDA_ARCHITECTURES", "")
    if wanted.strip():
        named = [_ARCHITECTURE.fullmatch(each) for each in re.split(r"[\s;,]+", wanted.strip())]
        if not all(named):
            raise BuildError(f"FASTODE_CUDA_ARCHITECTURES must name architectures, like '80;90a', and is {wanted!r}")
        chosen = tuple(dict.fromkeys(each[1] for each in named if each))
        if not covers(chosen, cards):
            raise BuildError(
                f"code for what FASTODE_CUDA_ARCHITECTURES names, {wanted!r}, does not run on {_say(cards)}"
            )
        return chosen
    chosen = tuple(sorted({native(card) for card in cards if card >= OLDEST}, key=lambda name: int(name.rstrip("a"))))
    if not cards:
        raise NothingToBuildWith("there is no card to build for, and FASTODE_CUDA_ARCHITECTURES is not set")
    if not chosen:
        raise NothingToBuildWith(
            f"there are CUDA operators for cards of capability 8.0 and above, and not for {_say(cards)}"
        )
    return chosen


def _say(cards: Sequence[tuple[int, int]]) -> str:
    return f"a card of capability {', '.join(f'{major}.{minor}' for major, minor in sorted(set(cards)))}"


# ---- the recipes


def sources(root: Path, part: Part) -> tuple[Path, ...]:
    """The translation units of a part: those for nvcc first, the largest first, because they take longest."""
    device = root.glob(f"{toolchain.CUDA}/{part.kind}*.cu")
    return (*sorted(device, key=lambda path: (-path.stat().st_size, path.name)), root / toolchain.CUDA / GIVEN)


def device_flags(chosen: Sequence[str]) -> tuple[str, ...]:
    """The flags of nvcc for some architectures, but for the places of headers."""
    targets = tuple(f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen)
    debug = ("-DFASTODE_DEBUG",) if "-DFASTODE_DEBUG" in toolchain.extra_flags() else ()
    return (*FLAGS, *targets, *debug)


def device_compiler(root: Path, chosen: Sequence[str]) -> tuple[str, ...]:
    """The command line that compiles device code under ``root`` for some architectures.

    Raises:
        BuildError: there is no compiler.
    """
    command, _ = toolchain.compiler()
    host = ("-ccbin", command[0]) if len(command) == 1 else ()  # nvcc takes a program, without arguments
    return (find().path, *device_flags(chosen), *host, f"-I{root}")


def operators_recipe(root: Path) -> Recipe:
    """Everything needed to build the operators under ``root``/cuda, which need no nvcc.

    Raises:
        BuildError: there is no compiler, or there are no sources.
    """
    unit = root / toolchain.CUDA / OPERATORS
    if not unit.exists():
        raise BuildError(f"no CUDA C++ sources were found under {root}")
    command, version = toolchain.compiler()
    extra, (includes, libraries) = toolchain.extra_flags(), toolchain.torch_flags()
    facts = _facts(root, command, version, (*toolchain.STABLE_ABI, *extra, *LINK_FLAGS))
    return Recipe(
        root,
        (unit,),
        command,
        facts,
        (*toolchain.FLAGS, *toolchain.STABLE_ABI, f"-I{root}", *includes, *extra),
        ("-shared", *extra, libraries, *LINK_FLAGS),
        name=NAME,
    )


def recipe(root: Path, part: Part, chosen: Sequence[str] | None = None) -> Recipe:
    """Everything needed to build a library of programs under ``root``/cuda.

    Args:
        root: the directory that holds ``cuda/``.
        part: which.
        chosen: the architectures, as "90a"; None takes those of `architectures`.

    Raises:
        BuildError: there is no compiler, there are no sources, or nothing to build them for.
    """
    units = sources(root, part)
    if len(units) == 1:
        raise BuildError(f"no CUDA C++ sources of {part} were found under {root}")
    nvcc = find()
    command, version = toolchain.compiler()
    chosen = architectures() if chosen is None else tuple(chosen)
    extra = toolchain.extra_flags()
    threads = f"--threads={max(1, min(len(chosen), toolchain.jobs() // len(units)))}"  # architectures at a time
    own = f"-DFASTODE_TYPE={TYPES[part.dtype]}"
    runtime = _runtime(nvcc)
    facts = _facts(root, command, version, (*extra, *device_flags(chosen), own, *PROGRAM_LINK_FLAGS)) | {
        "programs": str(part),
        "nvcc": nvcc.version,
        "nvcc reads": " ".join(f"{name}={os.environ.get(name, '')}" for name in _NVCC_READS),
    }
    return Recipe(
        root,
        units,
        command,
        facts,
        (*toolchain.FLAGS, f"-I{root}", *extra),
        ("-shared", *extra, f"-L{runtime}", *PROGRAM_LINK_FLAGS),
        (*device_compiler(root, chosen), own, threads),
        f"the CUDA programs {part}",
    )


def _facts(root: Path, command: tuple[str, ...], version: str, flags: Sequence[str]) -> dict[str, str]:
    return {
        "sources": toolchain.source_hash(root, "cpu", toolchain.AUTOGRAD),
        "torch": torch.__version__,
        "compiler": f"{shlex.join(command)}\n{version}",
        "flags": shlex.join((*toolchain.FLAGS, *flags)),
    }


def _runtime(nvcc: Nvcc) -> Path:
    """Where CUDA's static runtime lies: nvcc itself knows."""
    plan = _run([nvcc.path, "--dryrun", "-E", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    listed = re.findall(r'"-L([^"]*)"', plan) + ([f"{top[1]}/lib64", f"{top[1]}/lib"] if top else [])
    library = next((Path(each) for each in listed if (Path(each) / "libcudart_static.a").exists()), None)
    if library is None:
        raise BuildError(f"{nvcc} has no libcudart_static.a beside it (looked in {', '.join(listed) or 'nothing'})")
    return library


# ---- ahead of time


def prebuilt_name(root: Path, part: Part | None = None, chosen: Sequence[str] = ()) -> str:
    """The file name of a prebuilt library: it names its sources, the part, and its architectures.

    Args:
        root: the directory that holds ``cuda/``.
        part: which; None is the operators, which have no architectures.
        chosen: the architectures.
    """
    hashed = toolchain.source_hash(root, "cpu", toolchain.AUTOGRAD)[:16]
    which = "operators" if part is None else f"{part.kind}-{part.dtype}"
    return "-".join((f"libfastode-{toolchain.CUDA}", hashed, which, *(f"sm_{each}" for each in chosen))) + ".so"


def prebuilt(root: Path, package: Path, part: Part | None = None) -> Path | None:
    """A library in ``package`` that was built ahead of time from these very sources, for the cards that are there."""
    if toolchain.extra_flags() or any(os.environ.get(name) for name in (*_NVCC_READS, "FASTODE_CUDA_ARCHITECTURES")):
        return None
    for path in sorted(package.glob(prebuilt_name(root, part, () if part is None else ("*",)))):
        if part is None or covers(re.findall(r"sm_(\w+?)(?=-sm_|\.so)", path.name), capabilities()):
            return path
    return None


def build_ahead(root: Path, package: Path, chosen: Sequence[str] = PREBUILT) -> list[Path]:
    """Build the sources under ``root``/cuda for some architectures into the package directory ``package``.

    Raises:
        BuildError: with the reason.
    """
    made = {prebuilt_name(root, part, chosen): recipe(root, part, chosen) for part in PARTS}
    made[prebuilt_name(root)] = operators_recipe(root)

    def build(name: str) -> Path:
        with tempfile.TemporaryDirectory() as work:
            log = package.parent / f"fastode-build-{name.removesuffix('.so')}.log"
            library = toolchain.compile_into(made[name], Path(work), log)
            return Path(shutil.move(library, package / name))

    # As many at a time as there are cores: a part has few files.
    with ThreadPoolExecutor(max_workers=toolchain.jobs()) as pool:
        return list(pool.map(build, made))
