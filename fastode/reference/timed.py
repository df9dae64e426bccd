"""Fields that see the time: a convolution with t as one more channel, and how branches that hold one are evaluated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks

__all__ = ["TimeConv2d"]


class TimeConv2d(nn.Module):
    """The convolution of x with the time t as a channel in front of x's.

    In an nn.Sequential that an `ODEBlock` solves it is given the time. Its state_dict is that of the released
    ConcatConv2d: `_layer.weight` [out_channels, in_channels + 1, k, k], whose first input channel is t's, and
    `_layer.bias`.

    Args:
        in_channels: channels of x [N, in_channels, H, W].
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: of the convolution.
        padding: zeros on every side, of the time's channel too.
        bias: whether there is one.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, x is no such feature map.

    Source: the released code of Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated
        Gradients" (paper 003), which has it from torchdiffeq's example.

    Example:
        >>> conv = TimeConv2d(2, 4, padding=1)
        >>> conv(0.5, torch.ones(1, 2, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    sees_time = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride}
        for name, value in sizes.items():
            checks.steps(value, name)
        checks.count(padding, "padding")
        checks.flag("bias", bias)
        self.in_channels = in_channels
        self._layer = nn.Conv2d(in_channels + 1, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        checks.feature_map("x", x, self.in_channels)
        checks.same_kind(x, self._layer.parameters())
        return self._layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))


def at_time(field: Any, t: float | Tensor, x: Tensor) -> Tensor:
    """field at (t, x).

    Args:
        field: a module that sees the time (`sees_time` is true, and forward takes (t, x)), an nn.Sequential that holds
            one, or any other module of x.
        t: the time.
        x: the state.
    """
    if getattr(field, "sees_time", False):
        return field(t, x)
    if holds_time(field):
        for layer in field:
            x = at_time(layer, t, x)
        return x
    return field(x)


def holds_time(field: nn.Module) -> bool:
    """Whether a module is an nn.Sequential with a part that sees the time, which only its layers can be told."""
    if type(field).forward is not nn.Sequential.forward:
        return False
    return any(getattr(part, "sees_time", False) for part in field.modules())
