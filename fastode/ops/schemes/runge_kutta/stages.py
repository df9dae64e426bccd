"""Explicit schemes in Shu–Osher form: stages and their adjoint, over an engine's sweeps through the branch.

Derivation: README.md beside this file; equations are cited as (1) to (4) from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...function import gradients
from ...maps import channels_last, combine, converted, dots, like_reference, rows_of
from ...plan import Gradients, MaybeTensor, MaybeTensors, Plan, Record, statistics_of, tracked_statistics
from ...rerun import Rerun
from ...sweeps import ForwardSweeps, Sweeps


@dataclass(frozen=True)
class Scheme:
    """Where a tableau is not zero, by stage: alpha[i - 1] lists the k of u_k, beta[i - 1] those of f(u_k)."""

    alpha: tuple[tuple[int, ...], ...]
    beta: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.alpha)

    def uses(self, k: int) -> bool:
        """Whether f(u_k) is evaluated."""
        return any(k in row for row in self.beta)


# (plan, scheme, table, x, tensors) -> u_s, the points u_0 … u_{s−1}, the statistics of f's evaluations at those of them
# where it is evaluated
Forward = Callable[[Plan, Scheme, Tensor, Tensor, MaybeTensors], tuple[Tensor, list[Tensor], list[Tensor]]]


def make_function(sweeps: Sweeps, run: Forward) -> type[torch.autograd.Function]:
    """The block on an engine with these sweeps, `run` its forward pass, as an autograd Function."""

    class ShuOsherFunction(torch.autograd.Function):
        """u_s and the statistics for running averages; keeps x and the points u_k, and recomputes the rest.

        `table` [2, s, s] holds alpha and beta as a float64 tensor, so that learned coefficients never reach the host.
        """

        @staticmethod
        def forward(
            ctx: Any, plan: Plan, scheme: Scheme, rerun: Rerun | None, x: Tensor, table: Tensor, *tensors: MaybeTensor
        ) -> Any:
            read = converted(plan, tensors, x.dtype)
            y, points, statistics = run(plan, scheme, table, channels_last(x), read)
            tracked = tracked_statistics(plan, statistics)
            ctx.save_for_backward(x, table, *tensors, *points[1:], *statistics)
            ctx.plan, ctx.scheme, ctx.rerun, ctx.count = plan, scheme, rerun, 2 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*tracked)
            return (like_reference(y, x), *tracked)

        @staticmethod
        def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, kept = saved[: ctx.count], saved[ctx.count :]
            last = ctx.scheme.stages - 1

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), (x, table, *tensors) = bars, given
                assert bar is not None
                grads = Gradients(tensors, wanted[2:]) if any(wanted[2:]) else None
                points, statistics = [channels_last(x), *kept[:last]], kept[last:]
                read = converted(ctx.plan, tensors, x.dtype)
                x_bar, table_bar = backward(
                    sweeps, ctx.plan, ctx.scheme, table, points, read, statistics, channels_last(bar), grads,
                    *wanted[:2],
                )  # fmt: skip
                return [x_bar, table_bar, *([None] * len(tensors) if grads is None else grads.result())]

            return gradients(ctx, given, [y_bar], pull)

    return ShuOsherFunction


def forward(
    sweeps: ForwardSweeps, plan: Plan, scheme: Scheme, table: Tensor, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`Forward`, a sweep at a time."""
    points: list[Tensor] = []
    images: list[MaybeTensor] = []
    statistics: list[Tensor] = []
    terms: list[Tensor] = [x]
    coefs: MaybeTensor = None
    row = rows_of(table)
    for k in range(scheme.stages):
        if scheme.uses(k):
            point, image, records = sweeps.value(plan, tensors, terms, coefs)
            statistics += statistics_of(records)
        else:
            point, image = terms[0] if coefs is None else combine(terms, coefs), None
        points.append(point)
        images.append(image)
        # (1): u_{k+1} from what its row of the tableau names
        terms = _named(scheme, k, points, images)
        coefs = row([*((0, k, j) for j in scheme.alpha[k]), *((1, k, j) for j in scheme.beta[k])])
        # Free an image f(u_k) as soon as no later stage needs it.
        images = [image if any(j in row for row in scheme.beta[k + 1 :]) else None for j, image in enumerate(images)]
    assert coefs is not None
    return combine(terms, coefs), points, statistics


def _named(scheme: Scheme, k: int, points: list[Tensor], images: list[Tensor | None]) -> list[Tensor]:
    """The tensors that row k + 1 of the tableau combines."""
    return [*[points[j] for j in scheme.alpha[k]], *present(images, scheme.beta[k])]


def present(tensors: MaybeTensors, places: Sequence[int]) -> list[Tensor]:
    """The tensors at these places, each of which has one."""
    found = []
    for place in places:
        tensor = tensors[place]
        assert tensor is not None
        found.append(tensor)
    return found


def backward(
    sweeps: Sweeps,
    plan: Plan,
    scheme: Scheme,
    table: Tensor,
    points: list[Tensor],
    tensors: MaybeTensors,
    statistics: Sequence[Tensor],
    y_bar: Tensor,
    grads: Gradients | None,
    need_x: bool,
    need_table: bool,
) -> tuple[MaybeTensor, MaybeTensor]:
    """The cotangents of x and of the table, where they are needed; the parameters' gradients go to `grads`."""
    stages, units = scheme.stages, len(plan.units)
    used = [k for k in range(stages) if scheme.uses(k)]
    bars: list[Tensor | None] = [None] * stages + [y_bar]  # ū_0 … ū_s
    images: list[Tensor | None] = [None] * stages
    table_bar = torch.zeros_like(table) if need_table else None
    row = rows_of(table)
    revisited: dict[int, list[Record]] = {}
    for k in used if need_table else ():  # every f(u_k) stands in the coefficients' gradients
        met = statistics[used.index(k) * units :][:units]
        revisited[k], images[k] = sweeps.revisit(plan, tensors, points[k], met, image=True)
    for k in range(stages - 1, -1, -1):
        if table_bar is not None:
            _coefficient_gradients(scheme, _named(scheme, k, points, images), bars[k + 1], k, table_bar)
        skips = [i for i in range(k, stages) if k in scheme.alpha[i] and bars[i + 1] is not None]
        through = [i for i in range(k, stages) if k in scheme.beta[i] and bars[i + 1] is not None]
        addends = present(bars, [i + 1 for i in skips])
        along = [(0, i, k) for i in skips]
        if not through:
            bars[k] = combine(addends, row(along)) if addends else None
            continue
        records = revisited.pop(k, None)
        if records is None:
            records, _ = sweeps.revisit(plan, tensors, points[k], statistics[used.index(k) * units :][:units])
        # (3): the cotangent of f(u_k)
        cot = combine(present(bars, [i + 1 for i in through]), row([(1, i, k) for i in through]))
        needed = need_x or need_table or k > 0
        skip = row([None, *along])
        bars[k] = sweeps.pull(plan, tensors, records, cot, addends, skip, grads, need_point=needed)
    return bars[0], table_bar


def _coefficient_gradients(
    scheme: Scheme, terms: list[Tensor], u_bar: Tensor | None, k: int, table_bar: Tensor
) -> None:
    """(4): row k + 1 of the tableau's gradient, inner products of ū_{k+1} with what the row names."""
    if u_bar is None:
        return
    products = dots(u_bar, terms).to(table_bar.dtype)
    count = len(scheme.alpha[k])
    for place, j in enumerate(scheme.alpha[k]):
        table_bar[0, k, j] = products[place]
    for place, j in enumerate(scheme.beta[k]):
        table_bar[1, k, j] = products[count + place]
