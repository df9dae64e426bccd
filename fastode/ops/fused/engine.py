"""The engine of fused convolutions: in Triton, with norm and activation on load, and what follows on store.

Importing this module imports no Triton: its functions do, when they are first asked for.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from ..engine import NO_EXACT_IE, NO_LINEAR, NO_ODE_SOLUTION, ODE_SOLUTION, Call, OperatorEngine
from ..plan import Plan
from ..schemes.chain.chain import Chain
from ..schemes.skew_pair.linear import Linear
from ..schemes.skew_pair.pair import Pair

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedConvolution(OperatorEngine):
    """CUDA, any channels, no groups; kernels of odd sides."""

    name = "fused_convolution"
    devices = ("cuda",)

    @cached_property
    def _functions(self) -> Any:
        from . import functions

        return functions

    @cached_property
    def ie_skip(self) -> type[torch.autograd.Function]:
        return self._functions.IE_SKIP

    @cached_property
    def shu_osher(self) -> type[torch.autograd.Function]:
        return self._functions.SHU_OSHER

    @cached_property
    def skew_pair(self) -> type[torch.autograd.Function]:
        return self._functions.SKEW_PAIR

    @cached_property
    def skew_solution(self) -> type[torch.autograd.Function]:
        return self._functions.SKEW_SOLUTION

    def refuses(self, call: Call) -> str:
        if call.family == "exact_ie":
            return NO_EXACT_IE
        if call.family == ODE_SOLUTION:
            return NO_ODE_SOLUTION
        if isinstance(call.program, Linear):
            return NO_LINEAR
        if isinstance(call.program, Chain):
            return "it has no blocks that change the shape, nor chains without a skip"
        if torch.compiler.is_compiling():
            return "torch.compile does not trace fused convolutions"
        reason = _refuses_branch(call.program) if isinstance(call.program, Plan) else _refuses_pair(call)
        if reason:
            return reason
        for dtype in (call.lower, *(None if t is None else t.dtype for t in (*call.tensors, *call.inputs))):
            if dtype is not None and dtype not in _DTYPES:
                return f"there are no fused convolutions for {dtype}"
        return ""


def _refuses_branch(plan: Plan) -> str:
    for unit in plan.units:
        if unit.conv is None:
            return "a unit of the branch has no convolution"
        if unit.conv.groups != 1:
            return "fused convolutions have no groups"
        if not (unit.conv.kernel[0] % 2 and unit.conv.kernel[1] % 2):
            return "fused convolutions have kernels of odd sides"
    return ""


def _refuses_pair(call: Call) -> str:
    pair, weight = call.program, call.tensors[0]
    assert isinstance(pair, Pair) and weight is not None
    kernel = weight.shape[2:]
    if (*kernel, pair.padding) not in {(3, 3, 1), (4, 4, 1)} or kernel[0] != pair.stride + 2:
        return "the fused skew pair has a 3×3 kernel of stride 1 or a 4×4 kernel of stride 2, with padding 1"
    return ""
