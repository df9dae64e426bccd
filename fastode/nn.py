"""The fused twins of the reference blocks: the same constructors, parameters and buffers, less time and memory.

A twin adds no state to its reference. `fastode.fuse` swaps it in by assigning `__class__`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _build, _dispatch, _one_step, branch, functional, reference
from ._registry import register
from .nn_skew import SkewLinear, SkewPair, SOBlock, SOClassifier
from .ops.implicit_euler.autograd import Descent
from .ops.rerun import Rerun
from .ops.runge_kutta.autograd import Scheme
from .ops.sweeps import MaybeTensors, Plan

__all__ = [
    "SSP2",
    "SSP3",
    "Ark",
    "IESkip",
    "Midpoint",
    "ResBlock",
    "SOBlock",
    "SOClassifier",
    "ShuOsher",
    "SkewLinear",
    "SkewPair",
]


class _Fused:
    """What the one-step twins share: the engine's name, the operators' build, the question which engine can run."""

    engine: str = "auto"
    branch: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _build.load()

    def why_not(self, engine: str, x: Tensor | None) -> str:
        return _one_step.why_not(engine, branch.read(self.branch), x)

    def against(self, engine: str, x: Tensor) -> str:
        return _one_step.against(engine, branch.read(self.branch), x, self._kind())

    def _kind(self) -> str:
        raise NotImplementedError


@register(reference.IESkip)
class IESkip(_Fused, reference.IESkip):
    __doc__ = reference.IESkip.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.run_ie_skip(
            x, self.branch, self._descent(), self._reference, super().forward, engine=self.engine, owner=self
        )

    def _descent(self) -> Descent:
        return Descent(self.steps, self.step_size, self.theta, self.detach)

    def _kind(self) -> str:
        return functional.ie_kind(self._descent())

    def _reference(self) -> nn.Module:
        return reference.IESkip(self.branch, self.steps, self.step_size, self.theta, self.detach)


@register(reference.ShuOsher)
class ShuOsher(_Fused, reference.ShuOsher):
    __doc__ = reference.ShuOsher.__doc__

    def forward(self, x: Tensor) -> Tensor:
        scheme, rows = functional.scheme_of(self.tableau)
        return functional.run_shu_osher(
            x, self.branch, scheme, rows, self._reference, super().forward, engine=self.engine, owner=self
        )

    def _kind(self) -> str:
        return functional.shu_osher_kind(functional.scheme_of(self.tableau)[0])

    def _reference(self) -> nn.Module:
        return reference.ShuOsher(self.branch, self.tableau)


@register(reference.SSP2)
class SSP2(ShuOsher, reference.SSP2):
    __doc__ = reference.SSP2.__doc__


@register(reference.SSP3)
class SSP3(ShuOsher, reference.SSP3):
    __doc__ = reference.SSP3.__doc__


@register(reference.Midpoint)
class Midpoint(ShuOsher, reference.Midpoint):
    __doc__ = reference.Midpoint.__doc__


_EULER = Scheme(alpha=((0,),), beta=((0,),))


@register(reference.ResBlock)
class ResBlock(_Fused, reference.ResBlock):
    __doc__ = reference.ResBlock.__doc__

    def why_not(self, engine: str, x: Tensor | None) -> str:
        if self.shortcut is not None:
            return "its shortcut changes the shape, and only blocks that keep it are fused"
        return super().why_not(engine, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            _dispatch.choose(self.engine, lambda name: self.why_not(name, x))
            if not torch.compiler.is_compiling():
                _dispatch.note(self, "reference")
            return super().forward(x)
        rows = (((1.0,),), ((self.step_size,),))
        return functional.run_shu_osher(
            x, self.branch, _EULER, rows, self._reference, super().forward, engine=self.engine, owner=self
        )

    def _kind(self) -> str:
        return functional.shu_osher_kind(_EULER)

    def _reference(self) -> nn.Module:
        return reference.ResBlock(self.branch, self.step_size)


class _GivenTable(reference.Ark):
    """Ark with its coefficients as an input, for gradients with respect to them."""

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        self.table = table
        return super().forward(x)

    def coefficients(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return super().coefficients(dtype) if self.table is None else (self.table[0], self.table[1])


_ARK = Scheme(alpha=((0,), (0, 1)), beta=((0,), (0, 1)))


@register(reference.Ark)
class Ark(_Fused, reference.Ark):
    __doc__ = reference.Ark.__doc__

    def forward(self, x: Tensor) -> Tensor:
        def call_engine(
            engine: str, x: Tensor, plan: Plan, rerun: Rerun | None, tensors: MaybeTensors
        ) -> tuple[Tensor, ...]:
            table = torch.stack(self.coefficients(torch.float64))
            return functional.shu_osher_function(engine).apply(x, table, plan, _ARK, rerun, *tensors)

        return _one_step.run(
            x,
            self.branch,
            call_engine,
            self._reference,
            super().forward,
            kind=self._kind(),
            engine=self.engine,
            owner=self,
        )

    def _kind(self) -> str:
        return functional.shu_osher_kind(_ARK)

    def _reference(self) -> nn.Module:
        learned = {f"learn_{name}": name in self._parameters for name in ("a21", "b10")}
        block = _GivenTable(self.branch, **learned)
        block.a21, block.b10 = self.a21, self.b10
        return block
