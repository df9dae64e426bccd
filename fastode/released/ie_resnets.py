"""The networks of the released code of Li et al. 2020: IE-ResNets and the ResNets that they are compared with."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from .. import checks
from ..nets._stages import MakeBlock, check, conv, head, ie_skip, norm_act
from ..reference import BottleneckBranch, Chain, PreActBranch, ResBlock
from .blocks import ReleasedIESkip
from .network import Network
from .tables import TABLES

FOLLOW = ("code", "paper")
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_EXPANSION = 4
_OWN_LAYERS = 3  # norm, ReLU and last convolution of a bottleneck branch, which the inner steps have of their own


def ie_resnet18(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    follow: str = "code",
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
) -> Network:
    """The released IE-ResNet-K-18, its `sir_resnet18`, which loads that network's state_dicts as they are.

    It differs from `fastode.nets.ie_resnet18` by a norm and ReLU after the first convolution, and by a norm of its own
    in the shortcut of a block that changes the shape.

    Args:
        steps: K, the inner gradient steps of each IE-Skip, at least 1 (theirs: `it`).
        step_size: γ of an inner step, dimensionless (theirs: `wd`).
        theta: θ of the implicit scheme, in [0, 1].
        follow: "code" for what the released code computes: the IE-Skips of the last stage have θ f(y) with the other
            sign, and inner steps are constants in the backward. "paper" for Algorithm 1 in every stage, differentiated
            exactly.
        in_channels: channels of the image [N, in_channels, H, W]; theirs has 3.
        num_classes: number of logits.
        width: channels of the first stage; theirs has 16.

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: github.com/homles11/IE-ResNet; Li, He & Lin, "Implicit Euler Skip Connections", ICML 2020, Algorithm 1.

    Example:
        >>> import torch
        >>> ie_resnet18(width=4)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _ie_resnet(18, steps, step_size, theta, follow, in_channels, num_classes, width)


def ie_resnet34(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    follow: str = "code",
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
) -> Network:
    """The released IE-ResNet-K-34, its `sir_resnet34`: `ie_resnet18` with stages of 3, 4, 6, 3 blocks.

    Args:
        steps: as in ie_resnet18.
        step_size: as in ie_resnet18.
        theta: as in ie_resnet18.
        follow: as in ie_resnet18.
        in_channels: as in ie_resnet18.
        num_classes: as in ie_resnet18.
        width: as in ie_resnet18.

    Returns:
        As ie_resnet18 does.

    Raises:
        TypeError, ValueError: as ie_resnet18 does.

    Source: as ie_resnet18.

    Example:
        >>> import torch
        >>> ie_resnet34(width=2)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _ie_resnet(34, steps, step_size, theta, follow, in_channels, num_classes, width)


def ie_resnet50(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    follow: str = "code",
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
) -> Network:
    """The released IE-ResNet-K-50, its `sir_resnet50`: bottleneck blocks, whose first changes the channels.

    The released code leaves the last norm and the last convolution of each inner step as they were drawn: no training
    moves them, and their state_dicts hold them.

    Args:
        steps: as in ie_resnet18.
        step_size: as in ie_resnet18.
        theta: as in ie_resnet18.
        follow: as in ie_resnet18; with "code" also the inner steps' own last layers, with "paper" the trained ones.
        in_channels: as in ie_resnet18.
        num_classes: as in ie_resnet18.
        width: channels of the stem and of the first stage's 3×3 convolutions; theirs has 16.

    Returns:
        As ie_resnet18 does.

    Raises:
        TypeError, ValueError: as ie_resnet18 does.

    Source: as ie_resnet18.

    Example:
        >>> import torch
        >>> ie_resnet50(width=2)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _ie_resnet(50, steps, step_size, theta, follow, in_channels, num_classes, width)


def resnet18(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> Network:
    """The released ResNet-18 that IE-ResNet-18 is compared with, `resnet18` of its sResNet.py.

    The code's weight-sharing networks (s2ResNet.py, of depth 18 and 34) have the same names, and compute the same: they
    compare a block's channels with the bottleneck's, so that no block is ever applied twice.

    Args:
        in_channels: channels of the image [N, in_channels, H, W]; theirs has 3.
        num_classes: number of logits.
        width: channels of the first stage; theirs has 16.

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: github.com/homles11/IE-ResNet; Li, He & Lin 2020, eq. 1.

    Example:
        >>> import torch
        >>> resnet18(width=4)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(18, ResBlock, ResBlock, "resnet18", in_channels, num_classes, width)


def resnet34(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> Network:
    """The released ResNet-34: `resnet18` with stages of 3, 4, 6, 3 blocks.

    Args:
        in_channels: as in resnet18.
        num_classes: as in resnet18.
        width: as in resnet18.

    Returns:
        As resnet18 does.

    Raises:
        TypeError, ValueError: as resnet18 does.

    Source: as resnet18.

    Example:
        >>> import torch
        >>> resnet34(width=2)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(34, ResBlock, ResBlock, "resnet34", in_channels, num_classes, width)


def resnet50(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> Network:
    """The released bottleneck ResNet-50 that IE-ResNet-50 is compared with.

    Args:
        in_channels: as in resnet18.
        num_classes: as in resnet18.
        width: channels of the stem and of the first stage's 3×3 convolutions; theirs has 16.

    Returns:
        As resnet18 does.

    Raises:
        TypeError, ValueError: as resnet18 does.

    Source: as resnet18.

    Example:
        >>> import torch
        >>> resnet50(width=2)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(50, ResBlock, ResBlock, "resnet50", in_channels, num_classes, width)


def _ie_resnet(
    depth: int,
    steps: int,
    step_size: float,
    theta: float,
    follow: str,
    in_channels: int,
    num_classes: int,
    width: int,
) -> Network:
    checks.one_of("follow", follow, FOLLOW)
    skip = ie_skip(steps, step_size, theta, detach=follow == "code")

    own = _OWN_LAYERS if depth == 50 else 0

    def as_released(branch: nn.Sequential, flipped: bool) -> nn.Module:
        return ReleasedIESkip(branch, steps, step_size, theta, flipped, own)

    if follow == "paper":
        first = last = skip
    else:
        first = partial(as_released, flipped=False) if own else skip
        last = partial(as_released, flipped=True)
    return _resnet(depth, first, last, f"ie_resnet{depth}", in_channels, num_classes, width, steps)


def _resnet(
    depth: int,
    make_block: MakeBlock,
    make_last: MakeBlock,
    name: str,
    in_channels: int,
    num_classes: int,
    width: int,
    copies: int = 1,
) -> Network:
    """The network, with blocks by `make_block` where the shape is kept, and by `make_last` in the last stage."""
    check(in_channels, num_classes, width, "layer", ())
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=Chain(conv(in_channels, width, 3), *norm_act("layer", width)))
    expansion = _EXPANSION if depth == 50 else 1
    channels = width
    for i, blocks in enumerate(_BLOCKS[depth]):
        make = make_last if i == 3 else make_block
        stage: list[nn.Module] = []
        for j in range(blocks):
            channels_out, stride = width * 2**i * expansion, 2 if i > 0 and j == 0 else 1
            branch = (BottleneckBranch if depth == 50 else PreActBranch)(
                channels, channels_out, norm="layer", stride=stride, bias=False
            )
            if stride == 2 or channels != channels_out:
                shortcut = nn.Sequential(*norm_act("layer", channels), conv(channels, channels_out, 3, stride))
                stage.append(ResBlock(branch, shortcut=shortcut))
            else:
                stage.append(make(branch))
            channels = channels_out
        parts[f"stage{i + 1}"] = nn.Sequential(*stage)
    parts["head"] = head(channels, num_classes, "layer")
    return Network(parts, TABLES[name], copies)
