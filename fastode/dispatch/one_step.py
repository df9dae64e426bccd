"""How a one-step block runs: its branch is read, everything is checked, an engine is chosen and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import checks
from ..branch.read import Reading, channels, convolves, read
from ..branch.snapshot import Past
from ..linear_table import LinearTable, Parts, Places, Rows, in_words, parts_of
from ..ops import function
from ..ops.engine import Call, Engine, autocast_dtype
from ..ops.plan import MaybeTensors, Plan
from ..ops.rerun import Rerun, StandIn
from ..ops.schemes.implicit_euler.descent import Descent
from ..ops.schemes.implicit_euler.exact import Exact
from ..ops.schemes.runge_kutta.stages import Scheme
from ..reference.blocks import by_stages
from . import bare, choice
from .engines import AUTO, NAMES, REFERENCE
from .known import kind_of_call, known, remembered
from .running import update_running

Table = Callable[[], Tensor]


class Step(Protocol):
    """A one-step block without its branch; equal only to itself, so that it is a cheap key.

    Attributes:
        family: of blocks, as a `Call` has it.
        variant: what else the time of its calls depends on, in words.
        stages: as a `Call` has it.
        learned: whether coefficients are learned.
        traceable: whether torch.compile may trace the reference.
    """

    @property
    def family(self) -> str: ...

    @property
    def stages(self) -> int: ...

    @property
    def learned(self) -> bool: ...

    @property
    def variant(self) -> str: ...

    @property
    def traceable(self) -> bool: ...

    def apply(
        self, engine: Engine, plan: Plan, rerun: Rerun | None, x: Tensor, tensors: MaybeTensors, table: Table | None
    ) -> Any:
        """(y, *statistics) by the engine's autograd Function; `table` gives coefficients that are learned."""

    def plain(self, branch: bare.Function) -> bare.Function | None:
        """The reference around a branch that is a function of its own; None where it is to be called as a module."""


@dataclass(frozen=True, eq=False)
class DescentStep:
    """IE-Skip."""

    descent: Descent
    variant: str
    family: str = "ie"
    learned: bool = False
    traceable: bool = False  # the reference calls autograd inside its forward

    @property
    def stages(self) -> int:
        return self.descent.steps

    def apply(
        self, engine: Engine, plan: Plan, rerun: Rerun | None, x: Tensor, tensors: MaybeTensors, table: Table | None
    ) -> Any:
        made = function.call(engine.ie_skip, (plan, self.descent, rerun), (x, *tensors))
        return engine.apart(made, [plan], self.descent)

    def plain(self, branch: bare.Function) -> None:
        return None


@dataclass(frozen=True, eq=False)
class ExactStep:
    """The exact implicit Euler step."""

    exact: Exact
    variant: str = ""
    family: str = "exact_ie"
    stages: int = 1
    learned: bool = False
    traceable: bool = False  # it takes as many steps as the data needs

    def apply(
        self, engine: Engine, plan: Plan, rerun: Rerun | None, x: Tensor, tensors: MaybeTensors, table: Table | None
    ) -> Any:
        return function.call(engine.exact_ie, (plan, self.exact, rerun), (function.savable(x), *tensors))

    def plain(self, branch: bare.Function) -> None:
        return None


@dataclass(frozen=True, eq=False)
class SchemeStep:
    """An explicit scheme; `rows` are its square α and β, empty where they are learned."""

    scheme: Scheme
    rows: tuple[Rows, Rows] | tuple[()]
    variant: str
    family: str = "shu_osher"
    traceable: bool = True

    @property
    def stages(self) -> int:
        return self.scheme.stages

    @property
    def learned(self) -> bool:
        return not self.rows

    def apply(
        self, engine: Engine, plan: Plan, rerun: Rerun | None, x: Tensor, tensors: MaybeTensors, table: Table | None
    ) -> Any:
        given = table() if table is not None else constant_table(self)
        made = function.call(engine.shu_osher, (plan, self.scheme, rerun), (x, given, *tensors))
        return engine.apart(made, [plan], self.scheme)

    def plain(self, branch: bare.Function) -> bare.Function | None:
        return partial(by_stages, alpha=self.rows[0], beta=self.rows[1], evaluate=branch) if self.rows else None


def check_kind(x: Tensor, tensors: MaybeTensors) -> None:
    """Refuse an x on another device than a part's tensors, or of another dtype where it has convolutions."""
    check = checks.same_kind if convolves(tensors) else checks.same_device
    check(x, tensors)


def refuse_tensor(value: Any, check: Callable[[Any], None]) -> None:
    """Refuse a tensor that was put in a number's place, as the constructor does: its value may change unseen."""
    if isinstance(value, Tensor):
        check(value)


@remembered
def descent_step(steps: int, step_size: float, theta: float, detach: bool) -> DescentStep:
    """The step of an IE-Skip block."""
    refuse_tensor(step_size, checks.step_size)
    refuse_tensor(theta, checks.theta)
    refuse_tensor(steps, checks.steps)
    return DescentStep(Descent(steps, step_size, theta, detach), f"of {steps} {'detached ' if detach else ''}steps")


@remembered
def exact_step(tol: float, max_iterations: int, block: str) -> ExactStep:
    """The step of an exact implicit Euler block."""
    refuse_tensor(tol, partial(checks.step_size, name="tol"))
    return ExactStep(Exact(tol, max_iterations, block))


@remembered
def tableau_step(tableau: LinearTable) -> SchemeStep:
    """The step of a scheme with a fixed tableau or table."""
    return _step_of(tableau.parts)


@remembered
def euler_step(step_size: float) -> SchemeStep:
    """The step of a residual block: x + h f(x)."""
    refuse_tensor(step_size, checks.step_size)
    return _step_of(parts_of(((1.0,),), ((step_size,),)))


def learned_step(alpha: Places, beta: Places) -> SchemeStep:
    """The step of a scheme whose coefficients at these places are learned."""
    return SchemeStep(Scheme(alpha, beta), (), in_words(alpha, beta))


def _step_of(parts: Parts) -> SchemeStep:
    return SchemeStep(Scheme(parts.alpha, parts.beta), parts.rows, parts.words)


_tables: WeakKeyDictionary[SchemeStep, Tensor] = WeakKeyDictionary()


def constant_table(step: SchemeStep) -> Tensor:
    """Fixed coefficients [2, s, s] in float64, made once unless a tracer or a fake mode asks for them."""
    if torch.compiler.is_compiling():
        return torch.tensor(step.rows, dtype=torch.float64, device="cpu")
    kept = _tables.get(step)
    if kept is not None:
        return kept
    with torch.inference_mode(False):  # or it could not be saved for a backward
        made = torch.tensor(step.rows, dtype=torch.float64, device="cpu")
    if type(made) is Tensor:
        _tables[step] = made
    return made


def describe_call(step: Step, module: nn.Module, inputs: tuple[Tensor, ...] = ()) -> Call:
    """A call of a block around a branch, as an engine is asked about it."""
    return _call(step, read(module), inputs)


def _call(step: Step, reading: Reading, inputs: tuple[Tensor, ...]) -> Call:
    if reading.units is None:
        return Call(step.family, step.variant, None, (), inputs, reading.reason)
    tracked = tuple([norm is not None for norm in reading.norms])
    plan = Plan(reading.units, tracked, autocast_dtype(inputs[0]) if inputs else None)
    return Call(step.family, step.variant, plan, reading.tensors, inputs, stages=step.stages, learned=step.learned)


def run(
    x: Tensor,
    module: nn.Module,
    step: Step,
    make_reference: Callable[[], nn.Module],
    run_reference: Callable[[Tensor], Tensor],
    *,
    table: Table | None = None,
    engine: str = AUTO,
    owner: nn.Module | None = None,
    checked: bool = False,
) -> Tensor:
    """Run a one-step block.

    Args:
        x: the input [N, C, H, W].
        module: the branch.
        step: the block without it.
        make_reference: makes the reference block, for trials and for gradients of gradients.
        run_reference: the block in plain PyTorch.
        table: gives the coefficients [2, s, s] of a scheme that learns them; the reference takes them after x.
        engine: a name of an engine, or "auto".
        owner: the module that is being called, for the report.
        checked: whether the caller has just seen that nothing about the branch has changed.
    """
    plan: Plan | bare.Function | None
    if torch.compiler.is_compiling():
        reading, found = read(module), None
        chosen, plan = _decide(x, reading, step, make_reference, engine)
    else:
        found = known(module, lambda: read(module), checked=checked)
        reading = found.reading
        kind = kind_of_call((step, engine), (x,), reading) if isinstance(x, Tensor) else None
        answer = None if kind is None else found.answer(kind)
        if answer is None:
            answer = _decide(x, reading, step, make_reference, engine)
            if kind is not None:
                if answer[0] is REFERENCE and engine == AUTO and found.lasts(module):
                    answer = REFERENCE, _bare(step, module, reading, x)
                found.keep(kind, answer, _call(step, reading, (x,)))
        chosen, plan = answer
        choice.note(owner, chosen)
    if chosen is REFERENCE or not isinstance(plan, Plan):
        if plan is not None and not isinstance(plan, Plan) and bare.usable():
            return plan(x)
        untraced = torch.compiler.is_compiling() and not step.traceable
        call = torch.compiler.disable(run_reference) if untraced else run_reference
        return undone_on_error(call, x, module) if reading.units is None else call(x)
    rerun = None
    if found is not None and found.snapshot is not None and torch.is_grad_enabled():
        make = partial(_as_it_was, make_reference, module, found.snapshot.past)
        rerun = Rerun(make, 1 if table is None else 2, reading.tensors)
    y, *statistics = step.apply(chosen, plan, rerun, x, reading.tensors, table)
    if statistics:
        update_running(reading, statistics, x)
    return y


def _decide(
    x: Tensor, reading: Reading, step: Step, make_reference: Callable[[], nn.Module], engine: str
) -> tuple[Engine, Plan | None]:
    """The engine for a call that is checked first, and the branch as constants."""
    checks.engine(engine, NAMES)
    if isinstance(x, Tensor) and _is_one_sample(x, reading):
        call = Call(step.family, step.variant, None, (), (x,), "the input is a sample without a batch")
        return choice.choose(engine, call, make_reference), None
    if reading.units is not None:
        checks.feature_map("x", x, channels(reading.units))
        check_kind(x, reading.tensors)
        if x.shape[2] * x.shape[3] == 1:  # the branch keeps the size
            checks.enough_values(reading, x.shape)
    else:
        checks.tensor("x", x)
        if x.dim() == 4:
            checks.keeps_shape(reading, x)
    call = _call(step, reading, (x,))
    assert call.program is None or isinstance(call.program, Plan)
    return choice.choose(engine, call, make_reference), call.program


def _is_one_sample(x: Tensor, reading: Reading) -> bool:
    """Whether x is a map [C, H, W], which PyTorch's convolutions take and its norms take for another."""
    if x.dim() != 3 or reading.units is None or any(unit.norm is not None for unit in reading.units):
        return False
    return channels(reading.units) in (None, x.shape[0])


def _bare(step: Step, module: nn.Module, reading: Reading, x: Tensor) -> bare.Function | None:
    """A call that is left to PyTorch as its functions; None where it is one of modules."""
    if reading.units is None or not bare.takes(x):
        return None
    branch = bare.branch_of(module, x.shape)
    return None if branch is None else step.plain(branch)


def undone_on_error(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """call(x); if it fails, the branch's buffers are as they were."""
    if torch.compiler.is_compiling():
        return call(x)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        return call(x)
    except Exception:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        raise


def _as_it_was(make_reference: Callable[[], nn.Module], module: nn.Module, past: Past, stand_in: StandIn) -> nn.Module:
    """The reference block around a branch that is as it was when the block was called."""
    block = make_reference()
    (name,) = [name for name, child in block._modules.items() if child is module]
    block._modules[name] = past.restored(stand_in)
    return block
