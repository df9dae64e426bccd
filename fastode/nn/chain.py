"""The fused twins of chains and of residual blocks, which may change the shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from .. import reference
from ..dispatch import chain
from ..dispatch.engines import REFERENCE
from ..dispatch.one_step import describe_call, euler_step, run
from ..dispatch.registry import register
from ..ops.engine import Call
from .base import Fused, note

__all__ = ["Chain", "ResBlock"]


@register(reference.ResBlock)
class ResBlock(Fused, reference.ResBlock):
    __doc__ = reference.ResBlock.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return self.run_for(self, super().forward, x)

    def run_for(self, owner: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self._keeps_shape((x,)):
            return chain.run(x, self, partial(chain.read_block, self), plain, engine=self.engine, owner=owner)[0]
        if self.post_activation is None:
            return self._step(owner, plain, x)
        return self.post_activation(self._step(owner, super().sum, x))

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        if self._keeps_shape(inputs):
            return describe_call(euler_step(self.step_size), self.branch, inputs)
        return chain.read_block(self).call(inputs)

    def _step(self, owner: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.step_size == 0:  # of which a scheme would not evaluate the branch, nor move its running statistics
            note(owner, REFERENCE)
            return plain(x)
        make, checked = partial(reference.ResBlock, self.branch, self.step_size), owner is not self
        step = euler_step(self.step_size)
        return run(x, self.branch, step, make, plain, engine=self.engine, owner=owner, checked=checked)

    def _keeps_shape(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether it runs as one step of a scheme, the activation behind it apart."""
        if self.shortcut is not None or self.post_activation is None:
            return self.shortcut is None
        # Cards have programs of steps, and of chains none.
        x = inputs[0] if inputs else None
        return isinstance(x, Tensor) and x.device.type != "cpu"


@register(reference.Chain)
class Chain(Fused, reference.Chain):
    __doc__ = reference.Chain.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return self.run_for(self, super().forward, x)

    def run_for(self, owner: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, count = chain.run(x, self, self._read, plain, engine=self.engine, owner=owner)
        return y if count == len(self._modules) else self.from_layer(count, y)

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return self._read().call(inputs)

    def _read(self) -> chain.ChainReading:
        modules: Mapping[str, nn.Module | None] = self._modules
        return chain.read_sequence(modules, ResBlock, self.engine)
