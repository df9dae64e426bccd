"""The CUDA C++ operators: loaded beside the CPU's library where there is a card, or the reason why not.

Without them Triton's operators run. The programs that they launch are libraries of their own (nvcc.PARTS), loaded where
a call first asks for them. The order is as in operators.py: built ahead of time, built earlier, or now.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..tracing import constant
from . import nvcc, toolchain
from .nvcc import PARTS, TYPES, Part
from .toolchain import LIBRARY, BuildError

PACKAGE = Path(__file__).resolve().parents[1]

_path: Path | None = None  # of the library that is loaded
_reason = "the CUDA operators were not loaded"  # why there is none
_too_old: dict[int, str] = {}  # the cards that it has no code for, and why
_shared: dict[int, int] = {}  # the bytes of shared memory that a block can have on each card
_parts: dict[Part, str] = {}  # those that were asked for, and why each is missing, empty where it is loaded
_lock = threading.RLock()


def source_root() -> Path | None:
    """The directory of the C++ sources: inside an installed package, beside the package in a checkout."""
    return toolchain.source_root(PACKAGE)


def wanted() -> bool:
    """Whether this machine has a card for them."""
    return torch.cuda.is_available()


def why_not(index: int | None = None) -> str:
    """Why there are no CUDA C++ operators, or none for one card; empty if there are. Builds nothing, and can be traced.

    Args:
        index: of the card; None asks about the library alone.
    """
    if _path is None:
        return _reason
    return "" if index is None else _too_old.get(index, "")


def shared_bytes(index: int | None) -> int | None:
    """The bytes of shared memory that a block can have on a card; None where the library is not loaded. Can be traced.

    Args:
        index: of the card.
    """
    return None if index is None else _shared.get(index)


def leave_out(reason: str) -> None:
    """Say why they are not even tried."""
    global _reason
    _reason = reason


def load(announce: bool = True) -> str:
    """Open the library, built first if need be; operators.load calls this once, after the CPU's library.

    Args:
        announce: say on stderr when a build starts.

    Returns:
        Why it cannot be had; empty if it is loaded. Of a build that fails this also warns, but not where there is no
        nvcc: `python -m fastode info` and a block's `why_not` say that.
    """
    global _path, _reason
    if _path is not None:
        return ""
    if not wanted():
        leave_out("there is no CUDA device")
        return _reason
    try:
        _check_nvcc()
        _path = open_library(find_or_build(announce=announce))
        _reason = ""
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            _shared[index] = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
        for index, (major, minor) in enumerate(nvcc.capabilities()):
            if (major, minor) < nvcc.OLDEST:
                _too_old[index] = (
                    f"there are CUDA operators for capability 8.0 and above, and the card's is {major}.{minor}"
                )
    except nvcc.NothingToBuildWith as missing:
        leave_out(f"the CUDA operators are not built: {missing}")
    except (BuildError, OSError) as error:
        leave_out(str(error))
        message = f"fastode runs without its CUDA C++ operators, and Triton's take their place: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return _reason


def no_programs(kinds: tuple[str, ...], dtype: torch.dtype) -> str:
    """Why there are no programs of some kinds for maps of a dtype; empty if they are loaded, built first if need be.

    A build that fails is told once, by a warning. Can be traced: then nothing is built.

    Args:
        kinds: of nvcc.KINDS.
        dtype: of the maps.
    """
    return _no_programs(kinds, f"{dtype}".replace("torch.", ""), torch.compiler.is_compiling())


@constant
def _no_programs(kinds: tuple[str, ...], dtype: str, traced: bool) -> str:
    parts = [Part(kind, dtype) for kind in kinds]
    with _lock:
        missing = [part for part in parts if part not in _parts]
        unbuilt = next((part for part in missing if traced and not is_built(part)), None)
        if unbuilt is not None:
            return (
                f"the CUDA programs {unbuilt} were not built before tracing: call the block once, or run python -m "
                "fastode build"
            )
        if missing:
            with ThreadPoolExecutor(max_workers=len(missing)) as pool:
                _parts.update(zip(missing, pool.map(_take, missing), strict=True))
        for part in missing:
            if _parts[part]:
                message = f"fastode runs without the CUDA programs {part}, and Triton's take their place: "
                warnings.warn(message + _parts[part], RuntimeWarning, stacklevel=4)
        return next((_parts[part] for part in parts if _parts[part]), "")


def _take(part: Part) -> str:
    """Build and load a library of programs; why it cannot be had, empty if it is loaded."""
    assert _path is not None
    try:
        take_programs(_path, part, find_or_build(part))
    except (BuildError, OSError) as error:
        return str(error)
    return ""


def take_programs(operators: Path, part: Part, library: Path) -> None:
    """Load a library of programs, and have it give them to that of the operators.

    Raises:
        BuildError: it cannot be opened.
    """
    try:
        taker, giver = ctypes.CDLL(str(operators)), ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"the library {library} cannot be loaded: {str(error).splitlines()[0]}") from error
    taker.fastode_programs.restype = ctypes.c_void_p
    giver.fastode_give(ctypes.c_void_p(taker.fastode_programs(list(TYPES).index(part.dtype))))


def find_or_build(part: Part | None = None, announce: bool = True) -> Path:
    """The path of a library of programs, or of the operators', built first if need be; nothing is loaded.

    Raises:
        BuildError: with the reason.
    """
    ready = _prebuilt(part)
    if ready is not None:
        return ready
    return toolchain.build(_recipe(part), toolchain.cache_directory(), announce=announce)


def build_all() -> list[Path]:
    """The paths of all libraries, built first if need be, as many at a time as there are cores.

    Raises:
        BuildError: with the first reason.
    """
    if not all(map(_prebuilt, PARTS)):
        _check_nvcc(even_prebuilt=True)
    with ThreadPoolExecutor(max_workers=toolchain.jobs()) as pool:
        return list(pool.map(find_or_build, (None, *PARTS)))


def is_built(part: Part | None) -> bool:
    """Whether a library can be had without compiling it."""
    if _prebuilt(part) is not None:
        return True
    try:
        return (toolchain.cache_directory() / _recipe(part).key / LIBRARY).exists()
    except BuildError:  # without a compiler nobody knows what it would have been built by
        return False


def open_library(library: Path) -> Path:
    """Load the operators' library, which registers them.

    Raises:
        BuildError: it cannot be opened.
    """
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"the library {library} cannot be loaded: {str(error).splitlines()[0]}") from error
    return library


def _prebuilt(part: Part | None) -> Path | None:
    root = source_root()
    return nvcc.prebuilt(root, PACKAGE, part) if root is not None else None


def _recipe(part: Part | None) -> toolchain.Recipe:
    root = source_root()
    if root is None:
        raise BuildError(f"the C++ sources are missing beside {PACKAGE}")
    return nvcc.operators_recipe(root) if part is None else nvcc.recipe(root, part)


def _check_nvcc(even_prebuilt: bool = False) -> None:
    """Find out before anything is compiled that programs could not be: operators without them are of no use.

    Args:
        even_prebuilt: also where some were built ahead of time.

    Raises:
        BuildError: with the reason.
    """
    if even_prebuilt or not any(map(_prebuilt, PARTS)):
        found = nvcc.find()
        nvcc.architectures()
        _check_driver(found)


def _check_driver(found: nvcc.Nvcc) -> None:
    """A CUDA runtime asks for a driver of its own major release: refused before minutes of compiling."""
    release = _driver_release()
    if release is not None and release < found.release[0]:
        raise nvcc.NothingToBuildWith(
            f"{found} needs a driver of CUDA {found.release[0]}, and this one is of CUDA {release}"
        )


def _driver_release() -> int | None:
    """The major release of CUDA that this machine's driver is of; None where it cannot be asked."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000
    return None


def available() -> tuple[bool, str]:
    """Whether `load` gives the operators without compiling anything, and where from, or why not."""
    if _path is not None:
        return True, f"loaded from {_path}, with the programs {_listed(_parts) or 'none yet'}"
    if not wanted():
        return False, "there is no CUDA device"
    try:
        _check_nvcc()
        ready = [part for part in PARTS if is_built(part)]
        if is_built(None):
            return True, f"built, with the programs {_listed(ready) or 'none yet'}; a call builds those that it needs"
    except BuildError as error:
        return False, str(error)
    return False, "not built yet: fuse, or constructing a fused block, builds them on first use"


def _listed(parts: Iterable[Part]) -> str:
    return ", ".join(str(part) for part in parts if not _parts.get(part))


def describe() -> str:
    """The compiler of device code and what it compiles for, or why there is none: for people."""
    try:
        found = nvcc.find()
    except BuildError as error:
        return f"none: {error}"
    try:
        chosen = ", ".join(f"sm_{each}" for each in nvcc.architectures())
    except BuildError as error:
        return f"{found}; {error}"
    return f"{found}, for {chosen}"
