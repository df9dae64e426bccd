"""A second judgement of what failed the one rule, where the rule's few runs of the reference do not show its rounding.

The rule and what it allows stay as they are. The reference runs more often. Where float64 is judged, the truth is
computed in long double, and is not another run in float64. And a pre-activation within rounding of a kink may be on
either side: a block equals the reference if it does with a few of these on the other side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastode.testing import Comparison, Judge

from . import wide

MOVES = 16
# Some of very many kinks could be chosen to explain anything.
MOST_CROSSED = 3
MOST_NEAR = 64

Place = tuple[int, tuple[int, ...]]  # which call of an activation with a kink, and which of its pre-activations


def compare_by_either(
    judge: Judge, plain: nn.Module, fused: nn.Module, mode: Any, autocast: torch.dtype | None, *, by_error: bool = False
) -> Comparison:
    """The comparison of a block by the one rule and, where that fails, by the second judgement.

    Args:
        judge: of the one rule.
        plain: the reference.
        fused: its twin.
        mode: as the judge has it.
        autocast: the dtype of autocast around it, or None.
        by_error: as `judge_again` takes it.
    """
    comparison = judge.compare(fused)
    if comparison.ok:
        return comparison
    return compare_again(judge_again(plain, judge.inputs, mode, autocast, by_error=by_error), fused)


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
        tries = [
            (judge.verdict(found, judge.effect(steps(judge, [*crossed, p]))), p) for p in places if p not in crossed
        ]
        if not tries:
            break
        better, place = min(tries, key=lambda tried: tried[0].worst.ratio)
        if better.worst.ratio >= best.worst.ratio:
            break
        best = better
        crossed.append(place)
    return best if best.ok else comparison


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
