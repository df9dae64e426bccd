"""Explicit one-step schemes as data: frozen tableaus that check themselves when they are made.

A `Tableau` holds a scheme in Shu–Osher form, as paper 004 writes its blocks, with the step Δt folded into its
coefficients, and a `LinearTable` such rows without an order; a `Butcher` tableau holds the classical form that the
fixed-step ODE solvers step with, and an `Embedded` one beside it the weights by which an adaptive solver chooses its
steps (`fastode.embedded` has the known ones).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .linear_table import LinearTable as LinearTable
from .linear_table import Rows, check_lengths, check_name, rows_of_numbers

# Coefficients are float64: a sum that misses its value by less, relative to the magnitudes summed, is only rounded.
_ROUNDING = 2.0**-44


@dataclass(frozen=True)
class Tableau(LinearTable):
    """An explicit scheme in Shu–Osher form: u₀ = x, u_i = Σ_{k<i} α_ik u_k + β_ik f(u_k), y = u_s.

    Args:
        name: what the scheme is called.
        alpha: row i-1 holds α_i0 … α_i,i-1, which sum to one.
        beta: rows of the same lengths; the step Δt is folded in (dimensionless).
        order: the order of convergence it has; refused where it exceeds the number of stages or the coefficients miss
            the conditions of that order (those above order 4 are not looked at).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: rows of the wrong length, coefficients that are not finite, rows of alpha that do not sum to one, or
            an order the coefficients do not have.

    Source: Kim et al. 2020, eq. 4 (paper 004).

    Example:
        >>> heun = Tableau("heun", alpha=((1.0,), (0.5, 0.5)), beta=((1.0,), (0.0, 0.5)), order=2)
        >>> heun.stages, heun.ssp_coefficient
        (2, 1.0)
    """

    order: int

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, beta = self.alpha, self.beta
        for i, row in enumerate(alpha, start=1):
            if not _rounds_to(math.fsum(row), 1.0, math.fsum(map(abs, row))):
                raise ValueError(f"alpha must be rows that sum to one, got row {i} = {row}")
        _check_order(self.order, lambda magnitude: _butcher_form(_each(magnitude, alpha), _each(magnitude, beta)))

    @property
    def ssp_coefficient(self) -> float:
        """The largest c for which the scheme is made of convex combinations of Euler steps no longer than 1/c.

        Whatever convex functional does not grow under an Euler step of length Δt then does not grow under a step of the
        scheme of length c Δt; 0 means that the coefficients give no such guarantee.

        Source: Kim et al. 2020, Lemma 1 (paper 004).
        """
        pairs = [pair for rows in zip(self.alpha, self.beta, strict=True) for pair in zip(*rows, strict=True)]
        if any(alpha < 0 or beta < 0 for alpha, beta in pairs):
            return 0.0
        return min((alpha / beta for alpha, beta in pairs if beta > 0), default=math.inf)


@dataclass(frozen=True)
class Butcher:
    """An explicit Runge–Kutta scheme: k_i = f(y + Δt Σ_{j<i} a_ij k_j), y⁺ = y + Δt Σ b_i k_i.

    Args:
        name: what the scheme is called.
        a: row i holds a_i0 … a_i,i-1, so the first row is empty.
        b: one weight per stage; they sum to one.
        order: the order of convergence it has, checked as a Tableau's is.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: rows of the wrong length, coefficients that are not finite, weights that do not sum to one, or an
            order the coefficients do not have.

    Example:
        >>> Butcher("heun", a=((), (1.0,)), b=(0.5, 0.5), order=2).nodes
        (0.0, 1.0)
    """

    name: str
    a: Rows
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        check_name(self.name)
        a, (b,) = rows_of_numbers("a", self.a), rows_of_numbers("b", (self.b,))
        check_lengths("a", a, list(range(max(len(a), 1))))
        if len(b) != len(a):
            raise ValueError(f"b must be {len(a)} weights, one for each row of a, got {len(b)}")
        if not _rounds_to(math.fsum(b), 1.0, math.fsum(map(abs, b))):
            raise ValueError(f"b must be weights that sum to one, got {b}")
        _check_order(self.order, lambda magnitude: (_each(magnitude, a), _each(magnitude, (b,))[0]))
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)

    @property
    def stages(self) -> int:
        """The number of stages s."""
        return len(self.b)

    @property
    def nodes(self) -> tuple[float, ...]:
        """The times c_i = Σ_j a_ij of the stages, in steps."""
        return tuple(math.fsum(row) for row in self.a)


@dataclass(frozen=True)
class Embedded(Butcher):
    """A `Butcher` tableau with a second solution of lower order and a value in the middle of a step.

    With k_i as there, e = Δt Σ b_error_i k_i estimates the error of y⁺ = y + Δt Σ b_i k_i, and y + Δt Σ b_mid_i k_i is
    the value at half the step, which the interpolant goes through.

    Args:
        name: as in Butcher.
        a: as in Butcher.
        b: as in Butcher.
        order: of y⁺; the step control takes its root of the error.
        c: the times of the stages in steps, which the rows of a sum to but for rounding.
        b_error: one weight per stage, the solution's minus those of the second solution; they sum to zero.
        b_mid: one weight per stage; they sum to one half.
        embedded_order: of the second solution, checked as `order` is.

    Raises:
        TypeError, ValueError: as Butcher raises them; c, b_error or b_mid is not what it may be.

    Source: Dormand and Prince, "A family of embedded Runge-Kutta formulae", 1980, which paper 003 cites.

    Example:
        >>> pair = {"a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2, "c": (0.0, 1.0)}
        >>> heun = Embedded("heun", **pair, b_error=(-0.5, 0.5), b_mid=(0.5, 0.0), embedded_order=1)
        >>> heun.nodes, heun.b_embedded, heun.ends_in_solution
        ((0.0, 1.0), (1.0, 0.0), False)
    """

    c: tuple[float, ...]
    b_error: tuple[float, ...]
    b_mid: tuple[float, ...]
    embedded_order: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, total in (("b_error", 0.0), ("b_mid", 0.5)):
            weights = self._weights(name)
            if not _rounds_to(math.fsum(weights), total, math.fsum(map(abs, weights))):
                raise ValueError(f"{name} must be weights that sum to {total:g}, got {weights}")
        for c, row in zip(self._weights("c"), self.a, strict=True):
            if not _rounds_to(math.fsum(row), c, math.fsum(map(abs, row))):
                raise ValueError(f"c must be the sums of the rows of a, got {c} for the row {row}")
        _check_order(
            self.embedded_order,
            lambda magnitude: (_each(magnitude, self.a), _each(magnitude, (self.b_embedded,))[0]),
            "embedded_order",
        )

    def _weights(self, name: str) -> tuple[float, ...]:
        """An attribute as a tuple of floats, one for each stage, and kept as that."""
        (weights,) = rows_of_numbers(name, (getattr(self, name),))
        if len(weights) != self.stages:
            raise ValueError(f"{name} must be {self.stages} numbers, one for each row of a, got {len(weights)}")
        object.__setattr__(self, name, weights)
        return weights

    @property
    def nodes(self) -> tuple[float, ...]:
        """The times of the stages, in steps."""
        return self.c

    @property
    def b_embedded(self) -> tuple[float, ...]:
        """The weights of the second solution."""
        return tuple(b - error for b, error in zip(self.b, self.b_error, strict=True))

    @property
    def ends_in_solution(self) -> bool:
        """Whether the last stage is evaluated at y⁺ (first same as last), so that its slope is the next step's first.

        torchdiffeq takes it for that in every method, also where it is none.
        """
        return self.b[-1] == 0 and self.b[:-1] == self.a[-1]


def euler(step_size: float) -> Tableau:
    """The explicit Euler step u₁ = x + h f(x): a residual block.

    Args:
        step_size: h > 0, a dimensionless time.

    Returns:
        The tableau, of order 1.

    Raises:
        TypeError, ValueError: step_size is not a finite number above zero.

    Example:
        >>> euler(0.1).beta
        ((0.1,),)
    """
    checks.step_size(step_size)
    return Tableau("euler", alpha=((1.0,),), beta=((step_size,),), order=1)


def polynet(step_size: float = 1.0) -> LinearTable:
    """PolyNet's y = x + h f(x) + h f(h f(x)): two terms of the series of an implicit Euler step.

    Args:
        step_size: h > 0, a dimensionless time.

    Returns:
        The table: u₁ = h f(x), y = x + u₁ + h f(u₁). It is no `Tableau`: u₁ has no x in it.

    Raises:
        TypeError, ValueError: step_size is not a finite number above zero.

    Source: "Towards Natural Robustness Against Adversarial Examples", eqs. 15 and 18 (paper 002).

    Example:
        >>> polynet(0.5).beta
        ((0.5,), (0.0, 0.5))
    """
    checks.step_size(step_size)
    return LinearTable("polynet", alpha=((0.0,), (1.0, 1.0)), beta=((step_size,), (0.0, step_size)))


def ark(a21: float = 0.25, b10: float = 1.0) -> Tableau:
    """The two-stage scheme of an Ark block with fixed coefficients α₂₁ = σ(a21), β₁₀ = σ(b10).

    Args:
        a21: raw value of α₂₁, before the sigmoid, as in the block.
        b10: raw value of β₁₀, before the sigmoid.

    Returns:
        The tableau, of order 2 for any values.

    Raises:
        TypeError, ValueError: a value is not a finite number, or b10 is so low that its sigmoid is zero.

    Source: Kim et al. 2020, eqs. 13 and 15 (paper 004).

    Example:
        >>> ark(a21=0.0, b10=0.0).beta
        ((0.5,), (-0.25, 1.0))
    """
    checks.finite("a21", a21)
    checks.finite("b10", b10)
    alpha_21, beta_10 = _sigmoid(a21), _sigmoid(b10)
    if beta_10 == 0:
        raise ValueError(f"b10 must be a number whose sigmoid is above zero, got {b10}")
    beta_21 = 1 / (2 * beta_10)
    return Tableau(
        "ark",
        alpha=((1.0,), (1 - alpha_21, alpha_21)),
        beta=((beta_10,), (1 - beta_21 - alpha_21 * beta_10, beta_21)),
        order=2,
    )


def _sigmoid(value: float) -> float:
    # The exponential of a negative number only: the other way overflows.
    small = math.exp(-abs(value))
    return (1.0 if value >= 0 else small) / (1 + small)


def _rounds_to(value: float, exact: float, magnitude: float) -> bool:
    return abs(value - exact) <= _ROUNDING * magnitude


def _each(function: Callable[[float], float], rows: Rows) -> Rows:
    return tuple(tuple(map(function, row)) for row in rows)


def _butcher_form(alpha: Rows, beta: Rows) -> tuple[Rows, tuple[float, ...]]:
    """(a, b) of the same scheme: with rows of α that sum to one, every u_i is x plus a sum of f(u_k)."""
    increments: list[tuple[float, ...]] = [()]
    for i, (alphas, betas) in enumerate(zip(alpha, beta, strict=True), start=1):
        padded = [row + (0.0,) * (i - len(row)) for row in increments]
        increments.append(tuple(betas[k] + math.fsum(alphas[m] * padded[m][k] for m in range(i)) for k in range(i)))
    return tuple(increments[:-1]), increments[-1]


def _conditions(a: Rows, b: tuple[float, ...]) -> list[tuple[int, float, float]]:
    """The order conditions up to order 4 as (order p, left-hand side, γ): the side must be hᵖ / γ with h = Σ b."""

    def inner(weights: Sequence[float], values: Sequence[float]) -> float:
        return math.fsum(w * v for w, v in zip(weights, values, strict=False))

    c = [math.fsum(row) for row in a]
    ac = [inner(row, c) for row in a]
    ac2 = [inner(row, [v * v for v in c]) for row in a]
    aac = [inner(row, ac) for row in a]
    return [
        (2, inner(b, c), 2),
        (3, inner(b, [v * v for v in c]), 3),
        (3, inner(b, ac), 6),
        (4, inner(b, [v**3 for v in c]), 4),
        (4, inner(b, [v * w for v, w in zip(c, ac, strict=True)]), 8),
        (4, inner(b, ac2), 12),
        (4, inner(b, aac), 24),
    ]


def _check_order(
    order: Any, form: Callable[[Callable[[float], float]], tuple[Rows, tuple[float, ...]]], name: str = "order"
) -> None:
    """Refuse an order whose conditions fail; `form(function)` is (a, b) made of function(coefficient)."""
    checks.steps(order, name)
    (a, b), (magnitude_a, magnitude_b) = form(float), form(abs)
    step, magnitude_step = math.fsum(b), math.fsum(magnitude_b)
    for (p, side, gamma), (_, magnitude, _) in zip(
        _conditions(a, b), _conditions(magnitude_a, magnitude_b), strict=True
    ):
        if p <= order and not _rounds_to(side, step**p / gamma, magnitude + magnitude_step**p):
            raise ValueError(f"{name} must be at most {p - 1} with these coefficients, got {order}")
    # No explicit scheme has a higher order than stages.
    if order > len(b):
        raise ValueError(f"{name} must be at most {len(b)} with these coefficients, got {order}")


EULER = euler(1.0)
SSP2 = Tableau("ssp2", alpha=((1.0,), (1 / 2, 1 / 2)), beta=((1.0,), (0.0, 1 / 2)), order=2)
SSP3 = Tableau(
    "ssp3",
    alpha=((1.0,), (3 / 4, 1 / 4), (1 / 3, 0.0, 2 / 3)),
    beta=((1.0,), (0.0, 1 / 4), (0.0, 0.0, 2 / 3)),
    order=3,
)
MIDPOINT = Tableau("midpoint", alpha=((1.0,), (1.0, 0.0)), beta=((1 / 2,), (0.0, 1.0)), order=2)

EULER_RK = Butcher("euler", a=((),), b=(1.0,), order=1)
MIDPOINT_RK = Butcher("midpoint", a=((), (1 / 2,)), b=(0.0, 1.0), order=2)
RK4_38 = Butcher(
    "rk4",
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    order=4,
)


def check_tableau(value: Any, name: str = "tableau") -> None:
    """Refuse anything but a tableau or table (which has checked its own rows when it was made)."""
    if not isinstance(value, LinearTable):
        raise TypeError(f"{name} must be a fastode.tableau.Tableau or LinearTable, got {checks.what(value)}")
