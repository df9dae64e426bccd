"""Networks as others write them, from their published definitions, and blocks that none of ours is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """As torchvision has it: He et al. 2016a, two 3×3 convolutions, the activation after the sum, one ReLU for both."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision has it: the stride at the 3×3 convolution."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision has it: a stem of stride 4, stages, a linear head."""

    def __init__(self, block: type, layers: Sequence[int], width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, count in enumerate(layers):
            self.add_module(f"layer{i + 1}", self._stage(block, width * 2**i, count, 1 if i == 0 else 2))
        self.stages = len(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, classes)

    def _stage(self, block: type, planes: int, count: int, stride: int) -> nn.Sequential:
        downsample, outplanes = None, planes * block.expansion
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes)
            )
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = outplanes
        return nn.Sequential(first, *[block(outplanes, planes) for _ in range(count - 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActBlock(nn.Module):
    """As the CIFAR networks of He et al. 2016b are written: the shortcut begins after the first norm and activation."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3(planes, planes)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActResNet(nn.Module):
    def __init__(self, counts: Sequence[int] = (2, 2, 2, 2), width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.in_planes = width
        self.conv1 = conv3(3, width)
        self.layers = nn.Sequential(
            *[self._stage(width * 2**i, count, 1 if i == 0 else 2) for i, count in enumerate(counts)]
        )
        self.linear = nn.Linear(self.in_planes, classes)

    def _stage(self, planes: int, count: int, stride: int) -> nn.Sequential:
        blocks = []
        for step in (stride, *[1] * (count - 1)):
            blocks.append(PreActBlock(self.in_planes, planes, step))
            self.in_planes = planes
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(self.conv1(x))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


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
    "dropout": (
        lambda: Around(lambda b, x: x + b.part(b.branch(x)), nn.Dropout(0.1)),
        "branch.part (Dropout) is of a type the reader does not know.",
    ),
    "dropout by a function": (
        lambda: Around(lambda b, x: x + F.dropout(b.branch(x), 0.1, b.training)),
        "its forward calls dropout, which is neither a layer nor a sum.",
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
