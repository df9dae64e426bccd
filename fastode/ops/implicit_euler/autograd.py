"""IE-Skip on the staged engine: the inner loop in closed form and its exact adjoint.

Derivation: README.md beside this file; equations are cited as (1) to (6) from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rerun import Rerun
from ..sweeps import Gradients, MaybeTensors, Plan, channels_last, coefficients, combine, dual, like_reference
from ..sweeps import pull, pull_dual, tracked_statistics, value


@dataclass(frozen=True)
class Descent:
    """The inner gradient descent: K steps of size γ on ‖y − x − (1 − θ) s − θ f(y)‖²."""

    steps: int
    step_size: float
    theta: float
    detach: bool


class IESkipFunction(torch.autograd.Function):
    """y_K and the statistics of each evaluation of each norm; keeps x and recomputes the rest."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan, descent: Descent, rerun: Rerun | None, *tensors: Tensor | None):
        y, statistics = _forward(plan, descent, channels_last(x), tensors)
        ctx.save_for_backward(x, *tensors)
        ctx.plan, ctx.descent, ctx.rerun = plan, descent, rerun
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (like_reference(y, x), *statistics)

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *_):
        x, *tensors = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if y_bar is None:
            return (None,) * (4 + len(tensors))
        if torch.is_grad_enabled() and ctx.rerun is not None:
            x_bar, *bars = ctx.rerun.gradients([x, *tensors], tensors, wanted, 1, [y_bar])
        else:
            grads = Gradients(tensors, wanted[1:]) if any(wanted[1:]) else None
            x_bar = _backward(ctx.plan, ctx.descent, channels_last(x), tensors, channels_last(y_bar), grads, wanted[0])
            bars = [None] * len(tensors) if grads is None else grads.result()
        return (x_bar, None, None, None, *bars)


def _forward(plan: Plan, descent: Descent, x: Tensor, tensors: MaybeTensors) -> tuple[Tensor, list[Tensor]]:
    _, s, records = value(plan, tensors, [x], coefficients(1.0), keep=False)
    statistics = tracked_statistics(plan, records)
    terms, coefs = [x, s], coefficients(1.0, 1.0)
    for step in range(descent.steps):
        y, fy, records = value(plan, tensors, terms, coefs, keep=False)
        statistics += tracked_statistics(plan, records)
        terms = [_descend(plan, descent, tensors, x, s, y, fy, records, step)]
    return terms[0], statistics


def _residual(descent: Descent, scale: float, x: Tensor, s: Tensor, y: Tensor, fy: Tensor, step: int) -> Tensor:
    """scale times e = y − x − (1 − θ) s − θ f(y), (1); at the first step y − x is s."""
    theta = descent.theta
    if step == 0:
        return combine([s, fy], coefficients(scale * theta, -scale * theta))
    terms, values = [y, x, fy], [scale, -scale, -scale * theta]
    if theta != 1:
        terms, values = [*terms, s], [*values, -scale * (1 - theta)]
    return combine(terms, coefficients(*values))


def _descend(plan, descent: Descent, tensors, x, s, y, fy, records, step) -> Tensor:
    """y − γ g with g = 2 (e − θ Jᵀe), (2): the last pass of the pull-back makes the update."""
    e = _residual(descent, 1.0, x, s, y, fy, step)
    gamma, theta = descent.step_size, descent.theta
    return pull(plan, tensors, records, e, [y, e], coefficients(2 * gamma * theta, 1.0, -2 * gamma), None)


def _backward(
    plan: Plan, descent: Descent, x: Tensor, tensors: MaybeTensors, y_bar: Tensor, grads: Gradients | None, need_x: bool
) -> Tensor | None:
    one = coefficients(1.0)
    if descent.detach:  # g is a constant: what is left is the residual block
        _, s, at_x = value(plan, tensors, [x], one)
        return pull(plan, tensors, at_x, y_bar.to(s.dtype), [y_bar], coefficients(1.0, 1.0), grads, need_point=need_x)
    _, s, at_x = value(plan, tensors, [x], one, keep=False)
    gamma, theta, samples = descent.step_size, descent.theta, x.shape[0]
    points = [combine([x, s], coefficients(1.0, 1.0))]
    for step in range(descent.steps - 1):
        y, fy, records = value(plan, tensors, [points[-1]], one, keep=False)
        points.append(_descend(plan, descent, tensors, x, s, y, fy, records, step))

    residual_bar = None  # the sum over the steps of ē
    for step in range(descent.steps - 1, -1, -1):
        y = points.pop()
        stacked, records = dual(plan, tensors, y, y_bar)
        fy, pushed = stacked[:samples], stacked[samples:]
        e_bar = combine([y_bar, pushed], coefficients(-2 * gamma, 2 * gamma * theta))  # (4), with u = −γ J ȳ⁺
        e = _residual(descent, -2 * gamma, x, s, y, fy, step)
        cot = torch.cat([e_bar, e])
        # (5), divided by −θ: ⟨ē, f(y)⟩ − 2γ ⟨e, J(y) ȳ⁺⟩
        y_bar = pull_dual(
            plan, tensors, records, cot, [y_bar, e_bar], coefficients(-theta, 1.0, 1.0), grads, scale=-theta
        )
        residual_bar = e_bar if residual_bar is None else combine([residual_bar, e_bar], coefficients(1.0, 1.0))
    # (6): x̄ and s̄ get ȳ₀, and lose ē and (1 − θ) ē
    s_bar = y_bar if theta == 1 else combine([y_bar, residual_bar], coefficients(1.0, theta - 1))
    return pull(
        plan, tensors, at_x, s_bar.to(s.dtype), [y_bar, residual_bar], coefficients(1.0, 1.0, -1.0), grads,
        need_point=need_x,
    )
