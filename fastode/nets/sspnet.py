"""SSPNets: residual networks whose blocks are strong-stability-preserving Runge–Kutta steps (Kim et al. 2020)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .. import checks
from ..reference import SSP2, SSP3, Ark, Chain, Midpoint, PreActBranch, ResBlock
from ..reference.branches import make_norm
from ._stages import MakeBlock, check, conv, expansive, head, norm_act

_BLOCKS: dict[str, MakeBlock] = {"res": ResBlock, "ssp2": SSP2, "ssp3": SSP3, "midpoint": Midpoint}
_NAMES = (*_BLOCKS, "adap")


def sspnet(
    block: str = "ssp2",
    n: int = 6,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    norm: str = "batch",
) -> nn.Sequential:
    """SSPNet for 3×32×32 images: three groups of `n` blocks with an expansive residual block between the groups.

    The groups have `width` × (1, 2, 4) channels. The expansive block halves the size and doubles the channels; its
    first norm and ReLU feed the branch and the 1×1 shortcut and are evaluated once (the released code evaluates them
    twice, which in training moves the running statistics twice).

    Args:
        block: "res", "ssp2", "ssp3", "midpoint", or "adap": a group of Ark blocks, one of residual blocks, one of SSP2.
        n: blocks in a group, at least 1; the paper uses 6 and 10.
        in_channels: channels of the image [N, in_channels, H, W], with H and W at least 4.
        num_classes: number of logits.
        width: channels of the first group; the paper uses 16.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `group1`, `expand1`, `group2`, `expand2`, `group3`, `head` that maps
        [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Kim et al., "Robust Neural Networks inspired by Strong Stability Preserving Runge-Kutta methods", ECCV 2020,
        eqs. 9–15, Figure 3 and Section 4.1; the groups of "adap" and the last layers are the released code's.

    Example:
        >>> import torch
        >>> model = sspnet("ssp3", n=1, width=8)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.one_of("block", block, _NAMES)
    checks.steps(n, "n")
    check(in_channels, num_classes, width, norm, (1, 2, 4))
    kinds = (Ark, ResBlock, SSP2) if block == "adap" else (_BLOCKS[block],) * 3

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(in_channels, width, 3, bias=True))
    for i, make_block in enumerate(kinds):
        channels = width * 2**i
        if i > 0:
            parts[f"expand{i}"] = _expand(channels // 2, channels, norm)
        parts[f"group{i + 1}"] = _group(make_block, n, channels, norm)
    parts["head"] = head(channels, num_classes)
    return nn.Sequential(parts)


def sspnet_mnist(
    block: str = "ssp2",
    n: int = 6,
    *,
    in_channels: int = 1,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "batch",
) -> nn.Sequential:
    """SSPNet for 1×28×28 images: two strided convolutions, then the third group of `sspnet` alone.

    Args:
        block: "res", "ssp2", "ssp3", "midpoint", or "adap": Ark blocks, as in the released code.
        n: blocks, at least 1; the paper uses 6.
        in_channels: channels of the image [N, in_channels, H, W], with H and W at least 6 (and 10 in training with a
            norm that needs more than one value per channel).
        num_classes: number of logits.
        width: channels of every layer; the paper uses 64.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `group3`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Kim et al. 2020, Section 4.2 ("skipping group 1 and 2 in Figure 3") and Table 1; the stem is the released
        code's.

    Example:
        >>> import torch
        >>> model = sspnet_mnist("adap", n=1, width=8)
        >>> model(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    checks.one_of("block", block, _NAMES)
    checks.steps(n, "n")
    check(in_channels, num_classes, width, norm, (1,))
    stem = Chain(
        nn.Conv2d(in_channels, width, 3),
        *norm_act(norm, width),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        *norm_act(norm, width),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
    )
    make_block = Ark if block == "adap" else _BLOCKS[block]
    group = _group(make_block, n, width, norm)
    return nn.Sequential(OrderedDict(stem=stem, group3=group, head=head(width, num_classes, norm)))


def _group(make_block: MakeBlock, n: int, channels: int, norm: str) -> nn.Sequential:
    return nn.Sequential(*(make_block(PreActBranch(channels, norm=norm)) for _ in range(n)))


def _expand(channels_in: int, channels_out: int, norm: str) -> nn.Sequential:
    shortcut = nn.Sequential(conv(channels_in, channels_out, 1, stride=2), *make_norm(norm, channels_out))
    return expansive(PreActBranch(channels_in, channels_out, norm=norm, stride=2), shortcut)
