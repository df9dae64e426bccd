"""Convolutions by Winograd's filtering (csrc/cpu/resident/winograd.h): equal at every size and layout, forwards and
backwards, and no less local than direct sums where values are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from test_resident import fused
from torch import Tensor, nn

from fastode import reference
from fastode.tableau import EULER
from fastode.testing import assert_blocks_equal, compare_tensors, sample_input

# In channels, inner channels, height, width: whole vectors and parts of them, one vector of outputs and two, maps of
# one row of tiles, of one column, of more tiles than are transformed together, and of an odd side, which is direct, as
# are few samples of small maps.
SHAPES = [
    (16, 32, 2, 6), (17, 20, 6, 2), (20, 49, 4, 4), (33, 16, 8, 6), (48, 64, 4, 6), (16, 16, 2, 70), (24, 24, 7, 6),
    (16, 15, 4, 4),
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


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("channels", [16, 32, 40])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 7), (1, 4)])
def test_what_is_not_finite_stays_where_it_is(place: tuple[int, int], channels: int, value: float) -> None:
    torch.manual_seed(5)
    block = reference.ShuOsher(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), EULER)
    x = sample_input(2, channels, 6, 8)
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
