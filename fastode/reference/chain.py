"""Layers one after the other, as one block."""

from __future__ import annotations

from torch import Tensor, nn

from .. import checks
from .blocks import ResBlock, unshared
from .faults import call_repaired

__all__ = ["Chain"]


class Chain(nn.Sequential):
    """An nn.Sequential that runs fused from its first layer on: a stem, a norm and activation, and what they lead into.

    Its beginning is one call: norms, activations and convolutions as far as they reach, and a `ResBlock` right behind
    them, as in a pre-activation block whose shortcut begins after the first norm. A head, which is
    `AdaptiveAvgPool2d(1), Flatten(), Linear`, is one call, too, where the chain ends in it behind those, or is nothing
    else. Whatever else follows is called as it is. x is left as it is, also by a layer that works in place.

    Args:
        *layers: as nn.Sequential takes them, or one OrderedDict of named layers.

    Raises:
        TypeError: a layer is no module; at a call, x is no tensor.

    Source: He et al. 2016b, Figure 4e, for the pre-activation of a block that changes the shape.

    Example:
        >>> import torch
        >>> Chain(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.from_layer(0, x)

    def from_layer(self, first: int, x: Tensor) -> Tensor:
        """The layers from one on, applied to x."""
        checks.tensor("x", x)
        if first == 0:
            x = unshared(x, *self)
        for index, layer in enumerate(self):
            if index < first:
                continue
            if isinstance(layer, ResBlock):
                x = layer(x)
            else:
                x = call_repaired(layer, (layer,), x, keeps_shape=not isinstance(layer, nn.Sequential))
        return x
