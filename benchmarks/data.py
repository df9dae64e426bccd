"""Real inputs: 32x32 patches of the two photographs that ship inside scikit-learn, and feature maps made from them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastode.recipes.data import sample_photographs

PATCH = 32


@functools.cache
def _patches() -> tuple[Tensor, Tensor, str]:
    """All patches on a grid of step 32, the photographs alternating: values, photograph index, where they come from."""
    try:
        photographs = sample_photographs()
        source = "photographs (scikit-learn sample images)"
    except ImportError:
        photographs = [_generated(seed) for seed in (0, 1)]
        source = "generated images (scikit-learn or pillow is not installed)"
    cut = []
    for photograph in photographs:
        pixels = photograph.float() / 255  # [3, height, width]
        windows = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, rows, columns, 32, 32]
        cut.append(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH))
    count = min(len(patches) for patches in cut)
    patches = torch.stack([part[:count] for part in cut], 1).reshape(-1, 3, PATCH, PATCH)
    labels = torch.arange(len(cut)).repeat(count)
    mean, deviation = patches.mean((0, 2, 3), keepdim=True), patches.std((0, 2, 3), keepdim=True)
    return (patches - mean) / deviation, labels, source


def _generated(seed: int) -> Tensor:
    """An image of the photographs' size with their falling spectrum: noise of several scales, added up."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, 427, 640)
    for scale in (1, 4, 16, 64):
        noise = torch.randn(1, 3, 427 // scale + 2, 640 // scale + 2, generator=generator)
        total += scale**0.5 * F.interpolate(noise, size=(427, 640), mode="bilinear", align_corners=False)
    low, high = total.min(), total.max()
    return (255 * (total - low) / (high - low)).to(torch.uint8)[0]


def source() -> str:
    """Where the inputs come from, in words."""
    return _patches()[2]


def images(batch: int) -> Tensor:
    """The first patches of the two photographs, alternating, each colour with mean 0 and deviation 1.

    Args:
        batch: N, at most 520.

    Returns:
        float32 [N, 3, 32, 32], the same values on every call and every machine.

    Example:
        >>> images(4).shape
        torch.Size([4, 3, 32, 32])
    """
    patches = _patches()[0]
    if batch > len(patches):
        raise ValueError(f"batch must be at most {len(patches)}, got {batch}")
    return patches[:batch].clone()


def labels(batch: int) -> Tensor:
    """The photograph each patch was cut from: int64 [N], zeros and ones."""
    return _patches()[1][:batch].clone()


def feature_maps(batch: int, channels: int, size: int) -> Tensor:
    """The patches lifted to a block's shape: one fixed random 3x3 convolution, then averages over windows.

    Args:
        batch: N.
        channels: C; 3 gives the patches' own colours.
        size: H = W, a divisor of 32.

    Returns:
        float32 [N, C, H, W] with mean 0 and deviation 1 over all entries.

    Example:
        >>> feature_maps(2, 16, 8).shape
        torch.Size([2, 16, 8, 8])
    """
    maps = images(batch)
    if channels != 3:
        generator = torch.Generator().manual_seed(channels)
        maps = F.conv2d(maps, torch.randn(channels, 3, 3, 3, generator=generator) / 27**0.5, padding=1)
    maps = F.avg_pool2d(maps, PATCH // size)
    return (maps - maps.mean()) / maps.std()
