"""A single map's evaluations and their pull-backs, a step in one operator, for the solution of its equation.

Derivation: README.md of ops/schemes/ode. A map is a tensor [N, lanes, blocks · H, W] in channels_last memory: in each
sample the channels are in blocks of one vector, each block a plane of pixels (csrc/cpu/resident/plane.h). Empty places
are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...branch.layers import Conv
from ...solver import Solver
from ..maps import like_reference
from ..plan import Gradients, MaybeTensor, MaybeTensors, Plan
from ..schemes.ode.field import Made, Pulled, Stages, Weighted
from ..schemes.ode.time import Times, timed
from .call import beside, encode

_OPS = torch.ops.fastode


class ResidentField:
    """A field that a worker takes a sample through, a whole step at a time."""

    def __init__(self, plan: Plan, tensors: MaybeTensors, x: Tensor, wanted: Sequence[bool]) -> None:
        self.x, self.times = x, Times(plan, tensors, x)
        self.tensors = self.times.tensors
        self.code = encode(plan, self.tensors)
        self.sums, self.wants = Gradients(self.tensors, wanted), any(wanted)
        self.timed: list[tuple[int, Conv]] = timed(plan)
        self.planes = [self.enter(plane) for plane in self.times.planes]

    def enter(self, x: Tensor) -> Tensor:
        return _OPS.resident_enter.default(x)

    def leave(self, u: Tensor, x: Tensor) -> Tensor:
        return like_reference(_OPS.resident_leave.default(u, x), x)

    def scaled_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, solver: Solver
    ) -> Tensor:
        found: Tensor = _OPS.resident_scaled_squares.default(list(terms), list(weights), u, v, solver.rtol, solver.atol)
        return found

    def pull_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, factor: float, solver: Solver
    ) -> tuple[Tensor, Tensor, Tensor]:
        error_bar, u_bar, v_bar = _OPS.resident_pull_squares.default(
            list(terms), list(weights), u, v, factor, solver.rtol, solver.atol
        )
        return error_bar, u_bar, v_bar

    def gradients(self) -> list[MaybeTensor]:
        return self.times.joined(self.sums.result())

    def stages(self, stages: Stages, state: Tensor, first: MaybeTensor, keep: bool) -> Made:
        slopes, points, kept = _OPS.resident_step_forward.default(
            self.x, state, first, *self.code, *self._step(stages), keep
        )
        point = points[-1] if points else state
        slopes = slopes if first is None else [first, *slopes]
        return Made(slopes, point, [*points, *kept] if keep else [], [])

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
        error_bar, error_weights = error or (None, ())
        count = len(stages.evaluated)
        state, first, bars, moments, product = _OPS.resident_step_backward.default(
            self.x, end_bar, carried, list(slopes), list(kept[:count]), list(kept[count:]), *self.code,
            *self._step(stages), list(weights), error_bar, list(error_weights), self.wants,
        )  # fmt: skip
        for place, bar in enumerate(beside(self.tensors, bars)):
            if bar is not None:
                self.sums.add(place, bar)
        times = []
        for stage, row in zip(stages.evaluated, moments.view(count, -1), strict=True):
            times.append(self.times.pull(stages.times[stage], self._moments(row)))
        return Pulled(state, first, times, product[0] if slopes else None)

    def _step(self, stages: Stages) -> tuple[list[float], list[float], bool, list[int], list[Tensor]]:
        count = len(stages.rows)
        rows = [value for row in stages.rows for value in (*row, *(0.0,) * (count - len(row)))]
        return rows, list(stages.times), stages.given, [index for index, _ in self.timed], self.planes

    def _moments(self, row: Tensor) -> list[Tensor]:
        """Of each timed convolution [C, kh, kw], from an evaluation's, one after the other [kh, kw, width]."""
        found, taps = [], [conv.kernel[0] * conv.kernel[1] for _, conv in self.timed]
        width = row.numel() // max(sum(taps), 1)
        for (_, conv), part in zip(self.timed, row.split([count * width for count in taps]), strict=True):
            found.append(part.view(*conv.kernel, width)[..., : conv.out_channels].permute(2, 0, 1))
        return found
