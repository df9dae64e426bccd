"""The skew pair's solution with steps by error on the resident engine: one operator forwards, one backwards; and how a
solver and the log of what it did come to the operators and back.

Derivation: README.md of ops/schemes/skew_pair, "Steps by error"; the control is in csrc/step_control.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...native.constants import KEEP_NOTHING
from ...solver import Solver
from ...steps import Watch, is_recording, read_later
from ...tableau import Embedded
from ..function import gradients
from ..plan import MaybeTensor
from ..rerun import Rerun
from ..schemes.by_error import Steps
from ..schemes.skew_pair.pair import Pair
from . import card
from .call import beside
from .functions import keeps
from .skew import PairCode, encode, of_tensors, only

# How a solve ended, and the numbers before its attempts and in each (csrc/step_control.h).
_REACHED, _MOST_ATTEMPTS, _, _NOT_FINITE, _NO_ROOM = range(5)
_HEAD, _EACH = 10, 5
# Of how many attempts a card's log has room at first, where it is read.
_ROOM = 64
# Of how many steps a card keeps the sizes for gradients.
_MOST_TAKEN = 16384
# csrc/cpu/resident/control.h
_THROUGH = {"constant": 0, "solver": 1, "exact": 2}

SolverCode = tuple[list[float], list[float], list[int], bool]


class ResidentSolveFunction(torch.autograd.Function):
    """y(t₁) from x, which is z(0) and, repeated along the channels, y(0); every solve tells a watch what it did."""

    @staticmethod
    def forward(
        ctx: Any,
        pair: Pair,
        solver: Solver,
        watches: Sequence[Watch],
        steps: Sequence[Steps],
        rerun: Rerun | None,
        x: Tensor,
        *tensors: MaybeTensor,
    ) -> tuple[Tensor]:
        keep, traced = keeps(ctx, x), torch.compiler.is_compiling()
        code = encode(pair, tensors)
        if card.holds(x):
            end, log, kept = _solve_on_card(x, code, solver, watches, steps, keep, traced)
        else:
            end, log, kept = torch.ops.fastode.resident_solve_forward.default(
                x, *code, *solver_code(solver), keep, through_code(solver) if keep else 0, traced
            )
            if not traced:
                tell(log.tolist(), solver, watches, steps)
        ctx.save_for_backward(x, *tensors, log, *kept)
        ctx.pair, ctx.solver, ctx.steps, ctx.rerun, ctx.count = pair, solver, steps, rerun, 1 + len(tensors)
        ctx.set_materialize_grads(False)
        return (end,)

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        saved = ctx.saved_tensors
        given, log, kept = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1 :]
        if card.holds(given[0]) and ctx.rerun is not None and ctx.rerun.needed([end_bar]):
            _read_steps(given[0], encode(ctx.pair, given[1:]), ctx.solver, ctx.steps)

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, *tensors = given
            asked = of_tensors([True] * 4, wanted[1:])
            solver = _card_code(ctx.solver) if card.holds(x) else solver_code(ctx.solver)
            x_bar, found = torch.ops.fastode.resident_solve_backward.default(
                x, bars[0], log, list(kept), *encode(ctx.pair, tensors), *solver, through_code(ctx.solver), asked[0],
                any(asked[1:]),
            )  # fmt: skip
            return [x_bar, *only(beside(tensors, found), asked)]

        return gradients(ctx, given, [end_bar], pull)


def _solve_on_card(
    x: Tensor,
    code: PairCode,
    solver: Solver,
    watches: Sequence[Watch],
    steps: Sequence[Steps],
    keep: int,
    traced: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y(t₁), its log, and what a backward reads; nothing is read back unless somebody records."""
    if is_recording() and not traced:
        found, log = _read_all(x, code, solver, len(watches), keep)
        tell(log, solver, watches, steps)
        return found
    found = _launch(x, code, solver, 1, keep, traced)
    # What is captured has not run, and its log's memory is the graph's.
    if not traced and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        read_later(found[1], partial(_tell_failure, watches))
    return found


def _launch(
    x: Tensor, code: PairCode, solver: Solver, room: int, keep: int, traced: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A solve on a card whose log has room for so many attempts."""
    end, log, kept = torch.ops.fastode.resident_solve_forward.default(
        x, *code, *_card_code(solver, room), keep, through_code(solver) if keep else 0, traced
    )
    return end, log, kept


def _card_code(solver: Solver, room: int = 1) -> SolverCode:
    """A solver as the operators of a card take it: with the room of the log and of what is kept (csrc/cuda)."""
    table, numbers, limits, per_sample = solver_code(solver)
    # One more than there can be, so that it is the attempts that end a solve.
    most = _MOST_TAKEN if solver.max_steps is None else min(_MOST_TAKEN, solver.max_steps + 1)
    return table, numbers, [*limits, room, most], per_sample


def _read_all(
    x: Tensor, code: PairCode, solver: Solver, solves: int, keep: int
) -> tuple[tuple[Tensor, Tensor, list[Tensor]], list[float]]:
    """A solve on a card, and its log of all attempts as the CPU writes it: where there was no room, solved again."""
    room = _ROOM
    while True:
        found = _launch(x, code, solver, room, keep, False)
        rows = found[1].view(solves, -1).tolist()
        most = max(int(row[0]) for row in rows)
        if most <= room:
            return found, [value for row in rows for value in row[: _HEAD + _EACH * int(row[0])]]
        room = most  # the same steps again


def _read_steps(x: Tensor, code: PairCode, solver: Solver, steps: Sequence[Steps]) -> None:
    """Ask a card for the steps of a solve, which a backward that is differentiated takes again."""
    with torch.no_grad():
        _, log = _read_all(x, code, solver, len(steps), KEEP_NOTHING)
    for taken, (end, _, _, attempts) in zip(steps, _solves(log), strict=True):
        if end == _REACHED:
            _note(taken, solver, attempts)


def _tell_failure(watches: Sequence[Watch], log: Tensor) -> None:
    """Raise what the first solve that failed raises, by a log of each one's last attempt."""
    for watch, row in zip(watches, log.view(len(watches), -1).tolist(), strict=True):
        count, end, t, h = row[:4]
        if count:
            start, size, ratio, accepted, _ = row[_HEAD:]
            watch.attempt(start, size, ())
            watch.judged(ratio, accepted == 1)
        if end != _REACHED:
            _fail(watch, int(end), t, h)


def _fail(watch: Watch, end: int, t: float, h: float) -> NoReturn:
    """Raise what a solve that ended so raises."""
    if end == _MOST_ATTEMPTS:
        watch.fail_at_most()
    if end == _NO_ROOM:
        watch.fail(
            f"it took more steps than the {_MOST_TAKEN} of which a card keeps the sizes for gradients",
            "raise the tolerances, or ask for no gradients",
        )
    watch.attempt(t, h, (torch.tensor(math.nan),) if end == _NOT_FINITE else ())
    watch.fail_at_step()


def solver_code(solver: Solver) -> SolverCode:
    """A solver as the operators take it (csrc/cpu/resident_ops.cpp): the scheme's rows, numbers, integers."""
    tableau = solver.tableau
    numbers = [solver.rtol, solver.atol, solver.t1, solver.first_step or 0.0]
    if not isinstance(tableau, Embedded):
        # One stage more, at the step's end: its slope is the next step's first.
        none = (0.0,) * (tableau.stages + 1)
        rows = _rows((*tableau.a, tableau.b), (*tableau.b, 0.0), none, none)
        return rows, [*numbers[:3], solver.t1 / solver.steps], [tableau.order, -1, 1, solver.steps], False
    most = -1 if solver.max_steps is None else solver.max_steps
    rows = _rows(tableau.a, tableau.b, tableau.b_error, tableau.b_mid)
    return rows, numbers, [tableau.order, most, int(tableau.ends_in_solution), 0], solver.per_sample


def through_code(solver: Solver) -> int:
    """Through which sizes a solver's gradient goes, as the operators take it; given ones depend on nothing."""
    return _THROUGH[solver.gradient] if solver.is_adaptive else 0


def _rows(a: Sequence[tuple[float, ...]], *weights: tuple[float, ...]) -> list[float]:
    stages = len(a)
    return [value for row in (*a, *weights) for value in (*row, *(0.0,) * (stages - len(row)))]


def tell(log: list[float], solver: Solver, watches: Sequence[Watch], steps: Sequence[Steps]) -> None:
    """Tell each solve's watch and `Steps` what the log has of it; raises what the first one that failed raises."""
    tableau, chosen = solver.tableau, 1 if solver.first_step is not None else 2
    for watch, taken, (end, t, h, attempts) in zip(watches, steps, _solves(log), strict=True):
        watch.evaluations = chosen + (tableau.stages - 1) * len(attempts)
        for start, size, ratio, accepted, _ in attempts:
            watch.attempt(start, size, ())
            watch.judged(ratio, accepted == 1)
        if end != _REACHED:
            _fail(watch, end, t, h)
        watch.finish()
        _note(taken, solver, attempts)


def _note(taken: Steps, solver: Solver, attempts: Sequence[Sequence[float]]) -> None:
    """Note the steps of a solve that reached t₁."""
    accepted_ones = [(start, size) for start, size, _, accepted, _ in attempts if accepted == 1]
    start, size = accepted_ones[-1]
    taken.sizes, taken.at = [size for _, size in accepted_ones], (solver.t1 - start) / size
    taken.first_stayed = attempts[0][3] == 1


def _solves(log: list[float]) -> Iterator[tuple[int, float, float, list[list[float]]]]:
    """How each solve ended, the time and size at which it stands, and its attempts: t, h, ρ, accepted, half."""
    at = 0
    while at < len(log):
        count, end, t, h = log[at : at + 4]
        first, at = at + _HEAD, at + _HEAD + _EACH * int(count)
        yield int(end), t, h, [log[i : i + _EACH] for i in range(first, at, _EACH)]
