"""What is attacked: a model, images and their classes, checked before anything runs, and the model's answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..solver import GRADIENTS
from .held import MODES

Number = float | Sequence[float] | Tensor  # one for all, or one for each channel
Bounds = tuple[Number, Number]

_counters: list[Queries] = []


@dataclass
class Queries:
    """How often a model was asked.

    Attributes:
        forward: images it was evaluated at.
        gradient: images for which its gradient was taken, too.
    """

    forward: int = 0
    gradient: int = 0


@contextmanager
def counted() -> Iterator[Queries]:
    """A context that counts the queries of the attacks in it."""
    counter = Queries()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@contextmanager
def uncounted() -> Iterator[None]:
    """A context whose queries do not count: those that warm a CUDA graph up, and its capture, which runs nothing."""
    kept = _counters[:]
    _counters.clear()
    try:
        yield
    finally:
        _counters[:] = kept


@dataclass
class Task:
    """A checked attack's images and classes, or a part of them.

    Attributes:
        model: what is attacked.
        images: [N, C, H, W] as they came, without a graph.
        labels: [N].
        targets: [N], or None where any other class will do.
        low: the least values, [1, C, 1, 1] or a scalar tensor.
        high: the largest.
        known: whether a first answer of the model was looked at.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    low: Tensor
    high: Tensor
    known: list[int] = field(default_factory=list)

    def at(self, rows: Tensor) -> Task:
        """The part of some samples.

        Args:
            rows: their indices [n].
        """
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, images=picked(self.images, rows), labels=self.labels[rows], targets=targets)

    def count(self, samples: int) -> None:
        """Count evaluations of the model."""
        for counter in _counters:
            counter.forward += samples

    def logits(self, x: Tensor) -> Tensor:
        """The model's answer [n, K], counted, and checked the first time."""
        self.count(len(x))
        try:
            logits = checks.answered(self.model, x)
        except (RuntimeError, TypeError, ValueError) as error:
            size, other = ("x".join(map(str, each.shape[2:])) for each in (self.images, x))
            if size == other:
                raise
            wanted = "resize must give images that the model takes"
            raise ValueError(f"{wanted}, got {other} for {size}: {checks.first_line(error)}") from error
        if not self.known:
            self._check_logits(logits, len(x))
            self.known.append(logits.shape[1])
        return logits

    def fooled(self, logits: Tensor) -> Tensor:
        """Which samples the model has wrong, or where there are targets takes for them [n]; NaN is no class."""
        found = logits.argmax(1)
        hit = found != self.labels if self.targets is None else found == self.targets
        return hit & ~logits.isnan().any(1)

    def _check_logits(self, logits: Any, samples: int) -> None:
        wanted = "model must return logits [N, classes]"
        if not isinstance(logits, Tensor):
            raise TypeError(f"{wanted}, got {checks.what(logits)}")
        if not logits.is_floating_point() or logits.dim() != 2 or len(logits) != samples or logits.shape[1] < 2:
            kind = str(logits.dtype).removeprefix("torch.")
            raise ValueError(f"{wanted} with N = {samples}, got a tensor {list(logits.shape)} of dtype {kind}")
        found = logits.detach().float()
        slack = max(1e-5, torch.finfo(logits.dtype).eps)  # what rounding explains; by chance it happens at 1e-3
        if bool((found >= 0).all()) and bool(((found.sum(1) - 1).abs() < slack).all()):
            raise ValueError(f"{wanted}, got probabilities: they are at least 0 and each row's sum is 1")
        for name, classes in (("labels", self.labels), ("targets", self.targets)):
            most = -1 if classes is None else int(classes.max())
            if most >= logits.shape[1]:
                raise ValueError(f"{name} must be below the model's {logits.shape[1]} classes, got {most}")


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """Some samples of a batch, in its memory format."""
    return x[rows].contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def gradient_counted(samples: int) -> None:
    """Count gradients of images."""
    for counter in _counters:
        counter.gradient += samples


def task_of(
    model: Any,
    images: Any,
    labels: Any,
    targets: Any = None,
    bounds: Any = (0.0, 1.0),
    mode: Any = "eval",
    solver_gradient: Any = None,
    generator: Any = None,
) -> Task:
    """What every attack is given, checked.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], floating point, within the bounds, on the model's device.
        labels: [N], int64, from 0 to K - 1, on the same device.
        targets: as the labels, or None.
        bounds: the least and the largest value of a pixel, each a number or one for each channel.
        mode: "eval", "train" or "keep".
        solver_gradient: "solver", "constant", "exact" or None.
        generator: of random numbers, or None.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.
    """
    checks.module("model", model)
    checks.feature_map("images", images)
    if not len(images):
        raise ValueError("images must be at least one, got none")
    checks.one_of("mode", mode, MODES)
    if solver_gradient is not None:
        checks.one_of("solver_gradient", solver_gradient, GRADIENTS)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {checks.what(generator)}")
    checks.device_of(model, images)
    _check_classes("labels", labels, images)
    if targets is not None:
        _check_classes("targets", targets, images)
    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images.detach()
        low, high = _bounds(bounds, images)
    return Task(model, images, labels, targets, low, high)


def check_early_stop(early_stop: Any, mode: str) -> None:
    """Refuse to leave samples out where their answers depend on the rest of the batch."""
    checks.flag("early_stop", early_stop)
    if early_stop and mode == "train":
        raise ValueError("early_stop must be False with mode 'train', in which samples depend on one another")


def numbers(name: str, value: Any, images: Tensor, positive: bool = False) -> Tensor:
    """A number, or one for each channel, as a tensor that spreads over images.

    Args:
        name: of the argument.
        value: a number, or a sequence or tensor of one for each channel.
        images: [N, C, H, W].
        positive: whether it must be above zero.

    Raises:
        TypeError, ValueError: it is none of this.
    """

    def check(each: Any) -> float:
        if positive:
            checks.step_size(each, name)
        else:
            checks.finite(name, each)
        return float(each)

    if not isinstance(value, (Sequence, Tensor)) or isinstance(value, str):
        return torch.tensor(check(value), dtype=images.dtype, device=images.device)
    channels = images.shape[1]
    listed = value.flatten().tolist() if isinstance(value, Tensor) else value
    if len(listed) not in (1, channels):
        raise ValueError(f"{name} must be one number or one for each of {channels} channels, got {len(listed)}")
    each = [check(number) for number in listed]
    return torch.tensor(each, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def _bounds(bounds: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be the least and the largest value of a pixel, got {checks.what(bounds)}")
    low, high = (numbers("bounds", bound, images) for bound in bounds)
    if not bool((low < high).all()):
        raise ValueError(f"bounds must be a lower and a higher value, got {low.tolist()} and {high.tolist()}")
    # Normalised images meet normalised bounds up to rounding.
    slack = 8 * torch.finfo(images.dtype).eps * torch.maximum(low.abs(), high.abs())
    if not bool(((images >= low - slack) & (images <= high + slack)).all()):
        least, most = images.min().item(), images.max().item()
        got = f"values from {least:.6g} to {most:.6g}" if math.isfinite(least + most) else "some that are not finite"
        words = " to ".join(str(bound.flatten().tolist() if bound.dim() else bound.item()) for bound in (low, high))
        raise ValueError(f"images must be within bounds, {words}, got {got}")
    return low, high


def _check_classes(name: str, classes: Any, images: Tensor) -> None:
    if not isinstance(classes, Tensor):
        raise TypeError(f"{name} must be a tensor [{len(images)}] of dtype int64, got {checks.what(classes)}")
    if classes.dtype != torch.int64:
        kind = str(classes.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be a tensor [{len(images)}] of dtype int64, got dtype {kind}")
    if classes.shape != images.shape[:1]:
        raise ValueError(f"{name} must be a tensor [{len(images)}] of dtype int64, got shape {list(classes.shape)}")
    if classes.device != images.device:
        raise ValueError(f"{name} must be on the images' device {images.device}, got {classes.device}")
    if int(classes.min()) < 0:
        raise ValueError(f"{name} must be at least 0, got {int(classes.min())}")
