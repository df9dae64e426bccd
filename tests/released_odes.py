"""The networks of SONet's released code, from what is known of it: its parameters' names, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from released_codes import unbiased
from torch import Tensor, nn
from torch.nn import functional as F
from torchdiffeq import odeint


def eight_groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


class Counted(nn.Module):
    """A field, which counts its calls."""

    nfe: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nfe", torch.tensor(0.0))


class Solved(nn.Module):
    """A field, solved from time 0 to 1 with tolerances of 0.1."""

    def __init__(self, field: nn.Module, solver: str) -> None:
        super().__init__()
        self.odefunc = field
        self.solver = solver

    def solve(self, state: Any) -> Any:
        first = state[0] if isinstance(state, tuple) else state
        times = torch.tensor([0.0, 1.0], dtype=first.dtype)
        return odeint(self.odefunc, state, times, rtol=0.1, atol=0.1, method=self.solver)


class SkewField(Counted):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.kernel = nn.Parameter(torch.zeros(outputs, inputs, stride + 2, stride + 2))
        for name, channels in (("1", outputs), ("2", inputs)):
            setattr(self, f"norm1_{name}", eight_groups(channels))
            setattr(self, f"norm2_{name}", eight_groups(channels))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = self.norm1_1(state[0]), self.norm1_2(state[1])
        ahead = F.leaky_relu(F.conv2d(z, self.kernel, stride=self.stride, padding=1))
        back = F.leaky_relu(-F.conv_transpose2d(y, self.kernel, stride=self.stride, padding=1))
        return self.norm2_1(ahead), self.norm2_2(back)


class SkewBlock(Solved):
    def __init__(self, inputs: int, outputs: int, stride: int, solver: str) -> None:
        super().__init__(SkewField(inputs, outputs, stride), solver)
        self.outputs, self.stride = outputs, stride

    def forward(self, x: Tensor) -> Tensor:
        begin = x[:, :, :: self.stride, :: self.stride]
        channels = torch.arange(self.outputs) % x.shape[1]
        return self.solve((begin[:, channels], x))[0][1]


class LinearField(Counted):
    """Features y and classes z: ẏ = W σ(z) + b, ż = −Wᵀ σ(y) + b'."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, classes))
        self.bias = nn.Parameter(torch.zeros(features + classes))

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        features = self.weight.shape[0]
        y, z = F.leaky_relu(state).tensor_split([features], dim=1)
        return torch.cat((z @ self.weight.t(), -y @ self.weight), 1) + self.bias


class SkewHead(Solved):
    def __init__(self, features: int, classes: int, solver: str) -> None:
        super().__init__(LinearField(features, classes), solver)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(torch.cat((x, x.new_full((len(x), self.classes), 0.1)), 1))[1][:, -self.classes :]


class PostactBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = unbiased(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = unbiased(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        projection = (unbiased(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else ()
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        return (self.shortcut(x) + self.bn2(self.conv2(inner))).relu()


class FourLayers(nn.Module):
    """SONet, SOBlock-ResNet10 and ResNet10, which differ in their first layer, their blocks and their last layer."""

    def __init__(self, kind: str, counts: Sequence[int], width: int, classes: int, solver: str) -> None:
        super().__init__()
        self.conv1 = unbiased(3, width, 3) if kind == "resnet10" else SkewBlock(3, width, 1, solver)
        self.bn1 = nn.BatchNorm2d(width) if kind == "resnet10" else None
        channels = width
        for i, count in enumerate(counts):
            blocks: list[nn.Module] = []
            for j in range(count):
                outputs, stride = width * 2**i, 2 if i > 0 and j == 0 else 1
                block = SkewBlock(channels, outputs, stride, solver) if kind == "sonet" else None
                blocks.append(block or PostactBlock(channels, outputs, stride))
                channels = outputs
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = SkewHead(channels, classes, solver) if kind == "sonet" else nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = self.bn1(x).relu()
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.linear(x.mean((2, 3)))


class TimedConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self._layer = nn.Conv2d(channels + 1, channels, 3, 1, 1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._layer(F.pad(x, (0, 0, 0, 0, 1, 0)) + t * F.pad(torch.zeros_like(x), (0, 0, 0, 0, 1, 0), value=1.0))


class TimedField(Counted):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (eight_groups(channels) for _ in range(3))
        self.conv1, self.conv2 = TimedConvolution(channels), TimedConvolution(channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        x = self.conv1(t, self.norm1(x).relu())
        return self.norm3(self.conv2(t, self.norm2(x).relu()))


class TimedBlock(nn.Module):
    def __init__(self, channels: int, solver: str) -> None:
        super().__init__()
        self.ode_conv = Solved(TimedField(channels), solver)

    def forward(self, x: Tensor) -> Tensor:
        return self.ode_conv.solve(x)[1]


class ODENet(nn.Module):
    def __init__(self, blocks: int, width: int, classes: int, solver: str) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Sequential(*(TimedBlock(width, solver) for _ in range(blocks)))
        self.norm = eight_groups(width)
        self.linear = nn.Linear(9 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x[:, torch.arange(self.width) % 3]))
        return self.linear(F.adaptive_avg_pool2d(x, 3).flatten(1))
