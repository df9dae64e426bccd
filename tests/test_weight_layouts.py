"""Weights are packed, and gradients unpacked, alike from every layout in memory; nothing between them is read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.testing import assert_blocks_equal, sample_input


def stored(weight: Tensor, order: tuple[int, ...], step: int = 1) -> Tensor:
    """The weight with its axes stored in this order, every element `step` behind the one before."""
    moved = weight.permute(order)
    room = torch.full((*moved.shape[:-1], (moved.shape[-1] - 1) * step + 1), float("nan"), dtype=weight.dtype)
    room[..., ::step] = moved
    back = [order.index(axis) for axis in range(4)]
    return room[..., ::step].permute(back)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "outputs last": lambda weight: stored(weight, (2, 3, 1, 0)),
    "taps apart": lambda weight: stored(weight, (0, 1, 2, 3), step=2),
    "inputs apart": lambda weight: stored(weight, (2, 3, 0, 1), step=3),
}


def block_of(channels: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Conv2d(channels[1], channels[1], kernel, padding=kernel // 2)
    sides = min(kernel, 3)  # of the convolution that may have a stride
    outer = [nn.Conv2d(*channels, sides, stride, sides // 2, bias=False) for _ in range(2)]
    return reference.ResBlock(nn.Sequential(outer[0], nn.ReLU(), inner), 1.0, outer[1]).to(dtype)


def results(block: nn.Module, x: Tensor) -> list[Tensor]:
    block.engine = "resident"
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2), (5, 1)])
@pytest.mark.parametrize("channels", [(3, 16), (32, 32), (20, 37), (16, 64)])
@pytest.mark.parametrize("size", [(6, 7), (8, 8)], ids=["direct", "winograd"])
def test_every_layout_gives_the_same_bits(
    size: tuple[int, int], channels: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype
) -> None:
    plain = block_of(channels, kernel, stride, dtype)
    twin = copy.deepcopy(plain)
    fastode.fuse(twin)
    twin.engine = "resident"
    # One odd side, or PyTorch's own convolution of few channels may end the process (docs/pytorch-faults.md, 4).
    height, width = (size[0], size[1] - 1 + size[1] % 2) if kernel == 1 else size
    x = sample_input(2, channels[0], height, width, dtype=dtype)
    assert_blocks_equal(plain, twin, x)
    expected = results(twin, x)
    for name, layout in LAYOUTS.items():
        other = copy.deepcopy(twin)
        for module in other.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(layout(module.weight.detach()))
        found = results(other, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
