"""The backward of a reversible chain: hooks of parameters, buffers that a branch reads and writes, and tied ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastode
from fastode import reference
from fastode.testing import sample_input

F64 = torch.float64
Pair = tuple[reference.RevSequence, reference.RevSequence]


def unit(channels: int = 4) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1))


def pair(make: Callable[[], nn.Module], blocks: int = 3) -> Pair:
    """A chain of these branches, and its fused copy."""
    torch.manual_seed(0)
    plain = reference.RevSequence(*(reference.RevBlock(make(), make()) for _ in range(blocks))).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    return plain, fused


def nested() -> nn.Module:
    return reference.RevSequence(reference.RevBlock(unit(2), unit(2)), reference.RevBlock(unit(2), unit(2)))


def image() -> Tensor:
    return sample_input(2, 8, 6, 5, dtype=F64)


def assert_equal_steps(pair: Pair, backward: Callable[[nn.Module, Tensor], None] | None = None) -> None:
    """Gradients and buffers after a step are the reference's."""
    for block in pair:
        y = block(image()).square().sum()
        y.backward() if backward is None else backward(block, y)
    plain, fused = pair
    named = dict(fused.named_parameters())
    assert any(p.grad is not None for p in named.values())
    for name, p in plain.named_parameters():
        wanted, found = p.grad, named[name].grad
        assert (wanted is None) == (found is None), name
        if wanted is not None and found is not None:
            # A bias before a norm has no gradient but for rounding.
            assert torch.allclose(wanted, found, rtol=1e-9, atol=1e-9 * float(1 + wanted.abs().max())), name
    for buffer, own in zip(plain.buffers(), fused.buffers(), strict=True):
        assert torch.allclose(buffer, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [unit, nested])
def test_a_hook_of_a_parameter_runs_once_on_the_whole_gradient(make: Callable[[], nn.Module]) -> None:
    blocks = pair(make)
    met: list[list[Tensor]] = [[], []]
    for block, seen in zip(blocks, met, strict=True):

        def halve(grad: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(grad)
            return 0.5 * grad

        for p in block.parameters():
            p.register_hook(halve)
    assert_equal_steps(blocks)
    assert [len(seen) for seen in met] == [len(list(block.parameters())) for block in blocks]
    assert type(blocks[1](image()).grad_fn).__name__ == "_ChainBackward"


def test_a_hook_of_a_shared_parameter_meets_the_sum() -> None:
    shared = unit()
    blocks = pair(lambda: shared)
    met: list[Any] = []
    for block in blocks:
        block[0].f[2].weight.register_hook(lambda grad: met.append(grad.clone()))
    assert_equal_steps(blocks)
    assert len(met) == 2 and torch.allclose(*met, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_of_many_gradients_run_once(mode: Any) -> None:
    blocks, calls = pair(unit), []
    for block in blocks:
        register_multi_grad_hook(list(block.parameters()), lambda grads: calls.append(grads), mode=mode)
    assert_equal_steps(blocks)
    assert len(calls) == 2


@pytest.mark.parametrize("frozen", ["f", "all"])
def test_parameters_may_be_frozen_between_forward_and_backward(frozen: str) -> None:
    blocks, grads = pair(unit), []
    for block in blocks:
        x = image().requires_grad_()
        y = block(x).square().sum()
        for name, p in block.named_parameters():
            p.requires_grad_(frozen != "all" and f".{frozen}." not in name)
        y.backward()
        grads.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    for wanted, found in zip(*grads, strict=True):
        assert torch.allclose(wanted, found, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in blocks[1].parameters() if not p.requires_grad)


class Counting(nn.Module):
    """A map by how often it was evaluated."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return torch.tanh(self.conv(x)) / self.count.clone()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Tanh(), spectral_norm(nn.Conv2d(4, 4, 3, padding=1)))


@pytest.mark.parametrize("make", [Counting, normalised])
@pytest.mark.parametrize("twice", [False, True])
def test_a_branch_is_evaluated_again_with_the_buffers_of_its_call(make: Callable[[], nn.Module], twice: bool) -> None:
    def backward(block: nn.Module, y: Tensor) -> None:
        block(image())  # buffers go on
        y.backward(retain_graph=twice)
        if twice:
            y.backward()

    assert_equal_steps(pair(make), backward)


@pytest.mark.parametrize("make", [Counting, unit])
def test_buffers_may_be_shared_by_branches_and_within_one(make: Callable[[], nn.Module]) -> None:
    first = make()
    assert_equal_steps(pair(lambda: nn.Sequential(first, nn.Tanh(), first)))


def test_under_cached_parametrizations_a_chain_runs_as_the_reference() -> None:
    def step(block: nn.Module, _: Tensor) -> None:
        block.zero_grad()
        with parametrize.cached():
            block(image()).square().sum().backward()

    assert_equal_steps(pair(lambda: nn.Sequential(nn.Tanh(), weight_norm(nn.Conv2d(4, 4, 1)))), step)
