"""Convolutions by Winograd's filtering (csrc/cpu/resident/winograd.h), in float32 and, without AMX, in bfloat16.

In bfloat16 those of stride 2 are filtered, too.

They are equal at every size and layout, forwards and backwards, and no less local than direct sums where values are not
finite.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_resident import fused
from test_resident_bf16 import assert_same_bits_in_every_layout
from torch import Tensor, nn

from fastode import reference
from fastode.branch.layers import Conv
from fastode.ops.resident import bfloat16
from fastode.tableau import EULER
from fastode.testing import assert_blocks_equal, compare_tensors, sample_input

# In channels, inner channels, height, width: whole vectors and parts of them, one vector of outputs and two, maps of
# one row of tiles, of one column, of more tiles than are transformed together, and of an odd side, which is direct, as
# are few samples of small maps. Last, more groups of outputs than are multiplied together, of one vector and of two.
SHAPES = [
    (16, 32, 2, 6), (17, 20, 6, 2), (20, 49, 4, 4), (33, 16, 8, 6), (48, 64, 4, 6), (16, 16, 2, 150), (24, 24, 7, 6),
    (16, 15, 4, 4), (24, 152, 6, 4), (160, 20, 4, 6),
]  # fmt: skip


# In bfloat16, and samples: half a block of inputs and a whole one, one block of outputs and two, rows of an odd number
# of tiles, whose weight gradient is direct, and of more than are summed together, and odd sides, which are direct.
NARROW = [
    (17, 20, 2, 6, 700), (20, 49, 4, 4, 240), (33, 18, 8, 6, 65), (48, 64, 4, 8, 24), (32, 80, 2, 140, 6),
    (24, 24, 7, 6, 13), (64, 32, 8, 8, 14), (18, 40, 16, 12, 13),
]  # fmt: skip

# Of stride 2: whole vectors and parts of them, one row of tiles and several, more tiles than are transformed together,
# and sizes, or samples, that are direct.
HALVED = [
    (17, 20, 4, 8, 300), (40, 64, 16, 16, 9), (64, 48, 8, 32, 7), (20, 72, 12, 8, 30), (32, 32, 4, 136, 20),
    (24, 24, 12, 12, 30), (32, 48, 14, 16, 24), (24, 32, 16, 8, 2),
]  # fmt: skip


def convolutions(channels: int, inner: int, *, norm: bool) -> nn.Sequential:
    """Two convolutions with a norm of each sample, or nothing, and Softplus in front of each."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for ins, outs in ((channels, inner), (inner, channels)):
        layers += [nn.GroupNorm(1, ins)] * norm + [nn.Softplus(), nn.Conv2d(ins, outs, 3, padding=1)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("samples", [1, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_at_every_size(shape: tuple[int, int, int, int], samples: int) -> None:
    channels, inner, height, width = shape
    x = sample_input(samples, channels, height, width)
    for block in (
        reference.SSP2(convolutions(channels, inner, norm=True)),
        reference.IESkip(convolutions(channels, inner, norm=False), 1, 0.1),
    ):
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("lowered", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_equal_at_every_size_in_bfloat16(shape: tuple[int, int, int, int, int], lowered: bool) -> None:
    channels, inner, height, width, samples = shape
    dtype = torch.float32 if lowered else torch.bfloat16
    x = sample_input(samples, channels, height, width, dtype=dtype)
    for block in (
        reference.SSP2(convolutions(channels, inner, norm=True)),
        reference.IESkip(convolutions(channels, inner, norm=False), 1, 0.1),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            assert_blocks_equal(block.to(dtype), fused(block), x)


def halving(channels: int, inner: int) -> nn.Module:
    """A block whose first convolution has stride 2, of maps that nothing is added to."""
    torch.manual_seed(3)
    branch = nn.Sequential(
        *(nn.Conv2d(channels, inner, 3, 2, 1), nn.GroupNorm(1, inner), nn.Softplus()),
        nn.Conv2d(inner, inner, 3, padding=1),
    )
    return reference.ResBlock(branch, shortcut=nn.Conv2d(channels, inner, 1, 2), post_activation=nn.Softplus())


@pytest.mark.parametrize("lowered", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("shape", HALVED, ids=str)
def test_equal_at_every_size_of_stride_2(shape: tuple[int, int, int, int, int], lowered: bool) -> None:
    channels, inner, height, width, samples = shape
    dtype = torch.float32 if lowered else torch.bfloat16
    x = sample_input(samples, channels, height, width, dtype=dtype)
    block = halving(channels, inner).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.pairs
def test_what_of_stride_2_is_filtered() -> None:
    """Other sums make other bits: of two samples among forty, and alone."""
    torch.manual_seed(6)
    for side, filtered in ((16, True), (14, False)):
        twin = fused(reference.Chain(nn.Conv2d(32, 48, 3, 2, 1), nn.LeakyReLU(1.0)).to(torch.bfloat16))
        x = sample_input(40, 32, side, side, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(twin(x)[:2], twin(x[:2])) != filtered


@pytest.mark.pairs
def test_many_tiles_are_filtered_and_few_are_not() -> None:
    torch.manual_seed(6)
    block = reference.Chain(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3, padding=1))
    twin = fused(block.to(torch.bfloat16))
    x = sample_input(64, 32, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, half, few = twin(x), twin(x[:32]), twin(x[:2])
    assert torch.equal(whole[:32], half) and not torch.equal(half[:2], few)
    assert (half[:2].float() - few.float()).norm() <= torch.finfo(torch.bfloat16).eps * few.float().norm()


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [(24, 40, 6, 8), (32, 24, 8, 8), (40, 48, 12, 4), (80, 72, 8, 4)], ids=str)
def test_the_rule_of_choice_knows_what_is_filtered(shape: tuple[int, int, int, int]) -> None:
    """Other sums make other bits: of the same sample among as many as the rule knows to be filtered, and one fewer."""
    channels, inner, height, width = shape
    torch.manual_seed(9)
    block = reference.Chain(nn.Conv2d(channels, inner, 3, padding=1), nn.LeakyReLU(1.0)).to(torch.bfloat16)
    twin, conv = fused(block), Conv(channels, inner, (3, 3), (1, 1), (1, 1), 1)
    least = next(n for n in range(1, 500) if bfloat16.is_filtered(conv, height, width, n))
    x = sample_input(least + 1, channels, height, width, dtype=torch.bfloat16)
    with torch.no_grad():
        more, enough, fewer = (twin(x[: least + k])[: least - 1] for k in (1, 0, -1))
    assert torch.equal(more, enough) and not torch.equal(enough, fewer)


@pytest.mark.parametrize("samples", [1, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_skew_pairs_are_equal_at_every_size(shape: tuple[int, int, int, int], samples: int) -> None:
    ins, outs, height, width = shape
    torch.manual_seed(4)
    y, z = sample_input(samples, outs, height, width), sample_input(samples, ins, height, width, seed=1)
    for gamma, norm in ((0.0, "none"), (0.3, "layer")):
        pair = reference.SkewPair(ins, outs, gamma=gamma, activation="softplus", norm=norm)
        assert_blocks_equal(pair, fused(pair), (y, z))
        block = reference.SOBlock(pair, solver="midpoint", t1=0.8)
        assert_blocks_equal(block, fused(block), z)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.pairs)], ids=str)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("channels", [16, 32, 40])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 7), (1, 4)])
def test_what_is_not_finite_stays_where_it_is(
    place: tuple[int, int], channels: int, value: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    block = reference.ShuOsher(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), EULER).to(dtype)
    x = sample_input(2 if dtype == torch.float32 else 20, channels, 6, 8, dtype=dtype)
    x[1, channels // 3, place[0], place[1]] = value
    with torch.no_grad():
        expected, found, truth = block(x), fused(block)(x), copy.deepcopy(block).double()(x.double())
    near = torch.zeros(6, 8, dtype=torch.bool)
    near[max(0, place[0] - 1) : place[0] + 2, max(0, place[1] - 1) : place[1] + 2] = True
    assert torch.isfinite(found[0]).all() and torch.isfinite(found[1][:, ~near]).all()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    calm = torch.isfinite(expected) & (expected.abs() < 1e30)
    comparison = compare_tensors({"y": found[calm]}, {"y": truth[calm]}, [{"y": expected[calm]}], 9 * channels)
    assert comparison.ok, comparison.describe()


@pytest.mark.pairs
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 7), (1, 4)])
def test_what_is_not_finite_stays_where_it_is_of_stride_2(place: tuple[int, int], value: float) -> None:
    """Forwards at an input, in the pull-back at a cotangent."""
    torch.manual_seed(5)
    block = reference.Chain(nn.Conv2d(40, 48, 3, 2, 1, bias=False), nn.LeakyReLU(1.0)).to(torch.bfloat16)
    samples, y, x = 24, *place
    inputs = sample_input(samples, 40, 16, 16, dtype=torch.bfloat16)
    cotangents = sample_input(samples, 48, 8, 8, dtype=torch.bfloat16)

    def results(block: nn.Module, at: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.clone().requires_grad_()
        result = block(leaf)
        return result.detach(), torch.autograd.grad(result, leaf, bar)[0]

    fused_block = fused(block)
    calm = results(fused_block, inputs, cotangents)
    inputs[1, 13, 2 * y + 1, 2 * x + 1] = cotangents[1, 13, y, x] = value
    found, expected = results(fused_block, inputs, cotangents), results(block, inputs, cotangents)
    # Where the inputs, or the cotangents, that a number is made of are all finite it has stayed as it was.
    near = [torch.zeros(side, side, dtype=torch.bool) for side in (8, 16)]
    near[0][y : y + 2, x : x + 2] = True
    near[1][max(0, 2 * y - 1) : 2 * y + 2, max(0, 2 * x - 1) : 2 * x + 2] = True
    for ours, theirs, before, here in zip(found, expected, calm, near, strict=True):
        assert torch.isfinite(ours[0]).all() and torch.isfinite(ours[1][:, ~here]).all()
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
        away = (ours[1][:, ~here].float() - before[1][:, ~here].float()).norm()
        assert away <= torch.finfo(torch.bfloat16).eps * before[1].float().norm()


@pytest.mark.pairs
@pytest.mark.parametrize("stride", [1, 2])
def test_small_samples_and_channels_are_as_exact_as_large_ones(stride: int) -> None:
    """In bfloat16 each tile has a scale of its own, and so has each channel of weights, inputs and cotangents."""
    torch.manual_seed(8)
    block = reference.Chain(nn.Conv2d(32, 48, 3, stride, 1, bias=False), nn.LeakyReLU(1.0))  # no kink
    with torch.no_grad():
        block[0].weight.mul_(10.0 ** -(torch.arange(48) % 4 * 3.0)[:, None, None, None])
    block.to(torch.bfloat16)
    x = torch.randn(24, 32, 12 * stride, 8 * stride) * 10.0 ** -(torch.arange(24) % 5 * 6.0)[:, None, None, None]
    cotangent = torch.randn(24, 48, 12, 8) * 10.0 ** (torch.arange(48) % 3 * 4.0)[:, None, None]

    def results(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.to(torch.bfloat16).to(dtype).requires_grad_()
        y = block(leaf)
        return y, *torch.autograd.grad(y, [leaf, block[0].weight], cotangent.to(torch.bfloat16).to(dtype))

    found, truth = results(fused(block), torch.bfloat16), results(copy.deepcopy(block).double(), torch.float64)
    for ours, true, together in zip(found, truth, [(2, 3), (1, 2, 3), (1, 2, 3)], strict=True):
        error = torch.linalg.vector_norm(ours - true, dim=together) / torch.linalg.vector_norm(true, dim=together)
        assert error.max() <= torch.finfo(torch.bfloat16).eps


@pytest.mark.pairs
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 3), (2, 1)])
def test_small_numbers_beside_large_ones(place: tuple[int, int], stride: int) -> None:
    """One pixel of a tile has numbers 10,000 times as large; what is made of the others is exact to its own size."""
    torch.manual_seed(8)
    block = reference.Chain(nn.Conv2d(32, 48, 3, stride, 1, bias=False), nn.LeakyReLU(1.0)).to(torch.bfloat16)
    x = torch.randn(24, 32, 8 * stride, 8 * stride)
    cotangent = torch.randn(24, 48, 8, 8)
    for at in (x, cotangent):
        at[:, :, place[0], place[1]] *= 1e4

    def results(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(torch.bfloat16).to(dtype).requires_grad_()
        y = block(leaf)
        return y, torch.autograd.grad(y, leaf, cotangent.to(torch.bfloat16).to(dtype))[0]

    found, truth = results(fused(block), torch.bfloat16), results(copy.deepcopy(block).double(), torch.float64)
    for ours, true in zip(found, truth, strict=True):
        error = torch.linalg.vector_norm(ours - true, dim=1) / torch.linalg.vector_norm(true, dim=1)
        assert error.max() <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.pairs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spread", [10, 1000])
def test_channels_of_unlike_size_are_as_exact_as_alike_ones(
    spread: float, stride: int, layout: torch.memory_format
) -> None:
    """As behind batch norms: what a channel of small weights is multiplied with is large, and the reverse."""
    torch.manual_seed(8)
    block = reference.Chain(nn.Conv2d(40, 48, 3, stride, 1, bias=False), nn.LeakyReLU(1.0))
    inputs, outputs = (spread ** -torch.rand(count) for count in (40, 48))
    with torch.no_grad():
        block[0].weight.mul_(inputs[:, None, None]).mul_(outputs[:, None, None, None])
    block.to(torch.bfloat16).to(memory_format=layout)
    x = torch.randn(24, 40, 8 * stride, 8 * stride) / inputs[:, None, None]
    cotangent = torch.randn(24, 48, 8, 8) / outputs[:, None, None]

    def results(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(torch.bfloat16).to(dtype).requires_grad_()
        y = block(leaf)
        return y, torch.autograd.grad(y, leaf, cotangent.to(torch.bfloat16).to(dtype))[0]

    truth = results(copy.deepcopy(block).double(), torch.float64)
    pairs = zip(results(fused(block), torch.bfloat16), results(block, torch.bfloat16), truth, strict=True)
    for found, direct, true in pairs:
        assert (found - true).norm() <= 1.5 * (direct - true).norm()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spread", [1, 1000])
def test_same_bits_whatever_the_strides_of_filtered_weights(spread: float, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    conv = nn.Conv2d(40, 50, 3, stride, 1)
    with torch.no_grad():
        conv.weight.mul_(spread ** -torch.rand(40, 1, 1)).mul_(spread ** -torch.rand(50, 1, 1, 1))
    block = reference.Chain(conv, nn.LeakyReLU(0.5)).to(dtype)
    assert_same_bits_in_every_layout(block, sample_input(24, 40, 8 * stride, 8 * stride, dtype=torch.bfloat16))


@pytest.mark.pairs
@pytest.mark.parametrize("stride", [1, 2])
def test_numbers_whose_differences_are_not_finite(stride: int) -> None:
    torch.manual_seed(8)
    block = reference.Chain(nn.Conv2d(32, 48, 3, stride, 1, bias=False), nn.LeakyReLU(1.0)).to(torch.bfloat16)
    x = sample_input(24, 32, 16, 16, dtype=torch.bfloat16)
    x[:, :, 3, 3:8] = torch.tensor([2e38, -2e38, 2e38, -2e38, 2e38]).to(torch.bfloat16)
    x[:, :, 5, 3:8] = -x[:, :, 3, 3:8]
    with torch.no_grad():
        block[0].weight.mul_(1e-4)
        expected, found = block(x).double(), fused(block)(x).double()
    size = copy.deepcopy(block).double()
    with torch.no_grad():
        size[0].weight.abs_()
        size = size(x.double().abs())  # of the terms
    assert ((found - expected).abs() <= 2 * torch.finfo(torch.bfloat16).eps * size).all()


@pytest.mark.parametrize("side", [4, 16])
def test_about_as_exact_as_direct_sums(side: int) -> None:
    """Over many values its errors' root mean square is at most what the rule allows a block: twice PyTorch's own."""
    torch.manual_seed(7)
    block = reference.ShuOsher(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False)), EULER)
    x, cotangent = torch.randn(8, 64, side, side), torch.randn(8, 64, side, side)

    def results(block: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = block(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *block.parameters()], cotangent.to(dtype))]

    truth = results(copy.deepcopy(block).double(), torch.float64)
    pairs = zip(results(fused(block), torch.float32), results(block, torch.float32), truth, strict=True)
    for found, direct, true in pairs:
        assert (found - true).square().mean().sqrt() <= 2 * (direct - true).square().mean().sqrt()
