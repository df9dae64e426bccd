"""The solution of a single map's equation over an engine's field, as an autograd Function.

Derivation: README.md beside this file, and that of skew_pair, whose (5) to (12) are cited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....solver import Solver
from ....steps import Watch
from ....tableau import Embedded
from ...function import gradients
from ...maps import coefficients, combine, dots, weighing
from ...plan import MaybeTensor, Plan
from ...rerun import Rerun
from ..by_error import (
    Attempt,
    Steps,
    decides,
    interpolating,
    interpolating_rates,
    rounded,
    solve_by_error,
    through_first,
)
from . import exact
from .field import Field, Made, MakeField, Pulled, Stages
from .start import WayBack, choose, pull_start
from .taken import Taken, Tried, packed, unpacked


@dataclass(frozen=True)
class Course:
    """How a solve goes, and who is told.

    Attributes:
        solver: how.
        watch: is told every attempt of steps by error; None for equal steps.
        steps: is told the steps by error.
    """

    solver: Solver
    watch: Watch | None
    steps: Steps


def make_solution_function(make_field: MakeField) -> type[torch.autograd.Function]:
    """The solution on an engine with such a field, as an autograd Function."""

    class SolutionFunction(torch.autograd.Function):
        """u(t₁) from x, and the statistics of every evaluation of each tracked norm.

        Of steps by error its derivative goes through the sizes that the solver's `gradient` names.
        """

        @staticmethod
        def forward(ctx: Any, plan: Plan, course: Course, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor) -> Any:
            keep = any(ctx.needs_input_grad)
            own = make_field(plan, tensors, x, [False] * len(tensors))
            solve = _solve_by_error if course.solver.is_adaptive else _solve_equally
            end, taken = solve(own, course, own.enter(x), x.numel(), keep)
            if keep:
                ctx.packed, flat = packed(taken)
                ctx.save_for_backward(x, *tensors, *flat)
            ctx.plan, ctx.course, ctx.rerun, ctx.count = plan, course, rerun, 1 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*taken.statistics)
            return (own.leave(end, x), *taken.statistics)

        @staticmethod
        def backward(ctx: Any, end_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, rest = saved[: ctx.count], saved[ctx.count :]

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), (x, *tensors) = bars, given
                assert bar is not None
                own = make_field(ctx.plan, tensors, x, wanted[1:])
                taken = unpacked(ctx.packed, rest)
                back = _back_by_error if ctx.course.solver.is_adaptive else _back_equally
                x_bar = back(own, ctx.course, taken, own.enter(bar), own.enter(x), x.numel())
                return [own.leave(x_bar, x) if wanted[0] else None, *own.gradients()]

            return gradients(ctx, given, [end_bar], pull)

    return SolutionFunction


# ---- equal steps


def _solve_equally(own: Field, course: Course, state: Tensor, _: int, keep: bool) -> tuple[Tensor, Taken]:
    solver, taken = course.solver, Taken()
    scheme, size = solver.tableau, solver.t1 / solver.steps
    rows, weights = _scaled(scheme.a, size), [size * b for b in scheme.b]
    for i in range(solver.steps):
        stages = Stages(rows, [(i + c) * size for c in scheme.nodes], given=False)
        made = own.stages(stages, state, None, keep)
        state = _moved(state, made.slopes, weights)
        taken.stages.append(stages)
        taken.kept.append(made.kept)
        taken.statistics += made.statistics
    return state, taken


def _back_equally(own: Field, course: Course, taken: Taken, bar: Tensor, _: Tensor, __: int) -> Tensor:
    solver = course.solver
    weights = [solver.t1 / solver.steps * b for b in solver.tableau.b]
    for stages, kept in zip(reversed(taken.stages), reversed(taken.kept), strict=True):
        found = own.pull(stages, kept, weights, bar, None).state
        assert found is not None
        bar = found
    return bar


# ---- steps by error


def _solve_by_error(own: Field, course: Course, state: Tensor, entries: int, keep: bool) -> tuple[Tensor, Taken]:
    solver, watch, taken = course.solver, course.watch, Taken()
    tableau = solver.tableau
    assert watch is not None and isinstance(tableau, Embedded)
    watch.evaluations += 1 if solver.first_step is not None else 2
    taken.start = start = choose(own, state, entries, solver, keep)
    taken.statistics += start.statistics
    last, exactly = start.slopes[0], keep and solver.gradient == "exact"

    def attempt(state: tuple[Tensor], step: float, begin: float, end: float) -> Attempt[Any, Any]:
        stages = Stages(_scaled(tableau.a, step), _times(tableau, state[0].dtype, begin, step, end), given=True)
        watch.evaluations += len(stages.evaluated)
        made = own.stages(stages, state[0], last, keep)
        taken.statistics.extend(made.statistics)
        at_end = made.point
        if not tableau.ends_in_solution:
            at_end = _moved(state[0], made.slopes, [step * b for b in tableau.b])
        terms, weights = weighing(made.slopes, [step * w for w in tableau.b_error])
        square, nothing = own.scaled_squares(terms, weights, state[0], at_end, solver).tolist()
        ratio = math.sqrt(square / entries)
        if exactly:
            left = ratio <= 1 or decides(ratio, tableau.order)
            taken.tried.append(Tried(step, ratio, left))
            if left:
                leave(stages, made)
                taken.ends.append([state[0], at_end])
        return Attempt((at_end,), [ratio], (stages, made), nothing == 0)

    def leave(stages: Stages, made: Made) -> None:
        taken.stages.append(stages)
        taken.kept.append(made.kept)
        taken.slopes.append(made.slopes)

    def accept(found: tuple[Stages, Made]) -> None:
        nonlocal last
        stages, made = found
        last = made.slopes[-1]
        if exactly:
            return
        if len(taken.slopes) > 1:
            taken.slopes.pop()
        leave(stages, made)

    if not start.is_finite:
        watch.attempt(0.0, start.size, (state,))
        watch.fail_at_step()
    (begin,), step = solve_by_error(solver, watch, course.steps, (state,), start.size, attempt, accept)
    weights = [step * w for w in interpolating(tableau, course.steps.at)]
    result = _moved(begin, taken.slopes[-1], weights)
    if not (exactly or (keep and through_first(solver, course.steps))):
        taken.slopes = []
    return result, taken


def _back_by_error(own: Field, course: Course, taken: Taken, end_bar: Tensor, state: Tensor, entries: int) -> Tensor:
    """(5) with (7), and (8) and (9) where the derivative goes through the first step's size."""
    solver, steps, start = course.solver, course.steps, taken.start
    if solver.gradient == "exact":
        return exact.back(own, solver, steps.at, taken, end_bar, state, entries)
    tableau = solver.tableau
    assert start is not None and isinstance(tableau, Embedded)
    through, count = through_first(solver, steps), len(steps.sizes)
    size_bar = torch.zeros((), dtype=torch.float64, device=end_bar.device)
    bar, carried = end_bar, None
    for index in range(count - 1, -1, -1):
        step, is_last = steps.sizes[index], index == count - 1
        weights = [step * w for w in (interpolating(tableau, steps.at) if is_last else tableau.b)]
        asked = taken.slopes[0] if through and index == 0 else ()
        pulled = own.pull(taken.stages[index], taken.kept[index], weights, bar, carried, asked)
        if through:
            size_bar = size_bar + _of_size(tableau, pulled, step, index == 0)
            if is_last:
                moved = dots(end_bar, taken.slopes[-1]).double()
                rates = torch.tensor(interpolating_rates(tableau, steps.at), dtype=torch.float64)
                at_bar = step * (moved * rates.to(moved.device)).sum()
                # t₁ lies at (t₁ − t)/h of the last step, whose start t moves with the first step's size.
                size_bar = size_bar - at_bar * (steps.at / step if index == 0 else 1 / step)
        assert pulled.state is not None and pulled.first is not None
        bar, carried = pulled.state, pulled.first
        taken.kept[index] = []
    assert carried is not None
    if not through:
        return pull_start(own, start, bar, carried)
    return WayBack(own, state, entries, solver, start).run(bar, carried, float(size_bar))


def _of_size(tableau: Embedded, pulled: Pulled, step: float, is_first: bool) -> Tensor:
    """(8) but for the interpolant's part: what a step adds to the cotangent of the first step's size."""
    # The first step's times are c h, and later ones move with where their step starts.
    nodes = tableau.c[1:] if is_first else [1.0] * (tableau.stages - 1)
    total = torch.zeros((), dtype=torch.float64)
    for c, time_bar in zip(nodes, pulled.times, strict=True):
        total = total.to(time_bar.device) + c * time_bar
    if is_first:
        assert pulled.product is not None
        total = total.to(pulled.product.device) + pulled.product / step
    return total


def _times(tableau: Embedded, dtype: torch.dtype, begin: float, step: float, end: float) -> list[float]:
    """The times of the stages in the state's dtype; that of a step's end is just before it, where a field may jump."""
    start, last = torch.tensor([begin, end], dtype=torch.float64).to(dtype)
    before = float(torch.nextafter(last, last - 1))
    return [before if c == 1 else rounded(float(start) + c * step, dtype) for c in tableau.c]


def _scaled(rows: Sequence[Sequence[float]], size: float) -> list[list[float]]:
    return [[size * value for value in row] for row in rows]


def _moved(state: Tensor, slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    terms, used = weighing(slopes, weights)
    return combine([state, *terms], coefficients(1.0, *used))
