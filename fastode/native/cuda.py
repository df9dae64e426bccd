"""The operators for CUDA tensors: Triton's, registered where there is a card, beside or without the C++ library.

`operators.load` calls `register`; Triton is not imported before there is something to register.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from . import fake

_reason: str | None = None  # why nothing is registered, None before it was tried
_libraries: list[torch.library.Library] = []  # a registration lives as long as its library object
# The Triton operators as functions, by the type of device.
direct: dict[str, SimpleNamespace] = {}
_DEFINE = re.compile(r'#define\s+(\w+)\s+"([^"]*)"')
_SCHEMA = re.compile(r'm\.def\(((?:\s*(?:"[^"]*"|\w+))+)\s*\)')
_PIECE = re.compile(r'"([^"]*)"|(\w+)')


def why_not() -> str:
    """Why there are no kernels for CUDA tensors on this machine; empty if there are."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def schemas(source: Path) -> list[str]:
    """The operators' schemas as csrc/ops.cpp states them: the C++ compiler and this read the same text.

    Args:
        source: ops.cpp.
    """
    text = re.sub(r"//[^\n]*", "", source.read_text())
    macros = dict(_DEFINE.findall(text))
    found = _SCHEMA.findall(text)
    return ["".join(literal or macros[name] for literal, name in _PIECE.findall(pieces)) for pieces in found]


def define(source: Path) -> None:
    """Define the operators, on a machine where the C++ library that would do so cannot be built."""
    library = torch.library.Library("fastode", "FRAGMENT")
    for schema in schemas(source):
        library.define(schema)
    _libraries.append(library)
    fake.register()


def implement(key: str = "CUDA") -> None:
    """Register the Triton operators for a dispatch key."""
    from ..ops.triton import passes

    library = torch.library.Library("fastode", "IMPL", key)
    for operator in passes.OPERATORS:
        library.impl(operator.__name__, operator)
    _libraries.append(library)
    direct[key.lower()] = SimpleNamespace(**passes.DIRECT)


def operators(x: torch.Tensor) -> Any:
    """The operators for x by name: torch.ops.fastode or, where nothing stands between, what it would call.

    The way through PyTorch's dispatcher takes as long as a launch.
    """
    found = direct.get("cuda" if x.is_cuda else x.device.type) if direct else None
    if found is None or torch.compiler.is_compiling():
        return torch.ops.fastode
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
    return torch.ops.fastode if watched or torch._C._autograd._profiler_enabled() else found


def register(source: Path | None = None) -> None:
    """Make torch.ops.fastode take CUDA tensors where this machine can run them, once.

    Args:
        source: ops.cpp where the operators are not defined because the C++ library is missing, else None.
    """
    global _reason
    if _reason == "":
        return
    reason = why_not()
    if not reason:
        try:
            if source is not None:
                define(source)
            implement()
        except (ImportError, RuntimeError) as error:  # a Triton that does not fit this torch or this card's driver
            reason = f"Triton's operators cannot be registered: {' '.join(str(error).split())[:200]}"
    _reason = reason


def no_kernels() -> str:
    """Why torch.ops.fastode does not take CUDA tensors, empty if it does; costs nothing and can be traced."""
    return "the operators were not loaded" if _reason is None else _reason
