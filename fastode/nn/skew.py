"""The fused twins of the skew-symmetric blocks: the same constructors, parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks, reference
from ..branch.read import is_overridden, read
from ..branch.snapshot import Past
from ..dispatch import bare, choice
from ..dispatch.engines import AUTO, NAMES, REFERENCE, is_reference
from ..dispatch.known import Known, kind_of_call, known
from ..dispatch.linear import LinearField, evaluate_linear, read_linear, solve_linear
from ..dispatch.registry import reference_of, register
from ..dispatch.skew import Field, evaluate, read_field, repeated, solve, solve_adaptive, solve_adaptive_from_x
from ..ops import function
from ..ops.engine import Call, Engine
from ..ops.plan import MaybeTensors
from ..ops.rerun import StandIn
from ..ops.schemes.skew_pair.linear import Linear
from ..ops.schemes.skew_pair.march import March
from ..ops.schemes.skew_pair.pair import Pair
from ..reference.adaptive import State
from ..reference.skew import PADDING
from ..reference.solvers import solve as solve_plain
from ..reference.solvers import solve_fixed, without_time
from ..solver import PARTS, Solver
from ..tableau import Butcher
from .base import Fused, Opaque, note

__all__ = ["SOBlock", "SOClassifier", "SkewLinear", "SkewPair"]

_NORMS = ("pre_norm_y", "pre_norm_z", "post_norm_y", "post_norm_z")


@register(reference.SkewPair)
class SkewPair(Fused, reference.SkewPair):
    __doc__ = reference.SkewPair.__doc__

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return _read(self).call("skew_pair", "", inputs)

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        found = _known(self)
        kind = _kind(found, ("pair", self.engine), y, z)
        answer: tuple[Engine, Pair | bare.PairFunction | None, MaybeTensors] | None = None
        if kind is not None:
            answer = found.answer(kind)
        if answer is None:
            checks.engine(self.engine, NAMES)
            checks.skew_pair(y, z, self.weight, self.stride, PADDING)
            checks.same_device(y, found.reading.tensors, "y")
            call = found.reading.call("skew_pair", "", (y, z))
            chosen = choice.choose(self.engine, call, partial(_as_reference, self))
            if chosen is not REFERENCE:
                found.reading.check(y, z)
            answer = chosen, _pair_of(call), call.tensors
            if kind is not None:
                if chosen is REFERENCE and self.engine == AUTO and found.lasts(self):
                    answer = chosen, _bare(self, found.reading, y, z), call.tensors
                found.keep(kind, answer, call)
        chosen, pair, tensors = answer
        note(self, chosen)
        if chosen is REFERENCE or not isinstance(pair, Pair):
            if pair is not None and not isinstance(pair, Pair) and bare.usable():
                return pair(y, z)
            return super().forward(y, z)
        return evaluate(chosen, found.reading, pair, y, z, partial(_as_it_was, _past(found)), tensors)


@register(reference.SkewLinear)
class SkewLinear(Fused, reference.SkewLinear):
    __doc__ = reference.SkewLinear.__doc__

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        return _read(self).call("skew_linear", "", inputs)

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        found = _known(self)
        kind = _kind(found, ("linear", self.engine), y, z)
        answer: tuple[Engine, Linear | None, MaybeTensors] | None = None if kind is None else found.answer(kind)
        if answer is None:
            checks.engine(self.engine, NAMES)
            self.check_state(y, z)
            checks.same_device(y, found.reading.tensors, "y")
            call = found.reading.call("skew_linear", "", (y, z))
            chosen = choice.choose(self.engine, call, partial(_as_reference, self))
            answer = chosen, _linear_of(call), call.tensors
            if kind is not None:
                found.keep(kind, answer, call)
        chosen, linear, tensors = answer
        note(self, chosen)
        if chosen is REFERENCE or linear is None:
            return super().forward(y, z)
        return evaluate_linear(chosen, linear, y, z, partial(_as_it_was, _past(found)), tensors)


class _FusedSolve(Opaque, reference.SOBlock):
    """What SOBlock and SOClassifier share."""

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        reason = self._fault()
        return self._call(None if reason else _read(self.field), reason, inputs)

    def _call(self, reading: Field | LinearField | None, reason: str, inputs: tuple[Tensor, ...]) -> Call:
        """A call of the block around what was read of its field; without that, one for which there is a reason."""
        solver = self.settings
        exact = solver.is_adaptive and solver.gradient == "exact"  # the gradient goes through every step's size
        kind = "linear" if isinstance(self.field, reference.SkewLinear) else "skew"
        family = f"{kind}_{'adaptive' if solver.is_adaptive else 'solution'}"
        variant = f"by {solver.name} in {solver.steps} steps{' with the exact gradient' if exact else ''}"
        if reading is None:
            return Call(family, variant, None, (), inputs, reason)
        return reading.call(family, variant, inputs, len(solver.tableau.b), exact)

    def _fault(self) -> str:
        """Why the block cannot be fused because of its field, which must be one of ours as it is; empty if it is."""
        kind = type(self.field)
        if kind not in _FIELDS:
            return f"its field is a {kind.__name__}, and only SkewPair and SkewLinear are fused"
        if is_overridden(self.field):
            return "its field has hooks, which a fused solution would not call"
        if is_reference(getattr(self.field, "engine", AUTO)):
            return "its field is asked to run as the reference"
        return ""

    def forward(self, x: Tensor) -> Tensor:
        reason = self._fault()
        found = _known(self.field) if not reason else None
        settings = (self.engine, self.solver, *[getattr(self, name) for name in PARTS])
        kind = None if found is None else _kind(found, settings, x)
        answer: tuple[Engine, Pair | Linear | None, MaybeTensors, Solver, March | None] | None = None
        if found is not None and kind is not None:
            answer = found.answer(kind)
        if answer is None:
            checks.engine(self.engine, NAMES)
            if isinstance(self.field, reference.SkewPair | reference.SkewLinear):
                # Before an engine is chosen, so that the block refuses an input in its reference's own words.
                self.field.check_input(x)
            reading = None if found is None else found.reading
            if reading is not None:  # before an engine is chosen, which a trial may run
                checks.same_device(x, reading.tensors)
            call = self._call(reading, reason, (x,))
            chosen = choice.choose(self.engine, call, partial(_as_plain_solve, self))
            if chosen is not REFERENCE and reading is not None:
                reading.check_start(x)
            solver = self.settings
            answer = chosen, _field_of(call), call.tensors, solver, _march(solver)
            if found is not None and kind is not None:
                found.keep(kind, answer, call)
        chosen, program, tensors, solver, march = answer
        note(self, chosen)
        if self._takes_operators() and self._is_opaque(program, solver) and x.shape[0]:
            # As it begins, which refuses a wrong x, and has the shape in which it ends.
            y, _ = cast(Any, self.field).initial_state(x)
            return self._as_operator(x, y.shape, isinstance(program, Pair) and any(program.tracked))
        if chosen is REFERENCE or found is None or program is None:
            return super().forward(x)
        note(self.field, chosen)
        make: Callable[[StandIn], nn.Module] = partial(_as_it_was, _past(found))
        if march is not None:
            make = partial(_FixedSolution, _past(found), solver.tableau, solver.t1, solver.steps)
        if isinstance(program, Linear):
            return solve_linear(chosen, program, x, solver, self.in_words, make, tensors)
        if march is None:
            return self._adaptive(chosen, found.reading, program, solver, make, tensors, x)
        return solve(chosen, found.reading, program, x, march, make, tensors)

    def _is_opaque(self, program: Pair | Linear | None, solver: Solver) -> bool:
        """Whether a tracer may take the solution as an operator.

        Its steps must be chosen by the data, and all that it depends on must have been read, so that the compiler sees
        it change.
        """
        if not solver.is_adaptive:
            return False
        if program is not None:
            return True
        field = self.field
        if type(field) is not SkewLinear and type(field) is not reference.SkewLinear:
            return False
        return float(field.gamma) >= 0 and not is_overridden(field) and read(field.activation).units is not None

    def _adaptive(
        self,
        engine: Engine,
        field: Field,
        pair: Pair,
        solver: Solver,
        make: Callable[[StandIn], nn.Module],
        tensors: MaybeTensors,
        x: Tensor,
    ) -> Tensor:
        """By the engine's own steps where it has them, else with each evaluation as a call of it."""
        # A tracing compiler cannot follow steps that Python chooses by the data, nor "exact" sizes that it has read.
        together = not solver.per_sample and solver.gradient != "exact" and not torch.compiler.is_compiling()
        own = engine.skew_adaptive is not None and (engine.steps_inside or together)
        if own and x.shape[0]:
            words = self.in_words()
            if engine.solution_from_x:
                return solve_adaptive_from_x(engine.skew_adaptive, pair, x, solver, words, make, tensors).contiguous()
            return solve_adaptive(engine, field, pair, x, solver, words, make, tensors).contiguous()

        x = function.savable(x)

        def slopes(_: Any, state: State) -> State:
            y, z = state
            found = evaluate(engine, field, pair, _to_front(y), _to_front(z), make, tensors)
            return _to_back(found[0]), _to_back(found[1])

        # torchdiffeq flattens its state: as [N, H, W, C], so that the field finds it in its own memory format.
        back = (_to_back(repeated(x, field.weight.shape[0], field.stride)), _to_back(x))
        end, _ = solve_plain(slopes, back, solver, self)
        return _to_front(end).contiguous()


@register(reference.SOBlock)
class SOBlock(_FusedSolve):
    __doc__ = reference.SOBlock.__doc__


@register(reference.SOClassifier)
class SOClassifier(_FusedSolve, reference.SOClassifier):
    __doc__ = reference.SOClassifier.__doc__


# The fields whose solution is fused, and the reference of each.
_FIELDS: dict[type[nn.Module], type[nn.Module]] = {
    kind: plain
    for fused, plain in ((SkewPair, reference.SkewPair), (SkewLinear, reference.SkewLinear))
    for kind in (fused, plain)
}


class _FixedSolution(nn.Module):
    """The reference solution by fixed steps, as a function of the initial state or of x, which gives one."""

    def __init__(self, field: Past | None, scheme: Butcher, t1: float, steps: int, stand_in: StandIn) -> None:
        super().__init__()
        self.field: Any = _as_it_was(field, stand_in)
        self.scheme, self.t1, self.steps = scheme, t1, steps

    def forward(self, *state: Tensor) -> Tensor:
        y, z = state if len(state) == 2 else self.field.initial_state(*state)
        return solve_fixed(without_time(self.field), (y, z), self.scheme, self.t1, self.steps)[0]


def _march(solver: Solver) -> March | None:
    """The equal steps of a solver; none where its steps are by error."""
    scheme = solver.tableau
    return None if solver.is_adaptive else March(scheme.a, scheme.b, solver.t1 / solver.steps, solver.steps)


def _bare(pair: SkewPair, reading: Field, y: Tensor, z: Tensor) -> bare.PairFunction | None:
    """A pair that is left to PyTorch, as its functions; None where it is to be called."""
    if reading.reason or not bare.takes(y, z):
        return None
    return bare.pair_of(pair, y.shape, z.shape)


def _as_reference(field: Any) -> nn.Module:
    """A reference field around the same parameters and modules."""
    twin: nn.Module = copy.copy(field)
    twin.__class__ = _FIELDS[type(field)]
    # A dictionary of its own: functional_call puts other tensors into it.
    twin.__dict__["_parameters"] = dict(field._parameters)
    return twin


def _past(found: Known[Field]) -> Past | None:
    """The field as it was when it was called; a tracer has no need of it."""
    return None if found.snapshot is None else found.snapshot.past


def _as_it_was(past: Past | None, stand_in: StandIn) -> nn.Module:
    """A reference field that is as the field was when it was called."""
    assert past is not None
    twin = past.restored(stand_in)
    twin.__class__ = _FIELDS[type(twin)]
    return twin


def _as_plain_solve(block: Any) -> nn.Module:
    """A reference block around the same field."""
    twin = copy.copy(block)
    twin.__class__ = reference_of(type(block)) or type(block)
    twin.__dict__["_modules"] = {**block._modules, "field": _as_reference(block.field)}
    return twin


def _field_of(call: Call) -> Pair | Linear | None:
    assert call.program is None or isinstance(call.program, Pair | Linear)
    return call.program


def _pair_of(call: Call) -> Pair | None:
    assert call.program is None or isinstance(call.program, Pair)
    return call.program


def _linear_of(call: Call) -> Linear | None:
    assert call.program is None or isinstance(call.program, Linear)
    return call.program


def _known(field: Any) -> Known[Any]:
    if torch.compiler.is_compiling():
        return Known(None, _read(field))
    return known(field, lambda: _read(field))


def _kind(found: Known[Field], settings: tuple[Any, ...], *inputs: Any) -> Any:
    """What a call's answer is kept under; None where it is not kept."""
    if torch.compiler.is_compiling() or not all(isinstance(x, Tensor) for x in inputs):
        return None
    return kind_of_call(settings, inputs, found.reading)


def _read(field: Any) -> Field | LinearField:
    if isinstance(field, reference.SkewLinear):
        linear = read_linear(
            [field.weight, field.bias_y, field.bias_z], field.gamma, field.activation, field.released, field.initial
        )
        if [name for name in ("weight", "bias_y", "bias_z") if name not in field._parameters]:
            linear.reason = "its weight and biases are not parameters of its own."
        return linear
    norms = [getattr(field, name) for name in _NORMS]
    found = read_field(field.weight, field.stride, PADDING, field.gamma, field.activation, norms, _NORMS)
    if "weight" not in field._parameters:
        found.reason = "its weight is not a parameter of its own."
    return found


def _to_back(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def _to_front(x: Tensor) -> Tensor:
    """[N, H, W, C] as [N, C, H, W]."""
    return x.permute(0, 3, 1, 2)
