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


@constant
def traces_autograd() -> bool:
    """Whether torch.compile traces calls of torch.autograd.grad, too, as torch 2.13 can."""
    from torch._dynamo import config

    return bool(getattr(config, "trace_autograd_ops", False))
