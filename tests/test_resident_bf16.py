"""Convolutions in bfloat16 on the resident engine: every kernel size, every way of filling a tile, beside oneDNN's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.testing import Layout, assert_blocks_equal, sample_input

LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
# One block of 16 channels and two, an odd number of them, several of 32; rows of whole tiles, and rows laid end to end.
SHAPES = [(16, 4, 32), (8, 5, 20), (48, 6, 16), (40, 5, 7), (96, 4, 4), (128, 3, 9)]


def branch(channels: int, kernel: tuple[int, int], inner: int) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    torch.manual_seed(5)
    return nn.Sequential(
        nn.GroupNorm(1, channels), nn.Softplus(), nn.Conv2d(channels, inner, kernel, padding=padding),
        nn.GroupNorm(1, inner), nn.Softplus(), nn.Conv2d(inner, channels, kernel, padding=padding),
    ).to(torch.bfloat16)  # fmt: skip


def coupled(channels: int) -> nn.Sequential:
    torch.manual_seed(6)
    units = [(nn.BatchNorm2d(channels), nn.Softplus(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
    return nn.Sequential(*units[0], *units[1])


def fused(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin)
    twin.engine = "resident"
    return twin


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (3, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal(shape: tuple[int, int, int], kernel: tuple[int, int]) -> None:
    x = sample_input(3, *shape, dtype=torch.bfloat16)
    for inner in (shape[0], 20):
        block = reference.IESkip(branch(shape[0], kernel, inner), 1, 0.1)
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("side", [5, 7, 9])
@pytest.mark.parametrize("shape", [(16, 48, 8), (16, 64, 8), (9, 32, 16)], ids=str)
def test_equal_of_more_taps_than_are_summed_at_once(shape: tuple[int, int, int], side: int) -> None:
    samples, channels, size = shape
    x = sample_input(samples, channels, size, size, dtype=torch.bfloat16)
    torch.manual_seed(6)
    conv = nn.Conv2d(channels, channels, side, padding=side // 2)
    block = reference.Chain(conv, nn.Softplus()).to(torch.bfloat16)
    assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("size", [(9, 32), (5, 7), (8, 8), (3, 64)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [(1, 16), (3, 32), (4, 20), (5, 16), (12, 48), (20, 3), (33, 2)], ids=str)
def test_equal_of_few_channels(channels: tuple[int, int], kernel: int, size: tuple[int, int]) -> None:
    """Of which the rest of a vector, or of the pairs of a tap, is padding that is left out."""
    torch.manual_seed(6)
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2)
    block = reference.Chain(conv, nn.BatchNorm2d(channels[1]), nn.Softplus()).to(torch.bfloat16)
    for layout in LAYOUTS:
        assert_blocks_equal(
            block, fused(block), sample_input(3, channels[0], *size, dtype=torch.bfloat16, layout=layout)
        )


@pytest.mark.parametrize("batch", [2, 5])  # samples lie together in the tiles' rows, and are too few for that
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 5, 32), (32, 5, 16), (64, 8, 8), (96, 4, 4), (40, 5, 7)], ids=str)
def test_equal_where_a_norm_couples_the_samples(shape: tuple[int, int, int], layout: Layout, batch: int) -> None:
    x = sample_input(batch, *shape, dtype=torch.bfloat16, layout=layout)
    for scheme in (reference.SSP3, reference.Ark, lambda f: reference.IESkip(f, 2, 0.1)):
        block = scheme(coupled(shape[0])).to(torch.bfloat16)
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("batch", [3, 6, 7, 9, 11, 13, 22, 25])  # of which groups that lie together leave places empty
@pytest.mark.parametrize("size", [4, 8])
def test_equal_for_any_number_of_samples(size: int, batch: int) -> None:
    x = sample_input(batch, 32, size, size, dtype=torch.bfloat16)
    halves = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(1, 32), nn.Softplus(), nn.Conv2d(32, 32, 3, 1, 1))
    torch.manual_seed(5)
    strided = reference.ResBlock(halves, shortcut=nn.Conv2d(32, 32, 1, 2)).to(torch.bfloat16)
    for block in (reference.IESkip(branch(32, (3, 3), 32), 1, 0.1), strided):
        assert_blocks_equal(block, fused(block), x)


def test_a_sample_is_not_changed_by_what_lies_beside_it() -> None:
    block = reference.IESkip(branch(32, (3, 3), 48), 1, 0.1)
    x = sample_input(9, 32, 4, 4, dtype=torch.bfloat16)
    x[4] = torch.nan
    twin = fused(block)
    with torch.no_grad():
        found, alone = twin(x), torch.cat([twin(part) for part in x.split(1)])
    assert torch.equal(found.isnan(), alone.isnan())
    assert torch.equal(found.nan_to_num(), alone.nan_to_num())


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides: outputs as neighbours, or every second of a larger tensor in each way."""
    if layout == "outputs":
        return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "sparse":
        whole = torch.full([2 * side for side in weight.shape], torch.nan, dtype=weight.dtype)
        whole[::2, ::2, ::2, ::2] = weight
        return whole[::2, ::2, ::2, ::2]
    return weight.contiguous(memory_format=torch.channels_last)


def assert_same_bits_in_every_layout(block: reference.Chain, x: Tensor) -> None:
    """Results and gradients of a chain that begins with a convolution, under autocast where weights are float32."""
    weight, found = block[0].weight.detach(), []
    for layout in ("contiguous", "channels_last", "outputs", "sparse"):
        twin = fused(block)
        if layout != "contiguous":
            twin[0].weight = nn.Parameter(laid_out(weight, layout))
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=weight.dtype == torch.float32):
            y = twin(leaf)
        y.float().square().sum().backward()
        found.append([y, leaf.grad, *[parameter.grad for parameter in twin.parameters()]])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (7, 1), (9, 1)])
@pytest.mark.parametrize("channels", [(12, 20), (35, 16), (64, 33)], ids=str)
def test_same_bits_whatever_the_strides_of_the_weights(
    channels: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(7)
    conv = nn.Conv2d(*channels, kernel, stride, kernel // 2)
    block = reference.Chain(conv, nn.GroupNorm(1, channels[1]), nn.Tanh()).to(dtype)
    assert_same_bits_in_every_layout(block, sample_input(2, channels[0], 8, 8, dtype=torch.bfloat16))


def test_same_bits_among_convolutions_of_pytorch() -> None:
    # Both configure the tile registers of the same threads.
    x = sample_input(9, 64, 8, 8, dtype=torch.bfloat16)
    plain = nn.Conv2d(64, 64, 3, padding=1).to(torch.bfloat16)
    twin = fused(reference.SSP3(branch(64, (3, 3), 64)))
    with torch.no_grad():
        ours, theirs = twin(x), plain(x)
        for _ in range(5):
            assert torch.equal(twin(x), ours)
            assert torch.equal(plain(x), theirs)
