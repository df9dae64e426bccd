"""The fused twin of the Neural ODE block: the same constructor, parameters and buffers."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..dispatch import choice
from ..dispatch.registry import register
from ..ops.engine import Call
from .base import Fused, note

__all__ = ["ODEBlock"]


@register(reference.ODEBlock)
class ODEBlock(Fused, reference.ODEBlock):
    __doc__ = reference.ODEBlock.__doc__

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        reason = "no engine has the solution of a single map's equation yet"
        return Call("ode_solution", "", None, (), inputs, reason)

    def forward(self, x: Tensor) -> Tensor:
        note(self, choice.choose(self.engine, self.describe_call((x,))))
        return super().forward(x)
