"""What all engines share: a branch as constants, its tensors by place, the operators' codes, and sums of gradients.

A leaf: it imports nothing of the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..branch.layers import TENSORS_PER_UNIT, Activation, Norm
from ..branch.read import Unit
from ..native.constants import ACTIVATION_CODE, NORM_CODE

NO_NORM = (0, 1, 0.0)
NO_ACTIVATION = (0, 0.0, 0.0)

# The places of a unit's tensors; those of a norm alone are the first TENSORS_PER_NORM of them.
NORM_WEIGHT, NORM_BIAS, MEAN, VARIANCE, CONV_WEIGHT, CONV_BIAS = range(TENSORS_PER_UNIT)
TENSORS_PER_NORM = 4

MaybeTensor = Tensor | None
MaybeTensors = Sequence[Tensor | None]
Codes = tuple[int, int, float, int, float, float]


@dataclass(frozen=True)
class Plan:
    """A branch as constants.

    Attributes:
        units: norm, activation and convolution, each optional, in order.
        tracked: for each unit, whether its norm updates running statistics.
        lower: the dtype to which autocast lowers convolutions, None where it is off.
        memo: what an engine has made of it, for the tensors that it always comes with; a tracer leaves it alone.
    """

    units: tuple[Unit, ...]
    tracked: tuple[bool, ...]
    lower: torch.dtype | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def codes(self, index: int) -> Codes:
        """The norm and the activation of a unit as the operators take them."""
        if torch.compiler.is_compiling():
            return codes(self.units[index])
        kept = self.memo.get("codes")
        if kept is None:
            kept = self.memo["codes"] = [codes(unit) for unit in self.units]
        found: Codes = kept[index]
        return found


class Record(NamedTuple):
    """What a sweep keeps of one unit for its pull-back.

    Attributes:
        h: the unit's input.
        stats: the statistics of its norm.
        a: its convolution's input; None where the pull-back makes it again.
        t: the tangent of h, in sweeps that carry one.
        tstats: the statistics of t.
    """

    h: Tensor
    stats: Tensor
    a: Tensor | None
    t: Tensor | None = None
    tstats: Tensor | None = None


class Gradients:
    """The parameter gradients of a backward pass, summed as the sweeps find them; only those that are wanted."""

    def __init__(self, tensors: MaybeTensors, wanted: Sequence[bool]) -> None:
        self._tensors = tensors
        self._wanted = wanted
        self._sums: list[MaybeTensor] = [None] * len(wanted)
        # What the sums lack, one of each at most: all of these are added at once.
        self._waiting: dict[int, Tensor] = {}

    def wants(self, index: int) -> bool:
        return self._wanted[index]

    def wants_norm(self, at: int) -> bool:
        """Whether weight or bias of the norm whose tensors begin at `at` are wanted."""
        return self._wanted[at + NORM_WEIGHT] or self._wanted[at + NORM_BIAS]

    def add(self, index: int, gradient: Tensor, scale: float = 1.0) -> None:
        if self._wanted[index]:
            gradient = gradient if scale == 1.0 else gradient * scale
            if self._sums[index] is None:
                self._sums[index] = gradient
                return
            if index in self._waiting:
                self._add_waiting()
            self._waiting[index] = gradient

    def add_norm(self, at: int, weight_bar: Tensor, bias_bar: Tensor, scale: float = 1.0) -> None:
        """`add` for weight and bias of the norm whose tensors begin at `at`."""
        self.add(at + NORM_WEIGHT, weight_bar, scale)
        self.add(at + NORM_BIAS, bias_bar, scale)

    def _add_waiting(self) -> None:
        alike: dict[torch.dtype, list[int]] = {}  # of tensors of several dtypes a card would add each by itself
        for index, gradient in self._waiting.items():
            alike.setdefault(gradient.dtype, []).append(index)
        for places in alike.values():
            sums = [total for index in places if (total := self._sums[index]) is not None]
            totals = torch._foreach_add(sums, [self._waiting[index] for index in places])
            for index, total in zip(places, totals, strict=True):
                self._sums[index] = total
        self._waiting.clear()

    def result(self) -> list[MaybeTensor]:
        """A gradient for each tensor, in its dtype; None where there is none."""
        if self._waiting:
            self._add_waiting()
        pairs = zip(self._sums, self._tensors, strict=True)
        return [
            None if bar is None or tensor is None else bar if bar.dtype == tensor.dtype else bar.to(tensor.dtype)
            for bar, tensor in pairs
        ]


def statistics_of(records: Sequence[Record]) -> list[Tensor]:
    """The statistics by which the norms of one evaluation normalised, one for each unit."""
    return [record.stats for record in records]


def tracked_statistics(plan: Plan, statistics: Sequence[Tensor]) -> list[Tensor]:
    """Of the statistics of successive evaluations, those with which running statistics are updated, in order."""
    units = len(plan.units)
    return [stats for index, stats in enumerate(statistics) if plan.tracked[index % units]]


def norm_codes(norm: Norm | None) -> tuple[int, int, float]:
    """Mode, groups and eps as the operators take them."""
    return NO_NORM if norm is None else (NORM_CODE[norm.mode], norm.groups, norm.eps)


def activation_codes(activation: Activation | None) -> tuple[int, float, float]:
    """Kind, p and q as the operators take them."""
    return NO_ACTIVATION if activation is None else (ACTIVATION_CODE[activation.kind], activation.p, activation.q)


def codes(unit: Unit) -> Codes:
    """The norm and the activation of a unit as the operators take them."""
    return (*norm_codes(unit.norm), *activation_codes(unit.activation))
