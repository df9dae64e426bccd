"""What the papers measure of a trained network, as columns of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks, stability
from ..attacks.borrowed import art_attacks, foolbox_itself
from ..steps import record_steps
from .plan import Measure

__all__ = ["Alone", "Attacked", "Clean", "Distances", "Growth", "StepTimes"]

NEEDS: Mapping[str, Callable[[], Any]] = {
    "cw_l2": art_attacks, "cw_linf": art_attacks, "apgd": art_attacks, "boundary": foolbox_itself
}  # fmt: skip
DRAW_NOTHING = ("fgsm", "bim")
Values = dict[str, float | str]


@dataclass(frozen=True)
class Clean:
    """The images, in percent, that the network has right as they are.

    Attributes:
        column: of the table.
    """

    column: str = "natural"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def ready(self) -> None:
        return None

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        right = 0
        model.eval()
        with torch.no_grad():
            for x, y in zip(images.split(batch), labels.split(batch), strict=True):
                right += int((model(x).argmax(1) == y).sum())
        return {self.column: 100 * right / len(labels)}


@dataclass(frozen=True)
class Attacked:
    """The images, in percent, that the network has right before and after an attack.

    Attributes:
        column: of the table.
        attack: its name in `fastode.attacks`.
        options: of the attack.
        images: the first ones only; None for all that the plan attacks.
    """

    column: str
    attack: str
    options: Mapping[str, Any]
    images: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def ready(self) -> None:
        NEEDS.get(self.attack, lambda: None)()

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        found = _attacked(self, model, images, labels, generator, batch)
        return {self.column: 100 * found.robust_accuracy}


@dataclass(frozen=True)
class Distances:
    """The images, in percent, that are right and that an attack which looks for the least change leaves so within ε.

    Attributes:
        column: of the table, each with its ε.
        attack: its name in `fastode.attacks`.
        radii: each ε, a Euclidean distance.
        options: of the attack.
        images: as in `Attacked`.
    """

    column: str
    attack: str
    radii: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    images: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{self.column} {radius:g}" for radius in self.radii)

    def ready(self) -> None:
        NEEDS.get(self.attack, lambda: None)()

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        found = _attacked(self, model, images, labels, generator, batch)
        holds = [found.correct & ~(found.success & (found.l2 <= radius)) for radius in self.radii]
        return {name: 100 * float(each.double().mean()) for name, each in zip(self.columns, holds, strict=True)}


@dataclass(frozen=True)
class Alone:
    """A measure of each image as a batch of its own.

    The images of a batch share an adaptive solver's steps, so that one that a library has moved just far enough alone
    may be right again among others.

    Attributes:
        measure: `Attacked` or `Distances`.
    """

    measure: Measure

    @property
    def columns(self) -> tuple[str, ...]:
        return self.measure.columns

    def ready(self) -> None:
        self.measure.ready()

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        return self.measure(model, images, labels, generator, 1)


@dataclass(frozen=True)
class Growth:
    """The perturbation growth ratio of each group, by images that PGD makes (paper 004, eq. 17).

    Attributes:
        layers: names of the network's parts.
        norms: p, of 1 and 2.
        options: of the attack.
        images: as in `Attacked`.
    """

    layers: tuple[str, ...]
    norms: tuple[int, ...]
    options: Mapping[str, Any]
    images: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._column(layer, norm) for norm in self.norms for layer in self.layers)

    @staticmethod
    def _column(layer: str, norm: int) -> str:
        return f"{layer} ℓ{norm}"

    def ready(self) -> None:
        return None

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        moved = _attacked(
            Attacked("", "pgd", self.options, self.images), model, images, labels, generator, batch
        ).images
        images = images[: len(moved)]
        names = {layer: _inside(model, layer) for layer in self.layers}
        values: Values = {}
        for norm in self.norms:
            ratios: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
            for x, other in zip(images.split(batch), moved.split(batch), strict=True):
                if torch.equal(x, other):  # the attack leaves what is misclassified already
                    for layer in names:
                        ratios[layer].append(x.new_full((len(x),), math.nan))
                    continue
                found = stability.growth_ratio(model, x, other, norm=norm, layers=list(names.values()))
                for layer, name in names.items():
                    ratios[layer].append(found[name])
            for layer in self.layers:
                values[self._column(layer, norm)] = float(torch.cat(ratios[layer]).nanmean())
        return values


def _inside(model: nn.Module, layer: str) -> str:
    """The name of a network's part, where the network stands behind its normalisation."""
    return next(name for name, _ in model.named_modules() if name.rpartition(".")[2] == layer)


@dataclass(frozen=True)
class StepTimes:
    """The times at which the first adaptive block of a network stops, after so many steps of PGD (paper 003, Table 3).

    Attributes:
        iterations: of PGD, each a column.
        options: of the attack.
        images: of one batch, which shares its steps.
    """

    iterations: tuple[int, ...]
    options: Mapping[str, Any]
    images: int

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"after PGD-{steps}" for steps in self.iterations)

    def ready(self) -> None:
        return None

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
    ) -> Values:
        values: Values = {}
        x, y = images[: self.images], labels[: self.images]
        for column, steps in zip(self.columns, self.iterations, strict=True):
            moved = attacks.pgd(model, x, y, steps=steps, generator=generator, **self.options)
            model.eval()
            with record_steps() as log, torch.no_grad():
                model(moved)
            if log:
                times = [f"{min(time, log[0].solver.t1):.3f}" for time in log[0].times]
                values[column] = f"[{', '.join(times)}]"
            else:
                values[column] = "no adaptive steps"
        return values


def _attacked(
    measure: Any, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int
) -> attacks.Report:
    count = measure.images or len(images)
    options = dict(measure.options)
    if measure.attack not in DRAW_NOTHING:
        options["generator"] = generator
    return attacks.run(measure.attack, model, images[:count], labels[:count], batch_size=batch, **options)
