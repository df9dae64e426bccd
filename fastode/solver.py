"""How an ODE block is solved, as a value, and what is raised where it cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from . import checks
from .embedded import EMBEDDED
from .tableau import EULER_RK, MIDPOINT_RK, RK4_38, Butcher, Embedded

FIXED: dict[str, Butcher] = {"euler": EULER_RK, "midpoint": MIDPOINT_RK, "rk4": RK4_38}
ADAPTIVE: dict[str, Embedded] = EMBEDDED  # under torchdiffeq's names
GRADIENTS = ("solver", "constant", "exact")

NAMED = (*FIXED, *ADAPTIVE)


@dataclass(frozen=True)
class Solver:
    """How a block's equation is solved from time 0 to t₁, and what its derivative is.

    Args:
        method: "euler", "midpoint" or "rk4" (the 3/8 rule) or any `fastode.tableau.Butcher`, in equal steps; or one of
            torchdiffeq's adaptive "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", or any
            `fastode.tableau.Embedded`, with steps by error.
        rtol: relative tolerance > 0 of an adaptive method.
        atol: absolute tolerance > 0 of an adaptive method.
        t1: t₁ > 0, a dimensionless time.
        steps: how many equal steps a method without error control takes.
        gradient: the derivative of an adaptive method, always through the states of the steps taken. "solver" goes also
            through the size of the first step, as torchdiffeq's does; "constant" through no size; "exact" through the
            whole control, so that it is the derivative of the numbers that are returned.
        per_sample: solve every sample with steps of its own, as if it were alone; without it a batch shares them.
        max_steps: most attempts of an adaptive solve, rejected ones too; None for any number.
        first_step: the size of an adaptive method's first step; None to choose it by the field.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", Section
        6.1 (paper 003); the control is torchdiffeq's.

    Example:
        >>> Solver("bosh3", rtol=0.01, gradient="exact").tableau.stages
        4
    """

    method: str | Butcher = "dopri5"
    rtol: float = 0.1
    atol: float = 0.1
    t1: float = 1.0
    steps: int = 1
    gradient: str = "solver"
    per_sample: bool = False
    max_steps: int | None = None
    first_step: float | None = None

    def __post_init__(self) -> None:
        _check_method(self.method, "method")
        for name in ("rtol", "atol", "t1"):
            checks.step_size(getattr(self, name), name)
        checks.steps(self.steps)
        checks.one_of("gradient", self.gradient, GRADIENTS)
        checks.flag("per_sample", self.per_sample)
        if self.max_steps is not None:
            checks.steps(self.max_steps, "max_steps")
        if self.first_step is not None:
            checks.step_size(self.first_step, "first_step")

    @property
    def tableau(self) -> Butcher:
        """The method's tableau."""
        if isinstance(self.method, str):
            return FIXED.get(self.method) or ADAPTIVE[self.method]
        return self.method

    @property
    def is_adaptive(self) -> bool:
        """Whether steps are chosen by an estimate of their error."""
        return isinstance(self.tableau, Embedded)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.tableau.name


PARTS = tuple(field.name for field in fields(Solver))[1:]  # all but the method


def solver_of(solver: Any, parts: dict[str, Any]) -> Solver:
    """The solver that a block is given: whole, or as a method with what is not None of `parts`.

    Args:
        solver: a `Solver`, or a method as it takes one.
        parts: its other arguments by name; with a whole solver they must all be None.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.
    """
    given = {name: value for name, value in parts.items() if value is not None}
    unknown = next((name for name in given if name not in PARTS), None)
    if unknown is not None:
        raise TypeError(f"a part of solver must be one of {', '.join(map(repr, PARTS))}, got {unknown!r}")
    if isinstance(solver, Solver):
        if given:
            raise TypeError(f"solver must be a Solver, or a method with its parts, got a Solver and {min(given)}")
        return solver
    _check_method(solver, "solver", "a Solver, ")
    return Solver(solver, **given)


def _check_method(method: Any, name: str, others: str = "") -> None:
    if isinstance(method, str):
        checks.one_of(name, method, NAMED)
    elif not isinstance(method, Butcher):
        names = ", ".join(map(repr, NAMED))
        allowed = f"{others}a fastode.tableau.Butcher or one of {names}"
        raise TypeError(f"{name} must be {allowed}, got {checks.what(method)}")


class SolveError(RuntimeError):
    """A solve that cannot go on.

    Attributes:
        block: the block, in words.
        reason: what happened.
        t: the time that was reached, dimensionless; NaN where it is not known.
        h: the size of the step that was to be taken.
        ratio: ρ of the last attempt, its error in units of the tolerance; NaN before the first one.

    Example:
        >>> print(SolveError("SOBlock on SkewPair", "max_steps = 3 attempts were made", "raise it", 0.5, 0.01, 2.0))
        SOBlock on SkewPair: max_steps = 3 attempts were made at t = 0.5 with h = 0.01, error ratio 2; raise it
    """

    def __init__(
        self, block: str, reason: str, advice: str, t: float = math.nan, h: float = math.nan, ratio: float = math.nan
    ) -> None:
        # All arguments go to the base class, so that the error can be pickled, as one from another process is.
        super().__init__(block, reason, advice, t, h, ratio)
        self.block, self.reason, self.advice = block, reason, advice
        self.t, self.h, self.ratio = t, h, ratio

    def __str__(self) -> str:
        where = f"at t = {self.t:.6g} with h = {self.h:.6g}, error ratio {self.ratio:.6g}"
        return f"{self.block}: {self.reason} {where}; {self.advice}"
