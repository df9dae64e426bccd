"""IE-Skip in closed form: the inner loop and its exact adjoint, over an engine's sweeps through the branch.

Derivation: README.md beside this file; equations are cited as (1) to (6) from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...function import gradients
from ...maps import channels_last, coefficients, combine, combine_pair, converted, like_reference
from ...plan import Gradients, MaybeTensor, MaybeTensors, Plan, statistics_of, tracked_statistics
from ...rerun import Rerun
from ...sweeps import ForwardSweeps, Sweeps


@dataclass(frozen=True)
class Descent:
    """The inner gradient descent: K steps of size η on ‖y − x − (1 − θ) f(x) − θ f(y)‖²."""

    steps: int
    step_size: float
    theta: float
    detach: bool


# (plan, descent, x, tensors) -> y_K, the points y_0 … y_{K−1}, the statistics of f's evaluations at x and at the points
Forward = Callable[[Plan, Descent, Tensor, MaybeTensors], tuple[Tensor, list[Tensor], list[Tensor]]]


def make_function(sweeps: Sweeps, run: Forward) -> type[torch.autograd.Function]:
    """The block on an engine with these sweeps, `run` its forward pass, as an autograd Function."""

    class IESkipFunction(torch.autograd.Function):
        """y_K and the statistics for running averages; keeps x and the points y_0 … y_{K−1}, recomputes the rest."""

        @staticmethod
        def forward(
            ctx: Any, plan: Plan, descent: Descent, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor
        ) -> Any:
            read = converted(plan, tensors, x.dtype)
            y, points, statistics = run(plan, descent, channels_last(x), read)
            tracked = tracked_statistics(plan, statistics)
            if descent.detach:
                points, statistics = [], statistics[: len(plan.units)]
            ctx.save_for_backward(x, *tensors, *points, *statistics)
            ctx.plan, ctx.descent, ctx.rerun, ctx.count = plan, descent, rerun, 1 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*tracked)
            return (like_reference(y, x), *tracked)

        @staticmethod
        def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, kept = saved[: ctx.count], saved[ctx.count :]
            steps = 0 if ctx.descent.detach else ctx.descent.steps

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), (x, *tensors) = bars, given
                assert bar is not None
                grads = Gradients(tensors, wanted[1:]) if any(wanted[1:]) else None
                points, statistics = list(kept[:steps]), kept[steps:]
                ends = channels_last(x), channels_last(bar)
                read = converted(ctx.plan, tensors, x.dtype)
                x_bar = backward(sweeps, ctx.plan, ctx.descent, *ends, read, points, statistics, grads, wanted[0])
                return [x_bar, *([None] * len(tensors) if grads is None else grads.result())]

            return gradients(ctx, given, [y_bar], pull)

    return IESkipFunction


def forward(
    sweeps: ForwardSweeps, plan: Plan, descent: Descent, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`Forward`, a sweep at a time."""
    _, fx, records = sweeps.value(plan, tensors, [x])
    statistics = statistics_of(records)
    points: list[Tensor] = []
    terms: list[Tensor] = [x, fx]
    coefs: MaybeTensor = coefficients(1.0, 1.0)
    for _ in range(descent.steps):
        y, fy, records = sweeps.value(plan, tensors, terms, coefs)
        points.append(y)
        statistics += statistics_of(records)
        e = _residual(descent, 1.0, x, points, fy)
        pulled = sweeps.pull(plan, tensors, records, e, [y, e], update(descent), None)
        assert pulled is not None
        terms, coefs = [pulled], None
    return terms[0], points, statistics


def update(descent: Descent) -> Tensor:
    """The coefficients of Jᵀe, y and e in (2), y − η g with g = 2 (e − θ Jᵀe), added up by the pull-back."""
    return coefficients(2 * descent.step_size * descent.theta, 1.0, -2 * descent.step_size)


def residual_terms(
    descent: Descent, scale: float, x: Tensor, points: Sequence[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The terms and coefficients of (1), scale times e = y − x − (1 − θ) f(x) − θ f(y), at the last of `points`.

    f(x) is y_0 − x. f(y) has the last coefficient but is not among the terms: the caller makes it.
    """
    theta = descent.theta
    if len(points) == 1:
        return [points[0], x], [scale * theta, -scale * theta, -scale * theta]
    if theta == 1:
        return [points[-1], x], [scale, -scale, -scale]
    return [points[-1], points[0], x], [scale, -scale * (1 - theta), -scale * theta, -scale * theta]


def _residual(descent: Descent, scale: float, x: Tensor, points: Sequence[Tensor], fy: Tensor) -> Tensor:
    terms, values = residual_terms(descent, scale, x, points)
    return combine([*terms, fy], coefficients(*values))


def backward(
    sweeps: Sweeps,
    plan: Plan,
    descent: Descent,
    x: Tensor,
    y_bar: Tensor,
    tensors: MaybeTensors,
    points: list[Tensor],
    statistics: Sequence[Tensor],
    grads: Gradients | None,
    need_x: bool,
) -> MaybeTensor:
    """The cotangent of x, where it is needed; the parameters' gradients go to `grads`."""
    units, samples = len(plan.units), x.shape[0]
    eta, theta = descent.step_size, descent.theta
    addends, skip = [y_bar], coefficients(1.0, 1.0)
    fx_bar = y_bar
    residual_bar: MaybeTensor = None  # the sum over the steps of ē; stays None where the descent is detached
    for step in range(len(points) - 1, -1, -1):
        met = statistics[(step + 1) * units : (step + 2) * units]
        stacked, records = sweeps.dual(plan, tensors, points[step], y_bar, met)
        fy, pushed = stacked[:samples], stacked[samples:]
        # ē of (4), stacked with −2η e: the cotangents of value and tangent in (5) divided by −θ
        terms, values = residual_terms(descent, -2 * eta, x, points)
        terms.append(fy)
        cot = combine_pair([y_bar, pushed], terms, coefficients(-2 * eta, 2 * eta * theta, *values))
        e_bar = cot[:samples]
        del stacked, fy, pushed, terms
        points.pop()
        addends, skip = [y_bar, e_bar], coefficients(-theta, 1.0, 1.0)
        y_bar = sweeps.pull_dual(plan, tensors, records, cot, addends, skip, grads, scale=-theta)
        del cot
        residual_bar = e_bar if residual_bar is None else combine([residual_bar, e_bar], coefficients(1.0, 1.0))
    if residual_bar is not None:  # (6): f̄ = ȳ₀ − (1 − θ) Σ ē; the last pass adds x̄'s ȳ₀ − Σ ē
        fx_bar = y_bar if theta == 1 else combine([y_bar, residual_bar], coefficients(1.0, theta - 1))
        addends, skip = [y_bar, residual_bar], coefficients(1.0, 1.0, -1.0)
    records, _ = sweeps.revisit(plan, tensors, x, statistics[:units])
    return sweeps.pull(plan, tensors, records, fx_bar, addends, skip, grads, need_point=need_x)
