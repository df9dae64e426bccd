"""Blocks that are left to PyTorch, called as its functions: the reference's bits, and only where nobody looks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastode
from fastode import reference
from fastode.dispatch import bare, choice
from fastode.dispatch.engines import REFERENCE
from fastode.ops.engine import Engine
from fastode.testing import sample_input


def left_block(activation: type[nn.Module] = nn.ReLU, strided: bool = True) -> reference.ResBlock:
    """A block that "auto" leaves to PyTorch at a batch of few samples: of wide maps, with batch norms."""
    torch.manual_seed(0)
    first = nn.Conv2d(128, 128, 3, 2 if strided else 1, 1, bias=False)
    inner = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128))
    branch = nn.Sequential(first, nn.BatchNorm2d(128), activation(), inner)
    shortcut = nn.Sequential(nn.Conv2d(128, 128, 1, stride=2), nn.BatchNorm2d(128)) if strided else None
    return reference.ResBlock(branch, 0.5, shortcut, activation())


def pair(block: nn.Module, train: bool = True) -> tuple[nn.Module, nn.Module]:
    """The fused block and its reference."""
    fused = copy.deepcopy(block)
    fastode.fuse(fused)
    return fused.train(train), block.train(train)


def same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """That two calls give the same bits: results, gradients of all, buffers."""
    results = []
    for block in (fused, plain):
        given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = block(given)
        gradients = torch.autograd.grad(y.square().sum(), [given, *block.parameters()])
        results.append([y, *gradients, *block.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a block was called as functions; a scheme's, how often its branch was."""
    calls: list[int] = []

    def count(name: str) -> None:
        real = getattr(bare, name)

        def counting(*arguments: Any) -> Any:
            function = real(*arguments)

            def run(*inputs: Tensor) -> Any:
                calls.append(1)
                return function(*inputs)

            return None if function is None else run

        monkeypatch.setattr(bare, name, counting)

    for name in ("block_of", "sequence_of", "branch_of", "pair_of"):
        count(name)
    return calls


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has "auto" leave every call to PyTorch."""
    real = choice.choose

    def choose(*arguments: Any) -> Engine:
        real(*arguments)
        return REFERENCE

    monkeypatch.setattr(choice, "choose", choose)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
}


def branch(norm: Callable[[], nn.Module]) -> nn.Module:
    """A pre-activation branch of two units."""
    unit = [nn.Sequential(norm(), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)]
    return nn.Sequential(*unit)


def stem(norm: Callable[[], nn.Module]) -> list[nn.Module]:
    """A convolution of stride 2, a norm and an activation."""
    return [nn.Conv2d(4, 4, 3, 2, 1, bias=False), norm(), nn.ReLU()]


# How each block is made, and how many calls of functions one of its is.
BLOCKS: dict[str, tuple[Callable[[Callable[[], nn.Module]], nn.Module], int]] = {
    "Chain": (lambda norm: reference.Chain(*stem(norm)), 1),
    "Chain with a head": (lambda norm: reference.Chain(*stem(norm), nn.Upsample(scale_factor=2.0)), 1),
    "Chain into a block": (lambda norm: reference.Chain(*stem(norm), reference.ResBlock(branch(norm))), 2),
    "ResBlock": (lambda norm: reference.ResBlock(branch(norm), 0.3), 1),
    "SSP2": (lambda norm: reference.SSP2(branch(norm)), 2),
    "SSP3": (lambda norm: reference.SSP3(branch(norm)), 3),
    "Midpoint": (lambda norm: reference.Midpoint(branch(norm)), 2),
    "PolyBlock": (lambda norm: reference.PolyBlock(branch(norm)), 2),
}


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("size", [(1, 4, 6), (2, 4, 4), (3, 1, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_the_bits_of_its_reference(
    counted: list[int], name: str, norm: str, layout: torch.memory_format, size: tuple[int, int, int]
) -> None:
    make, calls = BLOCKS[name]
    torch.manual_seed(0)
    block = make(NORMS[norm])
    x = sample_input(size[0], 4, *size[1:], dtype=torch.float32, seed=1).to(memory_format=layout)
    for train in (True, False):
        fused, plain = pair(block, train)
        for lower in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                same(fused, plain, x)
                with torch.no_grad():
                    assert torch.equal(fused(x), plain(x))
    assert len(counted) == 8 * calls


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_a_skew_pair_has_the_bits_of_its_reference(
    counted: list[int], norm: str, layout: torch.memory_format, stride: int
) -> None:
    torch.manual_seed(0)
    fused, plain = pair(reference.SkewPair(4, 4, stride, 0.1, norm=norm))
    for samples in (1, 2):
        x = sample_input(samples, 4, 4, 6, dtype=torch.float32, seed=1).to(memory_format=layout)
        found = []
        for each in (fused, plain):
            state = [part.detach().clone().requires_grad_() for part in plain.initial_state(x)]
            slopes = each(*state)
            total = sum(slope.square().sum() for slope in slopes)
            found.append([*slopes, *torch.autograd.grad(total, [*state, *each.parameters()]), *each.buffers()])
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))
    assert len(counted) == 2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 8, 8), (3, 2, 1), (1, 7, 9)])
@pytest.mark.parametrize("strided", [True, False])
def test_same_bits_as_the_reference(
    counted: list[int], strided: bool, size: tuple[int, int, int], layout: torch.memory_format, train: bool
) -> None:
    fused, plain = pair(left_block(strided=strided), train)
    x = sample_input(size[0], 128, *size[1:], dtype=torch.float32, seed=1).to(memory_format=layout)
    with choice.recording() as used:
        for _ in range(3):
            same(fused, plain, x)
    assert {*used.values()} == {"reference"} and len(counted) == 3


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 3, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(4, 128), lambda: nn.GroupNorm(2, 128, affine=False), nn.Identity]
)
def test_other_norms(
    counted: list[int], norm: Callable[[], nn.Module], layout: torch.memory_format, size: tuple[int, int, int]
) -> None:
    block = left_block()
    block.branch[1], block.shortcut[1] = norm(), norm()
    fused, plain = pair(block)
    x = sample_input(size[0], 128, *size[1:], dtype=torch.float32, seed=1).to(memory_format=layout)
    same(fused, plain, x)
    found = []
    for each in (fused, plain):  # where PyTorch's group norm is at fault: the gradient of no input
        y = each(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*each.parameters()])])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))
    assert len(counted) == 2


@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU, nn.GELU])
def test_other_activations(counted: list[int], activation: type[nn.Module]) -> None:
    fused, plain = pair(left_block(activation))
    same(fused, plain, sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1))
    assert len(counted) == 1


def test_changes_are_seen(counted: list[int]) -> None:
    fused, plain = pair(left_block())
    x = sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1)
    same(fused, plain, x)
    for change in (
        lambda block: setattr(block, "step_size", 0.25),
        lambda block: setattr(block.branch[0], "weight", nn.Parameter(torch.full_like(block.branch[0].weight, 0.01))),
        lambda block: setattr(block.branch[1], "momentum", None),
        lambda block: setattr(block.shortcut[1], "momentum", 0.7),
        lambda block: setattr(block.branch[1], "momentum", 0.5),
        lambda block: block.eval(),
        lambda block: block.branch[1].weight.data.mul_(2.0),
        lambda block: block.branch.add_module("5", nn.Tanh()),
    ):
        change(fused)
        change(plain)
        same(fused, plain, x)
    assert len(counted) == 7  # a norm whose momentum is None is called, in two of nine calls


def test_hooks_see_every_module(counted: list[int]) -> None:
    fused, _ = pair(left_block())
    x, seen = sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1), []
    fused(x)
    handle = fused.branch[1].register_forward_hook(lambda module, given, y: seen.append(y))
    fused(x)
    assert len(seen) == 1 and len(counted) == 1
    handle.remove()
    fused.shortcut.register_forward_pre_hook(lambda module, given: seen.append(given))
    fused(x)
    assert len(seen) == 2 and len(counted) == 1


def test_who_looks_at_functions_sees_those_of_the_modules(counted: list[int]) -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    fused, _ = pair(left_block())
    x = sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1)
    fused(x)
    with Names() as mode:
        fused(x)
    assert len(counted) == 1 and {"batch_norm", "relu", "conv2d"} <= {*mode.names}


def test_the_reference_by_name_and_traced_calls_are_its_own(counted: list[int]) -> None:
    block = left_block().eval()
    x = sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1)
    named = copy.deepcopy(block)
    fastode.fuse(named, engine="reference")
    assert torch.equal(named(x), block(x))
    fused, _ = pair(block, False)
    fused(x)
    graph = torch.jit.trace(fused, x, check_trace=False)
    assert torch.equal(graph(x), block(x))
    assert len(counted) == 1


def test_other_norms_and_layers_that_work_in_place_are_called(counted: list[int]) -> None:
    x = sample_input(1, 128, 8, 8, dtype=torch.float32, seed=1)
    block = left_block()
    block.branch[2] = nn.ReLU(inplace=True)
    same(*pair(block), x)
    block = left_block()
    block.shortcut[1] = nn.BatchNorm2d(128, track_running_stats=False)
    same(*pair(block), x)
    assert not counted


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize(
    ("norm", "change", "modes"),
    [
        (nn.BatchNorm2d(4), lambda layer: setattr(layer, "track_running_stats", False), {True: 0, False: 2}),
        (nn.BatchNorm2d(4), lambda layer: delattr(layer, "num_batches_tracked"), {False: 0}),
        (
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            lambda layer: setattr(layer, "track_running_stats", False),
            {True: 0, False: 0},
        ),
    ],
)
def test_norms_whose_state_was_changed_by_hand(
    counted: list[int], norm: nn.Module, change: Callable[[nn.Module], None], modes: dict[bool, int]
) -> None:
    change(norm)
    block = reference.SSP2(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    x = sample_input(2, 4, 6, 6, dtype=torch.float32, seed=1)
    for train, calls in modes.items():
        same(*pair(block, train), x)
        assert len(counted) == calls
        counted.clear()


class Labelled(Tensor):
    """A tensor whose class takes part in every function's call."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


names: list[str] = []


@pytest.mark.usefixtures("left")
def test_tensors_of_other_classes_meet_the_modules_functions(counted: list[int]) -> None:
    x = sample_input(2, 4, 6, 6, dtype=torch.float32, seed=1)
    for block in (reference.ResBlock(branch(NORMS["batch"])), reference.Chain(*stem(NORMS["batch"]))):
        fused, plain = pair(block)
        found = []
        for each in (fused, plain):
            names.clear()
            each(x.as_subclass(Labelled))
            found.append([name for name in names if name in ("batch_norm", "conv2d", "relu", "silu")])
        assert found[0] == found[1] and found[0]
    skew, plain_skew = pair(reference.SkewPair(4, 4, 1, 0.1, norm="batch"))
    assert torch.equal(skew(x.as_subclass(Labelled), x)[0], plain_skew(x, x)[0])
    assert not counted


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("activation", bare._ACTIVATIONS)
def test_a_branch_of_one_activation_is_not_held_by_what_is_kept_of_it(
    counted: list[int], activation: type[nn.Module]
) -> None:
    fused, plain = pair(reference.SSP2(activation()))
    x = sample_input(1, 4, 6, 6, dtype=torch.float32, seed=1)
    same(fused, plain, x)
    assert len(counted) == 2
    gc.collect()
    gc.disable()
    try:
        held = weakref.ref(fused.branch)
        del fused
        assert held() is None
    finally:
        gc.enable()
