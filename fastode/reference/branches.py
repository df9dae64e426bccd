"""Residual branches of the papers: nn.Sequentials of norm, activation and convolution, in this order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .. import checks

__all__ = ["BottleneckBranch", "PreActBranch"]

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(min(MOST_GROUPS, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "sigmoid": nn.Sigmoid,
}


MOST_GROUPS = 32  # of the norm "group"


def make_norm(
    norm: str | Callable[[int], nn.Module], channels: int, name: str = "channels", most: int = MOST_GROUPS
) -> list[nn.Module]:
    """The norm of a branch as a list of no or one module.

    Args:
        norm: "batch", "group" (min(32, C) groups), "layer" (1 group), "instance" (C groups), "none", or a function from
            the number of channels to a module.
        channels: C.
        name: the argument that C comes from, for the error's words.
        most: groups of "group" where C is larger.

    Returns:
        [] for "none", else [module].

    Raises:
        TypeError, ValueError: norm is none of these, or C cannot be parted into the groups of "group".

    Source: Kim et al. 2020 (paper 004), released code.
    """
    if isinstance(norm, str) or not callable(norm):
        checks.one_of("norm", norm, (*NORMS, "none"))
        if norm == "none":
            return []
        if norm == "group":
            checks.groups(name, channels, most)
            return [nn.GroupNorm(min(most, channels), channels)]
        return [NORMS[norm](channels)]
    return [checks.made("norm", norm, "a function from the number of channels to a module", channels)]


def make_activation(activation: str | Callable[[], nn.Module]) -> nn.Module:
    """The activation of a branch, in PyTorch's default setting (LeakyReLU: slope 0.01; ELU: α = 1; softplus: β = 1).

    Args:
        activation: "relu", "leaky_relu", "tanh", "softplus", "elu", "silu", "gelu", "gelu_tanh" (its form with tanh),
            "sigmoid", or a function that makes a module.

    Returns:
        A new module, not in place where it is made by name.

    Raises:
        TypeError, ValueError: activation is none of these.
    """
    if isinstance(activation, str) or not callable(activation):
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
        return ACTIVATIONS[activation]()
    return checks.made("activation", activation, "a function that makes a module")


class PlainSlices(nn.Sequential):
    """A Sequential whose slices are plain Sequentials (nn.Sequential would call this constructor with the layers)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        checks.steps(value, name)


def _check_kernel(kernel_size: int) -> None:
    _check_sizes(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that padding keeps the size, got {kernel_size}")


class PreActBranch(PlainSlices):
    """`layers` times norm, activation, convolution: the branch of a pre-activation residual block.

    Args:
        in_channels: channels of the input [N, C, H, W].
        out_channels: channels of the output; None for in_channels, which a residual block without shortcut needs.
        norm: "batch", "group" (min(32, C) groups), "layer" (1 group), "instance" (C groups), "none", or a function from
            the number of channels to a module.
        activation: "relu", "leaky_relu", "tanh", "softplus", "elu", "silu", "gelu", "gelu_tanh" (its form with tanh),
            "sigmoid", or a function that makes a module.
        layers: how many times norm, activation, convolution.
        kernel_size: odd side of the kernels; the padding keeps the size.
        stride: of the first convolution.
        bias: whether the convolutions have one (paper 004: yes; paper 001: no).

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: Kim et al. 2020, Figure 2 (paper 004); Li et al. 2020 (paper 001).

    Example:
        >>> [type(layer).__name__ for layer in PreActBranch(8, norm="layer", layers=1)]
        ['GroupNorm', 'ReLU', 'Conv2d']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        norm: str | Callable[[int], nn.Module] = "batch",
        activation: str | Callable[[], nn.Module] = "relu",
        layers: int = 2,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        _check_sizes(in_channels=in_channels, out_channels=out_channels, layers=layers, stride=stride)
        _check_kernel(kernel_size)
        checks.flag("bias", bias)
        modules: list[nn.Module] = []
        for layer in range(layers):
            channels, step = (in_channels, stride) if layer == 0 else (out_channels, 1)
            conv = nn.Conv2d(channels, out_channels, kernel_size, step, padding=kernel_size // 2, bias=bias)
            name = "in_channels" if layer == 0 else "out_channels"
            modules += [*make_norm(norm, channels, name), make_activation(activation), conv]
        super().__init__(*modules)


class BottleneckBranch(PlainSlices):
    """Norm, activation, convolution three times: 1×1 down to out_channels / expansion, k×k, 1×1 up again.

    Args:
        in_channels: channels of the input [N, C, H, W].
        out_channels: channels of the output, a multiple of `expansion`; None for in_channels.
        norm: as in PreActBranch.
        activation: as in PreActBranch.
        expansion: how many times fewer channels the k×k convolution has.
        kernel_size: odd side k of the middle kernel; the padding keeps the size.
        stride: of the middle convolution.
        bias: whether the convolutions have one.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: He et al. 2016, as used by Li et al. 2020 for IE-ResNet-50 (paper 001).

    Example:
        >>> [layer.kernel_size[0] for layer in BottleneckBranch(16) if isinstance(layer, nn.Conv2d)]
        [1, 3, 1]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        norm: str | Callable[[int], nn.Module] = "batch",
        activation: str | Callable[[], nn.Module] = "relu",
        expansion: int = 4,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        _check_sizes(in_channels=in_channels, out_channels=out_channels, expansion=expansion, stride=stride)
        _check_kernel(kernel_size)
        checks.flag("bias", bias)
        if out_channels % expansion:
            raise ValueError(f"out_channels must be a multiple of expansion = {expansion}, got {out_channels}")
        width = out_channels // expansion
        modules: list[nn.Module] = []
        inner = "out_channels / expansion"
        for name, conv in (
            ("in_channels", nn.Conv2d(in_channels, width, 1, bias=bias)),
            (inner, nn.Conv2d(width, width, kernel_size, stride, padding=kernel_size // 2, bias=bias)),
            (inner, nn.Conv2d(width, out_channels, 1, bias=bias)),
        ):
            modules += [*make_norm(norm, conv.in_channels, name), make_activation(activation), conv]
        super().__init__(*modules)
