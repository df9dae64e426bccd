"""Steps by error, as the solutions of every kind of equation take them: the control, and the interpolant as weights.

Derivation: README.md of skew_pair, "Steps by error"; equation (6) is cited from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...reference import adaptive
from ...solver import Solver
from ...steps import Watch
from ...tableau import Embedded

State = TypeVar("State", bound=tuple[Tensor, ...])
Made = TypeVar("Made")


@dataclass
class Steps:
    """The steps that a solve took, filled by its forward; a backward that is differentiated takes them again.

    Attributes:
        sizes: of the accepted steps, from the first.
        at: the part of the last one at which t₁ lies.
        first_stayed: whether the first attempt was accepted, so that its size depends on the input.
    """

    sizes: list[float] = field(default_factory=list)
    at: float = 1.0
    first_stayed: bool = False


@dataclass(frozen=True)
class Attempt(Generic[State, Made]):
    """What an attempt of a step came to.

    Attributes:
        end: the state at the step's end.
        norms: of the error in units of its tolerance, the largest of which is ρ; read back to the host.
        made: what else it left.
        is_finite: whether the end is, where the norms do not tell.
    """

    end: State
    norms: Sequence[float]
    made: Made
    is_finite: bool = True


def solve_by_error(
    solver: Solver,
    watch: Watch,
    steps: Steps,
    state: State,
    size: float,
    attempt: Callable[[State, float, float, float], Attempt[State, Made]],
    accept: Callable[[Made], None],
) -> tuple[State, float]:
    """Attempts until t₁ is passed: the state at the last step's start, and that step's size.

    Args:
        solver: how.
        watch: is told every attempt.
        steps: is told every accepted one.
        state: at time 0.
        size: of the first attempt.
        attempt: makes one, from a state, its size as a stage sees it, and its start and end in time.
        accept: is given what an attempt left that is accepted.

    Raises:
        SolveError: the solve cannot go on.
    """
    t, attempts, order = 0.0, 0, solver.tableau.order
    while solver.max_steps is None or attempts < solver.max_steps:
        attempts += 1
        watch.attempt(t, size, state)
        if not (math.isfinite(size) and t + size > t):
            watch.fail_at_step()
        step = rounded(size, state[0].dtype)
        tried = attempt(state, step, t, t + size)
        ratio = max(tried.norms)
        if math.isnan(ratio) and not all(bool(torch.isfinite(u).all()) for u in state):
            watch.fail_at_step()
        watch.judged(ratio, ratio <= 1)
        if ratio <= 1:
            if not steps.sizes:
                steps.first_stayed = attempts == 1
            steps.sizes.append(step)
            accept(tried.made)
            if t + size >= solver.t1:
                watch.finish()
                steps.at = (solver.t1 - t) / size
                return state, step
            t, state = t + size, tried.end
            if not (tried.is_finite and all(map(math.isfinite, tried.norms))):
                watch.attempt(t, size, state)
                watch.fail_at_step()
        size *= adaptive.next_factor(ratio, order)
    watch.fail_at_most()


def decides(ratio: float, order: int) -> bool:
    """Whether an error ratio decides by how much the next step is longer, and no bound does."""
    return ratio != 0 and adaptive.next_factor(ratio, order) == adaptive.SAFETY / ratio ** (1 / order)


def through_first(solver: Solver, steps: Steps) -> bool:
    """Whether the gradient of a solve goes through the size of its first step."""
    return solver.gradient == "solver" and solver.first_step is None and steps.first_stayed


def retaken(slope: adaptive.Slope, state: adaptive.State, solver: Solver, steps: Steps) -> adaptive.State:
    """The reference's u(t₁) by the steps that a solve took, the first one's size chosen again where it counts.

    Args:
        slope: as `reference.adaptive.integrate` takes it.
        state: at time 0.
        solver: how, with the gradient "solver" or "constant".
        steps: what the solve took.
    """
    first = slope(torch.zeros((), dtype=state[0].dtype, device=state[0].device), state)
    sizes = [torch.tensor(size, dtype=torch.float64, device=state[0].device) for size in steps.sizes]
    if through_first(solver, steps):
        sizes[0] = adaptive.first_step(slope, state, first, solver.tableau.order, solver)
    return adaptive.retaken(slope, state, first, sizes, solver)


def rounded(value: float, dtype: torch.dtype) -> float:
    """A time as a stage sees it."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def interpolating(tableau: Embedded, x: float) -> list[float]:
    """(6): the weights with which the interpolant at the part x of a step is y + h Σ weights_j k_j."""
    return _quartic(tableau, (x**4, x**3, x**2, x))


def interpolating_rates(tableau: Embedded, x: float) -> list[float]:
    """The derivatives of those weights in x."""
    return _quartic(tableau, (4 * x**3, 3 * x**2, 2 * x, 1.0))


def _quartic(tableau: Embedded, powers: tuple[float, float, float, float]) -> list[float]:
    p4, p3, p2, p1 = powers
    end, mid = -8 * p4 + 14 * p3 - 5 * p2, 16 * p4 - 32 * p3 + 16 * p2
    weights = [end * b + mid * m for b, m in zip(tableau.b, tableau.b_mid, strict=True)]
    weights[0] += -2 * p4 + 5 * p3 - 4 * p2 + p1
    weights[-1] += 2 * p4 - 3 * p3 + p2
    return weights
