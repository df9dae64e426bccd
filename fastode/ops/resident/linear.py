"""The skew field of two matrix products, and its solution by any scheme, on the resident engine.

One operator forwards, one backwards. Derivation: README.md of ops/schemes/skew_pair. `tensors` are W and the biases of
ẏ and ż.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...solver import Solver
from ...steps import Watch
from ..function import gradients
from ..plan import MaybeTensor, MaybeTensors, activation_codes
from ..rerun import Rerun
from ..schemes.by_error import Steps
from ..schemes.skew_pair.linear import Linear
from ..schemes.skew_pair.march import March
from .call import beside
from .functions import keeps
from .skew import only
from .solve import SolverCode, solver_code, tell

_SOLVER = "resident solver"  # in a field's memo

LinearCode = tuple[list[Tensor], list[int], list[float]]


def encode(linear: Linear, tensors: MaybeTensors) -> LinearCode:
    """A field as the operators take it (csrc/cpu/resident/linear.h): present tensors, integers, numbers."""
    kind, p, q = activation_codes(linear.activation)
    integers, numbers = [kind, int(linear.released)], [linear.gamma, p, q, linear.initial]
    return [tensor for tensor in tensors if tensor is not None], integers, numbers


def _solver_code(linear: Linear, solver: Solver) -> SolverCode:
    """`solver_code`, kept beside the field for its last solver."""
    if torch.compiler.is_compiling():
        return solver_code(solver)
    kept = linear.memo.get(_SOLVER)
    if kept is None or kept[0] is not solver:
        kept = linear.memo[_SOLVER] = solver, solver_code(solver)
    code: SolverCode = kept[1]
    return code


class ResidentLinearFunction(torch.autograd.Function):
    """(ẏ, ż) at (y, z)."""

    @staticmethod
    def forward(ctx: Any, linear: Linear, rerun: Rerun | None, y: Tensor, z: Tensor, *tensors: MaybeTensor) -> Any:
        dy, dz = torch.ops.fastode.resident_linear_forward.default(y, z, *encode(linear, tensors))
        ctx.save_for_backward(y, z, *tensors)
        ctx.linear, ctx.rerun = linear, rerun
        ctx.set_materialize_grads(False)
        return dy, dz

    @staticmethod
    def backward(ctx: Any, dy_bar: MaybeTensor, dz_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        given, linear = ctx.saved_tensors, ctx.linear

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            y, z, *tensors = given
            has_y, has_z = (bar is not None for bar in bars)
            damped = linear.gamma != 0
            # ẏ reads z, and ż reads y; the damping makes each read itself too.
            reached = [has_z or damped, has_y or damped, True, has_y, has_z]
            asked = [want and there for want, there in zip(wanted, reached, strict=True)]
            y_bar, z_bar, found = torch.ops.fastode.resident_linear_backward.default(
                y, z, *bars, *encode(linear, tensors), asked[0], asked[1], any(asked[2:])
            )
            return only((y_bar, z_bar, *beside(tensors, found)), asked)

        return gradients(ctx, given, [dy_bar, dz_bar], pull)


class ResidentLinearSolveFunction(torch.autograd.Function):
    """y(t₁) from x, which is z(0); every solve with steps by error tells a watch what it did."""

    @staticmethod
    def forward(
        ctx: Any,
        linear: Linear,
        solver: Solver,
        watches: Sequence[Watch],
        steps: Sequence[Steps],
        rerun: Rerun | None,
        x: Tensor,
        *tensors: MaybeTensor,
    ) -> tuple[Tensor]:
        keep, traced = keeps(ctx), torch.compiler.is_compiling()
        end, log, kept = torch.ops.fastode.resident_linear_solve_forward.default(
            x,
            *encode(linear, tensors),
            *_solver_code(linear, solver),
            keep,
            keep and solver.gradient == "solver",
            traced,
        )
        if solver.is_adaptive and not traced:
            tell(log.tolist(), solver, watches, steps, x)
        ctx.save_for_backward(x, *tensors, log, *kept)
        ctx.linear, ctx.solver, ctx.rerun, ctx.count = linear, solver, rerun, 1 + len(tensors)
        ctx.set_materialize_grads(False)
        return (end,)

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        saved, linear, solver = ctx.saved_tensors, ctx.linear, ctx.solver
        given, log, kept = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1 :]

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, *tensors = given
            asked = [*wanted[:-1], wanted[-1] and _reads_slope_of_z(linear, solver)]
            x_bar, found = torch.ops.fastode.resident_linear_solve_backward.default(
                x, bars[0], log, list(kept), *encode(linear, tensors), *_solver_code(linear, solver),
                solver.gradient == "solver", any(asked[1:]),
            )  # fmt: skip
            return only((x_bar, *beside(tensors, found)), asked)

        return gradients(ctx, given, [end_bar], pull)


def _reads_slope_of_z(linear: Linear, solver: Solver) -> bool:
    """Whether y(t₁) depends on ż anywhere, and so on its bias."""
    if solver.is_adaptive:
        return True
    march = March(solver.tableau.a, solver.tableau.b, solver.t1 / solver.steps, solver.steps)
    return any(z for step in march.used(linear.gamma != 0) for _, z in step)
