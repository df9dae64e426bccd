"""A single map's evaluations and their pull-backs, sweep by sweep, for the solution of its equation.

Derivation: README.md of ops/schemes/ode. Maps are dense channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...solver import Solver
from ..maps import accumulator, cast, channels_last, coefficients, combine, converted, dots, like_reference
from ..plan import Gradients, MaybeTensor, MaybeTensors, Plan, Record, statistics_of, tracked_statistics
from ..schemes.ode.field import Made, Pulled, Stages, Weighted
from ..schemes.ode.time import Times, timed
from . import sweeps


class StagedField:
    """A field whose convolutions are PyTorch's."""

    def __init__(self, plan: Plan, tensors: MaybeTensors, x: Tensor, wanted: Sequence[bool]) -> None:
        self.plan, self.times = plan, Times(plan, tensors, x)
        self.tensors = converted(plan, self.times.tensors, x.dtype)
        self.sums = Gradients(self.times.tensors, wanted)
        self.timed = [index for index, _ in timed(plan)]

    def enter(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def leave(self, u: Tensor, x: Tensor) -> Tensor:
        return like_reference(u, x)

    def scaled_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, solver: Solver
    ) -> Tensor:
        error = combine(terms, coefficients(*weights))
        larger = u.abs() if u is v else torch.maximum(u.abs(), v.abs())
        scaled = error.div_(larger.mul_(solver.rtol).add_(solver.atol))
        square = torch.linalg.vector_norm(scaled, dtype=accumulator(scaled.dtype)).double().square()
        # Zero times a value that is not finite is NaN.
        return torch.stack([square, torch.linalg.vector_norm(v, float("inf")).double() * 0])

    def pull_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, factor: float, solver: Solver
    ) -> tuple[Tensor, Tensor, Tensor]:
        error, sizes = combine(terms, coefficients(*weights)), (u.abs(), v.abs())
        scale = torch.maximum(*sizes).mul_(solver.rtol).add_(solver.atol)
        error_bar = (error / scale).div_(scale).mul_(factor)
        through = (error_bar * error).div_(scale).mul_(-solver.rtol)
        # Of equal ones either gets a half, as torch has it.
        share = (torch.sign(sizes[0] - sizes[1]) + 1) / 2
        return error_bar, through * share * u.sign(), through * (1 - share) * v.sign()

    def gradients(self) -> list[MaybeTensor]:
        return self.times.joined(self.sums.result())

    def stages(self, stages: Stages, state: Tensor, first: MaybeTensor, keep: bool) -> Made:
        slopes = [] if first is None else [first]
        point, kept, statistics = state, [], []
        for i in stages.evaluated:
            terms, coefs = _terms(state, slopes, stages.rows[i])
            shifts = dict(zip(self.timed, self.times.at(stages.times[i]), strict=True))
            point, slope, records = sweeps.value(self.plan, self.tensors, terms, coefs, shifts)
            slopes.append(cast(slope, state.dtype))
            statistics += tracked_statistics(self.plan, statistics_of(records))
            if keep:
                kept += [tensor for record in records for tensor in (record.h, record.stats)]
        return Made(slopes, point, kept, statistics)

    def pull(
        self,
        stages: Stages,
        kept: Sequence[Tensor],
        weights: Sequence[float],
        end_bar: MaybeTensor,
        carried: MaybeTensor,
        slopes: Sequence[Tensor] = (),
        error: Weighted | None = None,
    ) -> Pulled:
        last = len(weights) - 1
        each = 2 * len(self.plan.units)
        bars: list[MaybeTensor] = [None] * len(weights)  # of the points
        times: list[Tensor] = []
        product: MaybeTensor = None
        first: MaybeTensor = None
        for i in range(last, -1, -1):
            column = [weights[i], *(row[i] for row in stages.rows[i + 1 :])]
            terms = [
                (w, bar) for w, bar in zip(column, [end_bar, *bars[i + 1 :]], strict=True) if w and bar is not None
            ]
            if error is not None and error[1][i]:
                terms.append((error[1][i], error[0]))
            if slopes and terms:
                (found,) = dots(slopes[i], [_sum(terms)]).double()
                product = found if product is None else product + found
            if carried is not None and i == last:
                terms.append((1.0, carried))
            if not terms:
                if i in stages.evaluated:
                    times.append(self.times.pull(0.0, [t.new_zeros(()) for t in self.times.bars]))
                continue
            if i not in stages.evaluated:
                first = _sum(terms)
                continue
            at = (i - stages.evaluated.start) * each
            rows = [Record(kept[k], kept[k + 1], None) for k in range(at, at + each, 2)]
            scale, bar = terms[0] if len(terms) == 1 else (1.0, _sum(terms))
            seen: dict[int, Tensor] = {}
            bars[i] = sweeps.pull(
                self.plan, self.tensors, rows, bar, [], coefficients(scale), self.sums, scale, cotangents=seen
            )
            moments = [self.times.moment(place, seen[index]) for place, index in enumerate(self.timed)]
            times.append(self.times.pull(stages.times[i], moments, scale))
        found_bars = [(1.0, bar) for bar in (end_bar, *bars) if bar is not None]
        return Pulled(_sum(found_bars) if found_bars else None, first, times[::-1], product)


def _terms(state: Tensor, slopes: Sequence[Tensor], row: Sequence[float]) -> tuple[list[Tensor], MaybeTensor]:
    used = [(k, w) for k, w in zip(slopes, row, strict=False) if w]
    if not used:
        return [state], None
    return [state, *(k for k, _ in used)], coefficients(1.0, *(w for _, w in used))


def _sum(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return combine([bar for _, bar in terms], coefficients(*(w for w, _ in terms)))
