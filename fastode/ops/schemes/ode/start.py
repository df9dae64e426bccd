"""The first step's size, chosen by the field, and the way back through the choice.

Derivation: README.md of skew_pair, "Steps by error", whose (9) is cited. The control is torchdiffeq's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....solver import Solver
from ...maps import coefficients, combine, dots, summed
from ..by_error import rounded
from .field import Field, Stages

AT_START = Stages(rows=((),), times=(0.0,), given=False)
_SMALL = 1e-5  # of the state's and the slope's norm


@dataclass(frozen=True)
class Start:
    """How the first step's size was chosen.

    Attributes:
        size: of the first step.
        slopes: F of time 0 and, where a trial was made, F′.
        kept: by the evaluation at time 0.
        trial_kept: by the trial.
        statistics: of both evaluations.
        is_finite: whether the state is.
        norms: d₀, d₁, d₂; empty where the size was given.
        trial_size: h₀.
    """

    size: float
    slopes: list[Tensor]
    kept: list[Tensor]
    trial_kept: list[Tensor]
    statistics: list[Tensor]
    is_finite: bool
    norms: tuple[float, ...] = ()
    trial_size: float = 0.0


def trial(size: float) -> Stages:
    """The stages of the trial: one step of Euler, and the field at its end."""
    return Stages(rows=((), (size,)), times=(0.0, size), given=True)


def choose(field: Field, state: Tensor, entries: int, solver: Solver, keep: bool) -> Start:
    """Evaluate the field at time 0 and choose the first step's size.

    Args:
        field: the field.
        state: at time 0, a map of the field's.
        entries: how many numbers the state has.
        solver: how.
        keep: whether the way back will come.
    """
    made = field.stages(AT_START, state, None, keep)
    (slope,) = made.slopes
    if solver.first_step is not None:
        squares = field.scaled_squares([state], [1.0], state, state, solver)
        return Start(solver.first_step, [slope], made.kept, [], made.statistics, float(squares[1]) == 0)
    squares = torch.cat([field.scaled_squares([v], [1.0], state, state, solver) for v in (state, slope)])
    of_state, nothing, of_slope, _ = squares.tolist()
    d0, d1 = math.sqrt(of_state / entries), math.sqrt(of_slope / entries)
    h0 = 1e-6 if d0 < _SMALL or d1 < _SMALL else 0.01 * d0 / d1
    tried = field.stages(trial(rounded(h0, state.dtype)), state, slope, keep)
    then = tried.slopes[1]
    change = field.scaled_squares([slope, then], [-1.0, 1.0], state, state, solver)
    d2 = math.sqrt(float(change[0]) / entries) / h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-3 * h0, 1e-6)
    else:
        h1 = (0.01 / (d2 if d2 > d1 else d1)) ** (1 / solver.tableau.order)
    size = math.nan if math.isnan(h0) or math.isnan(h1) else min(100 * h0, h1)
    statistics = [*made.statistics, *tried.statistics]
    return Start(size, [slope, then], made.kept, tried.kept, statistics, nothing == 0, (d0, d1, d2), h0)


def pull_start(field: Field, start: Start, state_bar: Tensor, slope_bar: Tensor) -> Tensor:
    """The cotangent of the state at time 0, from those of it and of its slope."""
    found = field.pull(AT_START, start.kept, (0.0,), state_bar, slope_bar).state
    assert found is not None
    return found


class WayBack:
    """The pull-back of `choose`, from the cotangents that the steps have found."""

    def __init__(self, field: Field, state: Tensor, entries: int, solver: Solver, start: Start) -> None:
        self.field, self.state, self.entries, self.solver, self.start = field, state, entries, solver, start

    def run(self, state_bar: Tensor, slope_bar: Tensor, size_bar: float) -> Tensor:
        """The cotangent of the state at time 0.

        Args:
            state_bar: of that state by the steps.
            slope_bar: of its slope by the steps.
            size_bar: of the first step's size.
        """
        start, (d0, d1, d2), (first, then) = self.start, self.start.norms, self.start.slopes
        h0, h1, bar = start.trial_size, start.size, size_bar
        d0_bar = d1_bar = d2_bar = trial_bar = 0.0
        # (9)
        if h1 == 100 * h0 or (d1 <= 1e-15 and d2 <= 1e-15):
            trial_bar = bar * (h1 / h0 if h1 > 1e-6 else 0.0)
        elif d2 > d1:
            d2_bar = -bar * h1 / (self.solver.tableau.order * d2)
        else:
            d1_bar = -bar * h1 / (self.solver.tableau.order * d1)
        if d2_bar:
            change_bar, *moved = self._pull_norm((first, then), (-1.0, 1.0), d2_bar / h0, d2 * h0)
            tried = trial(rounded(h0, self.state.dtype))
            pulled = self.field.pull(tried, start.trial_kept, (0.0, 0.0), None, change_bar)
            assert pulled.state is not None and pulled.first is not None
            slope_bar = combine([slope_bar, change_bar, pulled.first], coefficients(1.0, -1.0, 1.0))
            state_bar = summed([state_bar, pulled.state, *moved])
            # The trial's point moves with h₀ along F, and its time is h₀.
            along = float(dots(first, [pulled.first]).double()[0]) / h0
            trial_bar += along + sum(map(float, pulled.times)) - d2_bar * d2 / h0
        if trial_bar and not (d0 < _SMALL or d1 < _SMALL):
            d0_bar += trial_bar * h0 / d0
            d1_bar -= trial_bar * h0 / d1
        if d1_bar:
            own, *moved = self._pull_norm((first,), (1.0,), d1_bar, d1)
            slope_bar, state_bar = summed([slope_bar, own]), summed([state_bar, *moved])
        if d0_bar:
            state_bar = summed([state_bar, *self._pull_norm((self.state,), (1.0,), d0_bar, d0)])
        return pull_start(self.field, start, state_bar, slope_bar)

    def _pull_norm(
        self, terms: Sequence[Tensor], weights: Sequence[float], bar: float, norm: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(9): for the cotangent of the norm of v / (atol + rtol |u|), that of the sum v and, in two parts, of u."""
        factor = bar / (self.entries * norm)
        return self.field.pull_squares(terms, weights, self.state, self.state, factor, self.solver)
