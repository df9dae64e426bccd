"""IE-ResNets, the ResNets they are compared with, and the weight-sharing SwResNet-58 (Li et al. 2020)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..reference import BottleneckBranch, PreActBranch, ResBlock, ShuOsher
from ..tableau import Tableau
from ._stages import MakeBlock, check, check_shortcut, conv, head, ie_skip, stage

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_EXPANSION = 4  # of the bottleneck branch in ResNet-50

# Two residual blocks with the same weights: two Euler steps of the same branch.
_TWICE = Tableau("two_euler", alpha=((1.0,), (0.0, 1.0)), beta=((1.0,), (0.0, 1.0)), order=1)


def ie_resnet18(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    detach: bool = False,
    exact: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "layer",
    shortcut_kernel: int = 3,
) -> nn.Sequential:
    """IE-ResNet-K-18: a pre-activation ResNet-18 whose shape-keeping blocks are IE-Skips.

    Stages of 2, 2, 2, 2 blocks with `width` × (1, 2, 4, 8) channels, each later stage at half the size. A block that
    changes the shape is a ResBlock with a convolution as its shortcut. The parameters are those of `resnet18`.

    Args:
        steps: K, the inner gradient steps of each IE-Skip, at least 1.
        step_size: γ of an inner step, dimensionless; the paper takes 0.05 (natural training) and 0.1.
        theta: θ of the implicit scheme, in [0, 1]; 1 is the paper's implicit Euler.
        detach: True differentiates the block as if its inner steps were constant, as the released code does.
        exact: True takes `ExactIE` in place of each IE-Skip, the paper's "exact IE-ResNet", with the same parameters;
            the four arguments above are then not used.
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage; the paper uses 8 (MNIST), 16 and 64 (CIFAR).
        norm: "batch", "group", "layer" (GroupNorm with one group, as in the released code), "instance" or "none".
        shortcut_kernel: 3 (the paper's choice) or 1, the kernel of the shortcut where the shape changes.

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin, "Implicit Euler Skip Connections", ICML 2020, Algorithm 1 and Figure 2.

    Example:
        >>> import torch
        >>> model = ie_resnet18(steps=1, step_size=0.1, width=8)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    skip = ie_skip(steps, step_size, theta, detach, exact)
    return _resnet(18, skip, in_channels, num_classes, width, norm, shortcut_kernel)


def ie_resnet34(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    detach: bool = False,
    exact: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "layer",
    shortcut_kernel: int = 3,
) -> nn.Sequential:
    """IE-ResNet-K-34: `ie_resnet18` with stages of 3, 4, 6, 3 blocks.

    Args:
        steps: K, the inner gradient steps of each IE-Skip, at least 1.
        step_size: γ of an inner step, dimensionless; the paper takes 0.05 (natural training) and 0.1.
        theta: θ of the implicit scheme, in [0, 1]; 1 is the paper's implicit Euler.
        detach: True differentiates the block as if its inner steps were constant, as the released code does.
        exact: True takes `ExactIE` in place of each IE-Skip, the paper's "exact IE-ResNet", with the same parameters;
            the four arguments above are then not used.
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage.
        norm: "batch", "group", "layer" (as in the released code), "instance" or "none".
        shortcut_kernel: 3 (the paper's choice) or 1.

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin, "Implicit Euler Skip Connections", ICML 2020, Algorithm 1 and Figure 2.

    Example:
        >>> import torch
        >>> model = ie_resnet34(steps=1, step_size=0.1, width=8)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    skip = ie_skip(steps, step_size, theta, detach, exact)
    return _resnet(34, skip, in_channels, num_classes, width, norm, shortcut_kernel)


def ie_resnet50(
    steps: int = 1,
    step_size: float = 0.1,
    *,
    theta: float = 1.0,
    detach: bool = False,
    exact: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    norm: str = "layer",
    shortcut_kernel: int = 3,
) -> nn.Sequential:
    """IE-ResNet-K-50: stages of 3, 4, 6, 3 bottleneck blocks, the output of a stage four times as wide as its middle.

    Args:
        steps: K, the inner gradient steps of each IE-Skip, at least 1.
        step_size: γ of an inner step, dimensionless; the paper takes 0.05 (natural training) and 0.1.
        theta: θ of the implicit scheme, in [0, 1]; 1 is the paper's implicit Euler.
        detach: True differentiates the block as if its inner steps were constant, as the released code does.
        exact: True takes `ExactIE` in place of each IE-Skip, the paper's "exact IE-ResNet", with the same parameters;
            the four arguments above are then not used.
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the stem and of the first stage's 3×3 convolutions; the stage gives 4 × `width`.
        norm: "batch", "group", "layer" (as in the released code), "instance" or "none".
        shortcut_kernel: 3 (the paper's choice) or 1.

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin, "Implicit Euler Skip Connections", ICML 2020, Algorithm 1, Figure 2 and Section 5.3.

    Example:
        >>> import torch
        >>> model = ie_resnet50(steps=1, step_size=0.05, width=4)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    skip = ie_skip(steps, step_size, theta, detach, exact)
    return _resnet(50, skip, in_channels, num_classes, width, norm, shortcut_kernel)


def resnet18(
    *, in_channels: int = 3, num_classes: int = 10, width: int = 64, norm: str = "layer", shortcut_kernel: int = 3
) -> nn.Sequential:
    """The pre-activation ResNet-18 that IE-ResNet-18 is compared with: `ie_resnet18` with residual blocks.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage.
        norm: "batch", "group", "layer", "instance" or "none"; the default is `ie_resnet18`'s.
        shortcut_kernel: 3 (as in `ie_resnet18`) or 1 (He et al. 2016b).

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin 2020, eq. 1; He et al., "Identity mappings in deep residual networks", ECCV 2016.

    Example:
        >>> import torch
        >>> resnet18(width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(18, ResBlock, in_channels, num_classes, width, norm, shortcut_kernel)


def resnet34(
    *, in_channels: int = 3, num_classes: int = 10, width: int = 64, norm: str = "layer", shortcut_kernel: int = 3
) -> nn.Sequential:
    """The pre-activation ResNet-34 that IE-ResNet-34 and SwResNet-58 are compared with.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage.
        norm: "batch", "group", "layer", "instance" or "none"; the default is `ie_resnet34`'s.
        shortcut_kernel: 3 (as in `ie_resnet34`) or 1 (He et al. 2016b).

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin 2020, eq. 1; He et al., "Identity mappings in deep residual networks", ECCV 2016.

    Example:
        >>> import torch
        >>> resnet34(width=8)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(34, ResBlock, in_channels, num_classes, width, norm, shortcut_kernel)


def resnet50(
    *, in_channels: int = 3, num_classes: int = 10, width: int = 64, norm: str = "layer", shortcut_kernel: int = 3
) -> nn.Sequential:
    """The pre-activation bottleneck ResNet-50 that IE-ResNet-50 is compared with.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the stem and of the first stage's 3×3 convolutions; the stage gives 4 × `width`.
        norm: "batch", "group", "layer", "instance" or "none"; the default is `ie_resnet50`'s.
        shortcut_kernel: 3 (as in `ie_resnet50`) or 1 (He et al. 2016b).

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin 2020, eq. 1; He et al., "Identity mappings in deep residual networks", ECCV 2016.

    Example:
        >>> import torch
        >>> resnet50(width=4)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet(50, ResBlock, in_channels, num_classes, width, norm, shortcut_kernel)


def sw_resnet58(
    *, in_channels: int = 3, num_classes: int = 10, width: int = 64, norm: str = "layer", shortcut_kernel: int = 3
) -> nn.Sequential:
    """SwResNet-58: ResNet-34 with every block but a stage's first applied twice, with the same weights.

    Twelve of ResNet-34's sixteen two-convolution blocks are repeated, 34 + 2 × 12 = 58 layers, with ResNet-34's
    parameters under ResNet-34's names. A repeated block is one ShuOsher block of two Euler steps.

    Args:
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the first stage.
        norm: "batch", "group", "layer", "instance" or "none"; the default is `ie_resnet34`'s.
        shortcut_kernel: 3 (as in `ie_resnet34`) or 1 (He et al. 2016b).

    Returns:
        A network of parts `stem`, `stage1` … `stage4`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin 2020, Section 6.2, and supplement, Section 4 and Figure 1. The text leaves alone only the
        blocks that change the shape, which would repeat thirteen blocks; the paper's depth of 58 needs twelve.

    Example:
        >>> import torch
        >>> model = sw_resnet58(width=8)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
        >>> model.load_state_dict(resnet34(width=8).state_dict())
        <All keys matched successfully>
    """

    def twice(branch: nn.Sequential) -> nn.Module:
        return ShuOsher(branch, _TWICE)

    return _resnet(34, twice, in_channels, num_classes, width, norm, shortcut_kernel, make_first=ResBlock)


def _resnet(
    depth: int,
    make_block: MakeBlock,
    in_channels: int,
    num_classes: int,
    width: int,
    norm: str,
    shortcut_kernel: int,
    make_first: MakeBlock | None = None,
) -> nn.Sequential:
    bottleneck = depth == 50
    check(in_channels, num_classes, width, norm, (1, 2, 4, 8, 16, 32) if bottleneck else (1, 2, 4, 8))
    check_shortcut(shortcut_kernel)

    def make_branch(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        kind = BottleneckBranch if bottleneck else PreActBranch
        return kind(channels_in, channels_out, norm=norm, stride=stride, bias=False)

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(in_channels, width, 3))
    channels = width
    for i, blocks in enumerate(_BLOCKS[depth]):
        channels_out = width * 2**i * (_EXPANSION if bottleneck else 1)
        stride = 1 if i == 0 else 2
        parts[f"stage{i + 1}"] = stage(
            channels, channels_out, blocks, stride, make_branch, make_block, shortcut_kernel, make_first
        )
        channels = channels_out
    parts["head"] = head(channels, num_classes, norm)
    return nn.Sequential(parts)
