"""The fused twins of the one-step blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from .. import checks, reference
from ..branch.read import read
from ..dispatch.choice import MakeReference
from ..dispatch.engines import NAMES
from ..dispatch.one_step import (
    Step,
    descent_step,
    describe_call,
    exact_step,
    learned_step,
    run,
    tableau_step,
)
from ..dispatch.registry import register
from ..ops.engine import Call
from .base import Fused, Opaque

__all__ = ["SSP2", "SSP3", "Ark", "ExactIE", "IESkip", "Midpoint", "PolyBlock", "ShuOsher"]


class _OneStep(Fused):
    """A block of one step around a branch; `_step` gives it without the branch, `_reference` makes it plain."""

    branch: nn.Module
    _step: Callable[[], Step]
    _reference: Callable[[], MakeReference]

    def run_for(self, owner: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        make, checked = self._reference(), owner is not self
        return run(x, self.branch, self._step(), make, plain, engine=self.engine, owner=owner, checked=checked)

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return describe_call(self._step(), self.branch, inputs)


@register(reference.IESkip)
class IESkip(_OneStep, reference.IESkip):
    __doc__ = reference.IESkip.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return self.run_for(self, super().forward, x)

    def _step(self) -> Step:
        return descent_step(self.steps, self.step_size, self.theta, self.detach)

    def _reference(self) -> MakeReference:
        return partial(reference.IESkip, self.branch, self.steps, self.step_size, self.theta, self.detach)


@register(reference.ExactIE)
class ExactIE(Opaque, _OneStep, reference.ExactIE):
    __doc__ = reference.ExactIE.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if self._takes_operators() and isinstance(x, Tensor) and x.dim() == 4:
            reading = read(self.branch)
            if reading.units is not None and x.shape[0]:
                self._read_settings()
                moves = any(norm is not None for norm in reading.norms)
                return self._as_operator(x, x.shape, moves)
        return super().forward(x)

    def _read_settings(self) -> None:
        """Read all that the block depends on beside its branch, so that a tracer sees it change."""
        checks.step_size(self.tol, "tol")
        checks.steps(self.max_iterations, "max_iterations")
        checks.engine(self.engine, NAMES)

    def _solve(self, x: Tensor) -> Tensor:
        # Called by the reference's forward, outside of what a compiler traces.
        return self.run_for(self, super()._solve, x)

    def _step(self) -> Step:
        return exact_step(self.tol, self.max_iterations, self.in_words())

    def _reference(self) -> MakeReference:
        return partial(reference.ExactIE, self.branch, self.tol, self.max_iterations)


@register(reference.ShuOsher)
class ShuOsher(_OneStep, reference.ShuOsher):
    __doc__ = reference.ShuOsher.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return self.run_for(self, super().forward, x)

    def _step(self) -> Step:
        return tableau_step(self.tableau)

    def _reference(self) -> MakeReference:
        return partial(reference.ShuOsher, self.branch, self.tableau)


@register(reference.SSP2)
class SSP2(ShuOsher, reference.SSP2):
    __doc__ = reference.SSP2.__doc__


@register(reference.SSP3)
class SSP3(ShuOsher, reference.SSP3):
    __doc__ = reference.SSP3.__doc__


@register(reference.Midpoint)
class Midpoint(ShuOsher, reference.Midpoint):
    __doc__ = reference.Midpoint.__doc__


@register(reference.PolyBlock)
class PolyBlock(ShuOsher, reference.PolyBlock):
    __doc__ = reference.PolyBlock.__doc__


class _GivenTable(reference.Ark):
    """Ark with its coefficients as an input, for gradients with respect to them."""

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        self.table = table
        return super().forward(x)

    def coefficients(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return super().coefficients(dtype) if self.table is None else (self.table[0], self.table[1])


_ARK = learned_step(alpha=((0,), (0, 1)), beta=((0,), (0, 1)))


@register(reference.Ark)
class Ark(_OneStep, reference.Ark):
    __doc__ = reference.Ark.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return self.run_for(self, super().forward, x)

    def run_for(self, owner: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        make, checked = self._reference(), owner is not self
        return run(
            x,
            self.branch,
            self._step(),
            make,
            plain,
            table=self._table,
            engine=self.engine,
            owner=owner,
            checked=checked,
        )

    def _step(self) -> Step:
        return _ARK

    def _table(self) -> Tensor:
        return torch.stack(self.coefficients(torch.float64))

    def _reference(self) -> MakeReference:
        learned = tuple(name for name in ("a21", "b10") if name in self._parameters)
        return partial(_around, self.branch, self.a21, self.b10, learned)


def _around(branch: nn.Module, a21: Tensor, b10: Tensor, learned: Collection[str]) -> nn.Module:
    """Ark on a branch. It knows no block that was called: that would hold on to its own results, by a graph."""
    block = _GivenTable(branch, **{f"learn_{name}": name in learned for name in ("a21", "b10")})
    block.a21, block.b10 = a21, b10
    return block
