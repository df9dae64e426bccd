"""The networks of the released code of Kim et al. 2020: SSPNets for CIFAR-10 and MNIST."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .. import checks, nets
from ..reference import Ark, Midpoint, ShuOsher
from .blocks import MIDPOINT, evaluate_branch_twice, evaluate_norm_twice
from .ie_resnets import FOLLOW
from .network import Network
from .tables import TABLES


def sspnet(
    block: str = "ssp2",
    n: int = 6,
    *,
    follow: str = "code",
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    norm: str = "batch",
) -> Network:
    """The released SSPNet for CIFAR-10, its `cifar_model`, which loads that network's state_dicts as they are.

    Args:
        block: "res", "ssp2", "ssp3", "midpoint" (theirs: midrk2) or "adap" (theirs: ark).
        n: blocks in a group, at least 1 (theirs: `layers`, 6 by default, 10 too in the paper).
        follow: "code" for what the released code computes: the midpoint block ends in u₁ + f(u₁) and not in x + f(u₁);
            the first norm of an expansive block and f(x) of an Ark block are evaluated twice, which in training moves
            the running statistics twice; Ark learns α₂₁ too. "paper" for the paper, which is `fastode.nets.sspnet`.
        in_channels: channels of the image [N, in_channels, H, W], with H and W at least 4; theirs has 3.
        num_classes: number of logits.
        width: channels of the first group; theirs has 16.
        norm: "batch", "group", "layer" or "instance" (theirs: "b", "g", "l", "i").

    Returns:
        A network of parts `stem`, `group1`, `expand1`, `group2`, `expand2`, `group3`, `head` that maps
        [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: github.com/matbambbang/sspnet; Kim et al., "Robust Neural Networks inspired by Strong Stability Preserving
        Runge-Kutta methods", ECCV 2020, eqs. 9–15, Figure 3.

    Example:
        >>> import torch
        >>> sspnet("adap", n=1, width=4)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.one_of("follow", follow, FOLLOW)
    network = nets.sspnet(block, n, in_channels=in_channels, num_classes=num_classes, width=width, norm=_checked(norm))
    parts = OrderedDict(network.named_children())
    if follow == "code":
        _follow_code(parts, {})
    return Network(parts, TABLES[f"sspnet {block}"])


def sspnet_mnist(
    block: str = "ssp2",
    n: int = 6,
    *,
    follow: str = "code",
    in_channels: int = 1,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "batch",
) -> Network:
    """The released SSPNet for MNIST, its `mnist_model`, which loads that network's state_dicts as they are.

    Args:
        block: "res", "ssp2", "ssp3" or "adap" (theirs: ark).
        n: blocks, at least 1 (theirs: `layers`).
        follow: as in sspnet; their Ark blocks begin at a21 = −1 and b10 = 0.5 here.
        in_channels: channels of the image [N, in_channels, H, W], with H and W at least 6; theirs has 1.
        num_classes: number of logits; theirs has 10.
        width: channels of every layer; theirs has 64.
        norm: as in sspnet.

    Returns:
        A network of parts `stem`, `group3`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: as sspnet; Kim et al. 2020, Section 4.2.

    Example:
        >>> import torch
        >>> sspnet_mnist("ssp3", n=1, width=4)(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    checks.one_of("follow", follow, FOLLOW)
    checks.one_of("block", block, ("res", "ssp2", "ssp3", "adap"))
    network = nets.sspnet_mnist(
        block, n, in_channels=in_channels, num_classes=num_classes, width=width, norm=_checked(norm)
    )
    parts = OrderedDict(network.named_children())
    if follow == "code":
        _follow_code(parts, {"a21": -1.0, "b10": 0.5})
    return Network(parts, TABLES[f"sspnet_mnist {block}"])


def _checked(norm: str) -> str:
    checks.one_of("norm", norm, ("batch", "group", "layer", "instance"))  # theirs has no network without
    return norm


def _follow_code(parts: OrderedDict[str, nn.Module], begin: dict[str, float]) -> None:
    """Put the released code's blocks in the place of the paper's; Ark blocks begin at these values."""
    for name, part in parts.items():
        if name.startswith("expand"):
            part.register_forward_pre_hook(evaluate_norm_twice)
        if name.startswith("group"):
            parts[name] = nn.Sequential(*(_as_released(block, begin) for block in part.children()))


def _as_released(block: nn.Module, begin: dict[str, float]) -> nn.Module:
    if isinstance(block, Midpoint):
        return ShuOsher(block.branch, MIDPOINT)
    if isinstance(block, Ark):
        # Their flags leave both trainable.
        block = Ark(block.branch, learn_a21=True, learn_b10=True, **begin)
        block.register_forward_pre_hook(evaluate_branch_twice)
    return block
