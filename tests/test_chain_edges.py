"""Chains out of the ordinary: a layer that comes twice, a single row, a hook behind what is fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch.choice import recording
from fastode.testing import assert_blocks_equal, sample_input

ENGINES = ("staged", "resident")


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_gradients_where_a_layer_comes_twice(engine: str) -> None:
    again = nn.Tanh()
    plain = reference.Chain(again, nn.Conv2d(3, 4, 1), again, nn.Conv2d(4, 2, 1)).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    x = sample_input(2, 3, 4, 5, dtype=torch.float64)
    penalties: list[tuple[Tensor, ...]] = []
    for model in (plain, fused):
        leaf = x.clone().requires_grad_()
        (bar,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(bar.square().sum(), [leaf, model[1].weight, model[3].weight]))
    torch.testing.assert_close(penalties[1], penalties[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_maps_of_a_single_row_or_column_at_stride_2(size: tuple[int, int], engine: str) -> None:
    plain = reference.Chain(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 9, 3, 2, 1), nn.Conv2d(9, 2, 1, 2))
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    assert_blocks_equal(plain, fused, sample_input(2, 3, *size))


@pytest.mark.parametrize("first", [nn.Identity(), nn.Flatten(2), nn.Sequential(), nn.Dropout().eval()])
def test_x_is_left_as_it_is_behind_layers_that_hand_it_on(first: nn.Module) -> None:
    x = sample_input(2, 3, 4, 5)
    before = x.clone()
    for model in (reference.Chain(first, nn.ReLU(inplace=True)), fastode.nn.Chain(first, nn.ReLU(inplace=True))):
        assert torch.equal(model(x).flatten(), before.relu().flatten())
        assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_behind_what_is_fused_leaves_it_its_gradients(engine: str) -> None:
    plain = reference.Chain(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    x = sample_input(2, 3, 4, 5, dtype=torch.float64)
    penalties: list[list[Tensor]] = []
    for model in (plain, fused):
        model[2].register_forward_hook(lambda *_: None)
        model(x).square().sum().backward()
        leaf = x.clone().requires_grad_()
        (bar,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        penalties.append([bar, *torch.autograd.grad(bar.square().sum(), model[0].weight)])
    for found, wanted in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    torch.testing.assert_close(penalties[1], penalties[0])
    with recording() as used:
        fused(x)
    assert used == {fused: engine}


def test_parameters_that_change_their_names_but_not_their_order_are_seen() -> None:
    norm = nn.BatchNorm2d(2)
    plain = reference.ResBlock(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), norm, nn.Tanh())).eval()
    fused = fastode.nn.ResBlock(plain.branch).eval()
    x = sample_input(2, 2, 4, 5)
    fused(x)
    weight, bias = norm.weight, norm.bias
    del norm.weight, norm.bias
    norm.bias, norm.weight = weight, bias
    torch.testing.assert_close(fused(x), plain(x))
