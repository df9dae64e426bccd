"""ODE blocks in plain PyTorch: a field, solved from its initial state to time t₁."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..solver import ADAPTIVE, PARTS, Solver, solver_of
from ..steps import Watch
from ..tableau import EULER_RK, Butcher
from .adaptive import Slope, State, integrate, rms
from .blocks import unshared
from .faults import call_repaired
from .skew import SkewLinear
from .timed import at_time

__all__ = ["ODEBlock", "SOBlock", "SOClassifier"]

# How torchdiffeq's assertions about a solve that cannot go on begin.
_ATTEMPTS = "max_num_steps exceeded"
_STEP = ("underflow in dt", "non-finite values in state")


class _Solution(nn.Module):
    """What the blocks share: a field, and the parts of a `Solver`, which may be changed between calls."""

    solver: str | Butcher
    rtol: float
    atol: float
    t1: float
    steps: int
    gradient: str
    per_sample: bool
    max_steps: int | None
    first_step: float | None

    def __init__(
        self,
        field: nn.Module,
        solver: str | Butcher | Solver = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        t1: float | None = None,
        steps: int | None = None,
        gradient: str | None = None,
        per_sample: bool | None = None,
        max_steps: int | None = None,
        first_step: float | None = None,
    ) -> None:
        super().__init__()
        self._check_field(field)
        parts = (rtol, atol, t1, steps, gradient, per_sample, max_steps, first_step)
        settings = solver_of(solver, dict(zip(PARTS, parts, strict=True)))
        self.field = field
        self.solver = settings.method
        for name in PARTS:
            setattr(self, name, getattr(settings, name))

    def _check_field(self, field: Any) -> None:
        checks.module("field", field)

    @property
    def settings(self) -> Solver:
        """How the block is solved, from its attributes as they are now."""
        return Solver(self.solver, **{name: getattr(self, name) for name in PARTS})

    def in_words(self) -> str:
        """The block, as an error and a log name it."""
        details = self.field.extra_repr()
        return f"{type(self).__name__} on {type(self.field).__name__}{f'({details})' if details else ''}"

    def extra_repr(self) -> str:
        settings = self.settings
        words = [f"solver={settings.name!r}"]
        adaptive = ("rtol", "atol", "t1", "gradient", "per_sample", "max_steps", "first_step")
        for name in adaptive if settings.is_adaptive else ("t1", "steps"):
            value = getattr(settings, name)
            if name in ("rtol", "atol", "t1", "steps") or value != getattr(Solver, name):
                words.append(f"{name}={value!r}")
        return ", ".join(words)


class SOBlock(_Solution):
    """The block that maps x to y(t₁), where (y, z) solves the field's equation from its initial state.

    The derivative is that of the steps taken (discretise, then differentiate), not the continuous adjoint's.

    Args:
        field: a module with `initial_state(x)` -> (y, z) and `forward(y, z)` -> (ẏ, ż), as SkewPair and SkewLinear are.
        solver: a `fastode.Solver`, or its method: "euler", "midpoint" or "rk4" (the 3/8 rule) in equal steps, one of
            torchdiffeq's adaptive "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", or a tableau.
        rtol: relative tolerance > 0 of an adaptive method; this and what follows None for Solver's own, here 0.1.
        atol: absolute tolerance > 0 of an adaptive method; 0.1.
        t1: t₁ > 0, a dimensionless time; 1.
        steps: how many equal steps a method without error control takes; 1.
        gradient: "solver", "constant" or "exact", as in Solver.
        per_sample: whether every sample takes steps of its own, as in Solver.
        max_steps: most attempts of an adaptive solve, as in Solver.
        first_step: size of an adaptive method's first step, as in Solver.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, what the field raises for x.
        SolveError: at a call, the solve cannot go on; it says where, and what to try.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3,
        Section 4 and Table 2 (paper 003).

    Example:
        >>> from fastode.reference import SkewPair
        >>> block = SOBlock(SkewPair(3, 8, stride=2), solver="rk4", steps=2)
        >>> block(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 8, 2, 2])
    """

    def _check_field(self, field: Any) -> None:
        super()._check_field(field)
        if not callable(getattr(field, "initial_state", None)):
            raise TypeError(f"field must be a module with initial_state(x), as SkewPair is, got {checks.what(field)}")

    def forward(self, x: Tensor) -> Tensor:
        state: State = cast(Any, self.field).initial_state(x)
        return solve(without_time(self.field), state, self.settings, self)[0]


class SOClassifier(SOBlock):
    """The classification block: SOBlock on SkewLinear, from features [N, in_features] to logits [N, num_classes].

    Args:
        in_features: pooled features.
        num_classes: logits.
        gamma: γ ≥ 0, the damping.
        activation: as in SkewPair.
        released: True takes the released code's field and y(0) = 0.1, as in SkewLinear; the paper has y(0) = 1.
        solver: as in SOBlock.
        rtol: as in SOBlock.
        atol: as in SOBlock.
        t1: as in SOBlock.
        steps: as in SOBlock.
        gradient: as in SOBlock.
        per_sample: as in SOBlock.
        max_steps: as in SOBlock.
        first_step: as in SOBlock.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, x is no such matrix.
        SolveError: as in SOBlock.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients",
        Section 4 (paper 003).

    Example:
        >>> SOClassifier(8, 3, solver="euler")(torch.zeros(2, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        gamma: float = 0.0,
        activation: str | Callable[[], nn.Module] = "leaky_relu",
        released: bool = False,
        solver: str | Butcher | Solver = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        t1: float | None = None,
        steps: int | None = None,
        gradient: str | None = None,
        per_sample: bool | None = None,
        max_steps: int | None = None,
        first_step: float | None = None,
    ) -> None:
        field = SkewLinear(in_features, num_classes, gamma, activation, released)
        super().__init__(field, solver, rtol, atol, t1, steps, gradient, per_sample, max_steps, first_step)


class ODEBlock(_Solution):
    """The block that maps x to u(t₁), where u' = f(t, u) from u(0) = x: a Neural ODE.

    The derivative is that of the steps taken (discretise, then differentiate), not the continuous adjoint's.

    Args:
        field: f: any branch that keeps the shape of its input. In an nn.Sequential the layers that see the time, as
            `TimeConv2d` does, are given it; hooks of such a Sequential itself are not called. A module of your own that
            is to be called with (t, u) has an attribute `sees_time` that is true.
        solver: as in SOBlock.
        rtol: as in SOBlock.
        atol: as in SOBlock.
        t1: as in SOBlock.
        steps: as in SOBlock.
        gradient: as in SOBlock.
        per_sample: as in SOBlock.
        max_steps: as in SOBlock.
        first_step: as in SOBlock.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, f returns another shape than u has.
        SolveError: as in SOBlock.

    Source: Chen et al., "Neural Ordinary Differential Equations", 2018, as papers 002 and 003 take it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastode.reference import TimeConv2d
        >>> block = ODEBlock(nn.Sequential(nn.ReLU(), TimeConv2d(2, 2, padding=1)), solver="rk4")
        >>> block(torch.ones(1, 2, 4, 4)).shape
        torch.Size([1, 2, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x)
        return solve(self._slope, (x,), self.settings, self)[0]

    def _slope(self, t: Any, state: State) -> State:
        (u,) = state
        out = call_repaired(partial(at_time, self.field, t), (self.field,), unshared(u, self.field))
        if not isinstance(out, Tensor):
            raise TypeError(f"field must be a map to the shape {list(u.shape)}, got {checks.what(out)} from it")
        if out.shape != u.shape:
            raise ValueError(f"field must be a map to the shape {list(u.shape)}, got an output of {list(out.shape)}")
        return (out,)


def solve(slope: Slope, state: State, solver: Solver, block: _Solution) -> State:
    """The state at t₁.

    Args:
        slope: maps a time and a state to the state's derivative.
        state: tensors [N, ...] at time 0.
        solver: how.
        block: whose solution it is.

    Returns:
        The tensors at t₁.

    Raises:
        SolveError: an adaptive solve cannot go on.
        ValueError: each sample is to be solved alone and the block's field lets them see each other.
    """
    if not solver.is_adaptive:
        return solve_fixed(slope, state, solver.tableau, solver.t1, solver.steps)
    if solver.per_sample:
        _check_alone(block.field)
    if state[0].shape[0] == 0:
        # An empty batch has no error to choose a step by; one step of Euler gives its result and its graph.
        return solve_fixed(slope, state, EULER_RK, solver.t1, 1)
    if torch.compiler.is_compiling():  # an adaptive solver chooses its steps by the data
        return torch.compiler.disable(_solve_adaptive)(slope, state, solver, block)
    return _solve_adaptive(slope, state, solver, block)


def solve_fixed(slope: Slope, state: State, scheme: Butcher, t1: float, steps: int) -> State:
    """The state at t₁ after equal steps of an explicit Runge–Kutta scheme.

    Args:
        slope: maps a time and a state to the state's derivative.
        state: tensors at time 0.
        scheme: its Butcher tableau.
        t1: t₁, dimensionless.
        steps: how many steps.

    Returns:
        The tensors at t₁.
    """
    step = t1 / steps
    for i in range(steps):
        slopes: list[State] = []
        for row, c in zip(scheme.a, scheme.nodes, strict=True):
            slopes.append(slope((i + c) * step, _advance(state, slopes, row, step)))
        state = _advance(state, slopes, scheme.b, step)
    return state


def without_time(field: Callable[..., State]) -> Slope:
    """A field of the tensors of a state as a slope."""
    return lambda _, state: field(*state)


def _advance(state: State, slopes: Sequence[State], row: Sequence[float], step: float) -> State:
    """state + step Σ row_j slopes_j."""
    for coefficient, slope in zip(row, slopes, strict=True):
        if coefficient:
            state = tuple(torch.add(u, k, alpha=step * coefficient) for u, k in zip(state, slope, strict=True))
    return state


def _check_alone(field: nn.Module) -> None:
    for name, module in field.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                "per_sample must be False where samples see each other, got a batch norm in training mode as the "
                f"field's {name or 'whole'}"
            )


def _solve_adaptive(slope: Slope, state: State, solver: Solver, block: _Solution) -> State:
    if not solver.per_sample:
        return _solve_together(slope, state, solver, Watch(block.in_words(), solver))
    ends = []
    for i in range(state[0].shape[0]):
        alone = tuple(u[i : i + 1] for u in state)
        ends.append(_solve_together(slope, alone, solver, Watch(block.in_words(), solver, sample=i)))
    return tuple(torch.cat(tensors) for tensors in zip(*ends, strict=True))


def _solve_together(slope: Slope, state: State, solver: Solver, watch: Watch) -> State:
    def counted(t: Any, state: State) -> State:
        watch.evaluations += 1
        return slope(t, state)

    # The gradient that goes through the first step's size alone is torchdiffeq's own, and so are these methods.
    if solver.gradient == "solver" and ADAPTIVE.get(solver.name) == solver.tableau:
        return _odeint(counted, state, solver, watch)
    return integrate(counted, state, solver, watch)


def _odeint(slope: Slope, state: State, solver: Solver, watch: Watch) -> State:
    # Only adaptive solvers need it, and importing it takes a second.
    from torchdiffeq import odeint

    options: dict[str, Any] = {"norm": (driven := _Driven(slope, watch)).norm}
    if solver.max_steps is not None:
        options["max_num_steps"] = solver.max_steps
    if solver.first_step is not None:
        options["first_step"] = solver.first_step
    times = torch.tensor([0.0, solver.t1], dtype=torch.float64, device=state[0].device)
    tolerances = {"rtol": solver.rtol, "atol": solver.atol}
    try:
        ends = odeint(driven, state, times, method=solver.name, options=options, **tolerances)
    except AssertionError as error:
        _translate(error, watch)
    watch.finish()
    return tuple(u[-1] for u in ends)


class _Driven:
    """A slope that torchdiffeq calls, which also tells it every attempt and asks it for the norm of a state."""

    def __init__(self, slope: Slope, watch: Watch) -> None:
        self.slope, self.watch = slope, watch

    def __call__(self, t: Tensor, state: State) -> State:
        return self.slope(t, state)

    def norm(self, values: State) -> Tensor:
        """torchdiffeq's own; the last one before it judges an attempt is the attempt's error ratio."""
        self.last = rms(values)
        return self.last

    def callback_step(self, t: Tensor, state: State, h: Tensor) -> None:
        # torchdiffeq puts 0 in the place of a size that is not finite; no other one is 0.
        self.watch.attempt(t, h.where(h != 0, torch.nan), state)

    def callback_accept_step(self, t: Tensor, state: State, h: Tensor) -> None:
        self.watch.judged(self.last, True)

    def callback_reject_step(self, t: Tensor, state: State, h: Tensor) -> None:
        self.watch.judged(self.last, False)


def _translate(error: AssertionError, watch: Watch) -> NoReturn:
    words = str(error)
    if words.startswith(_ATTEMPTS):
        watch.fail_at_most()
    if words.startswith(_STEP):
        watch.fail_at_step()
    raise error
