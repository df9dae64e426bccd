"""YOPO: adversarial training with few propagations through the whole network and many through its first layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .. import checks
from ..attacks.balls import ball_of
from ..attacks.held import attacked
from ..attacks.task import Bounds, Number, task_of
from .losses import Loss, accuracy_of, check_batch, logits_of

__all__ = ["yopo"]


def yopo(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    first: nn.Module,
    eps: Number,
    step_size: Number,
    outer: int = 5,
    inner: int = 3,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Loss:
    """YOPO-m-n: m propagations through the network f = g ∘ f₀, and after each n steps of the images through f₀ alone.

    From x₁ = x + U(−ε, ε), each propagation j gives CE(f(xⱼ), y), its gradient by g's parameters and the costate
    p = ∇CE at f₀(xⱼ). With p frozen the images take n steps along the sign of ∇⟨p, f₀(x)⟩, back into the ball, to xⱼ₊₁,
    at which f₀'s parameters get the gradient of ⟨p, f₀(xⱼ₊₁)⟩. Gradients are summed over j. The last images are seen by
    f₀ alone, so that m propagations are enough; this is what the authors' program does, where the paper's formula would
    take all gradients at xⱼ₊₁.

    The network stays in the mode that it is in. In training mode each of the m propagations has its own batch
    statistics and moves the running ones; the steps between them do not.

    Args:
        model: returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        first: f₀, the module of the model that the images go into; all that the rest sees of them is its output.
        eps: the radius in the maximum norm, a number, or one for each channel (the authors: 8/255, CIFAR-10).
        step_size: of each step, likewise (the authors: 2/255).
        outer: m.
        inner: n.
        bounds: the least and the largest value of a pixel, each a number or one for each channel.
        generator: of the first noise.

    Returns:
        The sum of the m losses, whose backward pass gives the gradients above (once; it has no second derivative), and
        "accuracy" at the last propagation. The sum, as in the paper: rates are smaller than for one loss (0.2 / m).

    Raises:
        TypeError, ValueError: an argument is none of what it may be, the model returns no logits, or it does not put
            the images through `first` once.

    Source: Zhang et al. 2019 (You Only Propagate Once), Section 3 and Algorithm 1; paper 002, Table 3, has YOPO-5-3.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2))
        >>> images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
        >>> yopo(model, images, labels, first=model[0], eps=0.1, step_size=0.02).value.backward()
        >>> model[0].weight.grad.shape
        torch.Size([2, 1, 2, 2])
    """
    check_batch(model, images, labels)
    _check_first(model, first)
    checks.steps(outer, "outer")
    checks.steps(inner, "inner")
    task = task_of(model, images, labels, None, bounds, "keep", None, generator)
    ball = ball_of(task, "linf", eps, step_size, 1.0)
    head = [each for each in first.parameters() if each.requires_grad]
    own = set(map(id, first.parameters()))
    rest = [each for each in model.parameters() if each.requires_grad and id(each) not in own]

    x = ball.drawn(True, generator)
    losses, gradients = [], [torch.zeros_like(each) for each in (*head, *rest)]
    for _ in range(outer):
        logits, output = _propagated(model, first, x, labels)
        losses.append(F.cross_entropy(logits, labels))
        costate, *others = torch.autograd.grad(losses[-1], [output, *rest], allow_unused=True)
        if costate is None:
            raise ValueError("first must be a module whose output the logits depend on, got one that they do not")
        with attacked(first, "keep", None):
            for _ in range(inner):
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(first(leaf), leaf, costate)
                x = ball.step(x, gradient)
            found = _weight_gradients(first, head, x, costate)
        for total, part in zip(gradients, (*found, *others), strict=True):
            if part is not None:
                total += part
    value = _Given.apply(torch.stack(losses).sum().detach(), gradients, *head, *rest)
    return Loss(value, {"accuracy": accuracy_of(logits, labels)})


def _propagated(model: nn.Module, first: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits, and what its first module returned on the way."""
    seen: list[tuple[Any, Any, int]] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((inputs, output, getattr(output, "_version", 0)))

    handle = first.register_forward_hook(see)
    try:
        # The images need no gradient of their own, but the output does where the first module is frozen.
        logits = logits_of(model, x.detach().requires_grad_(), labels)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(
            "first must be a module that the model calls once for a batch of images, got one that it calls "
            f"{len(seen)} times; a fused chain calls none of its modules"
        )
    inputs, output, version = seen[0]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not _are(inputs[0], x):
        raise ValueError("first must be a module that the images themselves go into, got one that sees something else")
    if not isinstance(output, Tensor):
        raise TypeError(f"first must be a module that returns a tensor, got {checks.what(output)} from it")
    if output._version != version:
        raise ValueError("first must be a module whose output stays as it is, got one that the model changes in place")
    return logits, output


def _are(seen: Tensor, x: Tensor) -> bool:
    """Whether a module saw the images."""
    return seen.shape == x.shape and (seen.data_ptr() == x.data_ptr() or bool((seen == x).all()))


def _weight_gradients(first: nn.Module, head: list[nn.Parameter], x: Tensor, costate: Tensor) -> list[Tensor | None]:
    """The gradient of ⟨p, f₀(x)⟩ by the parameters of f₀, which are frozen: by other leaves in their place."""
    if not head:
        return []
    wanted = set(map(id, head))
    leaves = {name: each.detach().requires_grad_() for name, each in first.named_parameters() if id(each) in wanted}
    output = functional_call(first, leaves, (x,))
    return list(torch.autograd.grad(output, list(leaves.values()), costate, allow_unused=True))


def _check_first(model: nn.Module, first: Any) -> None:
    checks.module("first", first)
    if not any(each is first for each in model.modules()) or first is model:
        raise ValueError(f"first must be a module inside the model, got a {type(first).__name__} that is not")


class _Given(torch.autograd.Function):
    """A value whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(cotangent * gradient for gradient in ctx.gradients))
