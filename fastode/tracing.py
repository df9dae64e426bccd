"""What a tracer is told as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, a result that a tracer keeps, without importing all of Dynamo for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def is_exporting() -> bool:
    """Whether torch.export traces; torch 2.11 tells a compiled function so of torch.compile as well."""
    return torch.compiler.is_exporting()


@constant
def is_exporting_to_onnx() -> bool:
    """Whether torch.onnx.export traces."""
    return torch.onnx.is_in_onnx_export()
