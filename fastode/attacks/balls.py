"""The images that an attack may choose from: those near enough to the given ones, within the bounds of a pixel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .task import Task, numbers, picked

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Ball:
    """The images within a radius, and how one goes from one to another.

    Attributes:
        norm: "linf" or "l2".
        eps: the radius, [1, C, 1, 1] or a scalar tensor.
        step_size: the length of a step, likewise.
        images: the centres [N, C, H, W].
        lower: the least values: of the maximum norm with the radius, else of a pixel.
        upper: the largest.
    """

    norm: str
    eps: Tensor
    step_size: Tensor
    images: Tensor
    lower: Tensor
    upper: Tensor

    def at(self, rows: Tensor) -> Ball:
        """The part of some samples [n]."""
        lower, upper = (picked(b, rows) if b.dim() == 4 and len(b) > 1 else b for b in (self.lower, self.upper))
        return replace(self, images=picked(self.images, rows), lower=lower, upper=upper)

    def step(self, x: Tensor, gradient: Tensor) -> Tensor:
        """One step of steepest ascent, and back into the ball.

        Args:
            x: where it starts [n, C, H, W].
            gradient: there, of any length.

        Source: Madry et al. 2018, Section 2.1; the steps of Huang et al. (paper 003), Section 5.1.
        """
        if self.norm == "linf":
            return self.clipped(torch.addcmul(x, gradient.sign(), self.step_size))
        return self.clipped(torch.addcmul(x, gradient / _lengths(gradient), self.step_size))

    def clipped(self, x: Tensor) -> Tensor:
        """The image of the ball that is nearest."""
        if self.norm == "l2":
            delta = x - self.images
            x = torch.addcmul(self.images, delta, (self.eps / _lengths(delta)).clamp(max=1))
        return x.clamp(self.lower, self.upper)

    def drawn(self, random_start: bool | float, generator: torch.Generator | None) -> Tensor:
        """Where an attack starts: at the images, at uniform points of the ball, or at normal noise of a deviation."""
        if random_start is False:
            return self.images
        noise = _normal if self.norm == "l2" or random_start is not True else _uniform
        delta = noise(self.images, generator)
        if random_start is not True:
            return self.clipped(torch.add(self.images, delta, alpha=float(random_start)))
        if self.norm == "l2":
            # The length of a uniform point of a ball in d dimensions is U^(1/d) of the radius.
            size = self.images[:, :1, :1, :1]
            share = (_uniform(size, generator) * 0.5 + 0.5) ** (1 / self.images[0].numel())
            delta = delta / _lengths(delta) * share
        return self.clipped(torch.addcmul(self.images, delta, self.eps))


def ball_of(task: Task, norm: Any, eps: Any, step_size: Any, share: float) -> Ball:
    """The ball of an attack, checked.

    Args:
        task: what is attacked.
        norm: "linf" or "l2".
        eps: above zero; in the maximum norm also one for each channel.
        step_size: likewise; None for a share of the radius.
        share: that share.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.
    """
    checks.one_of("norm", norm, NORMS)
    images = task.images
    radius = numbers("eps", eps, images, positive=True)
    step = radius * share if step_size is None else numbers("step_size", step_size, images, positive=True)
    if norm == "l2":
        for name, value in (("eps", radius), ("step_size", step)):
            if value.numel() > 1:
                raise ValueError(f"{name} must be one number with norm 'l2', got {value.numel()}")
        return Ball(norm, radius, step, images, task.low.to(images.dtype), task.high.to(images.dtype))
    lower, upper = torch.maximum(images - radius, task.low), torch.minimum(images + radius, task.high)
    return Ball(norm, radius, step, images, lower, upper)


def check_start(random_start: Any) -> None:
    """Refuse a start that is neither True nor False nor a deviation."""
    if not isinstance(random_start, bool):
        checks.step_size(random_start, "random_start")


def _lengths(x: Tensor) -> Tensor:
    """‖x‖₂ of each sample [n, 1, 1, 1], at least the smallest normal number."""
    return x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny).view(-1, 1, 1, 1)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers from -1 to 1, drawn on the generator's device and so the same on all."""
    return _drawn(torch.rand, like, generator) * 2 - 1


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return _drawn(torch.randn, like, generator)


def _drawn(draw: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return draw(like.shape, generator=generator, device=device, dtype=dtype).to(like)
