"""A recipe as data: networks, their training, what is measured of them, and what the paper found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..training import Loss

__all__ = ["Claim", "Measure", "Network", "Plan", "Recipe", "Table", "Training"]

NOT_RUN = "It wants a GPU; its time has not been measured."
TrainingLoss = Callable[[nn.Module, Tensor, Tensor], Loss]


@dataclass(frozen=True)
class Network:
    """A row of the tables.

    Attributes:
        name: of the row.
        make: of `fastode.nets`, called with in_channels and num_classes.
        paper: the paper's row that it is compared with; "" for the one of its name.
        loss: that it is trained with; None for the plan's.
    """

    name: str
    make: Callable[..., nn.Module]
    paper: str = ""
    loss: TrainingLoss | None = None


@dataclass(frozen=True)
class Training:
    """How each network is trained.

    Attributes:
        loss: of `fastode.training`, its keywords bound.
        epochs: of all training images.
        batch: images of a step.
        optimizer: called with the parameters.
        milestones: epochs after which the rate falls; with other epochs than these they move along.
        factor: by which.
        augment: move and mirror the images.
        images: the first of the training images, of which an epoch has no more; None for all.
    """

    loss: TrainingLoss
    epochs: int
    batch: int
    optimizer: Callable[..., torch.optim.Optimizer]
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    augment: bool = False
    images: int | None = None


class Measure(Protocol):
    """What is measured of a trained network: `fastode.recipes.measures` has them."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table that it fills."""

    def ready(self) -> None:
        """Raise ImportError where a library is missing, before anything is trained."""

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> dict[str, float | str]:
        """The value of each column."""


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a figure as one.

    Attributes:
        name: as in the paper.
        title: what it shows.
        measures: its columns.
        paper: the paper's numbers by row and column; empty where its text has none.
        unit: of its numbers.
        axis: what the plot has along its axis: "bars" of networks by column, lines over "columns", a line for each
            column over "rows", or "" for no plot.
        note: what has to be said under it.
    """

    name: str
    title: str
    measures: tuple[Measure, ...]
    paper: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    unit: str = "% right"
    axis: str = "bars"
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in order."""
        return tuple(column for measure in self.measures for column in measure.columns)


@dataclass(frozen=True)
class Claim:
    """What the paper says of an order, which a run has or has not.

    Attributes:
        words: in a sentence.
        table: in which.
        columns: of the table, each of which is to have the order.
        rows: networks, from the least to the largest.
    """

    words: str
    table: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """One size of a recipe.

    Attributes:
        data: "digits" or "photographs", which packages ship, or the data set that the user has to name.
        networks: the rows.
        training: of each.
        tables: what comes out.
        images: of the test set, that are attacked.
        batch: images that are attacked together.
        seeds: how many.
        time: what it takes on two cores, in words; "about" where that is estimated.
        claims: of the paper.
        note: what is not the paper's, in sentences.
    """

    data: str
    networks: tuple[Network, ...]
    training: Training
    tables: tuple[Table, ...]
    images: int
    batch: int
    seeds: int
    time: str
    claims: tuple[Claim, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """An experiment of a paper.

    Attributes:
        name: on the command line.
        paper: of which, cited.
        title: what it is.
        plan: called with whether the paper's size is wanted, and whether the images have colours.
    """

    name: str
    paper: str
    title: str
    plan: Callable[[bool, bool], Plan]


def described(value: Any) -> Any:
    """A plan, or a part of one, in JSON's words: two that differ in what they do are described differently."""
    if isinstance(value, functools.partial):
        words = [*map(repr, value.args), *(f"{key}={_word(item)}" for key, item in sorted(value.keywords.items()))]
        return f"{described(value.func)}({', '.join(words)})"
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: described(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [described(item) for item in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _word(value: Any) -> str:
    return str(described(value)) if callable(value) else repr(value)
