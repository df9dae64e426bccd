"""The skew pair's solution with steps by error, over an engine's pair sweeps.

Derivation: README.md beside this file, "Steps by error"; equations are cited as (6) to (8) from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....solver import Solver
from ....steps import Watch
from ....tableau import Embedded
from ...function import gradients
from ...maps import accumulator, cast, channels_last, coefficients, combine, dots
from ...plan import Gradients, MaybeTensor, MaybeTensors
from ...rerun import Rerun
from ..by_error import Attempt, Steps, interpolating, interpolating_rates, solve_by_error
from .march import advanced, converted, flat, scaled_bars, terms_of, tracked, unflat
from .pair import Kept, Pair, PairSweeps

_INPUTS = 5  # y, z, their slopes and the first step's size

State = tuple[Tensor, Tensor]
Halves = tuple[MaybeTensor, MaybeTensor]
_Made = tuple[list[State], list[Kept]]  # the slopes of a step's stages, and the evaluations


def make_adaptive_function(sweeps: PairSweeps) -> type[torch.autograd.Function]:
    """The pair's solution with steps by error on an engine with these sweeps, as an autograd Function."""

    class AdaptiveFunction(torch.autograd.Function):
        """y(t₁) from (y, z) at time 0, its slopes there and the first step's size, and the tracked norms' statistics.

        Its derivative goes through the first step's size, and takes every later one as a constant.
        """

        @staticmethod
        def forward(
            ctx: Any,
            pair: Pair,
            solver: Solver,
            watch: Watch,
            steps: Steps,
            rerun: Rerun,
            *given: MaybeTensor,
        ) -> Any:
            y, z, dy, dz, h, *tensors = given
            assert y is not None and z is not None and dy is not None and dz is not None and h is not None
            solve = _Solve(sweeps, pair, solver, watch, steps, converted(pair, tensors, y))
            end = solve.run((channels_last(y), channels_last(z)), (dy, dz), float(h))
            # The gradient of a step's size needs its slopes, which nothing else does.
            wanted = solve.slopes if h.requires_grad and steps.first_stayed else []
            slopes = [k for row in wanted for pair_of_slopes in row for k in pair_of_slopes]
            ctx.save_for_backward(*given, *flat([kept for row in solve.kept for kept in row]), *slopes)
            ctx.pair, ctx.solver, ctx.steps, ctx.rerun = pair, solver, steps, rerun
            ctx.count, ctx.slopes = len(given), len(slopes)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*solve.statistics)
            return (end, *solve.statistics)

        @staticmethod
        def backward(ctx: Any, end_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, rest = saved[: ctx.count], saved[ctx.count :]
            kept = unflat(rest[: len(rest) - ctx.slopes])
            slopes = rest[len(rest) - ctx.slopes :]

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), tensors = bars, given[_INPUTS:]
                assert bar is not None
                sums = Gradients(tensors, wanted[_INPUTS:])
                read = converted(ctx.pair, tensors, given[0])
                way = _WayBack(sweeps, ctx.pair, ctx.solver, ctx.steps, read, sums)
                ends = way.run(channels_last(bar), list(kept), slopes if wanted[_INPUTS - 1] else ())
                return [*ends, *sums.result()]

            return gradients(ctx, given, [end_bar], pull)

    return AdaptiveFunction


class _Solve:
    """The forward: attempts until t₁ is passed, one number read back for each."""

    def __init__(
        self, sweeps: PairSweeps, pair: Pair, solver: Solver, watch: Watch, steps: Steps, tensors: MaybeTensors
    ) -> None:
        assert isinstance(solver.tableau, Embedded)
        self.sweeps, self.pair, self.solver, self.watch, self.steps = sweeps, pair, solver, watch, steps
        self.tableau, self.tensors = solver.tableau, tensors
        self.kept: list[list[Kept]] = []  # of each accepted step's stages but the first
        self.slopes: list[list[State]] = []  # of each accepted step's stages; none but the first's and the last's stay
        self.statistics: list[Tensor] = []

    def run(self, state: State, first: State, size: float) -> Tensor:
        """y(t₁)."""
        first = _like(first, state)

        def attempt(state: State, step: float, start: float, end: float) -> Attempt[State, _Made]:
            at_end, slopes, kept = self._attempt(state, self.slopes[-1][-1] if self.slopes else first, step)
            return Attempt(at_end, self._norms(state, at_end, slopes, step), (slopes, kept))

        state, step = solve_by_error(self.solver, self.watch, self.steps, state, size, attempt, self._accept)
        weights = interpolating(self.tableau, self.steps.at)
        last = advanced(state[0], [k[0] for k in self.slopes[-1]], weights, step)
        assert last is not None
        return last

    def _attempt(self, state: State, first: State, step: float) -> tuple[State, list[State], list[Kept]]:
        slopes, evaluations = [first], []
        for row in self.tableau.a[1:]:
            (y_terms, y_coefs), (z_terms, z_coefs) = (
                terms_of(state[half], [k[half] for k in slopes], row, step) for half in (0, 1)
            )
            self.watch.evaluations += 1
            dy, dz, kept = self.sweeps.evaluate(self.pair, self.tensors, y_terms, z_terms, y_coefs, z_coefs)
            assert dy is not None and dz is not None
            slopes.append(_like((dy, dz), state))
            evaluations.append(kept)
            self.statistics += tracked(self.pair, kept)
        end_y, end_z = kept.y, kept.z
        if not self.tableau.ends_in_solution:
            end_y, end_z = (advanced(state[half], [k[half] for k in slopes], self.tableau.b, step) for half in (0, 1))
        assert end_y is not None and end_z is not None
        return (end_y, end_z), slopes, evaluations

    def _norms(self, state: State, end: State, slopes: Sequence[State], step: float) -> list[float]:
        """The root mean square of each half's error in units of its tolerance, read back at once."""
        pairs = [(i, step * weight) for i, weight in enumerate(self.tableau.b_error) if weight]
        coefs = coefficients(*(weight for _, weight in pairs))
        norms = []
        for half in (0, 1):
            error = combine([slopes[i][half] for i, _ in pairs], coefs)
            tolerance = torch.maximum(state[half].abs(), end[half].abs()).mul_(self.solver.rtol).add_(self.solver.atol)
            scaled = error.div_(tolerance)
            norms.append(torch.linalg.vector_norm(scaled, dtype=accumulator(scaled.dtype)) / math.sqrt(scaled.numel()))
        both = torch.stack(norms)
        if not self.slopes:
            # Where an infinite state has finite slopes, nothing else tells of it: their error beside it is zero.
            both = both + 0 * torch.linalg.vector_norm(state[1], math.inf)
        found: list[float] = both.tolist()
        return found

    def _accept(self, made: _Made) -> None:
        slopes, kept = made
        if len(self.slopes) > 1:
            self.slopes.pop()
        self.slopes.append(slopes)
        self.kept.append(kept)


class _WayBack:
    """The backward through the steps that were accepted."""

    def __init__(
        self,
        sweeps: PairSweeps,
        pair: Pair,
        solver: Solver,
        steps: Steps,
        tensors: MaybeTensors,
        sums: Gradients,
    ) -> None:
        assert isinstance(solver.tableau, Embedded)
        self.sweeps, self.pair, self.steps, self.tensors, self.sums = sweeps, pair, steps, tensors, sums
        self.tableau, self.t1 = solver.tableau, solver.t1

    def run(self, end_bar: Tensor, kept: list[Kept], slopes: Sequence[Tensor]) -> list[MaybeTensor]:
        """The cotangents of y, z, their first slopes and, where slopes are given, the first step's size."""
        stages, count = self.tableau.stages, len(self.steps.sizes)
        bars: Halves = (end_bar, None)  # of the state at the end of a step
        carried: Halves = (None, None)  # of the last slope, as the next step's first
        size_bar: MaybeTensor = None
        for index in range(count - 1, -1, -1):
            step, is_last = self.steps.sizes[index], index == count - 1
            weights = interpolating(self.tableau, self.steps.at) if is_last else self.tableau.b
            points: list[Halves] = [(None, None)] * stages
            for i in range(stages - 1, 0, -1):
                sums = self._sums(i, step, weights, bars, points, carried)
                (bar_y, bar_z), common = scaled_bars(sums, point := kept.pop())
                if bar_y is not None or bar_z is not None:
                    points[i] = self.sweeps.pull_back(
                        self.pair, self.tensors, point, (bar_y, bar_z), self.sums, (True, True), common
                    )
            first_bars = _each(self._sums(0, step, weights, bars, points, carried))
            if slopes and (index == 0 or is_last):
                rows = slopes[: 2 * stages] if index == 0 else slopes[2 * stages :]
                found = self._size_bar(index, is_last, step, end_bar, rows, weights, bars, points, carried)
                size_bar = found if size_bar is None else size_bar + found
            bars = _each(
                [[(1.0, bar) for bar in (bars[h], *(p[h] for p in points)) if bar is not None] for h in (0, 1)]
            )
            carried = first_bars
        return [*bars, *carried, size_bar]

    def _sums(
        self,
        stage: int,
        step: float,
        weights: Sequence[float],
        bars: Halves,
        points: Sequence[Halves],
        carried: Halves,
    ) -> list[list[tuple[float, Tensor]]]:
        """(7): what a stage's slopes' cotangents are sums of, for each half."""
        factors = [weights[stage], *(row[stage] for row in self.tableau.a[stage + 1 :])]
        sums = []
        for half in (0, 1):
            above = [bars[half], *(point[half] for point in points[stage + 1 :])]
            terms = [(step * w, bar) for w, bar in zip(factors, above, strict=True) if w and bar is not None]
            last = carried[half] if stage == self.tableau.stages - 1 else None
            sums.append(terms if last is None else [*terms, (1.0, last)])
        return sums

    def _size_bar(
        self,
        index: int,
        is_last: bool,
        step: float,
        end_bar: Tensor,
        rows: Sequence[Tensor],
        weights: Sequence[float],
        bars: Halves,
        points: Sequence[Halves],
        carried: Halves,
    ) -> Tensor:
        """(8): what a step adds to the cotangent of the first step's size."""
        slopes = [(rows[2 * i], rows[2 * i + 1]) for i in range(self.tableau.stages)]
        total = torch.zeros((), dtype=torch.float64, device=end_bar.device)
        nothing: Halves = (None, None)
        if index == 0:
            for i, slope in enumerate(slopes):
                for k, bar in zip(slope, _each(self._sums(i, 1.0, weights, bars, points, nothing)), strict=True):
                    if bar is not None:
                        total = total + dots(k, [bar.to(k.dtype)]).double()[0]
        if is_last:
            moved = dots(end_bar, [k for k, _ in slopes]).double()
            rates = torch.tensor(interpolating_rates(self.tableau, self.steps.at), dtype=torch.float64)
            at_bar = step * (moved * rates.to(moved.device)).sum()
            # t₁ lies at (t₁ − t)/h of the last step, whose start t moves with the first step's size.
            total = total - at_bar * (self.steps.at / step if index == 0 else 1 / step)
        return total


def _each(sums: Sequence[Sequence[tuple[float, Tensor]]]) -> Halves:
    found: list[MaybeTensor] = []
    for terms in sums:
        if not terms:
            found.append(None)
        elif len(terms) == 1 and terms[0][0] == 1.0:
            found.append(terms[0][1])
        else:
            found.append(combine([bar for _, bar in terms], coefficients(*(c for c, _ in terms))))
    return found[0], found[1]


def _like(slopes: State, state: State) -> State:
    """The slopes in the state's dtype, as a stage's sum takes them."""
    dy, dz = (channels_last(cast(k, u.dtype)) for k, u in zip(slopes, state, strict=True))
    return dy, dz
