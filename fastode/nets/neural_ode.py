"""Neural ODE networks: ODENet of Huang et al. and the classifiers of "Towards Natural Robustness …", both with time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..reference import ODEBlock, TimeConv2d, skew
from ..reference.branches import MOST_GROUPS, make_norm
from ..solver import Solver, solver_of
from ..tableau import Butcher
from ._stages import check, head, norm_act

_POOLED = 3  # rows and columns that ODENet's head sees
_TOLERANCE = 1e-3  # of Chen et al.'s example


class ChannelCopy(nn.Module):
    """x repeated along its channels, whole as often as it fits and then its first channels, up to `channels`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        whole, rest = divmod(self.channels, x.shape[1])
        return torch.cat([x] * whole + [x[:, :rest]] * (rest > 0), 1)

    def extra_repr(self) -> str:
        return f"{self.channels}"


def odenet(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "group",
    blocks: int = 10,
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> nn.Sequential:
    """ODENet, with which SONet is compared: the image's channels repeated, ten Neural ODE blocks, a norm and a head.

    Each block's field is norm, ReLU, convolution, norm, ReLU, convolution, norm, and its convolutions see the time.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of every block. The released code's default is 54, of which it cannot make its 8 groups.
        norm: "group" (min(8, C) groups, the released code's), "batch", "layer", "instance" or "none".
        blocks: how many; the released code has 10.
        solver: a `fastode.Solver` or its method, as in `ODEBlock`, for every block; the paper has dopri5 with
            tolerances 0.1 and t1 = 1.
        **parts: of the solver by name, as in `ODEBlock`: rtol, atol, t1, steps, gradient, per_sample, max_steps,
            first_step.

    Returns:
        A network of parts `copy`, `block0` …, `norm`, `pool`, `flatten`, `head` that maps [N, in_channels, H, W] to
        [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", Section
        6.1 and Table 2, with the layout of its released code.

    Example:
        >>> model = odenet(width=8, blocks=2, solver="rk4")
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(in_channels, num_classes, width, norm, (1,), skew.MOST_GROUPS)
    checks.steps(blocks, "blocks")
    settings = solver_of(solver, parts)
    layers: OrderedDict[str, nn.Module] = OrderedDict(copy=ChannelCopy(width))
    for i in range(blocks):
        layers[f"block{i}"] = ODEBlock(_field(width, norm, 2, skew.MOST_GROUPS), settings)
    for layer in make_norm(norm, width, "width", skew.MOST_GROUPS):
        layers["norm"] = layer
    layers["pool"] = nn.AdaptiveAvgPool2d(_POOLED)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(width * _POOLED**2, num_classes)
    return nn.Sequential(layers)


def neural_ode_mnist(
    *,
    in_channels: int = 1,
    num_classes: int = 10,
    width: int = 128,
    norm: str = "group",
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> nn.Sequential:
    """The Neural ODE classifier for MNIST: a field of 4 convolutions of 128 channels, solved to t₁ = 100.

    The paper gives these numbers, and no more. The rest is the network that it takes: three convolutions that make the
    map smaller, one Neural ODE block, a norm, ReLU, the mean over positions and a linear layer. The field is norm, ReLU
    and a convolution that sees the time, as often as it has convolutions, and a last norm.

    Args:
        in_channels: channels of the image [N, in_channels, H, W], H and W at least 10.
        num_classes: number of logits.
        width: channels of every convolution.
        norm: "group" (min(32, C) groups), "batch", "layer", "instance" or "none".
        solver: a `fastode.Solver` or its method, as in `ODEBlock`; with a method its tolerances are 1e-3 and t1 is 100,
            unless `parts` says otherwise.
        **parts: of the solver by name, as in `ODEBlock`: rtol, atol, t1, steps, gradient, per_sample, max_steps,
            first_step.

    Returns:
        A network of parts `stem`, `block`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: "Towards Natural Robustness Against Adversarial Examples", Table A1; Chen et al., "Neural Ordinary
        Differential Equations", 2018, with the layout and the tolerances of its released example.

    Example:
        >>> model = neural_ode_mnist(width=8, solver="rk4", steps=4)
        >>> model(torch.ones(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """
    return _classifier(in_channels, num_classes, width, norm, 4, 100.0, solver, parts)


def neural_ode_cifar(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 256,
    norm: str = "group",
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> nn.Sequential:
    """The Neural ODE classifier for CIFAR-10: as `neural_ode_mnist`, with 5 convolutions of 256 channels to t₁ = 500.

    Args:
        in_channels: as in neural_ode_mnist.
        num_classes: as in neural_ode_mnist.
        width: as in neural_ode_mnist.
        norm: as in neural_ode_mnist.
        solver: as in neural_ode_mnist, but for t1, which is 500.
        **parts: as in neural_ode_mnist.

    Returns:
        As neural_ode_mnist does.

    Raises:
        TypeError, ValueError: as neural_ode_mnist does.

    Source: as neural_ode_mnist.

    Example:
        >>> model = neural_ode_cifar(width=8, solver="rk4", steps=4)
        >>> model(torch.ones(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    return _classifier(in_channels, num_classes, width, norm, 5, 500.0, solver, parts)


def _classifier(
    in_channels: int, num_classes: int, width: int, norm: str, convs: int, t1: float, solver: Any, parts: dict[str, Any]
) -> nn.Sequential:
    """Chen et al.'s network, with `convs` convolutions in its field."""
    check(in_channels, num_classes, width, norm, (1,))
    defaults = {} if isinstance(solver, Solver) else {"rtol": _TOLERANCE, "atol": _TOLERANCE, "t1": t1}
    settings = solver_of(solver, defaults | parts)
    stem = nn.Sequential(
        nn.Conv2d(in_channels, width, 3),
        *norm_act(norm, width),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        *norm_act(norm, width),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
    )
    block = ODEBlock(_field(width, norm, convs, MOST_GROUPS), settings)
    return nn.Sequential(OrderedDict(stem=stem, block=block, head=head(width, num_classes, norm)))


def _field(channels: int, norm: str, convs: int, most_groups: int) -> nn.Sequential:
    """Norm, ReLU and a convolution that sees the time, `convs` times, and a last norm, named as released."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, convs + 2):
        for layer in make_norm(norm, channels, "width", most_groups):
            layers[f"norm{i}"] = layer
        if i <= convs:
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"conv{i}"] = TimeConv2d(channels, channels, padding=1)
    return nn.Sequential(layers)
