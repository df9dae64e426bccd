"""What a tracer is told as a constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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


def is_recorded() -> bool:
    """Whether torch.jit.trace records the calls: of an autograd Function it would have a forward without gradients."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def are_leaves(tensors: Sequence[Tensor]) -> bool:
    """Whether a tracer's tensors are parameters of whose gradients autograd's engine knows whether it will use them.

    What a Function in the graph returns may be a parameter under another name, while its backward gives the gradient to
    something else (a straight-through estimator). Nor is a backward known that is traced into a forward.
    """
    return all(isinstance(tensor, nn.Parameter) for tensor in tensors) and not _traces_autograd()


@constant
def _traces_autograd() -> bool:
    """Whether torch.compile traces calls of torch.autograd.grad, too."""
    from torch._dynamo import config

    return bool(getattr(config, "trace_autograd_ops", False))
