"""Explicit schemes in Shu–Osher form on the staged engine: stages and their adjoint.

Derivation: README.md beside this file; equations are cited as (1) to (4) from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rerun import Rerun
from ..sweeps import Gradients, MaybeTensors, Plan, Record, channels_last, coefficients, combine, like_reference, pull
from ..sweeps import tracked_statistics, value


@dataclass(frozen=True)
class Scheme:
    """Which coefficients of a tableau are not zero, by stage: alpha[i - 1] lists the k of u_k, beta[i - 1] of F(u_k)."""

    alpha: tuple[tuple[int, ...], ...]
    beta: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.alpha)

    def uses(self, k: int) -> bool:
        """Whether F(u_k) is evaluated."""
        return any(k in row for row in self.beta)


class ShuOsherFunction(torch.autograd.Function):
    """u_s and the statistics of each evaluation of each norm; keeps x and recomputes the rest.

    `table` [2, s, s] holds alpha and beta as a float64 tensor, so that learned coefficients never reach the host.
    """

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, plan: Plan, scheme: Scheme, rerun: Rerun | None, *tensors):
        y, statistics, _ = _forward(plan, scheme, table, channels_last(x), tensors)
        ctx.save_for_backward(x, table, *tensors)
        ctx.plan, ctx.scheme, ctx.rerun = plan, scheme, rerun
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (like_reference(y, x), *statistics)

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *_):
        x, table, *tensors = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        if y_bar is None:
            return (None,) * (5 + len(tensors))
        if torch.is_grad_enabled() and ctx.rerun is not None:
            if wanted[1]:
                x_bar, table_bar, *bars = ctx.rerun.gradients([x, table, *tensors], tensors, wanted, 2, [y_bar])
            else:
                table_bar = None
                without = (wanted[0], *wanted[2:])
                x_bar, *bars = ctx.rerun.gradients([x, *tensors], tensors, without, 1, [y_bar])
        else:
            grads = Gradients(tensors, wanted[2:]) if any(wanted[2:]) else None
            x_bar, table_bar = _backward(
                ctx.plan, ctx.scheme, table, channels_last(x), tensors, channels_last(y_bar), grads, wanted[0], wanted[1]
            )
            bars = [None] * len(tensors) if grads is None else grads.result()
        return (x_bar, table_bar, None, None, None, *bars)


@dataclass
class _Stages:
    """What the forward stages leave behind: points u_k, values F(u_k), records."""

    points: list[Tensor]
    values: list[Tensor | None]
    records: list[list[Record]]


def _forward(
    plan: Plan, scheme: Scheme, table: Tensor, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], _Stages]:
    statistics: list[Tensor] = []
    kept = _Stages([], [], [])
    terms, coefs = [x], coefficients(1.0)
    for k in range(scheme.stages):
        if scheme.uses(k):
            point, image, records = value(plan, tensors, terms, coefs, keep=False)
            statistics += tracked_statistics(plan, records)
        else:
            point, image, records = terms[0] if len(terms) == 1 else combine(terms, coefs), None, []
        kept.points.append(point)
        kept.values.append(image)
        kept.records.append(records)
        # (1): u_{k+1} from what its row of the tableau names
        alpha, beta = scheme.alpha[k], scheme.beta[k]
        terms = [*(kept.points[j] for j in alpha), *(kept.values[j] for j in beta)]
        coefs = torch.cat([*(table[0, k, j : j + 1] for j in alpha), *(table[1, k, j : j + 1] for j in beta)])
    return combine(terms, coefs), statistics, kept


def _backward(plan, scheme, table, x, tensors, y_bar, grads, need_x, need_table) -> tuple[Tensor | None, Tensor | None]:
    _, _, kept = _forward(plan, scheme, table, x, tensors)
    stages = scheme.stages
    bars: list[Tensor | None] = [None] * stages + [y_bar]  # ū_0 … ū_s
    table_bar = torch.zeros_like(table) if need_table else None
    for k in range(stages - 1, -1, -1):
        if need_table:
            _coefficient_gradients(scheme, kept, bars[k + 1], k, table_bar)
        skips = [i for i in range(k, stages) if k in scheme.alpha[i] and bars[i + 1] is not None]
        images = [i for i in range(k, stages) if k in scheme.beta[i] and bars[i + 1] is not None]
        addends = [bars[i + 1] for i in skips]
        along = [table[0, i, k : k + 1] for i in skips]
        if not images:
            bars[k] = combine(addends, torch.cat(along)) if addends else None
            continue
        # (3): the cotangent of F(u_k)
        cot = combine([bars[i + 1] for i in images], torch.cat([table[1, i, k : k + 1] for i in images]))
        bars[k] = pull(
            plan, tensors, kept.records[k], cot.to(kept.values[k].dtype), addends,
            torch.cat([coefficients(1.0), *along]), grads, need_point=need_x or k > 0 or need_table,
        )
        kept.records[k] = []
    return bars[0], table_bar


def _coefficient_gradients(scheme: Scheme, kept: _Stages, u_bar: Tensor, k: int, table_bar: Tensor) -> None:
    """(4): row k + 1 of the tableau's gradient, inner products of ū_{k+1} with what the row names."""
    terms = [*(kept.points[j] for j in scheme.alpha[k]), *(kept.values[j] for j in scheme.beta[k])]
    products = torch.ops.fastode.dots(u_bar, [term.to(u_bar.dtype) for term in terms]).to(table_bar.dtype)
    count = len(scheme.alpha[k])
    for place, j in enumerate(scheme.alpha[k]):
        table_bar[0, k, j] = products[place]
    for place, j in enumerate(scheme.beta[k]):
        table_bar[1, k, j] = products[count + place]
