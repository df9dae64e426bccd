"""Attacks without the model's gradient: SPSA, which estimates it from answers, and images made for another model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .balls import Ball, ball_of
from .gradient import fgsm, finite
from .held import attacked
from .losses import Objective, objective_of
from .task import Bounds, Number, Task, check_early_stop, picked, task_of

__all__ = ["spsa", "transfer"]

# Of Adam, as Uesato et al. use it.
_BETA1, _BETA2, _SMALL = 0.9, 0.999, 1e-8


def spsa(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    step_size: Number = 0.01,
    steps: int = 20,
    samples: int = 32,
    delta: float = 0.01,
    loss: str = "margin",
    targets: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    early_stop: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """SPSA in the maximum norm: Adam on a gradient that is estimated from the model's answers alone.

    The estimate is the mean over directions v of random signs of (L(x + δv) − L(x − δv)) / (2δ) v.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the radius, in units of the images; a number, or one for each channel.
        step_size: Adam's learning rate, likewise.
        steps: updates.
        samples: directions of an estimate, each of two answers (Huang et al.: 32, with 20 steps).
        delta: δ > 0, in units of the images.
        loss: "margin", C&W's hinge without its bound, or "ce".
        targets: the classes [N] that the model is to take the images for; None where any wrong one will do.
        bounds: the least and the largest value of a pixel, each a number or one for each channel.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: of the directions; the numbers are drawn on its device.
        early_stop: ask once more at each step, and leave out samples that are fooled.
        batch_size: images in one call of the model, at least one direction of all of them.

    Returns:
        Images [N, C, H, W] within the radius and the bounds.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        FloatingPointError: the model's answers are not finite.

    Source: Uesato et al. 2018, Section 4.2; Huang et al. (paper 003), Section 5.1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> spsa(model, images, labels, eps=0.1, steps=2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 2, 2])
    """
    task = task_of(model, images, labels, targets, bounds, mode, None, generator)
    checks.steps(steps)
    checks.steps(samples, "samples")
    checks.steps(batch_size, "batch_size")
    checks.step_size(delta, "delta")
    checks.one_of("loss", loss, ("margin", "ce"))
    check_early_stop(early_stop, mode)
    ball = ball_of(task, "linf", eps, step_size, 1.0)
    with attacked(model, mode, None), torch.no_grad():
        moved = _Estimate(task, ball, objective_of(loss, task), samples, delta, batch_size, generator).climbed(
            steps, early_stop
        )
    return finite(moved, task.images)


class _Estimate:
    """SPSA on all samples that are left.

    Attributes:
        task: what is attacked.
        rows: the samples that are left [n].
    """

    def __init__(
        self, task: Task, ball: Ball, objective: Objective, samples: int, delta: float, batch_size: int,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        self.task, self.ball, self.objective = task, ball, objective
        self.samples, self.delta, self.batch_size, self.generator = samples, delta, batch_size, generator
        self.shape = task.images.shape
        self.rows = torch.arange(len(task.images), device=task.images.device)

    def climbed(self, steps: int, early_stop: bool) -> Tensor:
        """The images after all steps of Adam."""
        x = self.task.images
        found, mean, square = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, steps + 1):
            if early_stop:
                stays = (~self.task.fooled(self.task.logits(x))).nonzero().squeeze(1)
                if len(stays) < len(self.rows):
                    found[self.rows] = x
                    self._leave(stays)
                    x, mean, square = (picked(each, stays) for each in (x, mean, square))
            if not len(self.rows):
                return found
            gradient = self.gradient(x)
            mean = torch.lerp(gradient, mean, _BETA1)
            square = torch.lerp(gradient.square(), square, _BETA2)
            size = (square / (1 - _BETA2**step)).sqrt() + _SMALL
            x = self.ball.clipped(torch.addcmul(x, mean / (1 - _BETA1**step) / size, self.ball.step_size))
        found[self.rows] = x
        return found

    def gradient(self, x: Tensor) -> Tensor:
        """The estimate at x [n, C, H, W]."""
        total = torch.zeros_like(x)
        at_once = max(1, self.batch_size // (2 * len(x)))
        for first in range(0, self.samples, at_once):
            count = min(at_once, self.samples - first)
            signs = torch.stack([self._signs() for _ in range(count)]).to(x)
            shifted = torch.stack([x + self.delta * signs, x - self.delta * signs]).flatten(0, 2)
            logits = self.task.logits(shifted)
            values = self.objective.at(torch.arange(len(x), device=x.device).repeat(2 * count))(logits)
            above, below = values.view(2, count, len(x))
            total += ((above - below)[:, :, None, None, None].to(x) * signs).sum(0)
        return total / (2 * self.delta * self.samples)

    def _signs(self) -> Tensor:
        """A direction for each sample that is left; drawn for all, so that one's do not depend on the others."""
        device = self.rows.device if self.generator is None else self.generator.device
        signs = torch.randint(2, self.shape, generator=self.generator, device=device) * 2 - 1
        signs = signs.to(self.rows.device)
        return signs if len(self.rows) == self.shape[0] else signs[self.rows]

    def _leave(self, stays: Tensor) -> None:
        self.rows = self.rows[stays]
        self.task, self.ball, self.objective = self.task.at(stays), self.ball.at(stays), self.objective.at(stays)


def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    source: nn.Module,
    attack: Callable[..., Tensor] = fgsm,
    bounds: Bounds = (0.0, 1.0),
    **options: Any,
) -> Tensor:
    """Images that an attack makes for another model: a black-box attack, for the model is never asked.

    Args:
        model: a module that returns logits [N, K], for which the images are meant.
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        source: the other model, the oracle, on the same device.
        attack: a function of this module, or of its signature.
        bounds: the least and the largest value of a pixel, each a number or one for each channel.
        options: the attack's other arguments.

    Returns:
        Images [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the source returns no logits.

    Source: Papernot et al. 2017; Li, He & Lin 2020, Table 4 (FGSM with ε = 16/255).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, oracle = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
        >>> transfer(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), source=oracle, eps=16 / 255).shape
        torch.Size([2, 3, 2, 2])
    """
    task_of(model, images, labels, options.get("targets"), bounds)
    checks.module("source", source)
    if not callable(attack):
        raise TypeError(f"attack must be a function, got {checks.what(attack)}")
    return attack(source, images, labels, bounds=bounds, **options)
