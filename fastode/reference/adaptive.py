"""Adaptive Runge–Kutta solves in plain PyTorch, with torchdiffeq's step control and any of three derivatives.

The control is torchdiffeq 0.2's. Times are float64; inside a stage they have the state's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..solver import Solver
from ..steps import Watch
from ..tableau import Embedded

State = tuple[Tensor, ...]
Slope = Callable[[Any, State], State]  # of a time and a state

SAFETY = 0.9
MOST_GROWTH = 10.0
MOST_SHRINKAGE = 0.2


def integrate(slope: Slope, state: State, solver: Solver, watch: Watch) -> State:
    """The state at t₁ by an adaptive method.

    Args:
        slope: maps a time, a tensor without dimensions, and a state to the state's derivative.
        state: the tensors at time 0.
        solver: an adaptive one; all but `per_sample` counts.
        watch: is told every attempt.

    Returns:
        The tensors at t₁.

    Raises:
        SolveError: the solve cannot go on.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.4, as torchdiffeq has it.
    """
    tableau = solver.tableau
    assert isinstance(tableau, Embedded)
    t = torch.zeros((), dtype=torch.float64, device=state[0].device)
    first = slope(_cast(t, state), state)
    if solver.first_step is not None:
        h = torch.full_like(t, solver.first_step)
    else:
        h = first_step(slope, state, first, tableau.order, solver)
    if solver.gradient == "constant":
        h = h.detach()
    attempts = 0
    while solver.max_steps is None or attempts < solver.max_steps:
        attempts += 1
        watch.attempt(t, h, state)
        if not (torch.isfinite(h) and t + h > t and all(torch.isfinite(u).all() for u in state)):
            watch.fail_at_step()
        end, slopes, ratio = attempt(slope, state, first, t, h, tableau, solver)
        accepted = bool(ratio <= 1)
        watch.judged(ratio, accepted)
        if accepted:
            if t + h >= solver.t1:
                watch.finish()
                # Steps run past t₁, which the last one contains.
                return interpolated(tableau, state, end, slopes, h, (solver.t1 - t) / h)
            # For a method whose last stage is not at the step's end too, as torchdiffeq does.
            t, state, first = t + h, end, slopes[-1]
        h = next_size(h, ratio, tableau.order)
        if solver.gradient != "exact":
            h = h.detach()
    watch.fail_at_most()


def retaken(slope: Slope, state: State, first: State, sizes: Sequence[Tensor], solver: Solver) -> State:
    """The state at t₁ by steps of given sizes, the last of which contains it; `first` is the slope at time 0."""
    tableau = solver.tableau
    assert isinstance(tableau, Embedded)
    t = torch.zeros_like(sizes[0])
    for h in sizes[:-1]:
        state, slopes, _ = attempt(slope, state, first, t, h, tableau, solver)
        t, first = t + h, slopes[-1]
    h = sizes[-1]
    end, slopes, _ = attempt(slope, state, first, t, h, tableau, solver)
    return interpolated(tableau, state, end, slopes, h, (solver.t1 - t) / h)


def first_step(slope: Slope, state: State, first: State, order: int, solver: Solver) -> Tensor:
    """The size of the first step, float64, from the field's size and a second evaluation of it."""
    scale = [solver.atol + solver.rtol * u.abs() for u in state]
    d0, d1 = (rms([v / s for v, s in zip(values, scale, strict=True)]) for values in (state, first))
    h0 = torch.full_like(d0, 1e-6) if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    then = slope(h0, tuple(u + h0 * k for u, k in zip(state, first, strict=True)))
    d2 = rms([(new - old) / s for new, old, s in zip(then, first, scale, strict=True)]) / h0
    still = d1 <= 1e-15 and d2 <= 1e-15
    h1 = torch.clamp(1e-3 * h0, min=1e-6) if still else (0.01 / max(d1, d2)) ** (1 / order)
    return torch.min(100 * h0, h1).double()


def attempt(
    slope: Slope, state: State, first: State, t: Tensor, h: Tensor, tableau: Embedded, solver: Solver
) -> tuple[State, list[State], Tensor]:
    """One step of size h: the state at its end, the slopes of all stages, and the error ratio ρ."""
    slopes = [tuple(k.to(u.dtype) for k, u in zip(first, state, strict=True))]
    start, size, end_time = (_cast(time, state) for time in (t, h, t + h))
    end = state
    for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
        end = _moved(state, slopes, row, size)
        time = _just_before(end_time) if c == 1 else start + c * size
        slopes.append(tuple(k.to(u.dtype) for k, u in zip(slope(time, end), state, strict=True)))
    if not tableau.ends_in_solution:
        end = _moved(state, slopes, tableau.b, size)
    tolerances = [solver.atol + solver.rtol * torch.max(u.abs(), v.abs()) for u, v in zip(state, end, strict=True)]
    errors = _combined(slopes, tableau.b_error, size)
    return end, slopes, rms([e / s for e, s in zip(errors, tolerances, strict=True)])


def next_size(h: Tensor, ratio: Tensor, order: int) -> Tensor:
    """The size of the step after one of size h and error ratio ρ, float64; it shrinks only after a rejected one."""
    return h * next_factor(ratio.double(), order)


_Number = TypeVar("_Number", float, Tensor)


def next_factor(ratio: _Number, order: int) -> _Number | float:
    """By what the next step is longer after an error ratio ρ."""
    if ratio == 0:
        return MOST_GROWTH
    factor = SAFETY / ratio ** (1 / order)
    least = 1.0 if ratio < 1 else MOST_SHRINKAGE
    # By comparison: a clamp's zero gradient times that of an infinite ρ would be NaN.
    return least if factor < least else MOST_GROWTH if factor > MOST_GROWTH else factor


def interpolated(tableau: Embedded, state: State, end: State, slopes: Sequence[State], h: Tensor, x: Tensor) -> State:
    """The quartic through a step's ends, the slopes there and its middle, at the part x of the step."""
    h, x = _cast(h, state), _cast(x, state)
    values = []
    for u, v, mid, f, g in zip(state, end, _moved(state, slopes, tableau.b_mid, h), slopes[0], slopes[-1], strict=True):
        a = 2 * h * (g - f) - 8 * (v + u) + 16 * mid
        b = h * (5 * f - 3 * g) + 18 * u + 14 * v - 32 * mid
        c = h * (g - 4 * f) - 11 * u - 5 * v + 16 * mid
        values.append((((a * x + b) * x + c) * x + h * f) * x + u)
    return tuple(values)


def _moved(state: State, slopes: Sequence[State], weights: Sequence[float], h: Tensor) -> State:
    """state + h Σ weights_j slopes_j."""
    moves = _combined(slopes, weights, h)
    return tuple(u + move for u, move in zip(state, moves, strict=True))


def _combined(slopes: Sequence[State], weights: Sequence[float], h: Tensor) -> list[Tensor]:
    """h Σ weights_j slopes_j, summed as torchdiffeq does.

    In another order the sum's last digits differ, which is all that dopri8's error estimate often consists of.
    """
    sizes = h * torch.tensor(weights, dtype=h.dtype, device=h.device)
    return [(torch.stack(each, -1) * sizes).sum(-1) for each in zip(*slopes, strict=True)]


def rms(values: Sequence[Tensor]) -> Tensor:
    """The largest root mean square over all entries, batch included."""
    return max(value.abs().pow(2).mean().sqrt() for value in values)


def _cast(time: Tensor, state: State) -> Tensor:
    return time.to(state[0].dtype)


def _just_before(time: Tensor) -> Tensor:
    """The previous representable time, with the time's gradient: a field may jump at the step's end."""
    return time + (torch.nextafter(time, time - 1) - time).detach()
