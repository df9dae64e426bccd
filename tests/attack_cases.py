"""A small network, images and generators that the tests of `fastode.attacks` share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

CLASSES = 5


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(96, CLASSES),
    ).to(dtype)  # fmt: skip


def batch(model: nn.Module, count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images, and the classes that the model takes them for but the first."""
    images = torch.rand(count, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(images).argmax(1)
    labels[0] = (labels[0] + 1) % CLASSES
    return images, labels


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
