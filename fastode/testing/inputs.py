"""The feature maps that blocks are compared on, and the same moved by a rounding."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "channels_last", "sliced"]


def sample_input(
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> Tensor:
    """A normally distributed feature map in one of the three memory layouts that a block meets.

    Args:
        batch: N, may be 0.
        channels: C.
        height: H.
        width: W.
        dtype: the map's dtype; the values are drawn in float64 and rounded.
        device: where it lives.
        layout: "contiguous", "channels_last", or "sliced" (every second column of a wider map: dense in neither).
        seed: of the generator; the values do not depend on the layout.

    Returns:
        A tensor [N, C, H, W].

    Example:
        >>> sample_input(2, 3, 4, 5, layout="channels_last").stride()
        (60, 1, 15, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(device, dtype)
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros(batch, channels, height, 2 * width, dtype=dtype, device=device)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


def moved(x: Tensor, seed: int, precision: torch.dtype | None = None) -> Tensor:
    """The tensor with every entry moved up or down by one unit in the last place, at random.

    Args:
        x: any floating-point tensor.
        seed: of the generator.
        precision: the dtype whose unit is meant, where it is coarser than x's own (autocast).

    Returns:
        A tensor of the same shape, dtype and strides; entries that are not finite stay as they are.

    Example:
        >>> bool((moved(torch.ones(8), 0) != 1).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    up = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
    toward = torch.where(up, torch.full_like(x, math.inf), torch.full_like(x, -math.inf))
    if precision is None or precision == x.dtype:
        return torch.where(torch.isfinite(x), torch.nextafter(x, toward), x)
    coarse = x.to(precision)
    shift = torch.nextafter(coarse, toward.to(precision)).to(x.dtype) - coarse.to(x.dtype)
    return torch.where(torch.isfinite(x), x + shift, x)
