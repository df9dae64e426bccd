"""The autograd nodes in C++ (csrc/autograd): a module of their own, and optional.

A node needs torch's C++ interface, which is another one in every release, where the operators need its stable ABI only.
So this library is built for the torch and the Python that are here. Where it cannot be had, the autograd Functions in
Python do the same, slower. It is loaded beside the operators, never by a backward.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from . import toolchain
from .toolchain import LIBRARY, BuildError, Recipe

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "fastode_nodes"  # of the module, as nodes.cpp has it
SWITCH = "FASTODE_CPP_NODES"
# Its own code takes a microsecond of a call: optimising it further only makes the build longer, as do the headers of
# torch's operators that it does not call, and what pybind11 has to make modules, which its locks bring along unless
# they are the simple ones.
FLAGS = (*toolchain.FLAGS, "-O1", "-DAT_PER_OPERATOR_HEADERS", "-DPYBIND11_SIMPLE_GIL_MANAGEMENT")

module: Any = None  # None where it is not loaded
_path: Path | None = None
_reason = "the autograd nodes were not loaded"


def usable() -> bool:
    """Whether a call may go through a node: not where hooks save tensors or tangents are carried along."""
    return (
        module is not None
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Take the Functions in Python instead, in this context and in all threads: for tests and measurements."""
    global module
    before, module = module, None
    try:
        yield
    finally:
        module = module or before  # loaded meanwhile, where this was the first use of all


def load(root: Path | None, announce: bool = True) -> str:
    """Import the module, built first if need be; operators.load calls this once.

    Args:
        root: the directory of the C++ sources.
        announce: say on stderr when a build starts.

    Returns:
        Why it cannot be had; empty if it is loaded. Only speed is lost, and so no warning says it: `python -m fastode
        info` does.
    """
    global module, _path, _reason
    if module is not None:
        return ""
    try:
        if os.environ.get(SWITCH, "1") == "0":
            raise BuildError(f"{SWITCH} is 0")
        path = find_or_build(root, announce)
        module, _path, _reason = _import(path), path, ""
    except (BuildError, OSError, ImportError) as error:
        _reason = str(error)
        logging.getLogger(__name__).debug("without autograd nodes in C++: %s", _reason)
    return _reason


def connect(library: Path) -> None:
    """Let the operators ask autograd's engine whether it will use gradients, if the nodes are loaded.

    Args:
        library: of the operators, loaded.
    """
    if module is not None:
        ctypes.CDLL(str(library)).fastode_ask_engine(ctypes.c_void_p(module.question()))


def go_unused(leaves: list[torch.Tensor]) -> bool:
    """Whether autograd's engine will use none of these parameters' gradients in the backward of a compiled graph.

    Args:
        leaves: the parameters whose gradients an operator in it was traced for.
    """
    return module is not None and bool(module.go_unused(leaves))


def find_or_build(root: Path | None, announce: bool = True, again: bool = False) -> Path:
    """The library's path, built first if need be; nothing is loaded.

    Args:
        root: the directory of the C++ sources.
        announce: say on stderr when a build starts.
        again: try a build that has failed before.

    Raises:
        BuildError: with the reason.
    """
    ready = _prebuilt(root)
    if ready is not None:
        return ready
    made, cache = _recipe(root), toolchain.cache_directory()
    failed = cache / f"{made.key}.failed"  # or every process would wait for the compiler to fail once more
    if failed.exists() and not again:
        raise BuildError(failed.read_text())
    try:
        return toolchain.build(made, cache, announce=announce)
    except toolchain.CompileError as error:
        with contextlib.suppress(OSError):
            failed.write_text(str(error))
        raise


def available(root: Path | None) -> tuple[bool, str]:
    """Whether `load` gives the nodes without compiling anything, and where from, or why not."""
    if module is not None:
        return True, f"loaded from {_path}"
    if os.environ.get(SWITCH, "1") == "0":
        return False, f"{SWITCH} is 0"
    ahead = _prebuilt(root)
    if ahead is not None:
        return True, f"built ahead of time: {ahead}"
    try:
        key, cache = _recipe(root).key, toolchain.cache_directory()
    except BuildError as error:
        return False, str(error)
    if (cache / key / LIBRARY).exists():
        return True, f"built earlier: {cache / key / LIBRARY}"
    failed = cache / f"{key}.failed"
    return False, failed.read_text() if failed.exists() else "not built yet: they are built with the operators"


def _recipe(root: Path | None) -> Recipe:
    if root is None:
        raise BuildError("the C++ sources are missing")
    return recipe(root)


def recipe(root: Path) -> Recipe:
    """Everything needed to build the sources under ``root``/autograd.

    Args:
        root: the directory that holds ``autograd/``.

    Raises:
        BuildError: there is no compiler, there are no sources, or Python's headers are missing.
    """
    units = tuple(sorted((root / toolchain.AUTOGRAD).glob("*.cpp")))
    if not units:
        raise BuildError(f"no sources of autograd nodes were found under {root}")
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        raise BuildError(f"Python's headers are not installed: there is no Python.h in {headers}")
    command, version = toolchain.compiler()
    extra, (includes, libraries) = toolchain.extra_flags(), toolchain.torch_flags()
    link_flags: tuple[str, ...] = ("-shared", *extra, libraries, "-ltorch_python", "-ltorch_cpu", "-lc10")
    if sys.platform == "darwin":
        link_flags += ("-undefined", "dynamic_lookup")
    facts = {
        "sources": _source_hash(root),
        "torch": torch.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}",
        "compiler": f"{shlex.join(command)}\n{version}",
        "flags": shlex.join((*FLAGS, *extra)),
    }
    compile_flags = (*FLAGS, f"-I{root}", "-isystem", headers, *includes, *extra)
    return Recipe(root, units, command, facts, compile_flags, link_flags, name="the autograd nodes")


def _source_hash(root: Path) -> str:
    """Of the nodes' own sources and of the headers that they share with the operators."""
    return toolchain.source_hash(root, toolchain.CUDA, "cpu", "ops.cpp")


def _import(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


# ---- ahead of time


def prebuilt_name(root: Path) -> str:
    """The file name of a prebuilt library: it names its sources, torch and Python, and serves no other."""
    hashed = _source_hash(root)[:16]
    return f"libfastode-nodes-{hashed}-torch-{torch.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _prebuilt(root: Path | None) -> Path | None:
    if root is None or toolchain.extra_flags():
        return None
    path = PACKAGE / prebuilt_name(root)
    return path if path.exists() else None


def build_ahead(root: Path, package: Path) -> Path:
    """Build the sources under ``root``/autograd for this torch into the package directory ``package``.

    Raises:
        BuildError: with the reason.
    """
    with tempfile.TemporaryDirectory() as work:
        log = package.parent / "fastode-build-nodes.log"
        library = toolchain.compile_into(recipe(root), Path(work), log, announce=True)
        return Path(shutil.move(library, package / prebuilt_name(root)))
