"""The networks of IE-ResNet's and SSPNet's released codes, from what is known of them: names, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def pre_activation(*convolutions: nn.Conv2d) -> nn.Sequential:
    """Norm over all channels, ReLU and convolution, as often as there are convolutions."""
    layers: list[nn.Module] = []
    for convolution in convolutions:
        layers += [nn.GroupNorm(1, convolution.in_channels), nn.ReLU(), convolution]
    return nn.Sequential(*layers)


def unbiased(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def ie_branch(depth: int, inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    if depth < 50:
        return pre_activation(unbiased(inputs, outputs, 3, stride), unbiased(outputs, outputs, 3))
    middle = outputs // 4
    return pre_activation(
        unbiased(inputs, middle, 1), unbiased(middle, middle, 3, stride), unbiased(middle, outputs, 1)
    )


class SkipNet(nn.Module):
    """What IE-ResNet and its ResNets share: stem, head, and a walk over the stages."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.depth = depth
        self.conv1 = nn.Sequential(unbiased(3, width, 3), nn.GroupNorm(1, width), nn.ReLU())
        self.outputs = [width * 2**i * (4 if depth == 50 else 1) for i in range(4)]
        self.inputs = [width, *self.outputs[:-1]]
        self.final_bn = nn.GroupNorm(1, self.outputs[-1])
        self.fc = nn.Linear(self.outputs[-1], classes)

    def stage(self, i: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(4):
            x = self.stage(i, x)
        return self.fc(self.final_bn(x).relu().mean((2, 3)))


class IEResNet(SkipNet):
    """IE-ResNet: conv2, conv4, conv6, conv8 begin the stages, conv3, conv5, conv7, conv9 are their other blocks."""

    def __init__(
        self,
        depth: int,
        width: int,
        classes: int,
        steps: int,
        step_size: float,
        theta: float = 1.0,
        follow: str = "code",
    ) -> None:
        super().__init__(depth, width, classes)
        self.steps, self.step_size, self.theta, self.follow = steps, step_size, theta, follow
        for i, (inputs, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            first, rest = 2 * i + 2, 2 * i + 3
            stride = 1 if i == 0 else 2
            setattr(self, f"conv{first}", ie_branch(depth, inputs, outputs, stride))
            if inputs != outputs:
                setattr(self, f"d{first}", pre_activation(unbiased(inputs, outputs, 3, stride)))
            else:
                setattr(self, f"conv{first}_d", self.copies(outputs))
            count = BLOCKS[depth][i] - 1
            if depth == 18:
                setattr(self, f"conv{rest}", ie_branch(depth, outputs, outputs))
                setattr(self, f"conv{rest}_d", self.copies(outputs))
            else:
                branches = (ie_branch(depth, outputs, outputs) for _ in range(count))
                setattr(self, f"conv{rest}", nn.ModuleList(branches))
                setattr(self, f"conv{rest}_d", nn.ModuleList(self.copies(outputs) for _ in range(count)))

    def copies(self, channels: int) -> nn.ModuleList:
        return nn.ModuleList(ie_branch(self.depth, channels, channels) for _ in range(self.steps))

    def stage(self, i: int, x: Tensor) -> Tensor:
        first, rest = f"conv{2 * i + 2}", f"conv{2 * i + 3}"
        shortcut = getattr(self, f"d{2 * i + 2}", None)
        if shortcut is not None:
            x = getattr(self, first)(x) + shortcut(x)
        else:
            x = self.skip(getattr(self, first), getattr(self, f"{first}_d"), x, -1.0)
        branches, copies = getattr(self, rest), getattr(self, f"{rest}_d")
        if self.depth == 18:
            branches, copies = [branches], [copies]
        for branch, inner in zip(branches, copies, strict=True):
            x = self.skip(branch, inner, x, 1.0 if i == 3 and self.follow == "code" else -1.0)
        return x

    def skip(self, branch: nn.Sequential, copies: nn.ModuleList, x: Tensor, sign: float) -> Tensor:
        exact, slope = self.follow == "paper", branch(x)
        y = x + slope
        for copy in copies:
            with torch.enable_grad():
                inner = point = y if exact else y.detach().requires_grad_()
                for n, layer in enumerate(copy):  # of a copy, only a third unit is looked at
                    inner = (branch[n] if n < 6 or exact else layer)(inner)
                distance = point - x - (1 - self.theta) * slope + sign * self.theta * inner
                squared = distance.square().sum()
                (gradient,) = torch.autograd.grad(squared, point, create_graph=exact, retain_graph=True)
            y = y - self.step_size * gradient
        return y


class PreactBlock(nn.Module):
    def __init__(self, depth: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual_function = ie_branch(depth, inputs, outputs, stride)
        changes = stride != 1 or inputs != outputs
        self.shortcut = pre_activation(unbiased(inputs, outputs, 3, stride)) if changes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual_function(x)


class PreactResNet(SkipNet):
    """The ResNets beside IE-ResNet."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__(depth, width, classes)
        for i, (inputs, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            blocks = [PreactBlock(depth, inputs, outputs, 1 if i == 0 else 2)]
            blocks += [PreactBlock(depth, outputs, outputs, 1) for _ in range(BLOCKS[depth][i] - 1)]
            setattr(self, f"conv{i + 2}_x", nn.Sequential(*blocks))

    def stage(self, i: int, x: Tensor) -> Tensor:
        return getattr(self, f"conv{i + 2}_x")(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(min(32, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
}


class SSPBranch(nn.Module):
    """Norm, ReLU, convolution twice; each layer by its name, and all as a sequence."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int = 1, sequence: str = "residual") -> None:
        super().__init__()
        self.n1, self.n2 = NORMS[norm](inputs), NORMS[norm](outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        layers = (self.n1, nn.ReLU(), self.conv1, self.n2, nn.ReLU(), self.conv2)
        setattr(self, sequence, nn.Sequential(*layers))
        self.sequence = sequence

    def slope(self, x: Tensor) -> Tensor:
        return getattr(self, self.sequence)(x)


class Residual(SSPBranch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.slope(x)


class Expansive(SSPBranch):
    """Its first norm is evaluated by the shortcut, and again by the branch."""

    def __init__(self, inputs: int, norm: str) -> None:
        super().__init__(inputs, 2 * inputs, norm, stride=2)
        self.downsample = nn.Sequential(unbiased(inputs, 2 * inputs, 1, 2), NORMS[norm](2 * inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.n1(x).relu()) + self.slope(x)


class MidpointBlock(SSPBranch):
    def forward(self, x: Tensor) -> Tensor:
        half = x + self.slope(x) / 2
        return half + self.slope(half)


class ArkBlock(SSPBranch):
    """Both stages evaluate f(x) themselves."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__(channels, channels, norm, sequence="f")
        self.a21 = nn.Parameter(torch.tensor(0.25))
        self.b10 = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a21.sigmoid(), self.b10.sigmoid()
        u = x + b * self.slope(x)
        last = 1 / (2 * b)
        return (1 - a) * x + (1 - last - a * b) * self.slope(x) + a * u + last * self.slope(u)


class SSPBlock(nn.Module):
    """Two or three Euler steps of one residual block, each mixed with x."""

    def __init__(self, channels: int, norm: str, weights: Sequence[float]) -> None:
        super().__init__()
        self.block = Residual(channels, channels, norm)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        u = x
        for weight in self.weights:
            u = weight * x + (1 - weight) * self.block(u)
        return u


def ssp_block(kind: str, channels: int, norm: str) -> nn.Module:
    if kind == "ark":
        return ArkBlock(channels, norm)
    if kind == "ssp2":
        return SSPBlock(channels, norm, (0.0, 1 / 2))
    if kind == "ssp3":
        return SSPBlock(channels, norm, (0.0, 3 / 4, 1 / 3))
    return (MidpointBlock if kind == "midpoint" else Residual)(channels, channels, norm)


class SSPNet(nn.Module):
    def __init__(self, kinds: Sequence[str], n: int, width: int, norm: str, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1)
        for i, kind in enumerate(kinds):
            channels = width * 2**i
            setattr(self, f"block{i + 1}", nn.Sequential(*(ssp_block(kind, channels, norm) for _ in range(n))))
            if i < 2:
                setattr(self, f"sub{i + 1}", Expansive(channels, norm))
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for part in ("block1", "sub1", "block2", "sub2", "block3"):
            x = getattr(self, part)(x)
        return self.fc(x.mean((2, 3)))


class SSPNetMnist(nn.Module):
    def __init__(self, kind: str, n: int, width: int, norm: str, classes: int) -> None:
        super().__init__()
        shrink = [nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 4, 2, 1), nn.Conv2d(width, width, 4, 2, 1)]
        between = [layer for _ in range(2) for layer in (NORMS[norm](width), nn.ReLU())]
        self.downsample = nn.Sequential(shrink[0], *between[:2], shrink[1], *between[2:], shrink[2])
        self.blocks = nn.Sequential(*(ssp_block(kind, width, norm) for _ in range(n)))
        last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
        self.linear = nn.Sequential(NORMS[norm](width), nn.ReLU(), *last)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.downsample(x)))
