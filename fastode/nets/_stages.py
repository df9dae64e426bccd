"""What the papers' networks have in common: argument checks, expansive blocks, stages and heads.

A network here is a plain `nn.Sequential` of named parts (`stem`, `stage1`, …, `head`), so that a stage can be taken out
by name, as the perturbation growth ratio of Kim et al. (2020), eq. 17, needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from .. import checks
from ..reference import Chain, ExactIE, IESkip, ResBlock
from ..reference.branches import MOST_GROUPS, NORMS, make_norm

# (in_channels, out_channels, stride) -> the residual branch; branch -> the block that keeps the shape
MakeBranch = Callable[[int, int, int], nn.Sequential]
MakeBlock = Callable[[nn.Sequential], nn.Module]


def check(
    in_channels: int,
    num_classes: int,
    width: int,
    norm: str,
    multiples: Sequence[int],
    most_groups: int = MOST_GROUPS,
) -> None:
    """Refuse sizes and a norm that no network can be built from, whose norms have `width` × `multiples` channels."""
    for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("width", width)):
        checks.steps(value, name)
    check_norm(norm)
    if norm == "group":
        check_groups(width, multiples, most_groups)


def check_groups(width: int, multiples: Sequence[int], most: int, norm: str = "norm") -> None:
    """Refuse a width of which a multiple is not parted evenly by min(most, channels) groups."""
    for channels in (width * multiple for multiple in multiples):
        if channels > most and channels % most:
            widths = ", ".join(map(str, multiples))
            raise ValueError(
                f"width must be a number whose multiples by {widths} are each at most {most} or a multiple of {most} "
                f"with {norm} 'group', got {width}"
            )


def check_norm(norm: str, name: str = "norm") -> None:
    """Refuse a norm that no paper uses."""
    checks.one_of(name, norm, (*NORMS, "none"))


def check_shortcut(kernel: int) -> None:
    """Refuse a shortcut's kernel that no paper uses."""
    checks.steps(kernel, "shortcut_kernel")
    if kernel not in (1, 3):
        raise ValueError(f"shortcut_kernel must be 1 or 3, got {kernel}")


def ie_skip(steps: int, step_size: float, theta: float, detach: bool, exact: bool = False) -> MakeBlock:
    """What makes a branch an IE-Skip, or with `exact` the block that it approaches.

    A bad argument is refused here, before the first layer is made.
    """
    checks.steps(steps)
    checks.step_size(step_size)
    checks.theta(theta)
    checks.flag("detach", detach)
    checks.flag("exact", exact)
    if exact:
        return ExactIE

    def make(branch: nn.Sequential) -> nn.Module:
        return IESkip(branch, steps=steps, step_size=step_size, theta=theta, detach=detach)

    return make


def norm_act(norm: str, channels: int) -> list[nn.Module]:
    """The norm, unless there is none, and the ReLU that follows it."""
    return [*make_norm(norm, channels), nn.ReLU()]


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution whose odd kernel is padded to keep the size at stride 1."""
    return nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=bias)


def expansive(branch: nn.Sequential, shortcut: nn.Module) -> nn.Sequential:
    """ResBlock-E: the block that changes the shape, with its first norm and activation before the fork.

    The branch's leading norm and activation also feed the shortcut (He et al. 2016b), so they are moved in front of the
    ResBlock and evaluated once.
    """
    fork = next(i for i, layer in enumerate(branch) if isinstance(layer, nn.Conv2d))
    block = ResBlock(branch[fork:], shortcut=shortcut)
    return Chain(OrderedDict(preactivation=branch[:fork], block=block))


def stage(
    channels_in: int,
    channels_out: int,
    blocks: int,
    stride: int,
    make_branch: MakeBranch,
    make_block: MakeBlock,
    shortcut_kernel: int,
    make_first: MakeBlock | None = None,
) -> nn.Sequential:
    """One stage: a first block that may change the shape, then blocks that keep it.

    `make_first` makes the first block where it keeps the shape and is to differ from the others.
    """
    first = make_branch(channels_in, channels_out, stride)
    layers: list[nn.Module] = []
    if stride != 1 or channels_in != channels_out:
        layers.append(expansive(first, conv(channels_in, channels_out, shortcut_kernel, stride)))
    else:
        layers.append((make_first or make_block)(first))
    layers += [make_block(make_branch(channels_out, channels_out, 1)) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def head(channels: int, num_classes: int, norm: str | None = None) -> nn.Sequential:
    """Mean over positions and a linear classifier, after a last norm and ReLU where `norm` is given."""
    before = [] if norm is None else norm_act(norm, channels)
    return Chain(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def zero_padded(channels_in: int, channels_out: int) -> nn.Sequential:
    """Shortcut A of He et al. (2016a): every second pixel, and zeros in the new channels."""
    # A mean over one pixel is the pixel; the padding's last pair is that of the channels.
    return nn.Sequential(nn.AvgPool2d(1, stride=2), nn.ConstantPad3d((0, 0, 0, 0, 0, channels_out - channels_in), 0.0))
