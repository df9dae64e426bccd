"""The networks of the released code of Huang et al. 2020: SONet, SOBlock-ResNet10, ResNet10 and ODENet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from .. import checks, nets
from ..nets._stages import check, conv, head, norm_act
from ..reference import Chain, ResBlock, SkewPair, SOBlock, SOClassifier, skew
from ..reference.branches import make_norm
from ..solver import Solver, solver_of
from ..tableau import Butcher
from .blocks import JoinedClassifier
from .network import Network
from .tables import TABLES

_STRIDES = (1, 2, 2, 2)
_MULTIPLES = (1, 2, 4, 8)


def sonet(
    blocks: Sequence[int] = (2, 2, 2, 2),
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> Network:
    """The released SONet, its `sonet_s`, which loads that network's state_dicts as they are.

    Its classification block is the code's: with the activation inside, biases and y(0) = 0.1. The paper's has no
    biases, so no weights of the code fit it. An adaptive solver judges the error of this block's y and z as one tensor,
    as the code has them; such a block runs as it is after `fastode.fuse`, by equal steps it is fused.

    Args:
        blocks: skew-symmetric blocks in each of the four layers (theirs: `num_blocks`); the paper has one in each.
        in_channels: channels of the image [N, in_channels, H, W], with H and W multiples of 8; theirs has 3.
        num_classes: number of logits.
        width: channels of the first two layers (theirs: `channel`).
        solver: a `fastode.Solver` or its method, as in `SOBlock`, for every block; theirs has dopri5 with tolerances
            0.1 and t1 = 1.
        **parts: of the solver by name, as in `SOBlock`.

    Returns:
        A network of parts `block0` … `block4`, `pool`, `flatten`, `head` that maps [N, in_channels, H, W] to
        [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: github.com/yao-lab/SONet; Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from
        Obfuscated Gradients", eqs. 3 and 6, Figure 2 and Section 5.1.

    Example:
        >>> import torch
        >>> sonet((1, 1, 1, 1), width=4, solver="rk4")(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check_blocks(blocks)
    check(in_channels, num_classes, width, "group", _MULTIPLES, skew.MOST_GROUPS)
    settings = solver_of(solver, parts)
    layers: OrderedDict[str, nn.Module] = OrderedDict(block0=SOBlock(SkewPair(in_channels, width), settings))
    channels = width
    for i, (count, stride) in enumerate(zip(blocks, _STRIDES, strict=True)):
        layer = []
        for j in range(count):
            layer.append(SOBlock(SkewPair(channels, width * _MULTIPLES[i], stride if j == 0 else 1), settings))
            channels = width * _MULTIPLES[i]
        layers[f"block{i + 1}"] = nn.Sequential(*layer)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    kind = JoinedClassifier if settings.is_adaptive else SOClassifier
    layers["head"] = kind(channels, num_classes, released=True, solver=settings)
    return Network(layers, TABLES["sonet"])


def soblock_resnet10(
    blocks: Sequence[int] = (1, 1, 1, 1),
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> Network:
    """The released SOBlock-ResNet10, its `resXsonet10`: ResNet10 with a skew-symmetric ODE block as its first layer.

    Args:
        blocks: as in resnet10.
        in_channels: as in resnet10.
        num_classes: as in resnet10.
        width: as in resnet10.
        solver: of the first layer, as in sonet.
        **parts: of the solver by name, as in `SOBlock`.

    Returns:
        As resnet10 does.

    Raises:
        TypeError, ValueError: as resnet10 does.

    Source: as sonet.

    Example:
        >>> import torch
        >>> soblock_resnet10(width=4, solver="euler")(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check_blocks(blocks)
    check(in_channels, num_classes, width, "group", (1,), skew.MOST_GROUPS)
    stem = SOBlock(SkewPair(in_channels, width), solver_of(solver, parts))
    return _resnet10(stem, blocks, num_classes, width, "soblock_resnet10")


def resnet10(
    blocks: Sequence[int] = (1, 1, 1, 1), *, in_channels: int = 3, num_classes: int = 10, width: int = 64
) -> Network:
    """The released ResNet10, with which SONet is compared.

    Args:
        blocks: residual blocks in each of the four layers (theirs: `num_blocks`, whose default has two in each, with
            which the network is a ResNet-18; the code's instructions and the paper have one).
        in_channels: channels of the image [N, in_channels, H, W]; theirs has 3.
        num_classes: number of logits.
        width: channels of the first layer (theirs: `channel`).

    Returns:
        A network of parts `stem`, `block1` … `block4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: github.com/yao-lab/SONet; Huang et al. 2020, Section 5.1.

    Example:
        >>> import torch
        >>> resnet10(width=4)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check_blocks(blocks)
    check(in_channels, num_classes, width, "batch", ())
    stem = Chain(conv(in_channels, width, 3), *norm_act("batch", width))
    return _resnet10(stem, blocks, num_classes, width, "resnet10")


def odenet(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    blocks: int = 10,
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> Network:
    """The released ODENet, its `odenet_tq`: `fastode.nets.odenet`, which loads that network's state_dicts.

    Args:
        in_channels: channels of the image [N, in_channels, H, W]; theirs has 3, which its state_dict does not show.
        num_classes: number of logits.
        width: channels of every block (theirs: `channel`), at most 8 or a multiple of 8.
        blocks: how many; theirs has 10 whatever its arguments say.
        solver: as in sonet.
        **parts: of the solver by name, as in `ODEBlock`.

    Returns:
        A network of parts `copy`, `block0` …, `norm`, `pool`, `flatten`, `head` that maps [N, in_channels, H, W] to
        [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: as sonet; Section 6.1.

    Example:
        >>> import torch
        >>> odenet(width=4, blocks=1, solver="rk4")(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    network = nets.odenet(
        in_channels=in_channels, num_classes=num_classes, width=width, blocks=blocks, solver=solver, **parts
    )
    return Network(OrderedDict(network.named_children()), TABLES["odenet"])


def _check_blocks(blocks: Any) -> None:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise TypeError(f"blocks must be four ints >= 1, got {checks.what(blocks)}")
    if len(blocks) != len(_STRIDES):
        raise ValueError(f"blocks must be four ints >= 1, got {len(blocks)}")
    for i, count in enumerate(blocks):
        checks.steps(count, f"blocks[{i}]")


def _resnet10(stem: nn.Module, blocks: Sequence[int], num_classes: int, width: int, name: str) -> Network:
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for i, (count, stride) in enumerate(zip(blocks, _STRIDES, strict=True)):
        layer = []
        for j in range(count):
            layer.append(_basic_block(channels, width * _MULTIPLES[i], stride if j == 0 else 1))
            channels = width * _MULTIPLES[i]
        parts[f"block{i + 1}"] = nn.Sequential(*layer)
    parts["head"] = head(channels, num_classes)
    return Network(parts, TABLES[name])


def _basic_block(channels_in: int, channels_out: int, stride: int) -> ResBlock:
    """The original residual block, whose norms and activations follow its convolutions and its sum."""
    branch = nn.Sequential(
        conv(channels_in, channels_out, 3, stride),
        *norm_act("batch", channels_out),
        conv(channels_out, channels_out, 3),
        *make_norm("batch", channels_out),
    )
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(conv(channels_in, channels_out, 1, stride), *make_norm("batch", channels_out))
    return ResBlock(branch, shortcut=shortcut, post_activation=nn.ReLU())
