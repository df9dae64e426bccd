"""A second judgement of what failed the one rule, where the rule's few runs of the reference do not show its rounding.

The rule and what it allows stay as they are. The reference runs more often. Where float64 is judged, the truth is
computed in long double, and is not another run in float64. And a pre-activation within rounding of a kink may be on
either side: a block equals the reference if it does with a few of these on the other side. And where steps follow their
error, the first may have the block's own size: that divides a difference of two slopes by a small step, and so is one
number with many times their rounding, of which runs on moved inputs show a part.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastode
from fastode.reference import adaptive
from fastode.testing import Comparison, Judge
from fastode.testing.record import Shifted
from fastode.testing.rule import Tensors

from . import wide

MOVES = 16
# Some of very many kinks could be chosen to explain anything.
MOST_CROSSED = 3
MOST_NEAR = 64
# Relative: by how much rounding may move a step's size, and its error in units of the tolerance.
CLOSE = 1e-4

Place = tuple[int, tuple[int, ...]]  # which call of an activation with a kink, and which of its pre-activations


def compare_by_either(
    judge: Judge, plain: nn.Module, fused: nn.Module, mode: Any, autocast: torch.dtype | None, *, by_error: bool = False
) -> Comparison:
    """The comparison of a block by the one rule and, where that fails, by the second judgement.

    Args:
        judge: of the one rule, in this mode or one that asks for more.
        plain: the reference.
        fused: its twin.
        mode: of the twin's run.
        autocast: the dtype of autocast around it, or None.
        by_error: as `judge_again` takes it.
    """
    comparison = judge.compare(fused, mode=mode, quick=True)
    if comparison.ok:
        return comparison
    again = judge_again(plain, judge.inputs, mode, autocast, by_error=by_error)
    comparison = compare_again(again, fused)
    return comparison if comparison.ok or not by_error else compare_with_its_first_steps(again, fused)


def judge_again(
    plain: nn.Module, inputs: Any, mode: Any, autocast: torch.dtype | None, *, by_error: bool = False
) -> Judge:
    """The judge with more runs of the reference and, in float64, the truth in long double where it can be computed.

    Args:
        plain: the reference.
        inputs: of it.
        mode: as `Judge` takes it.
        autocast: the dtype of autocast around it, or None.
        by_error: whether its steps follow their error: their times are float64 in a wider arithmetic, too, and so the
            truth stays another run in float64.
    """
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    if first.dtype is torch.float64 and wide.WIDER and not by_error:
        try:
            return Judge(plain, inputs, mode=mode, autocast=autocast, moves=MOVES, truth=wide.truth)
        except NotImplementedError:
            pass
    return Judge(plain, inputs, mode=mode, autocast=autocast, moves=MOVES)


def compare_again(judge: Judge, fused: nn.Module) -> Comparison:
    """The comparison of a block, with pre-activations on the other side of a kink if it passes so."""
    found = judge.run(fused)
    comparison = judge.verdict(found)
    places = near(judge)
    crossed: list[Place] = []
    best = comparison
    while not best.ok and math.isfinite(best.worst.ratio) and len(crossed) < MOST_CROSSED:
        tries = [(crossed_verdict(judge, found, [*crossed, p]), p) for p in places if p not in crossed]
        if not tries:
            break
        better, place = min(tries, key=lambda tried: tried[0].worst.ratio)
        if better.worst.ratio >= best.worst.ratio:
            break
        best = better
        crossed.append(place)
    return best if best.ok else comparison


def crossed_verdict(judge: Judge, found: Tensors, places: list[Place]) -> Comparison:
    """The comparison of what a block yields where these pre-activations are on the other side."""
    return judge.verdict(found, judge.effect(Shifted(steps(judge, places))))


def near(judge: Judge) -> list[Place]:
    """The pre-activations that are within rounding of a kink, the nearest first."""
    found: list[tuple[float, Place]] = []
    for call, tensor in enumerate(judge.across or []):
        pairs = zip(tensor.coalesce().indices().T.tolist(), tensor.coalesce().values().tolist(), strict=True)
        found += [(abs(step), (call, tuple(index))) for index, step in pairs]
    return [place for _, place in sorted(found)[:MOST_NEAR]]


def steps(judge: Judge, places: list[Place]) -> list[Tensor]:
    """What moves these pre-activations, and no other, to the other side."""
    assert judge.across is not None
    made = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in judge.across]
    for call, index in places:
        made[call][index] = judge.across[call][index]
    return made


def compare_with_its_first_steps(judge: Judge, fused: nn.Module) -> Comparison:
    """The comparison of a block whose steps follow their error with the truth that begins with steps of its sizes.

    Where a size is further from the truth's own than rounding may move it, it is the plain comparison.
    """
    with fastode.record_steps() as log:
        found = judge.run(fused)
    own = first_steps(log)
    with fastode.record_steps() as log:
        judge.effect(moved_first_steps([]))
    true = first_steps(log)
    moves = [mine - theirs for mine, theirs in zip(own, true, strict=False)]
    rounds = len(own) == len(true) and all(abs(move) <= CLOSE * size for move, size in zip(moves, true, strict=True))
    return judge.verdict(found, judge.effect(moved_first_steps(moves)) if rounds else None)


def first_steps(log: fastode.StepLog) -> list[float]:
    """The size that each recorded solve tried first."""
    return [next((h for t, h, _ in solve.rejected if t == 0.0), solve.times[1]) for solve in log if not solve.error]


@contextmanager
def moved_first_steps(moves: list[float]) -> Iterator[None]:
    """Within, the reference's solves, its own and torchdiffeq's, begin with steps longer by `moves`, in order."""
    left = iter(moves)

    def moved(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: plain(*args, **options) + next(left, 0.0)

    theirs = importlib.import_module("torchdiffeq._impl.rk_common")
    with ExitStack() as stack:
        for module, name in ((adaptive, "first_step"), (theirs, "_select_initial_step")):
            stack.enter_context(mock.patch.object(module, name, moved(getattr(module, name))))
        yield
