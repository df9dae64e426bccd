"""Losses of (model, images, labels), each with what to log: natural, uniform noise, PGD, TRADES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks

__all__ = ["Loss", "adversarial", "natural", "trades", "uniform_noise"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss and what to log beside it.

    Attributes:
        value: a scalar with a graph.
        log: by name, scalars without one; "accuracy" is that on the images given or made.
    """

    value: Tensor
    log: dict[str, Tensor]


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy on the images as they are, in the mode that the model is in.

    Args:
        model: returns logits [N, K].
        images: [N, C, H, W].
        labels: their classes [N], int64.

    Returns:
        The loss, and "accuracy".

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.

    Source: Li, He & Lin 2020 (paper 001), Section 5.2.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> natural(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])).value.shape
        torch.Size([])
    """
    check_batch(model, images, labels)
    logits = logits_of(model, images, labels)
    return Loss(F.cross_entropy(logits, labels), {"accuracy": accuracy_of(logits, labels)})


def uniform_noise(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, generator: torch.Generator | None = None
) -> Loss:
    """Cross-entropy on images with noise from Uniform(−ε, ε), not clipped, in the mode that the model is in.

    Args:
        model: returns logits [N, K].
        images: [N, C, H, W].
        labels: their classes [N], int64.
        eps: ε > 0; the paper has 0.3 on MNIST.
        generator: of the noise, on the images' device.

    Returns:
        The loss, and "accuracy" on the noisy images.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.

    Source: Kim et al. 2020 (paper 004), Section 5.1, which does not say that images are clipped afterwards.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> uniform_noise(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), eps=0.3).value.shape
        torch.Size([])
    """
    check_batch(model, images, labels)
    checks.step_size(eps, "eps")
    noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
    return natural(model, images + noise, labels)


def adversarial(model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack) -> Loss:
    """Adversarial training: cross-entropy on attacked images alone.

    The attack chooses the mode that the model is attacked in and leaves the model as it was; the loss takes the mode
    that the model is in. `fastode.attacks.pgd` with its keywords bound (`functools.partial`) is such an attack, by
    default in eval mode.

    Args:
        model: returns logits [N, K].
        images: [N, C, H, W].
        labels: their classes [N], int64.
        attack: a function of (model, images, labels) that returns images of the same shape.

    Returns:
        The loss, and "accuracy" on the attacked images.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.

    Source: Madry et al. 2018, eq. 2.1; Li, He & Lin 2020 (paper 001), Section 5.1.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> found = adversarial(model, torch.rand(1, 1, 2, 2), torch.tensor([0]), attack=lambda model, x, y: x + 0.1)
        >>> found.value.shape
        torch.Size([])
    """
    check_batch(model, images, labels)
    return natural(model, _attacked(model, images, labels, attack), labels)


def trades(model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack, beta: float = 6.0) -> Loss:
    """TRADES: CE(f(x), y) + β KL(f(x) ‖ f(x')), the divergence's mean over samples, both parts with a gradient.

    The clean and the attacked images go through the model one after the other, each batch with its own batch
    statistics where the model is in training mode. The attack of its authors maximises the divergence in eval mode from
    x + 0.001 N(0, 1): `fastode.attacks.pgd` with loss="kl" and random_start=0.001.

    Args:
        model: returns logits [N, K].
        images: [N, C, H, W].
        labels: their classes [N], int64.
        attack: as in `adversarial`.
        beta: 1/λ > 0; the papers have 1 and 6.

    Returns:
        The loss, and "accuracy" on the clean images, "robust_accuracy", "natural" and "divergence".

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.

    Source: Zhang et al. 2019, eq. 5; papers 001 (Section 5.4) and 003 (Section 5.1).

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> found = trades(model, torch.rand(1, 1, 2, 2), torch.tensor([0]), attack=lambda model, x, y: x)
        >>> found.log["divergence"].item()
        0.0
    """
    check_batch(model, images, labels)
    checks.step_size(beta, "beta")
    moved = _attacked(model, images, labels, attack)
    clean, robust = logits_of(model, images, labels), logits_of(model, moved, labels)
    loss = F.cross_entropy(clean, labels)
    divergence = F.kl_div(robust.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
    log = {
        "accuracy": accuracy_of(clean, labels),
        "robust_accuracy": accuracy_of(robust, labels),
        "natural": loss.detach(),
        "divergence": divergence.detach(),
    }
    return Loss(loss + beta * divergence, log)


def check_batch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Refuse what no loss can be taken of."""
    checks.module("model", model)
    checks.feature_map("images", images)
    checks.tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be of dtype int64, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be a tensor [{len(images)}], got shape {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"labels must be on the images' device {images.device}, got {labels.device}")
    checks.device_of(model, images)


def logits_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The model's answer [N, K], checked."""
    logits = checks.answered(model, images)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits [N, classes], got {checks.what(logits)}")
    if logits.dim() != 2 or len(logits) != len(labels):
        raise ValueError(f"model must return logits [{len(labels)}, classes], got shape {list(logits.shape)}")
    if logits.device.type == "cpu" and len(labels):  # on a card the check would wait for the labels
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < logits.shape[1]:
            raise ValueError(f"labels must be in [0, {logits.shape[1]}), got {low} to {high}")
    return logits


def _attacked(model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    if not callable(attack):
        raise TypeError(f"attack must be a function of (model, images, labels), got {checks.what(attack)}")
    moved = attack(model, images, labels)
    if not isinstance(moved, Tensor) or moved.shape != images.shape:
        raise ValueError(f"attack must return images {list(images.shape)}, got {checks.what(moved)}")
    return moved.detach()


def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of the labels that the largest logits are at."""
    return (logits.detach().argmax(1) == labels).float().mean()
