"""What a solve leaves for its pull-back, and how a Function saves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .field import Stages
from .start import Start


@dataclass(frozen=True)
class Tried:
    """An attempt of a step, where the gradient goes through all sizes.

    Attributes:
        size: of the step.
        ratio: of its error.
        left: whether it left what its pull-back needs; a rejected one does only where its error has a gradient.
    """

    size: float
    ratio: float
    left: bool

    @property
    def accepted(self) -> bool:
        return self.ratio <= 1


@dataclass
class Taken:
    """A solve's accepted steps, or, where the gradient goes through all sizes, its attempts, and what leads to them.

    Attributes:
        stages: of each.
        kept: by each.
        slopes: of the first and the last one by error, which the first size's gradient needs; of each, for all sizes'.
        ends: the states at start and end of each, for the gradient of all sizes.
        tried: every attempt, for the gradient of all sizes.
        start: how the first step by error was chosen.
        statistics: of every evaluation, in order.
    """

    stages: list[Stages] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    slopes: list[list[Tensor]] = field(default_factory=list)
    ends: list[list[Tensor]] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    start: Start | None = None
    statistics: list[Tensor] = field(default_factory=list)


def packed(taken: Taken) -> tuple[Any, list[Tensor]]:
    """A solve without its tensors, and these."""
    flat: list[Tensor] = []

    def put(tensors: Sequence[Tensor]) -> slice:
        flat.extend(tensors)
        return slice(len(flat) - len(tensors), len(flat))

    rows = [[put(each) for each in tensors] for tensors in (taken.kept, taken.slopes, taken.ends)]
    start, of_start = taken.start, list[slice]()
    if start is not None:
        # What only the sizes' gradients need goes with the slopes.
        beside = (start.slopes, start.trial_kept) if taken.slopes else ([], [])
        of_start = [put(each) for each in (start.kept, *beside)]
        start = replace(start, kept=[], slopes=[], trial_kept=[], statistics=[])
    return (taken.stages, rows, taken.tried, start, of_start), flat


def unpacked(packed: Any, flat: Sequence[Tensor]) -> Taken:
    """The solve that was packed."""
    stages, rows, tried, start, of_start = packed
    if start is not None:
        own, both, trial = (list(flat[at]) for at in of_start)
        start = replace(start, kept=own, slopes=both, trial_kept=trial)
    kept, slopes, ends = ([list(flat[at]) for at in each] for each in rows)
    return Taken(list(stages), kept, slopes, ends, tried, start)
