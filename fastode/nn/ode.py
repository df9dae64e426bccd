"""The fused twin of the Neural ODE block: the same constructor, parameters and buffers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import reference
from ..dispatch.engines import AUTO, is_reference
from ..dispatch.ode import describe_call, read_field, run
from ..dispatch.registry import register
from ..ops.engine import Call
from .base import Opaque

__all__ = ["ODEBlock"]


@register(reference.ODEBlock)
class ODEBlock(Opaque, reference.ODEBlock):
    __doc__ = reference.ODEBlock.__doc__

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return describe_call(read_field(self.field), self.settings, inputs)

    def forward(self, x: Tensor) -> Tensor:
        if self._takes_operators() and self._may_be_opaque(x):
            reading = read_field(self.field)
            if reading.units is not None:
                return self._as_operator(x, x.shape, any(norm is not None for norm in reading.norms))
        plain = super().forward
        make = partial(_as_reference, self)
        return run(x, self.field, self.settings, self.engine, self.in_words(), make, self, plain)

    def _may_be_opaque(self, x: Tensor) -> bool:
        """Whether a tracer may take the solution as an operator, if all that it depends on can be read.

        Only what was read is seen by the compiler as it changes. Its steps must be chosen by the data or its engine by
        name.
        """
        named = self.engine != AUTO and not is_reference(self.engine)
        return (named or self.settings.is_adaptive) and x.dim() == 4 and x.shape[0] > 0


def _as_reference(block: Any) -> nn.Module:
    """A reference block around the same field."""
    twin: reference.ODEBlock = copy.copy(block)
    twin.__class__ = reference.ODEBlock
    twin.__dict__["_modules"] = dict(block._modules)
    return twin
