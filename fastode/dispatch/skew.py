"""How a skew pair and its solution run: the field is read, an engine is chosen and called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .. import checks
from ..branch.layers import Activation
from ..branch.read import Reading, is_overridden, read
from ..ops import function
from ..ops.engine import Call, Engine, autocast_dtype
from ..ops.maps import is_channels_last
from ..ops.plan import TENSORS_PER_NORM, MaybeTensor, MaybeTensors
from ..ops.rerun import Rerun, StandIn
from ..ops.schemes import by_error
from ..ops.schemes.by_error import Steps
from ..ops.schemes.skew_pair.linear import Linear
from ..ops.schemes.skew_pair.march import March
from ..ops.schemes.skew_pair.pair import Pair
from ..reference.adaptive import first_step, integrate, retaken
from ..solver import Solver
from ..steps import Watch
from .running import update_running


@dataclass
class Field:
    """A skew pair as it was read: its constants but for autocast, its tensors, and why it cannot be fused, if so.

    `norms` holds, as a `Pair` orders them, what the reader found of the norms before W on y and z and after σ on each.
    """

    weight: Tensor
    stride: int
    padding: int
    gamma: float
    activation: Activation | None
    norms: list[Reading]
    reason: str = ""

    @property
    def tensors(self) -> list[MaybeTensor]:
        """W's weight and then four tensors of each norm, as the engines take them."""
        rows = (reading.tensors or [None] * TENSORS_PER_NORM for reading in self.norms)
        return [self.weight, *(tensor for row in rows for tensor in row[:TENSORS_PER_NORM])]

    def call(
        self, family: str, variant: str = "", inputs: tuple[Tensor, ...] = (), stages: int = 1, exact: bool = False
    ) -> Call:
        """A call of a block around this field, as an engine is asked about it."""
        program = None if self.reason else self.pair(autocast_dtype(inputs[0]) if inputs else None)
        return Call(family, variant, program, self.tensors, inputs, self.reason, stages, exact=exact)

    def pair(self, lower: torch.dtype | None) -> Pair:
        """The constants under autocast to `lower`."""
        norms = [reading.units[0].norm if reading.units else None for reading in self.norms]
        tracked = [any(norm is not None for norm in reading.norms) for reading in self.norms]
        return Pair(
            self.stride,
            self.padding,
            float(self.gamma),
            self.activation,
            (norms[0], norms[1], norms[2], norms[3]),
            (tracked[0], tracked[1], tracked[2], tracked[3]),
            lower,
        )

    def check_start(self, x: Tensor) -> None:
        """Refuse what the norms would refuse of the state that x gives, before anything runs."""
        self.check(x[:, :1, :: self.stride, :: self.stride].expand(-1, self.weight.shape[0], -1, -1), x)

    def check(self, y: Tensor, z: Tensor) -> None:
        """Refuse what the norms would refuse, before anything runs."""
        for reading, x in zip(self.norms, (y, z, y, z), strict=True):
            checks.enough_values(reading, x.shape)

    def update_running(self, statistics: Sequence[Tensor], y: Tensor, z: Tensor) -> None:
        """Update running statistics: `statistics` holds one entry of each tracked norm for each evaluation."""
        if not statistics:
            return
        pairs = zip(self.norms, (y, z, y, z), strict=True)
        tracked = [(reading, x) for reading, x in pairs if any(norm is not None for norm in reading.norms)]
        for index, (reading, x) in enumerate(tracked):
            update_running(reading, statistics[index :: len(tracked)], x)


def read_field(
    weight: Tensor,
    stride: int,
    padding: int,
    gamma: float,
    activation: nn.Module | None,
    norms: Sequence[nn.Module] = (),
    names: Sequence[str] = (),
) -> Field:
    """Read a pair with σ = activation (None for the identity) and either four norms with their names, or none."""
    field = Field(weight, stride, padding, gamma, None, [Reading(())] * 4)
    field.activation, field.reason = read_activation(activation)
    for index, (name, norm) in enumerate(zip(names, norms, strict=True)):
        if type(norm) is nn.Identity and not is_overridden(norm):
            continue
        reading = field.norms[index] = read(norm, name)
        if reading.units is None:
            field.reason = reading.reason
        elif len(reading.units) > 1 or reading.units[0].activation is not None or reading.units[0].conv is not None:
            field.reason = f"its {name} is more than one norm layer."
    updated = [norm.running_mean for reading in field.norms for norm in reading.norms if norm is not None]
    if len({id(mean) for mean in updated}) < len(updated):
        field.reason = "two of its norms update the same running statistics."
    return field


def read_activation(activation: nn.Module | None) -> tuple[Activation | None, str]:
    """A module as one activation, None for the identity, and why it cannot be read as one; empty if it can."""
    if activation is None or (type(activation) is nn.Identity and not is_overridden(activation)):
        return None, ""
    reading = read(activation, "activation")
    if reading.units is None:
        return None, reading.reason
    if len(reading.units) > 1 or reading.units[0].norm is not None or reading.units[0].conv is not None:
        return None, "its activation is more than one activation layer."
    return reading.units[0].activation, ""


def evaluate(
    engine: Engine,
    field: Field,
    pair: Pair,
    y: Tensor,
    z: Tensor,
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> tuple[Tensor, Tensor]:
    """The slopes at (y, z), by an engine that can run the field; `tensors` are the field's."""
    dy, dz, *statistics = function.call(
        engine.skew_pair, (pair, rerun_of(make_reference, 2, tensors)), (y, z, *tensors)
    )
    field.update_running(statistics, y, z)
    return dy, dz


def solve(
    engine: Engine,
    field: Field,
    pair: Pair,
    x: Tensor,
    steps: March,
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> Tensor:
    """y at the end of equal steps from the state that x gives; `tensors` are the field's."""
    inputs: tuple[Tensor, ...] = (x,)
    if not engine.solution_from_x:
        inputs = (repeated(x, field.weight.shape[0], field.stride), x)
    rerun = rerun_of(make_reference, len(inputs), tensors)
    end, *statistics = function.call(engine.skew_solution, (pair, steps, rerun), (*inputs, *tensors))
    if statistics:
        field.update_running(statistics, inputs[0], x)
    return end if engine.solution_from_x or is_channels_last(x) else end.contiguous()


def solve_adaptive(
    engine: Engine,
    field: Field,
    pair: Pair,
    x: Tensor,
    solver: Solver,
    block: str,
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> Tensor:
    """y(t₁) with steps by error from the state that x gives, by an engine that has it; `tensors` are the field's.

    `block` names it in words.

    The first step's size is chosen by plain PyTorch around two evaluations, through which its gradient goes.
    """
    function_of_steps, tableau = engine.skew_adaptive, solver.tableau
    assert function_of_steps is not None
    watch = Watch(block, solver)
    x = function.savable(x)
    state = repeated(x, field.weight.shape[0], field.stride), x

    def slope(_: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        watch.evaluations += 1
        y, z = state
        return evaluate(engine, field, pair, y, z, make_reference, tensors)

    first = slope(None, state)
    with torch.set_grad_enabled(torch.is_grad_enabled() and solver.gradient == "solver"):
        if solver.first_step is None:
            h = first_step(slope, state, first, tableau.order, solver)
        else:
            h = torch.tensor(solver.first_step, dtype=torch.float64, device=x.device)
    steps = Steps()

    def make(stand_in: StandIn) -> nn.Module:
        return _Retaken(make_reference(stand_in), solver, steps)

    rerun = Rerun(make, 5, tensors)
    inputs = (*state, *first, h)
    constants = (pair, solver, watch, steps, rerun)
    end, *statistics = function.call(function_of_steps, constants, (*inputs, *tensors))
    field.update_running(statistics, *state)
    return end


def solve_adaptive_from_x(
    solution: type[Function] | None,
    program: Pair | Linear,
    x: Tensor,
    solver: Solver,
    block: str,
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> Tensor:
    """As `solve_adaptive`, by an engine's function that also chooses the first step's size, of each sample alone if so
    asked.
    """
    assert solution is not None
    if torch.compiler.is_compiling():
        (end,) = function.call(solution, (program, solver, (), (), None), (x, *tensors))
        return end
    x = function.savable(x)
    samples: list[int | None] = [*range(x.shape[0])] if solver.per_sample else [None]
    watches, steps = [Watch(block, solver, sample) for sample in samples], [Steps() for _ in samples]

    def make(stand_in: StandIn) -> nn.Module:
        return _RetakenFromX(make_reference(stand_in), solver, steps)

    rerun = Rerun(make, 1, tensors)
    (end,) = function.call(solution, (program, solver, watches, steps, rerun), (x, *tensors))
    return end


class _RetakenFromX(nn.Module):
    """The reference solution by the steps that solves have taken, those chosen again that the gradient goes through."""

    def __init__(self, field: Any, solver: Solver, steps: Sequence[Steps]) -> None:
        super().__init__()
        self.field, self.solver, self.steps = field, solver, steps

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(1) if self.solver.per_sample else (x,)
        return torch.cat([self._solution(part, steps) for part, steps in zip(parts, self.steps, strict=True)])

    def _solution(self, x: Tensor, steps: Steps) -> Tensor:
        def slope(_: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dy, dz = self.field(*state)
            return dy, dz

        state = self.field.initial_state(x)
        if self.solver.gradient == "exact":
            return integrate(slope, state, self.solver, Watch("", self.solver))[0]
        return by_error.retaken(slope, state, self.solver, steps)[0]


class _Retaken(nn.Module):
    """The reference solution by the steps that a solve has taken, the first one's size a tensor."""

    def __init__(self, field: nn.Module, solver: Solver, steps: Steps) -> None:
        super().__init__()
        self.field, self.solver, self.steps = field, solver, steps

    def forward(self, y: Tensor, z: Tensor, dy: Tensor, dz: Tensor, h: Tensor) -> Tensor:
        later = [torch.full_like(h, size) for size in self.steps.sizes]
        sizes = [h, *later[1:]] if self.steps.first_stayed else later
        return retaken(lambda _, state: self.field(*state), (y, z), (dy, dz), sizes, self.solver)[0]


def repeated(x: Tensor, channels: int, stride: int) -> Tensor:
    """y(0) of `SkewPair.initial_state`, in channels_last and in one pass, where torch.cat takes one for each copy."""
    if stride == 1 and channels == x.shape[1]:
        # A copy of x; no operator writes into its inputs, so it can be x.
        return x
    small = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).unsqueeze(3)  # [N, H, W, 1, C]
    copies = -(-channels // x.shape[1])
    spread = small.expand(-1, -1, -1, copies, -1).flatten(3)[..., :channels]
    return spread.contiguous().permute(0, 3, 1, 2)


def rerun_of(make_reference: Callable[[StandIn], nn.Module], inputs: int, tensors: MaybeTensors) -> Rerun | None:
    """What a backward that is differentiated runs again; none where no backward comes, or a tracer is at work."""
    needless = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return None if needless else Rerun(make_reference, inputs, tensors)
