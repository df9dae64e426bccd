"""The head of a network on the resident engine: the mean of every channel and a linear layer behind it, in one call.

What the layer reads is stored as eager stores it, under autocast to bfloat16 in that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...native import nodes
from ..engine import Call
from ..function import NodeFunction, gradients
from ..plan import MaybeTensor
from ..rerun import Rerun

# Two threads of an AMD EPYC with AVX2, 2026-11-29, 1 to 128 samples, 64 to 512 channels, 10 to 128 classes, weights up
# to MOST_ENTRIES: attacks and steps have 1.2 to 6.9 times the speed of eager's calls, forwards 1.02 to 2.1 in bfloat16,
# and in float32 1.1 to 1.7 with 10 classes, but 0.92 to 1.15 with 100 and more.
MOST_ENTRIES = 1 << 16
MOST_CLASSES = 64


def refuses(call: Call) -> str:
    """Why the engine cannot run a head, as a chain without units; empty if it can."""
    x, weight = call.x, call.tensors[0]
    if x is None or weight is None:
        return ""
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or x.numel() == 0:
        return "the linear layer does not take the mean of such a map"
    dtypes = {tensor.dtype for tensor in call.tensors if tensor is not None}
    if call.lower is None or x.dtype == torch.float64:
        return "" if dtypes == {x.dtype} else "its parameters are not of the input's dtype"
    if call.lower != torch.bfloat16 or not dtypes <= {torch.float32, torch.bfloat16}:
        return "under autocast it lowers float32 to bfloat16"
    return ""


def slower(call: Call) -> str:
    """Why the engine is taken to be slower than plain PyTorch, for a head that it can run; empty where it is not."""
    x, weight = call.x, call.tensors[0]
    assert x is not None and weight is not None
    if weight.numel() > MOST_ENTRIES:
        return f"a head of more than {MOST_ENTRIES} weights was measured to be slower than plain PyTorch"
    wide = x.dtype != torch.bfloat16 and (call.lower is None or x.dtype == torch.float64)
    if weight.shape[0] > MOST_CLASSES and wide and not torch.is_grad_enabled():
        return f"without gradients a head of more than {MOST_CLASSES} classes was measured to be slower than PyTorch"
    return ""


class ResidentHeadFunction(NodeFunction):
    """y, from the map, the weight and the bias or None."""

    constants = ("lower", "rerun")

    @classmethod
    def through_node(cls, lower: torch.dtype | None, rerun: Rerun | None, given: Sequence[MaybeTensor]) -> Any:
        return nodes.module.head((cls, lower, rerun), given, _lowers(lower, given[0]))

    @staticmethod
    def forward(
        ctx: Any, lower: torch.dtype | None, rerun: Rerun | None, x: Tensor, weight: Tensor, bias: MaybeTensor
    ) -> Tensor:
        y, pooled = torch.ops.fastode.resident_head_forward.default(_dense(x), weight, bias, _lowers(lower, x))
        ctx.save_for_backward(x, weight, bias)
        ctx.pooled, ctx.lower, ctx.rerun = pooled, lower, rerun
        ctx.set_materialize_grads(False)
        made: Tensor = y
        return made

    @staticmethod
    def backward(ctx: Any, y_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        given = ctx.saved_tensors

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            (bar,), (x, weight, bias) = bars, given
            assert bar is not None
            x = _dense(x)
            pooled = getattr(ctx, "pooled", None)
            if pooled is None:  # which a node in C++ does not hand over
                pooled = torch.ops.fastode.resident_head_forward.default(x, weight, bias, _lowers(ctx.lower, x))[1]
            x_bar, found = torch.ops.fastode.resident_head_backward.default(
                x, pooled, bar.contiguous(), weight, wanted[0], any(wanted[1:])
            )
            weight_bar, bias_bar = found or (None, None)
            return [x_bar if wanted[0] else None, weight_bar, None if bias is None else bias_bar]

        return gradients(ctx, given, [y_bar], pull)


def _lowers(lower: torch.dtype | None, x: MaybeTensor) -> bool:
    assert x is not None
    return lower is not None and x.dtype == torch.float32


def _dense(x: Tensor) -> Tensor:
    """x, as it is where the operators take it so."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
