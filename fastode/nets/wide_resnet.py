"""WideResNet-34-10, with residual skips or with IE-Skips (Li et al. 2020, Section 5.4)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .. import checks
from ..reference import PreActBranch, ResBlock
from ._stages import MakeBlock, check, check_shortcut, conv, head, ie_skip, stage

_BLOCKS = 5  # in each of three stages: 34 = 6 × 5 + 4
_WIDEN = 10


def wide_resnet34_10(
    skip: str = "ie",
    *,
    steps: int = 1,
    step_size: float = 0.1,
    theta: float = 1.0,
    detach: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    norm: str = "layer",
    shortcut_kernel: int = 3,
) -> nn.Sequential:
    """WideResNet-34-10, or IE-WideResNet-K-34: three stages of five blocks, ten times as wide as a thin ResNet's.

    Args:
        skip: "ie" (IE-Skips where a block keeps the shape) or "res" (residual skips, the baseline).
        steps: K, the inner gradient steps of each IE-Skip, at least 1; not used by "res".
        step_size: γ of an inner step, dimensionless; the paper takes 0.1; not used by "res".
        theta: θ of the implicit scheme, in [0, 1]; 1 is the paper's implicit Euler; not used by "res".
        detach: True differentiates as if the inner steps were constant (the released code); not used by "res".
        in_channels: channels of the image [N, in_channels, H, W].
        num_classes: number of logits.
        width: channels of the stem; the stages have 10, 20 and 40 times as many (the paper's 160, 320 and 640).
        norm: "batch", "group", "layer", "instance" or "none"; the default is `ie_resnet18`'s.
        shortcut_kernel: 3 (the paper's IE-WideResNet, 46 × 2²⁰ parameters) or 1 (the plain one, 44 × 2²⁰).

    Returns:
        A network of parts `stem`, `stage1` … `stage3`, `head` that maps [N, in_channels, H, W] to [N, num_classes].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside what is allowed above.

    Source: Li, He & Lin, "Implicit Euler Skip Connections", ICML 2020, Section 5.4 and Table 5.

    Example:
        >>> import torch
        >>> model = wide_resnet34_10("ie", steps=1, width=1)
        >>> model(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.one_of("skip", skip, ("ie", "res"))
    implicit = ie_skip(steps, step_size, theta, detach)
    check(in_channels, num_classes, width, norm, (1, *(_WIDEN * 2**i for i in range(3))))
    check_shortcut(shortcut_kernel)
    make_block: MakeBlock = implicit if skip == "ie" else ResBlock

    def make_branch(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        return PreActBranch(channels_in, channels_out, norm=norm, stride=stride, bias=False)

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(in_channels, width, 3))
    channels = width
    for i in range(3):
        channels_out = width * _WIDEN * 2**i
        stride = 1 if i == 0 else 2
        parts[f"stage{i + 1}"] = stage(
            channels, channels_out, _BLOCKS, stride, make_branch, make_block, shortcut_kernel
        )
        channels = channels_out
    parts["head"] = head(channels, num_classes, norm)
    return nn.Sequential(parts)
