"""The attacks by the gradient of the image: one step or many, with momentum, and through changed images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .ascent import Ascent, best_of
from .balls import ball_of, check_start
from .held import attacked
from .losses import check_loss, objective_of
from .task import Bounds, Number, Task, check_early_stop, task_of

__all__ = ["bim", "di2_fgsm", "fgsm", "pgd"]

Change = Callable[[Tensor], Tensor]


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    loss: str = "ce",
    targets: Tensor | None = None,
    confidence: float = 50.0,
    bounds: Bounds = (0.0, 1.0),
    mode: str = "eval",
    solver_gradient: str | None = None,
) -> Tensor:
    """The fast gradient sign method: one step as long as the radius, x + ε sign(∇L).

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the radius in the maximum norm, in units of the images; a number, or one for each channel.
        loss: "ce" or "margin", as in `pgd`.
        targets: the classes [N] that the model is to take the images for; None where any wrong one will do.
        confidence: as in `pgd`.
        bounds: the least and the largest value of a pixel, each a number or one for each channel.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W] within the radius, in the memory format of the given ones.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        FloatingPointError: the model's gradient is not finite.

    Source: Goodfellow et al. 2015, Section 4; Li, He & Lin 2020, Section 5.1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> moved = fgsm(model, images, labels, eps=0.1)
        >>> bool(((moved - images).abs() <= 0.1 + 1e-6).all())
        True
    """
    return pgd(model, images, labels, eps=eps, step_size=eps, steps=1, random_start=False, loss=loss, targets=targets,
               confidence=confidence, bounds=bounds, mode=mode, solver_gradient=solver_gradient)  # fmt: skip


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    step_size: Number | None = None,
    steps: int = 10,
    norm: str = "linf",
    random_start: bool | float = True,
    restarts: int = 1,
    loss: str = "ce",
    targets: Tensor | None = None,
    confidence: float = 50.0,
    bounds: Bounds = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    early_stop: bool = False,
    graphed: bool = False,
    solver_gradient: str | None = None,
) -> Tensor:
    """Projected gradient descent on the images, in the maximum or the Euclidean norm.

    The model is left as it was: its mode, requires_grad, gradients and buffers, also where the attack fails.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the radius, in units of the images; in the maximum norm also one for each channel.
        step_size: likewise; None for 2.5 eps / steps.
        steps: gradient steps of each start.
        norm: "linf" (steps by the gradient's sign) or "l2" (by the gradient over its length).
        random_start: True for a uniform point of the ball, False for the images, or the deviation of normal noise
            (TRADES: 0.001).
        restarts: starts; of each sample the first success stays, else the images of the largest loss.
        loss: "ce", the cross-entropy; "margin", C&W's hinge on logits; "kl", the divergence from the answer to the
            unchanged images, which takes no targets and needs a random start.
        targets: the classes [N] that the model is to take the images for; None where any wrong one will do.
        confidence: κ > 0 of the margin: from there on it grows no more.
        bounds: the least and the largest value of a pixel, each a number or one for each channel, which normalised
            images need.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: of the starts; the numbers are drawn on its device.
        early_stop: leave out samples that are already fooled: these stay as they then are. Not for models whose samples
            depend on one another: batch norm in training, adaptive solvers without `per_sample`.
        graphed: on a CUDA device, repeat a step as one CUDA graph. Capturing it takes the time of four steps.
        solver_gradient: "exact" to attack with the true derivative of blocks with adaptive solvers ("solver" and
            "constant" are those of `fastode.Solver`); None for what each block has.

    Returns:
        Images [N, C, H, W] within the radius and the bounds, in the memory format of the given ones.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        FloatingPointError: the model's gradient is not finite.

    Source: Madry et al. 2018, Section 2.1; Li, He & Lin 2020, Section 5.1; Huang et al. (paper 003), Section 5.1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        >>> moved = pgd(model, images, labels, eps=0.5, norm="l2", generator=torch.Generator().manual_seed(0))
        >>> bool(((moved - images).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all())
        True
    """
    return _climbed(
        _Settings(
            model, images, labels, eps, step_size, steps, loss, targets, confidence, bounds, mode, solver_gradient,
            generator=generator, early_stop=early_stop, graphed=graphed, norm=norm, random_start=random_start,
            restarts=restarts,
        )
    )  # fmt: skip


def bim(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    step_size: Number | None = None,
    steps: int = 10,
    momentum: float = 0.0,
    loss: str = "ce",
    targets: Tensor | None = None,
    confidence: float = 50.0,
    bounds: Bounds = (0.0, 1.0),
    mode: str = "eval",
    early_stop: bool = False,
    graphed: bool = False,
    solver_gradient: str | None = None,
) -> Tensor:
    """The basic iterative method in the maximum norm, and with momentum MI-FGSM: many signed steps from the images.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the radius, as in `pgd`.
        step_size: None for eps / steps.
        steps: gradient steps.
        momentum: μ ≥ 0: a step follows the sign of g, where g becomes μ g + ∇L / ‖∇L‖₁.
        loss: "ce" or "margin", as in `pgd`.
        targets: as in `pgd`.
        confidence: as in `pgd`.
        bounds: as in `pgd`.
        mode: as in `pgd`.
        early_stop: as in `pgd`.
        graphed: as in `pgd`.
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W] within the radius and the bounds.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        FloatingPointError: the model's gradient is not finite.

    Source: Kurakin et al. 2017, Section 2.2; Dong et al. 2018, Algorithm 1 (eq. 6 and 7).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> bim(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), eps=0.1, momentum=1.0).shape
        torch.Size([2, 3, 2, 2])
    """
    return _climbed(
        _Settings(
            model, images, labels, eps, step_size, steps, loss, targets, confidence, bounds, mode, solver_gradient,
            early_stop=early_stop, graphed=graphed, random_start=False, momentum=momentum, reach=1.0,
        )
    )  # fmt: skip


def di2_fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    step_size: Number | None = None,
    steps: int = 10,
    momentum: float = 0.0,
    probability: float = 0.5,
    resize: float = 0.9,
    loss: str = "ce",
    targets: Tensor | None = None,
    confidence: float = 50.0,
    bounds: Bounds = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    solver_gradient: str | None = None,
) -> Tensor:
    """DI²-FGSM, and with momentum M-DI²-FGSM: signed steps by gradients through randomly resized and padded images.

    At each step, with a probability, the batch is resized to a random square size between the image's and `resize`
    times it, and padded with zeros at random to the larger of the two. One draw holds for the batch.

    Args:
        model: a module that returns logits [N, K]; with `resize` above 1 it must take images of that size.
        images: [N, C, H, W], within the bounds, as high as wide.
        labels: their classes [N], int64.
        eps: the radius, as in `pgd`.
        step_size: None for eps / steps.
        steps: gradient steps.
        momentum: μ ≥ 0, as in `bim`.
        probability: from 0 to 1, of a change.
        resize: the extreme size over the image's; the authors enlarge by 330 / 299.
        loss: "ce" or "margin", as in `pgd`.
        targets: as in `pgd`.
        confidence: as in `pgd`.
        bounds: as in `pgd`.
        mode: as in `pgd`.
        generator: of the changes.
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W] within the radius and the bounds.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        FloatingPointError: the model's gradient is not finite.

    Source: Xie et al. 2019, Section 3.2 (eq. 3 and 4).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
        >>> di2_fgsm(model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), eps=0.1, resize=0.5).shape
        torch.Size([2, 3, 4, 4])
    """
    checks.theta(probability, "probability")
    checks.step_size(resize, "resize")
    if isinstance(images, Tensor) and images.dim() == 4 and images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be as high as wide, got {images.shape[2]}x{images.shape[3]}")

    def change(x: Tensor) -> Tensor:
        return _resized(x, probability, resize, generator)

    return _climbed(
        _Settings(
            model, images, labels, eps, step_size, steps, loss, targets, confidence, bounds, mode, solver_gradient,
            generator=generator, random_start=False, momentum=momentum, reach=1.0, change=change,
        )
    )  # fmt: skip


def _resized(x: Tensor, probability: float, resize: float, generator: torch.Generator | None) -> Tensor:
    """Images resized and padded at random, or as they are."""
    size = x.shape[-1]
    extreme = max(1, int(size * resize))
    small, large = min(size, extreme), max(size, extreme)

    def below(most: int) -> int:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(most, (), generator=generator, device=device))

    # Always the same number of draws, so that a step's do not depend on the chances of the steps before it.
    chance, side = below(1 << 24) / (1 << 24), small + below(max(1, large - small))
    top, left = below(large - side + 1), below(large - side + 1)
    if chance >= probability:
        return x
    inner = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return F.pad(inner, (left, large - side - left, top, large - side - top))


@dataclass(frozen=True)
class _Settings:
    """An attack's arguments as they came, and what tells the attacks apart.

    Attributes:
        reach: how many radii long the steps are together where no step size is given.
        change: what the model sees in place of an image.
    """

    model: Any
    images: Any
    labels: Any
    eps: Any
    step_size: Any
    steps: Any
    loss: Any
    targets: Any
    confidence: Any
    bounds: Any
    mode: Any
    solver_gradient: Any
    generator: Any = None
    early_stop: Any = False
    graphed: Any = False
    norm: Any = "linf"
    random_start: Any = True
    restarts: Any = 1
    momentum: Any = 0.0
    reach: float = 2.5
    change: Change | None = None

    def task(self) -> Task:
        """What is attacked, after all checks but those of the ball."""
        task = task_of(
            self.model, self.images, self.labels, self.targets, self.bounds, self.mode, self.solver_gradient,
            self.generator,
        )  # fmt: skip
        checks.steps(self.steps)
        checks.steps(self.restarts, "restarts")
        checks.flag("graphed", self.graphed)
        checks.finite("momentum", self.momentum)
        if self.momentum < 0:
            raise ValueError(f"momentum must be at least 0, got {self.momentum}")
        check_start(self.random_start)
        check_loss(self.loss, task, self.confidence)
        if self.loss == "kl" and self.random_start is False:
            raise ValueError("loss must be 'ce' or 'margin' without a random start, where 'kl' has no gradient")
        check_early_stop(self.early_stop, self.mode)
        if self.early_stop and self.graphed:
            raise ValueError("early_stop must be False with graphed, which repeats one shape")
        return task


def _climbed(settings: _Settings) -> Tensor:
    """The images of an attack by gradients."""
    task = settings.task()
    ball = ball_of(task, settings.norm, settings.eps, settings.step_size, settings.reach / settings.steps)
    with attacked(task.model, settings.mode, settings.solver_gradient):
        objective = objective_of(settings.loss, task, settings.confidence)
        ascent = Ascent(
            task, ball, objective, settings.steps, torch.zeros((), dtype=torch.bool, device=task.images.device),
            settings.momentum or None, settings.change, settings.early_stop, settings.graphed,
        )  # fmt: skip
        moved = best_of(ascent, lambda: ball.drawn(settings.random_start, settings.generator), settings.restarts)
    return finite(moved, task.images, ascent.fault)


def finite(moved: Tensor, images: Tensor, fault: Tensor | bool = False) -> Tensor:
    """What an attack returns: not the images themselves, and none after a gradient that was NaN."""
    if not bool(moved.isfinite().all() & ~torch.as_tensor(fault)):
        raise FloatingPointError("model must have a finite gradient, got NaN or infinity at some of the images")
    return moved.clone() if moved is images else moved
