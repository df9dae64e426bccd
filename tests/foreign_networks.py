"""Blocks as others write them, and blocks that none of ours is; benchmarks/foreign.py has whole networks."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.foreign import conv3
from fastode.dispatch.choice import recording


class DropPath(nn.Module):
    """Stochastic depth, as timm has it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class PreActBasic(nn.Module):
    """As timm writes its pre-activation blocks: the shortcut after the first norm and activation, stochastic depth."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, in_chs)
        self.act1 = nn.SiLU(inplace=True)
        projects = stride != 1 or in_chs != out_chs
        self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if projects else None
        self.conv1 = conv3(in_chs, out_chs, stride)
        self.norm2 = nn.GroupNorm(2, out_chs)
        self.act2 = nn.SiLU(inplace=True)
        self.conv2 = conv3(out_chs, out_chs)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x_preact = self.act1(self.norm1(x))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x_preact)
        x = self.conv1(x_preact)
        x = self.conv2(self.act2(self.norm2(x)))
        return self.drop_path(x) + shortcut


class Stages(nn.Module):
    """A scheme of several stages by hand; `scheme` gives the result of f and x."""

    def __init__(self, scheme: Callable[[nn.Module, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.GroupNorm(1, channels), nn.Tanh(), conv3(channels, channels))
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        return self.scheme(self.f, x)


def heun(f: nn.Module, x: Tensor) -> Tensor:
    first = f(x)
    return x + 0.5 * first + 0.5 * f(x + first)


def ssp2(f: nn.Module, x: Tensor) -> Tensor:
    u = x + f(x)
    return 0.5 * x + 0.5 * (u + f(u))


def ssp3(f: nn.Module, x: Tensor) -> Tensor:
    u1 = x + f(x)
    u2 = 0.75 * x + 0.25 * (u1 + f(u1))
    return x / 3 + 2 / 3 * (u2 + f(u2))


def scaled(f: nn.Module, x: Tensor) -> Tensor:
    return torch.sub(0.9 * x, f(x), alpha=0.3)


SCHEMES = {scheme.__name__: scheme for scheme in (heun, ssp2, ssp3, scaled)}


class Around(nn.Module):
    """A block whose forward is `body` of itself and x, around two convolutions, a norm and some part."""

    def __init__(self, body: Callable[[Around, Tensor], Tensor], part: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.last = conv3(4, 4), nn.BatchNorm2d(4), conv3(4, 4)
        self.part = part
        self.body = body
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def branch(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


def _counting(block: Around, x: Tensor) -> Tensor:
    block.calls += 1
    return x + block.branch(x) if block.calls % 2 else x - block.branch(x)


def _counting_in_a_buffer(block: Around, x: Tensor) -> Tensor:
    block.count += 1
    return x + block.branch(x)


def _by_chance(block: Around, x: Tensor) -> Tensor:
    return x if block.training and random.random() < 0.2 else x + block.branch(x)


def _by_data(block: Around, x: Tensor) -> Tensor:
    return x + block.branch(x) if x.sum() > 0 else x


_GLOBAL = [0]


def _by_the_world(block: Around, x: Tensor) -> Tensor:
    _GLOBAL[0] += 1
    return x + block.branch(x) if _GLOBAL[0] % 2 else x - block.branch(x)


def _in_place(block: Around, x: Tensor) -> Tensor:
    return x + block.branch(F.relu(x, inplace=True))


def _other_skip(block: Around, x: Tensor) -> Tensor:
    return block.branch(x) + x.flip(3)


def _middle(block: Around, x: Tensor) -> Tensor:
    first = block.conv(x)
    return x + first + block.last(F.relu(first))


def _two_branches(block: Around, x: Tensor) -> Tensor:
    x = x + block.conv(x)
    return x + block.last(x)


class AlwaysDropout(nn.Dropout):
    """Drops in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


# What must be refused, and the reason.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "state": (lambda: Around(_counting), "its forward changes calls, which its next call may see."),
    "buffer": (lambda: Around(_counting_in_a_buffer), "its forward changes the buffer count itself."),
    "chance": (lambda: Around(_by_chance), "its forward draws random numbers."),
    "data": (
        lambda: Around(_by_data),
        "its forward cannot be followed by torch.fx: symbolically traced variables cannot be used as inputs to control "
        "flow",
    ),
    "the world": (
        lambda: Around(_by_the_world),
        "its forward gives something else in train mode on an input [2, 4, 6, 8] when it is called again.",
    ),
    "in place": (lambda: Around(_in_place), "its forward changes its input in place."),
    "another skip": (lambda: Around(_other_skip), "its forward calls flip, which is neither a layer nor a sum."),
    "a skip from within": (lambda: Around(_middle), "its forward returns a sum of 3 maps, where two are read."),
    "two in one": (lambda: Around(_two_branches), "its forward applies different chains at its stages."),
    "dropout in both modes": (
        lambda: Around(lambda b, x: x + F.dropout(b.branch(x), 0.1)),
        "its forward draws random numbers in training (dropout).",
    ),
    "dropout of a class of theirs": (
        lambda: Around(lambda b, x: x + b.part(b.branch(x)), AlwaysDropout(0.1)),
        "its forward draws random numbers in training (dropout).",
    ),
    "dropout by a number of its own": (
        lambda: Around(lambda b, x: x + F.dropout(b.branch(x), training=1)),  # type: ignore[arg-type]
        "its forward calls dropout with arguments that are not followed.",
    ),
    "a layer of each call": (
        lambda: Around(lambda b, x: x + nn.Conv2d(4, 4, 1)(b.branch(x))),
        "its forward makes a Conv2d of its own at each call.",
    ),
    "a gate of something else": (
        lambda: Around(lambda b, x: x + b.branch(x) * b.branch(x).sigmoid()),
        "its forward multiplies by something else than a number (mul).",
    ),
    "an uneven padding": (
        lambda: Around(lambda b, x: x + b.part(F.pad(b.branch(x), (0, 2, 0, 2))), nn.Conv2d(4, 4, 3)),
        "its forward pads otherwise than with as many zeros on each side of a map.",
    ),
    "a padding by ones": (
        lambda: Around(lambda b, x: x + b.part(F.pad(b.branch(x), (1, 1, 1, 1), value=1.0)), nn.Conv2d(4, 4, 3)),
        "its forward pads otherwise than with as many zeros on each side of a map.",
    ),
    "a padding before a padding": (
        lambda: Around(lambda b, x: x + b.part(F.pad(b.branch(x), [1] * 4)), nn.Conv2d(4, 4, 5, padding=1)),
        "its forward pads what part takes, which is no convolution without padding.",
    ),
    "a padding before a function": (
        lambda: Around(lambda b, x: x + b.part(F.relu(F.pad(b.branch(x), [1] * 4))), nn.Conv2d(4, 4, 3)),
        "its forward pads what it does not convolve then.",
    ),
    "a padding beside a sum": (
        lambda: Around(lambda b, x: b.part(F.pad(x, [1] * 4)) + b.part(F.pad(x, [1] * 4) * 2), nn.Conv2d(4, 4, 3)),
        "its forward uses pad otherwise than as a map.",
    ),
    "squeeze-excite": (
        lambda: Around(lambda b, x: x + b.part(b.branch(x)), SqueezeExcite()),
        "its forward calls mean, which is neither a layer nor a sum.",
    ),
    "stochastic depth": (
        lambda: Around(lambda b, x: x + b.part(b.branch(x)), DropPath(0.2)),
        "its forward calls x.shape, which is neither a layer nor a sum.",
    ),
    "a gate": (
        lambda: Around(lambda b, x: x + b.branch(x) * b.conv(x).sigmoid()),
        "its forward multiplies by something else than a number (mul).",
    ),
    "a learned scale": (
        lambda: Around(lambda b, x: x + b.norm.weight.view(1, 4, 1, 1) * b.branch(x)),
        "its forward calls norm.weight, which is neither a layer nor a sum.",
    ),
    "a constant": (lambda: Around(lambda b, x: x + b.branch(x) + 1), "its forward adds a number to a map (add)."),
    "an unused layer": (
        lambda: Around(lambda b, x: (b.conv(x), x + b.branch(x))[1]),
        "its forward computes what it does not return (conv).",
    ),
    "twice at one point": (
        lambda: Around(lambda b, x: x + b.branch(x) + b.branch(x + b.branch(x))),
        "its forward evaluates its chain twice at one point.",
    ),
    "more behind": (
        lambda: Around(lambda b, x: F.relu(b.norm(x + b.last(F.relu(b.conv(x)))))),
        "its forward has more behind its sum than an activation (norm, relu).",
    ),
    "broadcasting": (
        lambda: Around(lambda b, x: x + b.part(b.branch(x)), nn.Conv2d(4, 1, 1)),
        "the branch is one that takes 4 channels and returns 1.",
    ),
    "two results": (
        lambda: Around(lambda b, x: (x + b.branch(x), x)),  # type: ignore[arg-type,return-value]
        "its forward returns or adds tuple, and no single map.",
    ),
}


def engine_of(block: nn.Module, x: Tensor) -> str:
    """The engine that a call of a fused block used."""
    with recording() as used:
        block(x)
    return used[block]
