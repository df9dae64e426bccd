"""The exact implicit Euler step and its implicit gradient, over an engine's sweeps through the branch.

Derivation: README.md beside this file, "The limit"; equations are cited as (7) to (9) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....reference.exact import inverted, tell
from ....reference.implicit import find_root
from ...function import gradients
from ...maps import channels_last, coefficients, combine, converted, like_reference
from ...plan import Gradients, MaybeTensor, MaybeTensors, Plan, Record, statistics_of, tracked_statistics
from ...rerun import Rerun
from ...sweeps import ProductSweeps


@dataclass(frozen=True)
class Exact:
    """How y = x + f(y) is solved, as `reference.ExactIE` has it, and the block in words."""

    tol: float
    max_iterations: int
    block: str


def make_exact_function(sweeps: ProductSweeps) -> type[torch.autograd.Function]:
    """The block on an engine with these sweeps, as an autograd Function."""

    class ExactIEFunction(torch.autograd.Function):
        """y and the statistics at y for running averages; keeps x, y and the statistics."""

        @staticmethod
        def forward(ctx: Any, plan: Plan, exact: Exact, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor) -> Any:
            read, start = converted(plan, tensors, x.dtype), channels_last(x)
            _, fx, _ = sweeps.value(plan, read, [start])
            first = combine([start, fx], coefficients(1.0, 1.0))
            found = find_root(
                lambda y: _Point(sweeps, plan, read, channels_last(y)),
                start,
                first,
                is_coupled(plan),
                exact.tol,
                exact.max_iterations,
            )
            tell(exact.block, "solution", found.residuals, exact.tol, found.iterations, found.products)
            assert isinstance(found.point, _Point)
            statistics = statistics_of(found.point.records)
            tracked = tracked_statistics(plan, statistics)
            ctx.save_for_backward(x, *tensors, channels_last(found.y), *statistics)
            ctx.plan, ctx.exact, ctx.rerun, ctx.count = plan, exact, rerun, 1 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*tracked)
            return (like_reference(found.y, x), *tracked)

        @staticmethod
        def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, (y, *statistics) = saved[: ctx.count], saved[ctx.count :]

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), (x, *tensors) = bars, given
                assert bar is not None
                plan, exact, grads = ctx.plan, ctx.exact, Gradients(tensors, wanted[1:]) if any(wanted[1:]) else None
                read, one = converted(plan, tensors, x.dtype), coefficients(1.0)
                records, _ = sweeps.revisit(plan, read, y, statistics)

                def pulled(v: Tensor) -> Tensor:
                    found = sweeps.pull(plan, read, list(records), channels_last(v), [], one, None)
                    assert found is not None
                    return found

                # (9); x enters y = x + f(y) alone, so its cotangent is λ itself.
                coupled, most = is_coupled(plan), exact.max_iterations
                bar_of_plain = inverted(pulled, channels_last(bar), coupled, exact.tol, most, exact.block)
                if grads is None:
                    return [bar_of_plain, *([None] * len(tensors))]
                sweeps.pull(plan, read, records, channels_last(bar_of_plain), [], one, grads, need_point=False)
                return [bar_of_plain, *grads.result()]

            return gradients(ctx, given, [y_bar], pull)

    return ExactIEFunction


class _Point:
    """f at a point by an engine's sweeps."""

    def __init__(self, sweeps: ProductSweeps, plan: Plan, tensors: MaybeTensors, y: Tensor) -> None:
        self._sweeps, self._plan, self._tensors = sweeps, plan, tensors
        self.records: list[Record]
        _, self.value, self.records = sweeps.value(plan, tensors, [y])

    def push(self, v: Tensor) -> Tensor:
        """J v."""
        return self._sweeps.push(self._plan, self._tensors, self.records, channels_last(v))


def is_coupled(plan: Plan) -> bool:
    """Whether a norm takes its statistics over the batch."""
    return any(unit.norm is not None and unit.norm.mode == "batch" for unit in plan.units)
