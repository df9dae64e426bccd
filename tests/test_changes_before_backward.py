"""A block's gradients of gradients are those of what it was when it was called, whatever has happened to it since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_changes_between_calls import KINDS, units
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastode
from fastode import reference
from fastode.reference.plain import plain_norms
from fastode.testing import compare_tensors, sample_input

Change = Callable[[Any], Any]
ENGINES = ("resident", "staged")


def twins(kind: str, engine: str) -> tuple[nn.Module, nn.Module]:
    plain = KINDS[kind](units()).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    return fused, plain


def assert_same(found: list[Tensor], truth: list[Tensor]) -> None:
    named = [{f"{i}": t.detach() for i, t in enumerate(tensors)} for tensors in (found, truth)]
    comparison = compare_tensors(named[0], named[1], [], 9 * 6 * 30)
    assert comparison.ok, comparison.describe()


def differentiated_twice(y: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """First gradients, and those of the sum of their squares; PyTorch's third derivatives of norms are wrong."""
    first = torch.autograd.grad(y.square().sum(), sources, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), sources, allow_unused=True)
    return [*first, *(t for t in second if t is not None)]


CHANGES: dict[str, Change] = {
    "eval": lambda m: m.eval(),
    "a parameter replaced": lambda m: setattr(m.branch[2], "weight", nn.Parameter(2 * m.branch[2].weight.detach())),
    "a layer swapped": lambda m: m.branch.__setitem__(1, nn.Tanh()),
    "a hook": lambda m: m.branch[1].register_forward_hook(lambda part, given, out: 2 * out),
    "eps set": lambda m: setattr(m.branch[3][0], "eps", 0.5),
    "the branch replaced": lambda m: setattr(m, "branch", nn.Identity()),
}
SETTINGS: dict[str, Change] = {
    "ie": lambda m: setattr(m, "theta", 0.5),
    "ssp3": lambda m: setattr(m, "tableau", fastode.tableau.MIDPOINT),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [*CHANGES, "a setting"])
def test_a_change_before_backward_changes_nothing(change: str, kind: str, engine: str) -> None:
    results = []
    for module in twins(kind, engine):
        x = sample_input(3, 4, 3, 2, dtype=torch.float64).requires_grad_()
        with plain_norms() if module.__class__ in (reference.IESkip, reference.SSP3) else nullcontext():
            y = module(x)
        sources = [x, module.branch[2].weight, module.branch[3][2].weight]
        CHANGES.get(change, SETTINGS[kind])(module)
        results.append(differentiated_twice(y, sources))
    assert_same(*results)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaves", [True, False])
def test_gradients_of_gradients_of_tensors_given_for_one_call(leaves: bool, kind: str, engine: str) -> None:
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    results = []
    for module in twins(kind, engine):
        given = {name: (1.3 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
        used = given if leaves else {name: 1.1 * p for name, p in given.items()}
        with plain_norms() if module.__class__ in (reference.IESkip, reference.SSP3) else nullcontext():
            y = torch.func.functional_call(module, used, (x,))
        results.append(differentiated_twice(y, list(used.values())))
    assert_same(*results)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.eval(),
        lambda f: setattr(f, "gamma", 0.4),
        lambda f: setattr(f, "activation", nn.Tanh()),
        lambda f: setattr(f, "weight", nn.Parameter(2 * f.weight.detach())),
        lambda f: setattr(f.pre_norm_z, "eps", 0.3),
    ],
)
def test_a_change_of_a_skew_pair_before_backward_changes_nothing(change: Change) -> None:
    torch.manual_seed(5)
    field = reference.SkewPair(3, 4, norm="layer", activation="softplus")
    plain = reference.SOBlock(field, solver="midpoint").double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    results = []
    for module in (fused, plain):
        x = sample_input(2, 3, 3, 4, dtype=torch.float64).requires_grad_()
        z, weight = 1.5 * x, module.field.weight
        total = sum(y.sin().sum() for y in (module(x), *module.field(module(x), z)))
        change(module.field)
        module.steps, module.t1 = 3, 0.5
        results.append(differentiated_twice(total, [x, weight]))
    assert_same(*results)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_where_hooks_save_copies(kind: str, engine: str) -> None:
    results = []
    for module in twins(kind, engine):
        module.eval()
        x = sample_input(3, 4, 3, 2, dtype=torch.float64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            y = module(x)
        results.append(differentiated_twice(y, [x, module.branch[2].weight, module.branch[3][0].bias]))
    assert_same(*results)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tangent_of_a_cotangent_is_not_lost(kind: str, engine: str) -> None:
    bar, tangent = (sample_input(3, 4, 3, 2, dtype=torch.float64, seed=seed) for seed in (1, 2))
    results = []
    for module in twins(kind, engine):
        module.branch[3][0] = nn.Identity()  # PyTorch has no tangent of the backward of a group norm
        x = sample_input(3, 4, 3, 2, dtype=torch.float64).requires_grad_()
        y = module.eval()(x)
        with forward_ad.dual_level():
            x_bar = torch.autograd.grad(y, x, forward_ad.make_dual(bar, tangent))[0]
            results.append(list(forward_ad.unpack_dual(x_bar)))
    assert_same(*results)
    assert all(t is not None for result in results for t in result)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_is_left_alone(kind: str, engine: str) -> None:
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    results = []
    for module in twins(kind, engine):
        module.eval()
        for where in ("meta", "cpu"):
            given = x.clone().requires_grad_()
            with torch.device(where):
                y = module(given)
                y.square().sum().backward()
            results.append([y, given.grad])
    assert_same(results[0] + results[1], results[2] + results[3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_array_and_a_class_that_gets_a_forward_are_seen(kind: str) -> None:
    class Chain(nn.Sequential):
        pass

    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    modules = twins(kind, "auto")
    for module in modules:
        module.eval().branch.__class__ = Chain
        module.branch[1].mask = np.zeros(3)
        module(x)
        module.branch[1].mask = np.ones(3)
    assert_same(*([module(x)] for module in modules))
    Chain.forward = lambda self, x: 2 * nn.Sequential.forward(self, x)
    assert_same(*([module(x)] for module in modules))
