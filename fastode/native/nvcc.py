"""The build of the CUDA C++ operators: which nvcc, which architectures, its recipe and its key.

A library of its own beside the CPU's, so that one that cannot be built leaves the others as they are. It is compiled,
locked and kept by toolchain.py's functions, and like that file setup.py loads this one without the package.

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
from dataclasses import dataclass
from pathlib import Path

import torch

from . import toolchain
from .toolchain import BuildError, Recipe

NAME = "the CUDA operators"
# What is built ahead of time; of a card's own generation there is at most one.
PREBUILT = ("80", "90a", "100")
OLDEST = (8, 0)  # the first capability with tensor cores for bfloat16
FLAGS = ("-O3", "-std=c++20", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas")
# torch's CUDA library is found through libtorch, where there is one: a torch for the CPU loads the result, too.
LINK_FLAGS = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-lcudart_static", "-ldl", "-lpthread", "-lrt")
_NVCC_READS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_ARCHITECTURE = re.compile(r"(?:sm_)?(\d{2,3}[af]?)")


class NothingToBuildWith(BuildError):
    """There is no nvcc, or no card for which there is code: nothing has failed, and nothing was tried."""


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


# ---- the recipe


def sources(root: Path) -> tuple[Path, ...]:
    """The translation units under ``root``/cuda; those for nvcc first, the largest first, because they take longest."""
    device = sorted(root.glob(f"{toolchain.CUDA}/*.cu"), key=lambda path: (-path.stat().st_size, path.name))
    return (*device, *sorted(root.glob(f"{toolchain.CUDA}/*.cpp")))


def device_flags(chosen: Sequence[str]) -> tuple[str, ...]:
    """The flags of nvcc for some architectures, but for the places of headers."""
    targets = tuple(f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen)
    debug = ("-DFASTODE_DEBUG",) if "-DFASTODE_DEBUG" in toolchain.extra_flags() else ()
    return (*FLAGS, *targets, *debug)


def recipe(root: Path, chosen: Sequence[str] | None = None) -> Recipe:
    """Everything needed to build the sources under ``root``/cuda.

    Args:
        root: the directory that holds ``cuda/``.
        chosen: the architectures, as "90a"; None takes those of `architectures`.

    Raises:
        BuildError: there is no compiler, there are no sources, or nothing to build them for.
    """
    units = sources(root)
    if not units:
        raise BuildError(f"no CUDA C++ sources were found under {root}")
    nvcc = find()
    command, version = toolchain.compiler()
    chosen = architectures() if chosen is None else tuple(chosen)
    extra, (includes, libraries) = toolchain.extra_flags(), toolchain.torch_flags()
    host = ("-ccbin", command[0]) if len(command) == 1 else ()  # nvcc takes a program, without arguments
    threads = f"--threads={max(1, min(len(chosen), toolchain.jobs() // len(units)))}"  # architectures at a time
    runtime, headers = _runtime(nvcc)
    facts = {
        "sources": toolchain.source_hash(root, "cpu", toolchain.AUTOGRAD),
        "torch": torch.__version__,
        "compiler": f"{shlex.join(command)}\n{version}",
        "nvcc": nvcc.version,
        "flags": shlex.join((*toolchain.FLAGS, *toolchain.STABLE_ABI, *extra, *device_flags(chosen), *LINK_FLAGS)),
        "nvcc reads": " ".join(f"{name}={os.environ.get(name, '')}" for name in _NVCC_READS),
    }
    return Recipe(
        root,
        units,
        command,
        facts,
        (*toolchain.FLAGS, *toolchain.STABLE_ABI, f"-I{root}", *includes, *headers, *extra),
        ("-shared", *extra, libraries, f"-L{runtime}", *LINK_FLAGS),
        (nvcc.path, *device_flags(chosen), *host, threads, f"-I{root}"),
        NAME,
    )


def _runtime(nvcc: Nvcc) -> tuple[Path, tuple[str, ...]]:
    """Where CUDA's static runtime lies, and the flags by which its headers are found: nvcc itself knows."""
    plan = _run([nvcc.path, "--dryrun", "-E", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    listed = re.findall(r'"-L([^"]*)"', plan) + ([f"{top[1]}/lib64", f"{top[1]}/lib"] if top else [])
    library = next((Path(each) for each in listed if (Path(each) / "libcudart_static.a").exists()), None)
    if library is None:
        raise BuildError(f"{nvcc} has no libcudart_static.a beside it (looked in {', '.join(listed) or 'nothing'})")
    folders = re.findall(r'"-I([^"]*)"', plan) or ([f"{top[1]}/include"] if top else [])
    return library, tuple(flag for each in dict.fromkeys(folders) for flag in ("-isystem", each))


# ---- ahead of time


def prebuilt_name(root: Path, chosen: Sequence[str]) -> str:
    """The file name of a prebuilt library: it names its sources and its architectures."""
    hashed = toolchain.source_hash(root, "cpu", toolchain.AUTOGRAD)[:16]
    return f"libfastode-{toolchain.CUDA}-{hashed}-{'-'.join(f'sm_{each}' for each in chosen)}.so"


def prebuilt(root: Path, package: Path) -> Path | None:
    """A library in ``package`` that was built ahead of time from these very sources, for the cards that are there."""
    if toolchain.extra_flags() or any(os.environ.get(name) for name in (*_NVCC_READS, "FASTODE_CUDA_ARCHITECTURES")):
        return None
    for path in sorted(package.glob(prebuilt_name(root, ["*"]))):
        if covers(re.findall(r"sm_(\w+?)(?=-sm_|\.so)", path.name), capabilities()):
            return path
    return None


def build_ahead(root: Path, package: Path, chosen: Sequence[str] = PREBUILT) -> Path:
    """Build the sources under ``root``/cuda for some architectures into the package directory ``package``.

    Raises:
        BuildError: with the reason.
    """
    made = recipe(root, chosen)
    with tempfile.TemporaryDirectory() as work:
        log = package.parent / f"fastode-build-{toolchain.CUDA}.log"
        library = toolchain.compile_into(made, Path(work), log, announce=True)
        return Path(shutil.move(library, package / prebuilt_name(root, chosen)))
