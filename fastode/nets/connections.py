"""Other networks with skip connections that paper 002 reads as ODE schemes, of ResNet-56's size: FractalNet, RevNet."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .. import checks
from ..reference import FractalBlock, PreActBranch, ResBlock, RevBlock, RevSequence
from ..reference.branches import MOST_GROUPS
from ._stages import check, conv, head, norm_act, zero_padded

_REVERSIBLE = 4  # blocks of four convolutions in each of three stages: 56 = 3 (4 × 4 + 2) + 2


def fractalnet(
    columns: int = 4,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 18,
    norm: str = "batch",
) -> nn.Sequential:
    """FractalNet for CIFAR: three blocks of `columns` columns, with max pooling between them.

    The blocks have `width` × (1, 2, 4) channels; a unit is a 3×3 convolution, a norm and a ReLU. As it stands it has
    0.80 million parameters, ResNet-56 has 0.85. Drop-path, which trains some of the paths at a time, is left out.

    Args:
        columns: C, at least 1; the longest path through a block has 2^(C − 1) units.
        in_channels: channels of the image [N, in_channels, H, W], with H and W at least 4.
        num_classes: number of logits.
        width: channels of the first block.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `block1`, `pool1`, `block2`, `pool2`, `block3`, `head` that maps [N, in_channels, H, W] to
        [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 19 (paper 002); Larsson et al., "FractalNet:
        Ultra-deep neural networks without residuals", 2016, whose five blocks are wider, and whose joins take the mean
        of all columns that meet.

    Example:
        >>> import torch
        >>> fractalnet(columns=2, width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.steps(columns, "columns")
    check(in_channels, num_classes, width, norm, (1, 2, 4))
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for i in range(3):
        if i > 0:
            parts[f"pool{i}"] = nn.MaxPool2d(2)
        parts[f"block{i + 1}"] = _fractal(channels, width * 2**i, columns, norm)
        channels = width * 2**i
    parts["head"] = head(channels, num_classes)
    return nn.Sequential(parts)


def _fractal(channels_in: int, channels_out: int, columns: int, norm: str) -> FractalBlock:
    def make_unit(first: bool) -> nn.Module:
        return nn.Sequential(
            conv(channels_in if first else channels_out, channels_out, 3), *norm_act(norm, channels_out)
        )

    return FractalBlock(make_unit, columns)


def revnet(*, in_channels: int = 3, num_classes: int = 10, width: int = 28, norm: str = "batch") -> nn.Sequential:
    """RevNet of 56 layers: three stages, each a residual block and a chain of four reversible blocks.

    The stages have `width` × (1, 2, 4) channels. A residual block may change the shape and has two convolutions; a
    reversible block has two in each of f and g, on half the channels. The branches have their norms and ReLUs before
    their convolutions; shortcuts have no parameters. As it stands it has 0.82 million, ResNet-56 has 0.85.
    After `fastode.fuse` a training step keeps one map for each chain.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage, an even number.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `stage1` … `stage3`, `head` that maps [N, in_channels, H, W] to [N, num_classes]; a
        stage has the parts `residual` and `reversible`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 21 (paper 002); Gomez et al., "The reversible
        residual network: Backpropagation without storing activations", NeurIPS 2017, whose RevNets for CIFAR have 38
        and 110 layers.

    Example:
        >>> import torch
        >>> revnet(width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(in_channels, num_classes, width, norm, (1, 2, 4))
    if width % 2:
        raise ValueError(f"width must be an even number, got {width}")
    if norm == "group" and width > 2 * MOST_GROUPS and width % (2 * MOST_GROUPS):
        most = 2 * MOST_GROUPS
        raise ValueError(f"width must be at most {most} or a multiple of {most} with norm 'group', got {width}")
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(in_channels, width, 3))
    channels = width
    for i in range(3):
        channels_out = width * 2**i
        stride = 1 if i == 0 else 2
        branch = PreActBranch(channels, channels_out, norm=norm, stride=stride, bias=False)
        residual = ResBlock(branch, shortcut=zero_padded(channels, channels_out) if i > 0 else None)
        blocks = (RevBlock(_half(channels_out, norm), _half(channels_out, norm)) for _ in range(_REVERSIBLE))
        parts[f"stage{i + 1}"] = nn.Sequential(OrderedDict(residual=residual, reversible=RevSequence(*blocks)))
        channels = channels_out
    parts["head"] = head(channels, num_classes, norm)
    return nn.Sequential(parts)


def _half(channels: int, norm: str) -> PreActBranch:
    return PreActBranch(channels // 2, norm=norm, bias=False)
