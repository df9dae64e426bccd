"""What a solve did: its steps for who asks for them, and where it stopped for the error that says so."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .solver import SolveError, Solver

_logs: list[StepLog] = []
# Logs of solves on a card that nobody has read, and what tells what they say: the latest ones.
_unread: deque[tuple[Tensor, Callable[[Tensor], None]]] = deque(maxlen=1024)


@dataclass(frozen=True)
class SolveSteps:
    """The steps of one adaptive solve.

    Attributes:
        block: the block, in words.
        solver: how it was solved.
        sample: which of the batch was solved, with steps of each sample; None where all share them.
        times: from 0 to the end of the last accepted step, which lies past t₁: u(t₁) is interpolated.
        ratios: ρ of each accepted step, its error in units of the tolerance; at most 1.
        rejected: (t, h, ρ) of each attempt whose ρ was above 1.
        evaluations: of the field, the first step's choice included.
        error: why the solve stopped before t₁; empty if it did not.
    """

    block: str
    solver: Solver
    sample: int | None
    times: tuple[float, ...]
    ratios: tuple[float, ...]
    rejected: tuple[tuple[float, float, float], ...]
    evaluations: int
    error: str = ""


@dataclass(frozen=True)
class ImplicitSolve:
    """What solving one implicit Euler step, or the linear system of its gradient, came to.

    Attributes:
        block: the block, in words.
        what: "solution" or "gradient".
        residuals: ‖y − x − f(y)‖ / ‖x‖ of every sample, or of the batch where it is coupled; of a gradient the linear
            system's residual relative to its right-hand side.
        tol: what was asked of them.
        iterations: Newton steps, the most of a sample; of a gradient, how often its Krylov space was begun.
        products: with J or its transpose.
    """

    block: str
    what: str
    residuals: tuple[float, ...]
    tol: float
    iterations: int
    products: int

    @property
    def converged(self) -> bool:
        """Whether every residual is at most tol; where one is not, the gradient is not that of what was returned."""
        return all(residual <= self.tol for residual in self.residuals)


class StepLog(list[SolveSteps]):
    """The adaptive solves that were made, oldest first; printed, a table.

    Attributes:
        implicit: the exact implicit Euler steps that were solved, and the linear systems of their gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.implicit: list[ImplicitSolve] = []

    def __str__(self) -> str:
        tables = ([self._solves()] if self or not self.implicit else []) + ([self._implicit()] if self.implicit else [])
        return "\n\n".join(tables)

    def _implicit(self) -> str:
        rows = [("block", "of", "asked", "largest residual", "converged", "iterations", "products")]
        for solve in self.implicit:
            found = f"{solve.tol:g}", f"{max(solve.residuals):.2g}", "yes" if solve.converged else "no"
            rows.append((solve.block, solve.what, *found, f"{solve.iterations}", f"{solve.products}"))
        return _table(rows)

    def _solves(self) -> str:
        rows = [("block", "method", "tolerance", "times", "error ratios", "rejected", "evaluations")]
        for solve in self:
            block = solve.block if solve.sample is None else f"{solve.block}, sample {solve.sample}"
            tolerances = dict.fromkeys((solve.solver.rtol, solve.solver.atol))
            tolerance = ", ".join(f"{value:g}" for value in tolerances)
            times, ratios = (", ".join(f"{v:.3f}" for v in values) for values in (solve.times, solve.ratios))
            counts = f"{len(solve.rejected)}", f"{solve.evaluations}"
            rows.append((block, solve.solver.name, tolerance, f"[{times}]", f"[{ratios}]", *counts))
        return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@contextmanager
def record_steps() -> Iterator[StepLog]:
    """Collect, while in this context, the steps of adaptive solves, and how exact implicit Euler steps were solved.

    Returns:
        A context manager that gives the log, a list of `SolveSteps`, oldest first; `print(log)` is a table. Its
        attribute `implicit` is a list of `ImplicitSolve`, one for each call of an `ExactIE` and one for its gradient.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", Table 3
        (paper 003), which has the times.

    Example:
        >>> from fastode.reference import SOClassifier
        >>> with record_steps() as log:
        ...     y = SOClassifier(2, 1, solver=Solver(first_step=0.5, atol=9.0))(torch.zeros(1, 2))
        >>> log[0].times, log[0].evaluations, log[0].rejected
        ((0.0, 0.5, 5.5), 13, ())
    """
    log = StepLog()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs[:] = [other for other in _logs if other is not log]


@contextmanager
def unrecorded() -> Iterator[None]:
    """A context in which solves are recorded by nobody: one that is made again was recorded before."""
    logs = list(_logs)
    _logs.clear()
    try:
        yield
    finally:
        _logs[:] = logs


def is_recording() -> bool:
    """Whether solves are recorded by anybody."""
    return bool(_logs)


def read_later(log: Tensor, tell: Callable[[Tensor], None]) -> None:
    """Let `check_solves` read a log that is still being written on a card, and tell what it says."""
    _unread.append((log, tell))


def check_solves() -> None:
    """Raise why a solve on a card has left NaN, of those made since the last check, up to 1024.

    A solve with steps by error that is one launch on a card does not wait for it: where it cannot go on, its result is
    NaN, and the error that is raised on a CPU is raised here, or at once while `record_steps` records. This waits for
    the card. Elsewhere, under `torch.compile`, and of replays of a CUDA graph there is nothing to read.

    Raises:
        SolveError: the first of them that did not reach t₁.

    Source: torchdiffeq raises its assertions at once, which takes a synchronisation for each attempt.

    Example:
        >>> check_solves()
    """
    unread = list(_unread)
    _unread.clear()
    for device in {log.device for log, _ in unread}:
        if device.type == "cuda":  # a log may be another stream's, for which reading it does not wait
            torch.cuda.synchronize(device)
    for log, tell in unread:
        tell(log)


def note_implicit(solve: ImplicitSolve) -> None:
    """Give an exact implicit Euler step, or its gradient, to who records."""
    for log in _logs:
        log.implicit.append(solve)


class Watch:
    """What is known of a solve while it goes on. Where nobody records, nothing is kept but the last attempt.

    Args:
        block: the block, in words.
        solver: how it is solved.
        sample: which of the batch is solved, if it is one alone.
    """

    def __init__(self, block: str, solver: Solver, sample: int | None = None) -> None:
        self.block, self.solver, self.sample = block, solver, sample
        self.evaluations = 0
        self.t: Any = math.nan
        self.h: Any = math.nan
        self.ratio: Any = math.nan  # before the first attempt was judged
        self.state: tuple[Tensor, ...] = ()
        self.attempts: list[tuple[float, float, float, bool]] | None = [] if _logs else None

    def attempt(self, t: Any, h: Any, state: tuple[Tensor, ...]) -> None:
        """Note that a step of size h from t is about to be tried."""
        self.t, self.h, self.state = t, h, state

    def judged(self, ratio: Any, accepted: bool) -> None:
        """Note the error ratio of the last attempt."""
        self.ratio = ratio
        if self.attempts is not None:
            self.attempts.append((_number(self.t), _number(self.h), _number(ratio), accepted))

    def finish(self, error: str = "") -> None:
        """Give the steps to who records."""
        if self.attempts is None:
            return
        accepted = [(t + h, ratio) for t, h, ratio, good in self.attempts if good]
        steps = SolveSteps(
            self.block,
            self.solver,
            self.sample,
            (0.0, *(time for time, _ in accepted)),
            tuple(ratio for _, ratio in accepted),
            tuple((t, h, ratio) for t, h, ratio, good in self.attempts if not good),
            self.evaluations,
            error,
        )
        for log in _logs:
            log.append(steps)

    def fail(self, reason: str, advice: str) -> NoReturn:
        """Raise what says that the solve cannot go on."""
        self.finish(reason)
        block = self.block if self.sample is None else f"{self.block}, sample {self.sample}"
        # From None: the assertion of a library that may have led here says less.
        raise SolveError(block, reason, advice, *map(_number, (self.t, self.h, self.ratio))) from None

    def fail_at_step(self) -> NoReturn:
        """Raise why the attempt that was noted last cannot be made."""
        if not all(bool(torch.isfinite(u).all()) for u in self.state):
            self.fail("the state is not finite", "look for NaN and infinity in the input, or normalise the field")
        if not math.isfinite(_number(self.h)) or _number(self.ratio) == math.inf:
            self.fail(
                "the field gave a value that is not finite",
                "look for NaN and infinity in the input and the parameters, or normalise the field",
            )
        self.fail(
            "the step is too small to move the time",
            "try larger tolerances, a solver in equal steps, or a smoother or damped field",
        )

    def fail_at_most(self) -> NoReturn:
        """Raise that max_steps attempts did not reach t₁."""
        self.fail(
            f"max_steps = {self.solver.max_steps} attempts did not reach t1 = {self.solver.t1:g}",
            "raise max_steps or the tolerances, or shorten t1",
        )


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value
