"""The CUDA C++ operators: loaded beside the CPU's library where there is a card, or the reason why not.

Without them Triton's operators run. The order is as in operators.py: built ahead of time, built earlier, or now.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from pathlib import Path

import torch

from . import nvcc, toolchain
from .toolchain import LIBRARY, BuildError, Recipe

PACKAGE = Path(__file__).resolve().parents[1]

_path: Path | None = None  # of the library that is loaded
_reason = "the CUDA operators were not loaded"  # why there is none
_too_old: dict[int, str] = {}  # the cards that it has no code for, and why
_shared: dict[int, int] = {}  # the bytes of shared memory that a block can have on each card


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
        _path = open_library(find_or_build(announce))
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


def find_or_build(announce: bool = True) -> Path:
    """The library's path, built first if need be; nothing is loaded.

    Raises:
        BuildError: with the reason.
    """
    ready = _prebuilt()
    if ready is not None:
        return ready
    return toolchain.build(_here(), toolchain.cache_directory(), announce=announce)


def open_library(library: Path) -> Path:
    """Load a library, which registers its operators.

    Raises:
        BuildError: it cannot be opened.
    """
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"the library {library} cannot be loaded: {str(error).splitlines()[0]}") from error
    return library


def _prebuilt() -> Path | None:
    root = source_root()
    return nvcc.prebuilt(root, PACKAGE) if root is not None else None


def _here() -> Recipe:
    root = source_root()
    if root is None:
        raise BuildError(f"the C++ sources are missing beside {PACKAGE}")
    made = nvcc.recipe(root)
    _check_driver(nvcc.find())
    return made


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
        return True, f"loaded from {_path}"
    if not wanted():
        return False, "there is no CUDA device"
    ahead = _prebuilt()
    if ahead is not None:
        return True, f"built ahead of time: {ahead}"
    try:
        library = toolchain.cache_directory() / _here().key / LIBRARY
    except BuildError as error:
        return False, str(error)
    if library.exists():
        return True, f"built earlier: {library}"
    return False, "not built yet: fuse, or constructing a fused block, builds it on first use"


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
