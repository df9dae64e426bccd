"""The fused twin of the Neural ODE block: the same constructor, parameters and buffers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import reference
from ..dispatch.ode import describe_call, read_field, run
from ..dispatch.registry import register
from ..ops.engine import Call
from .base import Fused

__all__ = ["ODEBlock"]


@register(reference.ODEBlock)
class ODEBlock(Fused, reference.ODEBlock):
    __doc__ = reference.ODEBlock.__doc__

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return describe_call(read_field(self.field), self.settings, inputs)

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward
        make = partial(_as_reference, self)
        return run(x, self.field, self.settings, self.engine, self.in_words(), make, self, plain)


def _as_reference(block: Any) -> nn.Module:
    """A reference block around the same field."""
    twin: reference.ODEBlock = copy.copy(block)
    twin.__class__ = reference.ODEBlock
    twin.__dict__["_modules"] = dict(block._modules)
    return twin
