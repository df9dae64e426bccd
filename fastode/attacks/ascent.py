"""The loop of the gradient attacks: steps uphill from one or more starts, on all samples or on those not yet fooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..fusion import graphs
from .balls import Ball
from .losses import Objective
from .task import Task, gradient_counted, picked, uncounted


@dataclass(frozen=True)
class Ascent:
    """A gradient attack on some samples.

    Attributes:
        task: what is attacked.
        ball: where images may go.
        objective: what is made larger.
        steps: how many.
        fault: a scalar that becomes True where a gradient is NaN, whose sign would be taken for zero.
        decay: of the momentum; None for none.
        change: what the model sees in place of an image.
        early_stop: whether samples that are fooled take no more steps.
        graphed: whether a step is one CUDA graph.
    """

    task: Task
    ball: Ball
    objective: Objective
    steps: int
    fault: Tensor
    decay: float | None = None
    change: Callable[[Tensor], Tensor] | None = None
    early_stop: bool = False
    graphed: bool = False

    def at(self, rows: Tensor) -> Ascent:
        """The part of some samples [n]."""
        return replace(self, task=self.task.at(rows), ball=self.ball.at(rows), objective=self.objective.at(rows))

    @cached_property
    def as_graph(self) -> _Step:
        """One step as a CUDA graph, captured once for all starts."""
        return _Step(self)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's gradient at x, and the model's logits; of the input and nothing else."""
        leaf = x.detach().requires_grad_()
        gradient_counted(len(x))
        logits = self.task.logits(leaf if self.change is None else self.change(leaf))
        if not logits.requires_grad:
            raise ValueError("model must return logits that depend on the images, got some without a graph")
        # The sum: a sample's gradient does not depend on how many there are.
        (gradient,) = torch.autograd.grad(self.objective(logits).sum(), leaf)
        self.fault.logical_or_(gradient.isnan().any())
        return gradient, logits.detach()

    def moved(self, x: Tensor, gradient: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next images, and the momentum they were reached by."""
        if self.decay is None:
            return self.ball.step(x, gradient), None
        # Divided by the mean, not the sum, of magnitudes: the direction is the same, and numbers stay near one.
        size = gradient.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient.dtype).tiny).view(-1, 1, 1, 1)
        velocity = gradient / size if velocity is None else torch.addcdiv(self.decay * velocity, gradient, size)
        return self.ball.step(x, velocity), velocity

    def climbed(self, start: Tensor) -> Tensor:
        """The images after all steps."""
        if self.graphed:
            return self.as_graph.climbed(start)
        if self.early_stop:
            return self._climbed_by_those_left(start)
        x, velocity = start, None
        for _ in range(self.steps):
            x, velocity = self.moved(x, self.gradient(x)[0], velocity)
        return x

    def _climbed_by_those_left(self, start: Tensor) -> Tensor:
        found = start.clone()
        rows = torch.arange(len(start), device=start.device)
        left, x, velocity = self, start, None
        for _ in range(self.steps):
            gradient, logits = left.gradient(x)
            stays = ~left.task.fooled(logits)
            if not bool(stays.all()):
                found[rows[~stays]] = x[~stays]
                kept = stays.nonzero().squeeze(1)
                rows, x, gradient, left = rows[kept], picked(x, kept), gradient[kept], left.at(kept)
                velocity = None if velocity is None else velocity[kept]
            if not len(rows):
                return found
            x, velocity = left.moved(x, gradient, velocity)
        found[rows] = x
        return found


class _Step:
    """One step as a CUDA graph, which moves images where they lie.

    Attributes:
        model: what is attacked.
    """

    def __init__(self, ascent: Ascent) -> None:
        self.model, self.ascent = ascent.task.model, ascent
        self.x = ascent.task.images.clone()
        self.velocity = None if ascent.decay is None else torch.zeros_like(self.x)
        with uncounted():
            self.replay = graphs.repeated(self.take, self.model, self.x)

    def take(self) -> list[Tensor]:
        x, velocity = self.ascent.moved(self.x, self.ascent.gradient(self.x)[0], self.velocity)
        self.x.copy_(x)
        if velocity is not None and self.velocity is not None:
            self.velocity.copy_(velocity)
        return []

    def climbed(self, start: Tensor) -> Tensor:
        self.x.copy_(start)
        if self.velocity is not None:
            self.velocity.zero_()
        for _ in range(self.ascent.steps):
            gradient_counted(len(start))
            self.ascent.task.count(len(start))
            self.replay()
        return self.x.clone()


def best_of(ascent: Ascent, start: Callable[[], Tensor], restarts: int) -> Tensor:
    """The images of the most successful of several starts, sample by sample.

    A sample that was fooled keeps the images of the first start that did it, another one those with the largest loss.

    Args:
        ascent: what is done from each start.
        start: draws one, of all samples.
        restarts: how many; after a single one the model is not asked again.
    """
    task = ascent.task
    left = torch.arange(len(task.images), device=task.images.device)
    best = task.images.clone()
    if ascent.early_stop:
        with torch.no_grad():
            left = (~task.fooled(task.logits(task.images))).nonzero().squeeze(1)
    largest = torch.full((len(best),), -torch.inf, device=best.device)
    open_ = torch.ones(len(best), dtype=torch.bool, device=best.device)
    for _ in range(restarts):
        drawn = start()  # of all, so that a sample's numbers do not depend on the others
        if not len(left):
            break
        everything = len(left) == len(best)
        part = ascent if everything else ascent.at(left)
        x = part.climbed(drawn if everything else picked(drawn, left))
        if restarts == 1:
            if everything:
                return x
            best[left] = x  # index_copy would lose the memory format
            return best
        with torch.no_grad():
            logits = part.task.logits(x)
        hit, value = part.task.fooled(logits), part.objective(logits).float()
        better = open_[left] & (hit | (value > largest[left]))
        best[left[better]] = x[better]
        largest[left] = torch.maximum(largest[left], value)
        open_[left[hit]] = False
        if ascent.early_stop:
            left = left[~hit]
    return best
