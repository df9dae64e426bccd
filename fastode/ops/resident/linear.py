"""The skew field of two matrix products, and its solution by any scheme, on the resident engine.

One operator forwards, one backwards. Derivation: README.md of ops/schemes/skew_pair. `tensors` are W and the biases of
ẏ and ż.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...native import nodes
from ...solver import Solver
from ...steps import Watch
from ..function import NodeFunction, gradients
from ..plan import MaybeTensor, MaybeTensors, activation_codes
from ..rerun import Rerun
from ..schemes.by_error import Steps
from ..schemes.skew_pair.linear import Linear
from ..schemes.skew_pair.march import March
from .call import beside
from .functions import keeps
from .skew import only
from .solve import solver_code, tell, through_code

_PROGRAM, _SOLVER = "resident node", "resident solver"  # in a field's memo

LinearCode = tuple[list[Tensor], list[int], list[float]]


def encode(linear: Linear, tensors: MaybeTensors) -> LinearCode:
    """A field as the operators take it (csrc/cpu/resident/linear.h): present tensors, integers, numbers."""
    kind, p, q = activation_codes(linear.activation)
    integers, numbers = [kind, int(linear.released)], [linear.gamma, p, q, linear.initial]
    return [tensor for tensor in tensors if tensor is not None], integers, numbers


def _program(linear: Linear, tensors: MaybeTensors) -> Any:
    """The field as the nodes take it; kept beside the field."""
    kept = linear.memo.get(_PROGRAM)
    if kept is None:
        kept = linear.memo[_PROGRAM] = nodes.module.program(*encode(linear, tensors)[1:])
    return kept


def _solver(linear: Linear, solver: Solver) -> Any:
    """The solver as the nodes take it; kept beside the field for its last solver."""
    kept = linear.memo.get(_SOLVER)
    if kept is None or kept[0] is not solver:
        made = nodes.module.solver(*solver_code(solver), through_code(solver), _reads_slope_of_z(linear, solver))
        kept = linear.memo[_SOLVER] = solver, made
    return kept[1]


class ResidentLinearFunction(NodeFunction):
    """(ẏ, ż) at (y, z)."""

    constants = ("linear", "rerun")

    @classmethod
    def through_node(cls, linear: Linear, rerun: Rerun | None, given: MaybeTensors) -> Any:
        return nodes.module.linear(_program(linear, given[2:]), (cls, linear, rerun), given)

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


class ResidentLinearSolveFunction(NodeFunction):
    """y(t₁) from x, which is z(0); every solve with steps by error tells a watch what it did."""

    constants = ("linear", "solver", "watches", "steps", "rerun")

    @classmethod
    def through_node(
        cls,
        linear: Linear,
        solver: Solver,
        watches: Sequence[Watch],
        steps: Sequence[Steps],
        rerun: Rerun | None,
        given: MaybeTensors,
    ) -> Any:
        x, *tensors = given
        # A backward asks no watch.
        constants = (cls, linear, solver, (), (), rerun)
        found = nodes.module.linear_solve(_program(linear, tensors), constants, given, _solver(linear, solver))
        if found is NotImplemented:
            return found
        end, log = found
        if solver.is_adaptive:
            assert x is not None
            tell(log.tolist(), solver, watches, steps)
        return (end,)

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
        keep, traced = keeps(ctx, x), torch.compiler.is_compiling()
        end, log, kept = torch.ops.fastode.resident_linear_solve_forward.default(
            x,
            *encode(linear, tensors),
            *solver_code(solver),
            keep,
            through_code(solver) if keep else 0,
            traced,
        )
        if solver.is_adaptive and not traced:
            tell(log.tolist(), solver, watches, steps)
        ctx.save_for_backward(x, *tensors, log, *kept)
        ctx.linear, ctx.solver, ctx.rerun, ctx.count = linear, solver, rerun, 1 + len(tensors)
        ctx.set_materialize_grads(False)
        return (end,)

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        saved, linear, solver = ctx.saved_tensors, ctx.linear, ctx.solver
        # A node hands over neither log nor what was kept: the operator takes the steps again.
        given, (log, *kept) = saved[: ctx.count], saved[ctx.count :] or (torch.empty(0, dtype=torch.float64),)

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, *tensors = given
            asked = [*wanted[:-1], wanted[-1] and _reads_slope_of_z(linear, solver)]
            x_bar, found = torch.ops.fastode.resident_linear_solve_backward.default(
                x, bars[0], log, kept, *encode(linear, tensors), *solver_code(solver),
                through_code(solver), any(asked[1:]),
            )  # fmt: skip
            return only((x_bar, *beside(tensors, found)), asked)

        return gradients(ctx, given, [end_bar], pull)


def _reads_slope_of_z(linear: Linear, solver: Solver) -> bool:
    """Whether y(t₁) depends on ż anywhere, and so on its bias."""
    if solver.is_adaptive:
        return True
    march = March(solver.tableau.a, solver.tableau.b, solver.t1 / solver.steps, solver.steps)
    return any(z for step in march.used(linear.gamma != 0) for _, z in step)
