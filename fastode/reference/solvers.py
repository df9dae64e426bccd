"""ODE blocks in plain PyTorch: a field on a pair (y, z), solved from its initial state to time t₁."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..tableau import EULER_RK, MIDPOINT_RK, RK4_38, Butcher
from .skew import SkewLinear

__all__ = ["SOBlock", "SOClassifier"]

FIXED: dict[str, Butcher] = {"euler": EULER_RK, "midpoint": MIDPOINT_RK, "rk4": RK4_38}
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")  # torchdiffeq's names

State = tuple[Tensor, Tensor]
Slope = Callable[[Tensor, Tensor], State]


class SOBlock(nn.Module):
    """The block that maps x to y(t₁), where (y, z) solves the field's equation from its initial state.

    The derivative is that of the steps taken (discretise, then differentiate), not the continuous adjoint's.

    Args:
        field: a module with `initial_state(x)` -> (y, z) and `forward(y, z)` -> (ẏ, ż), as SkewPair and SkewLinear are.
        solver: "euler", "midpoint" or "rk4" (the 3/8 rule) in equal steps, or one of torchdiffeq's adaptive "dopri5",
            "dopri8", "bosh3", "fehlberg2", "adaptive_heun".
        rtol: relative tolerance > 0 of an adaptive solver.
        atol: absolute tolerance > 0 of an adaptive solver.
        t1: t₁ > 0, a dimensionless time.
        steps: how many equal steps a fixed-step solver takes.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, what the field raises for x.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3,
        Section 4 and Table 2 (paper 003).

    Example:
        >>> from fastode.reference import SkewPair
        >>> block = SOBlock(SkewPair(3, 8, stride=2), solver="rk4", steps=2)
        >>> block(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 8, 2, 2])
    """

    def __init__(
        self,
        field: nn.Module,
        solver: str = "dopri5",
        rtol: float = 0.1,
        atol: float = 0.1,
        t1: float = 1.0,
        steps: int = 1,
    ) -> None:
        super().__init__()
        checks.module("field", field)
        if not callable(getattr(field, "initial_state", None)):
            raise TypeError(f"field must be a module with initial_state(x), as SkewPair is, got {checks.what(field)}")
        checks.solver(solver, (*FIXED, *ADAPTIVE))
        checks.step_size(rtol, "rtol")
        checks.step_size(atol, "atol")
        checks.step_size(t1, "t1")
        checks.steps(steps)
        self.field = field
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.t1 = t1
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        state: State = cast(Any, self.field).initial_state(x)
        if self.solver in FIXED:
            return solve_fixed(self.field, state, FIXED[self.solver], self.t1, self.steps)[0]
        return solve_adaptive(self.field, state, self.solver, self.rtol, self.atol, self.t1)[0]

    def extra_repr(self) -> str:
        if self.solver in FIXED:
            return f"solver={self.solver!r}, t1={self.t1}, steps={self.steps}"
        return f"solver={self.solver!r}, rtol={self.rtol}, atol={self.atol}, t1={self.t1}"


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

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, x is no such matrix.

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
        solver: str = "dopri5",
        rtol: float = 0.1,
        atol: float = 0.1,
        t1: float = 1.0,
        steps: int = 1,
    ) -> None:
        field = SkewLinear(in_features, num_classes, gamma, activation, released)
        super().__init__(field, solver, rtol, atol, t1, steps)


def solve_fixed(field: Slope, state: State, scheme: Butcher, t1: float, steps: int) -> State:
    """The state at t₁ after equal steps of an explicit Runge–Kutta scheme.

    Args:
        field: maps (y, z) to (ẏ, ż).
        state: (y, z) at time 0.
        scheme: its Butcher tableau.
        t1: t₁, dimensionless.
        steps: how many steps.

    Returns:
        (y, z) at t₁.
    """
    step = t1 / steps
    for _ in range(steps):
        slopes: list[State] = []
        for row in scheme.a:
            slopes.append(field(*_advance(state, slopes, row, step)))
        state = _advance(state, slopes, scheme.b, step)
    return state


def solve_adaptive(field: Slope, state: State, solver: str, rtol: float, atol: float, t1: float) -> State:
    """The state at t₁ by one of torchdiffeq's adaptive solvers.

    Args:
        field: maps (y, z) to (ẏ, ż).
        state: (y, z) at time 0.
        solver: torchdiffeq's name of it.
        rtol: relative tolerance.
        atol: absolute tolerance.
        t1: t₁, dimensionless.

    Returns:
        (y, z) at t₁.
    """
    if state[0].shape[0] == 0:
        # An empty batch has no error to choose a step by; one step of Euler gives its result and its graph.
        return solve_fixed(field, state, EULER_RK, t1, 1)
    if torch.compiler.is_compiling():  # an adaptive solver chooses its steps by the data
        return torch.compiler.disable(_odeint)(field, state, solver, rtol, atol, t1)
    return _odeint(field, state, solver, rtol, atol, t1)


def _odeint(field: Slope, state: State, solver: str, rtol: float, atol: float, t1: float) -> State:
    # Only adaptive solvers need it, and importing it takes a second.
    from torchdiffeq import odeint

    times = torch.tensor([0.0, t1], device=state[0].device)
    y, z = odeint(lambda _, pair: field(*pair), state, times, rtol=rtol, atol=atol, method=solver)
    return y[-1], z[-1]


def _advance(state: State, slopes: Sequence[State], row: Sequence[float], step: float) -> State:
    """state + step Σ row_j slopes_j."""
    y, z = state
    for coefficient, (dy, dz) in zip(row, slopes, strict=True):
        if coefficient:
            y, z = torch.add(y, dy, alpha=step * coefficient), torch.add(z, dz, alpha=step * coefficient)
    return y, z
