"""How the solution of a single map's equation runs: the field is read, everything is checked, an engine is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import checks
from ..branch.layers import CONV, KNOWN, read_time_conv
from ..branch.read import Reading, channels, read
from ..branch.snapshot import Past
from ..ops import function
from ..ops.engine import ODE_SOLUTION, Call, Engine, autocast_dtype
from ..ops.plan import Plan
from ..ops.rerun import Rerun, StandIn
from ..ops.schemes.by_error import Steps, retaken
from ..ops.schemes.ode.solution import Course
from ..reference.adaptive import State, integrate
from ..reference.solvers import solve_fixed
from ..reference.timed import TimeConv2d, at_time
from ..solver import Solver
from ..steps import Watch
from . import choice
from .engines import NAMES, REFERENCE
from .known import Known, kind_of_call, known
from .one_step import check_kind
from .running import update_running

# Not in the reader's own module: the reference, which has this layer, is not for readers to import.
KNOWN[TimeConv2d] = (CONV, read_time_conv)


def read_field(field: nn.Module) -> Reading:
    """The field as units, convolutions that see the time among them."""
    return read(field, "field", timed=True)


def describe_call(reading: Reading, solver: Solver, inputs: tuple[Tensor, ...] = ()) -> Call:
    """A call of an ODEBlock, as an engine is asked about it."""
    if solver.is_adaptive:
        variant = f"by {solver.name} to {solver.t1:g} within {solver.rtol:g} and {solver.atol:g}"
    else:
        variant = f"by {solver.name} in {solver.steps} steps"
    reason = reading.reason or _fault(inputs)
    if reason or reading.units is None:
        return Call(ODE_SOLUTION, variant, None, (), inputs, reason)
    tracked = tuple(norm is not None for norm in reading.norms)
    plan = Plan(reading.units, tracked, autocast_dtype(inputs[0]) if inputs else None)
    return Call(ODE_SOLUTION, variant, plan, reading.tensors, inputs, stages=len(solver.tableau.b))


def _fault(inputs: tuple[Tensor, ...]) -> str:
    if torch.compiler.is_compiling():
        return "torch.compile does not trace the solution of a single map's equation"
    if any(x.dim() != 4 for x in inputs):
        return "the input is no feature map [N, C, H, W]"
    if inputs and autocast_dtype(inputs[0]) is not None:
        return "autocast would lower the time as well"
    return ""


def run(
    x: Tensor,
    field: nn.Module,
    solver: Solver,
    engine: str,
    block: str,
    make_reference: Callable[[], nn.Module],
    owner: nn.Module,
    run_reference: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run an ODEBlock.

    Args:
        x: the input.
        field: the map.
        solver: how its equation is solved.
        engine: a name of an engine, or "auto".
        block: the block in words.
        make_reference: makes the reference block, for trials.
        owner: the block, for the report.
        run_reference: the block in plain PyTorch.
    """
    checks.tensor("x", x)
    if torch.compiler.is_compiling():
        choice.choose(engine, describe_call(read_field(field), solver, (x,)))
        return run_reference(x)
    found = known(field, lambda: read_field(field), "field")
    kind = kind_of_call((solver, engine), (x,), found.reading)
    answer = None if kind is None else found.answer(kind)
    if answer is None:
        answer = _decide(x, found.reading, solver, make_reference, engine)
        if kind is not None:
            found.keep(kind, answer, describe_call(found.reading, solver, (x,)))
    chosen, plan = answer
    choice.note(owner, chosen)
    if chosen is REFERENCE or plan is None:
        return run_reference(x)
    if not solver.is_adaptive:
        return _solve(chosen, plan, found, x, solver, block, None)
    # The reference flattens its state for steps by error, and its result is contiguous.
    if not solver.per_sample:
        return _solve(chosen, plan, found, x, solver, block, None).contiguous()
    parts = enumerate(x.split(1))
    return torch.cat([_solve(chosen, plan, found, part, solver, block, index) for index, part in parts]).contiguous()


def _decide(
    x: Tensor, reading: Reading, solver: Solver, make_reference: Callable[[], nn.Module], engine: str
) -> tuple[Engine, Plan | None]:
    """The engine for a call that is checked first, and the field as constants."""
    checks.engine(engine, NAMES)
    call = describe_call(reading, solver, (x,))
    if reading.units is not None and x.dim() == 4:
        checks.feature_map("x", x, channels(reading.units))
        check_kind(x, reading.tensors)
        checks.enough_values(reading, x.shape)
    assert call.program is None or isinstance(call.program, Plan)
    return choice.choose(engine, call, make_reference), call.program


def _solve(
    engine: Engine, plan: Plan, found: Known[Reading], x: Tensor, solver: Solver, block: str, sample: int | None
) -> Tensor:
    x = function.savable(x)
    course = Course(solver, Watch(block, solver, sample) if solver.is_adaptive else None, Steps())
    rerun = None
    if found.snapshot is not None and torch.is_grad_enabled():
        make = partial(_Retaken, found.snapshot.past, solver, course.steps)
        rerun = Rerun(make, 1, found.reading.tensors)
    end, *statistics = function.call(engine.ode_solution, (plan, course, rerun), (x, *found.reading.tensors))
    if statistics:
        update_running(found.reading, statistics, x)
    return end


class _Retaken(nn.Module):
    """The reference solution by the steps that a solve has taken, those chosen again that the gradient goes through."""

    def __init__(self, past: Past, solver: Solver, steps: Steps, stand_in: StandIn) -> None:
        super().__init__()
        self.field, self.solver, self.steps = past.restored(stand_in), solver, steps

    def forward(self, x: Tensor) -> Tensor:
        solver = self.solver

        def slope(t: object, state: State) -> State:
            return (at_time(self.field, t, state[0]),)  # type: ignore[arg-type]

        if not solver.is_adaptive:
            return solve_fixed(slope, (x,), solver.tableau, solver.t1, solver.steps)[0]
        if solver.gradient == "exact":
            return integrate(slope, (x,), solver, Watch("", solver))[0]
        return retaken(slope, (x,), solver, self.steps)[0]
