"""Networks read as ordinary differential equations: ResNet-56 with step h, a PolyNet of its size, ResNet10, SONet and
SOBlock-ResNet10.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from .. import checks
from ..reference import Chain, PolyBlock, ResBlock, SkewPair, SOBlock, SOClassifier, skew
from ..reference.branches import make_norm
from ..solver import Solver, solver_of
from ..tableau import Butcher
from ._stages import MakeBlock, check, check_groups, check_norm, conv, head, norm_act, zero_padded

_RESNET56_BLOCKS = 9  # in each of three stages: 56 = 6 × 9 + 2
_STRIDES = (1, 2, 2, 2)  # of the four blocks of ResNet10 and SONet
_MULTIPLES = (1, 2, 4, 8)  # of the width, in these blocks


def resnet56(
    step_size: float = 1.0,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    norm: str = "batch",
) -> nn.Sequential:
    """ResNet-56 for CIFAR with step size h: every block is relu(shortcut(x) + h F(x)).

    Three stages of nine blocks with `width` × (1, 2, 4) channels, F = conv, norm, ReLU, conv, norm. Where the shape
    changes, the shortcut takes every second pixel and fills the new channels with zeros, so it has no parameters.

    Args:
        step_size: h, dimensionless; the paper takes 10⁰ to 10⁻¹⁰.
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage; the paper uses 16.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `stage1` … `stage3`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 2 and Section 4.1, which takes the network of
        He et al., "Deep residual learning for image recognition", CVPR 2016, Section 4.2 (shortcut A).

    Example:
        >>> import torch
        >>> model = resnet56(step_size=0.1, width=8)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.step_size(step_size)
    check(in_channels, num_classes, width, norm, (1, 2, 4))
    return _thin(
        in_channels, num_classes, width, norm, step_size, lambda branch: ResBlock(branch, step_size, None, nn.ReLU())
    )


def polynet(
    step_size: float = 1.0,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    norm: str = "batch",
) -> nn.Sequential:
    """PolyNet of ResNet-56's size: every block that keeps the shape is relu(x + h F(x) + h F(h F(x))).

    The branches, the two blocks that change the shape, stem and head are those of `resnet56`, and so is the number of
    parameters: both evaluations share F.

    Args:
        step_size: h, dimensionless; PolyNet has 1.
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `stage1` … `stage3`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 15, which takes the block of Zhang et al.,
        "PolyNet: A pursuit of structural diversity in very deep networks", CVPR 2017 (poly-2); the network is
        `resnet56`'s, for PolyNet itself is one for larger images.

    Example:
        >>> import torch
        >>> polynet(width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.step_size(step_size)
    check(in_channels, num_classes, width, norm, (1, 2, 4))
    return _thin(in_channels, num_classes, width, norm, step_size, lambda branch: PolyBlock(branch, step_size))


def _thin(
    in_channels: int, num_classes: int, width: int, norm: str, step_size: float, make_block: MakeBlock
) -> nn.Sequential:
    """ResNet-56 with the blocks that `make_block` makes where they keep the shape."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(in_channels, width, norm))
    channels = width
    for i in range(3):
        blocks: list[nn.Module] = []
        for j in range(_RESNET56_BLOCKS):
            channels_out = width * 2**i
            changes = i > 0 and j == 0
            branch = _postact_branch(channels, channels_out, 2 if changes else 1, norm)
            shortcut = zero_padded(channels, channels_out) if changes else None
            block = ResBlock(branch, step_size, shortcut, nn.ReLU()) if changes else make_block(branch)
            blocks.append(nn.Sequential(block, *([] if isinstance(block, ResBlock) else [nn.ReLU()])))
            channels = channels_out
        parts[f"stage{i + 1}"] = nn.Sequential(*blocks)
    parts["head"] = head(channels, num_classes)
    return nn.Sequential(parts)


def resnet10(*, in_channels: int = 3, num_classes: int = 10, width: int = 64, norm: str = "batch") -> nn.Sequential:
    """ResNet10: a convolution and four residual blocks of two convolutions, each block its own stage.

    The blocks have `width` × (1, 2, 4, 8) channels, the last three halve the size; a shortcut that changes the shape is
    a 1×1 convolution and a norm.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage; the paper uses 32 and 64.
        norm: "batch", "group", "layer", "instance" or "none".

    Returns:
        A network of parts `stem`, `block1` … `block4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients",
        Section 5.1.

    Example:
        >>> import torch
        >>> resnet10(width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(in_channels, num_classes, width, norm, _MULTIPLES)
    return _resnet10(_stem(in_channels, width, norm), num_classes, width, norm)


def sonet(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "group",
    gamma: float = 0.0,
    solver: str | Butcher | Solver = "dopri5",
    released: bool = False,
    **parts: Any,
) -> nn.Sequential:
    """SONet: five skew-symmetric ODE blocks, average pooling and a skew-symmetric classification block.

    It is ResNet10 with its first convolution, its four residual blocks and its linear layer replaced.

    Args:
        in_channels: channels of the image [N, in_channels, H, W], with H and W multiples of 8.
        num_classes: number of logits.
        width: channels of the first two blocks; the paper uses 32 and 64.
        norm: the norms before and after each skew pair: "group" (min(8, C) groups, the released code's), "batch",
            "layer", "instance" or "none".
        gamma: γ, the damping, at least 0; the paper trains with 0.
        solver: a `fastode.Solver` or its method, as in `SOBlock`, for every block; the paper has dopri5 with tolerances
            0.1 and t1 = 1.
        released: True takes the released code's classification block instead of the paper's.
        **parts: of the solver by name, as in `SOBlock`: rtol, atol, t1, steps, gradient, per_sample, max_steps,
            first_step.

    Returns:
        A network of parts `block0` … `block4`, `pool`, `flatten`, `head` that maps [N, in_channels, H, W] to
        [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eqs. 3
        and 6, Figure 2 and Section 5.1.

    Example:
        >>> import torch
        >>> model = sonet(width=8, solver="rk4")
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(in_channels, num_classes, width, norm, _MULTIPLES, skew.MOST_GROUPS)
    settings = solver_of(solver, parts)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["block0"] = SOBlock(SkewPair(in_channels, width, gamma=gamma, norm=norm), settings)
    channels = width
    for i, stride in enumerate(_STRIDES):
        channels_out = width * 2**i
        field = SkewPair(channels, channels_out, stride=stride, gamma=gamma, norm=norm)
        layers[f"block{i + 1}"] = SOBlock(field, settings)
        channels = channels_out
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = SOClassifier(channels, num_classes, gamma=gamma, released=released, solver=settings)
    return nn.Sequential(layers)


def soblock_resnet10(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "batch",
    skew_norm: str = "group",
    gamma: float = 0.0,
    solver: str | Butcher | Solver = "dopri5",
    **parts: Any,
) -> nn.Sequential:
    """ResNet10 with a skew-symmetric ODE block in place of its first layer, which the paper calls SOBlock.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage; the paper uses 32 and 64.
        norm: the norms of the residual blocks: "batch", "group", "layer", "instance" or "none".
        skew_norm: the norms before and after the skew pair, by the same names ("group" has min(8, C) groups here).
        gamma: γ, the damping, at least 0; the paper trains with 0.
        solver: a `fastode.Solver` or its method, as in `SOBlock`; the paper has dopri5 with tolerances 0.1 and t1 = 1.
        **parts: of the solver by name, as in `SOBlock`: rtol, atol, t1, steps, gradient, per_sample, max_steps,
            first_step.

    Returns:
        A network of parts `stem`, `block1` … `block4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients",
        Section 5.1 and Table 1.

    Example:
        >>> import torch
        >>> model = soblock_resnet10(width=8, solver="euler")
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(in_channels, num_classes, width, norm, _MULTIPLES)
    check_norm(skew_norm, "skew_norm")
    if skew_norm == "group":
        check_groups(width, (1,), skew.MOST_GROUPS, "skew_norm")
    field = SkewPair(in_channels, width, gamma=gamma, norm=skew_norm)
    stem = SOBlock(field, solver_of(solver, parts))
    return _resnet10(stem, num_classes, width, norm)


def _resnet10(stem: nn.Module, num_classes: int, width: int, norm: str) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for i, stride in enumerate(_STRIDES):
        channels_out = width * 2**i
        shortcut = _projection(channels, channels_out, stride, norm) if stride == 2 else None
        branch = _postact_branch(channels, channels_out, stride, norm)
        # A Sequential of one, so that parameters have the names that they always had.
        parts[f"block{i + 1}"] = nn.Sequential(ResBlock(branch, shortcut=shortcut, post_activation=nn.ReLU()))
        channels = channels_out
    parts["head"] = head(channels, num_classes)
    return nn.Sequential(parts)


def _stem(in_channels: int, width: int, norm: str) -> nn.Sequential:
    return Chain(conv(in_channels, width, 3), *norm_act(norm, width))


def _postact_branch(channels_in: int, channels_out: int, stride: int, norm: str) -> nn.Sequential:
    """The branch of the original residual block of He et al. (2016a), whose ReLU follows the sum."""
    return nn.Sequential(
        conv(channels_in, channels_out, 3, stride),
        *norm_act(norm, channels_out),
        conv(channels_out, channels_out, 3),
        *make_norm(norm, channels_out),
    )


def _projection(channels_in: int, channels_out: int, stride: int, norm: str) -> nn.Sequential:
    return nn.Sequential(conv(channels_in, channels_out, 1, stride), *make_norm(norm, channels_out))
