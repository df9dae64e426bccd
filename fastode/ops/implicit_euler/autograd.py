"""IE-Skip on the staged engine: the inner loop in closed form and its exact adjoint.

Derivation: README.md beside this file; equations are cited as (1) to (6) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rerun import Rerun
from ..sweeps import (
    Gradients,
    MaybeTensors,
    Plan,
    channels_last,
    coefficients,
    combine,
    combine_pair,
    dual,
    like_reference,
    pull,
    pull_dual,
    revisit,
    statistics_of,
    tracked_statistics,
    value,
)


@dataclass(frozen=True)
class Descent:
    """The inner gradient descent: K steps of size γ on ‖y − x − (1 − θ) s − θ f(y)‖²."""

    steps: int
    step_size: float
    theta: float
    detach: bool


class IESkipFunction(torch.autograd.Function):
    """y_K and the statistics for running averages; keeps x and the points y_0 … y_{K−1}, and recomputes the rest."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan, descent: Descent, rerun: Rerun | None, *tensors: Tensor | None):
        y, points, statistics = _forward(plan, descent, channels_last(x), tensors)
        tracked = tracked_statistics(plan, statistics)
        if descent.detach:
            points, statistics = [], statistics[: len(plan.units)]
        ctx.save_for_backward(x, *tensors, *points, *statistics)
        ctx.plan, ctx.descent, ctx.rerun, ctx.count = plan, descent, rerun, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*tracked)
        return (like_reference(y, x), *tracked)

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *_):
        x, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if y_bar is None:
            return (None,) * (4 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(y_bar):
            x_bar, *bars = ctx.rerun.gradients([x, *tensors], tensors, wanted, 1, [y_bar])
        else:
            grads = Gradients(tensors, wanted[1:]) if any(wanted[1:]) else None
            count = 0 if ctx.descent.detach else ctx.descent.steps
            x_bar = _backward(
                ctx.plan,
                ctx.descent,
                channels_last(x),
                tensors,
                list(kept[:count]),  # emptied as the steps go back; torch 2.11 traces what is saved as a tuple
                kept[count:],
                channels_last(y_bar),
                grads,
                wanted[0],
            )
            bars = [None] * len(tensors) if grads is None else grads.result()
        return (x_bar, None, None, None, *bars)


def _forward(
    plan: Plan, descent: Descent, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y_K, the points y_0 … y_{K−1}, and the statistics of f's evaluations at x and at these points."""
    if plan.fused:
        from ..triton import conv_blocks

        return conv_blocks.ie_skip(plan, descent, x, tensors)
    _, s, records = value(plan, tensors, [x], coefficients(1.0))
    statistics = statistics_of(records)
    points: list[Tensor] = []
    terms, coefs = [x, s], coefficients(1.0, 1.0)
    for _ in range(descent.steps):
        y, fy, records = value(plan, tensors, terms, coefs)
        points.append(y)
        statistics += statistics_of(records)
        e = _residual(descent, 1.0, x, points, fy)
        terms = [pull(plan, tensors, records, e, [y, e], update(descent), None)]
    return terms[0], points, statistics


def update(descent: Descent) -> Tensor:
    """(2), made by the last pass of the pull-back: in y − γ g, g = 2 (e − θ Jᵀe), the coefficients of Jᵀe, y and e."""
    return coefficients(2 * descent.step_size * descent.theta, 1.0, -2 * descent.step_size)


def residual_terms(
    descent: Descent, scale: float, x: Tensor, points: Sequence[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """scale times e = y − x − (1 − θ) s − θ f(y), (1), at the last of `points`; s is y_0 − x.

    f(y) comes last: it has a coefficient but is not among the terms.
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


def _backward(
    plan: Plan,
    descent: Descent,
    x: Tensor,
    tensors: MaybeTensors,
    points: list[Tensor],
    statistics: Sequence[Tensor],
    y_bar: Tensor,
    grads: Gradients | None,
    need_x: bool,
) -> Tensor | None:
    units, samples = len(plan.units), x.shape[0]
    gamma, theta = descent.step_size, descent.theta
    addends, skip = [y_bar], coefficients(1.0, 1.0)
    s_bar = y_bar
    residual_bar = None  # the sum over the steps of ē; None stays where the descent is a constant
    for step in range(len(points) - 1, -1, -1):
        met = statistics[(step + 1) * units : (step + 2) * units]
        stacked, records = dual(plan, tensors, points[step], y_bar, met)
        fy, pushed = stacked[:samples], stacked[samples:]
        # (4), with u = −γ J ȳ⁺; and (5) divided by −θ: ⟨ē, f(y)⟩ − 2γ ⟨e, J(y) ȳ⁺⟩
        terms, values = residual_terms(descent, -2 * gamma, x, points)
        terms.append(fy)
        cot = combine_pair([y_bar, pushed], terms, coefficients(-2 * gamma, 2 * gamma * theta, *values))
        e_bar = cot[:samples]
        del stacked, fy, pushed, terms
        points.pop()
        addends, skip = [y_bar, e_bar], coefficients(-theta, 1.0, 1.0)
        y_bar = pull_dual(plan, tensors, records, cot, addends, skip, grads, scale=-theta)
        del cot
        residual_bar = e_bar if residual_bar is None else combine([residual_bar, e_bar], coefficients(1.0, 1.0))
    if residual_bar is not None:  # (6): x̄ and s̄ get ȳ₀, and lose ē and (1 − θ) ē
        s_bar = y_bar if theta == 1 else combine([y_bar, residual_bar], coefficients(1.0, theta - 1))
        addends, skip = [y_bar, residual_bar], coefficients(1.0, 1.0, -1.0)
    records, _ = revisit(plan, tensors, x, statistics[:units])
    return pull(plan, tensors, records, s_bar, addends, skip, grads, need_point=need_x)
