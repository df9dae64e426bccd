"""The face that the solution of a single map's equation asks of an engine: the map, for one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ....solver import Solver
from ...plan import MaybeTensor, MaybeTensors, Plan


@dataclass(frozen=True)
class Stages:
    """The stages of a step, as numbers.

    Attributes:
        rows: a_ij Δt.
        times: of every stage.
        given: whether the first slope comes from before, so that stage 0 is not evaluated.
    """

    rows: Sequence[Sequence[float]]
    times: Sequence[float]
    given: bool

    @property
    def evaluated(self) -> range:
        """The stages at which the field is evaluated."""
        return range(int(self.given), len(self.rows))


@dataclass(frozen=True)
class Made:
    """What the stages of a step came to.

    Attributes:
        slopes: of every stage, the given one among them.
        point: of the last stage.
        kept: what the pull-back needs; empty where nothing was to be kept.
        statistics: of every evaluation of each tracked norm.
    """

    slopes: list[Tensor]
    point: Tensor
    kept: list[Tensor]
    statistics: list[Tensor]


@dataclass(frozen=True)
class Pulled:
    """The cotangents of a step's beginning.

    Attributes:
        state: of the state.
        first: of the first slope, where that is given.
        times: of the time of every evaluation.
        product: Σ_i ⟨F_i, F̄_i⟩ over all stages without what is carried, where it was asked for.
    """

    state: MaybeTensor
    first: MaybeTensor = None
    times: Sequence[Tensor] = field(default_factory=list)
    product: MaybeTensor = None


# The cotangent of a combination of a step's slopes, and its weights.
Weighted = tuple[Tensor, Sequence[float]]


class Field(Protocol):
    """A field for a call on one input. Its maps are of a layout of its own, in which empty places are zero."""

    def enter(self, x: Tensor) -> Tensor:
        """A user's map as one of its own."""

    def leave(self, u: Tensor, x: Tensor) -> Tensor:
        """One of its own in the memory format that the reference gives a result of x."""

    def stages(self, stages: Stages, state: Tensor, first: MaybeTensor, keep: bool) -> Made:
        """The stages of a step from a state; `first` is the given slope."""

    def pull(
        self,
        stages: Stages,
        kept: Sequence[Tensor],
        weights: Sequence[float],
        end_bar: MaybeTensor,
        carried: MaybeTensor,
        slopes: Sequence[Tensor] = (),
        error: Weighted | None = None,
    ) -> Pulled:
        """The pull-back of a step whose end is state + Σ weights_i F_i; `carried` is the last slope's own cotangent.

        With `slopes`, of all stages, it also finds the product. `error` is that of the step's error, if it has one.
        """

    def scaled_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, solver: Solver
    ) -> Tensor:
        """The sum of the squares of Σ weights_i terms_i over the larger of the tolerances at u and v; 0 or NaN.

        The second number is 0 where v is finite.
        """

    def pull_squares(
        self, terms: Sequence[Tensor], weights: Sequence[float], u: Tensor, v: Tensor, factor: float, solver: Solver
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of half that sum of squares, times `factor`: in the combination, in u and in v."""

    def gradients(self) -> list[MaybeTensor]:
        """Those of the field's tensors, after all pull-backs."""


# (plan, tensors, x, which gradients of the tensors are wanted) -> the field
MakeField = Callable[[Plan, MaybeTensors, Tensor, Sequence[bool]], Field]
