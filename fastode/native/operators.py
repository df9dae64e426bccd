"""Where the compiled operators come from: prebuilt, the cache, or a build; and if none of these, the reason why not.

The order is: a library that ``FASTODE_PREBUILD=1 pip install --no-build-isolation .`` left inside the package, then one
built earlier on a machine like this one, then a build. Nothing here runs on ``import fastode``.
"""

from __future__ import annotations

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import cuda, cuda_library, fake, nodes, toolchain
from .toolchain import (
    LIBRARY,
    BuildError,
    Recipe,
    build,
    cache_directory,
    cpu_features,
    extra_flags,
    levels,
    prebuilt_name,
    recipe,
)

PACKAGE = Path(__file__).resolve().parents[1]


def source_root() -> Path | None:
    """The directory of the C++ sources: inside an installed package, beside the package in a checkout."""
    return toolchain.source_root(PACKAGE)


def prebuilt() -> Path | None:
    """The best of the libraries built ahead of time from these very sources that this machine's CPU can run."""
    root = source_root()
    if root is None or extra_flags():
        return None
    able = (level for level in levels() if level.features <= set(cpu_features()))
    return next((path for level in able if (path := PACKAGE / prebuilt_name(root, level)).exists()), None)


@dataclass
class _State:
    path: Path | None = None
    reason: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_state = _State()


def loaded() -> bool:
    """Whether the operators are in ``torch.ops.fastode`` now; costs nothing and can be traced."""
    return _state.path is not None


def load(announce: bool = True) -> str | None:
    """Make ``torch.ops.fastode`` usable: prebuilt, from the cache, or by a build of at most 90 s.

    Called by ``fuse`` and by the constructors of fused modules. It tries once per process.

    Args:
        announce: say on stderr when a build starts.

    Returns:
        None when the operators are ready, else the reason why not, of which the first call also warns.
    """
    if torch.compiler.is_compiling():  # a traced call must not start a compiler; what is decided stays decided
        undecided = "the C++ operators were not loaded before tracing: call fastode.fuse or build the block first"
        return None if loaded() else _state.reason or undecided
    with _state.lock:
        if loaded() or _state.reason is not None:
            return _state.reason
        try:
            with ThreadPoolExecutor(1) as beside:
                # A file more to compile, while this thread's are.
                nodes_loaded = beside.submit(nodes.load, source_root(), announce) if toolchain.jobs() > 1 else None
                _state.path = _open(find_or_build(announce))
            if nodes_loaded is None:
                nodes.load(source_root(), announce)
            nodes.connect(_state.path)
            cuda.register()
            cuda_library.load(announce)
        except (BuildError, OSError) as error:
            _state.reason = str(error)
            cuda_library.leave_out(_state.reason)
            message = f"fastode runs its reference blocks on the CPU, which are slower: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            root = source_root()
            if root is not None:
                cuda.register(root / "ops.cpp")
        return _state.reason


def find_or_build(announce: bool = True) -> Path:
    """The library's path, built first if need be; nothing is loaded.

    Raises:
        BuildError: with the reason.
    """
    return prebuilt() or build(_here(), cache_directory(), announce=announce)


def _open(library: Path) -> Path:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"the library {library} cannot be loaded: {str(error).splitlines()[0]}") from error
    fake.register()
    return library


def _here() -> Recipe:
    if sys.platform == "win32":
        raise BuildError("the C++ operators are built on Linux and macOS only")
    root = source_root()
    if root is None:
        raise BuildError(f"the C++ sources are missing beside {PACKAGE}")
    return recipe(root)


def available() -> tuple[bool, str]:
    """Whether ``load`` gives the operators without compiling anything, and where from, or why not."""
    if loaded():
        return True, f"loaded from {_state.path}"
    if _state.reason is not None:
        return False, _state.reason
    ahead = prebuilt()
    if ahead is not None:
        return True, f"built ahead of time: {ahead}"
    try:
        library = cache_directory() / _here().key / LIBRARY
    except BuildError as error:
        return False, str(error)
    if library.exists():
        return True, f"built earlier: {library}"
    return False, "not built yet: fuse, or constructing a fused block, builds it on first use"
