"""The nodes of the skew pair and of its solution: what the Functions give, bit for bit, and what they hold."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import test_attack_gradients as attack
import test_changes_before_backward as changes
import test_resident_skew as skew
import torch
from test_nodes import Features
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import fastode
from fastode import reference
from fastode.native import nodes
from fastode.testing import sample_input

BLOCKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pair": lambda field: field,
    "euler": lambda field: reference.SOBlock(field, solver="euler"),
    "midpoint": lambda field: reference.SOBlock(field, solver="midpoint", steps=2),
}


def block_of(kind: str, norm: str = "group", gamma: float = 0.3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    field = reference.SkewPair(4, 4, norm=norm, gamma=gamma, activation="leaky_relu")
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = BLOCKS[kind](field).to(dtype)
    fastode.fuse(block, engine="resident")
    return block


def inputs_of(kind: str, dtype: torch.dtype = torch.float64, layout: Any = torch.contiguous_format) -> list[Tensor]:
    maps = [sample_input(3, 4, 5, 4, dtype=dtype, seed=seed) for seed in range(2 if kind == "pair" else 1)]
    return [x.to(memory_format=layout).requires_grad_() for x in maps]


def outputs_of(block: nn.Module, inputs: list[Tensor], node: bool = True) -> list[Tensor]:
    found = block(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    for y in outputs:
        name = type(y.grad_fn).__name__
        assert (name == "CppFunction") == node and y.grad_fn.name().startswith("Resident")
    return outputs


def loss_of(outputs: list[Tensor], used: tuple[bool, ...] = (True, True)) -> Tensor:
    return sum((y.square().sum() for y, use in zip(outputs, used, strict=False) if use), torch.zeros(()))


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_same_as_the_function(kind: str, norm: str, gamma: float) -> None:
    block = block_of(kind, norm, gamma)
    twin = copy.deepcopy(block)
    halves = [(True, True), (True, False), (False, True)] if kind == "pair" else [(True,)]
    for layout, used in itertools.product((torch.contiguous_format, torch.channels_last), halves):
        results = []
        for module, without in ((block, False), (twin, True)):
            inputs = inputs_of(kind, layout=layout)
            sources = [*inputs, *module.parameters()]
            if without:
                with nodes.left_out():
                    outputs = outputs_of(module, inputs, node=False)
            else:
                outputs = outputs_of(module, inputs)
            for asked in (sources, inputs[-1:], sources[len(inputs) :], sources):
                found = torch.autograd.grad(loss_of(outputs, used), asked, retain_graph=True, allow_unused=True)
                results.append([*outputs, *found])
        for ours, theirs in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (torch.equal(a, b) and a.stride() == b.stride())


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_compiled_backward(kind: str) -> None:
    for gamma in (0.1, 0.4):
        block, inputs = block_of(kind, gamma=gamma), inputs_of(kind)
        sources = [*inputs, *block.parameters()]
        expected = torch.autograd.grad(loss_of(outputs_of(block, inputs)), sources, allow_unused=True)
        loss = loss_of(outputs_of(block, inputs))
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([x.grad for x in sources], list(expected))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_write_is_refused_and_a_second_backward_too(kind: str) -> None:
    block, inputs = block_of(kind), inputs_of(kind)
    loss = loss_of(outputs_of(block, inputs))
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
    loss = loss_of(outputs_of(block, inputs))
    with torch.no_grad():
        next(block.parameters()).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", BLOCKS)
def test_results_that_a_hook_stores_are_freed(kind: str) -> None:
    block, features = block_of(kind), Features()
    block.register_forward_hook(features.read)
    outputs_of(block, inputs_of(kind))
    gone = weakref.ref(features), weakref.ref(block)
    del block, features
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


WITHOUT_NODES: list[Any] = [
    pytest.param(attack.test_attacks_and_training_steps_in_any_order, ("solution", "resident")),
    pytest.param(attack.test_no_weight_gradient_is_computed_for_an_image_alone, ("solution", "resident")),
    pytest.param(changes.test_a_change_of_a_skew_pair_before_backward_changes_nothing, (lambda f: f.eval(),)),
    *[pytest.param(skew.test_gradients_of_gradients_are_the_references, (stride,)) for stride in (1, 2)],
    pytest.param(skew.test_frozen_weight_skips_its_gradient, ()),
    pytest.param(skew.test_slopes_may_be_written_over, ()),
    pytest.param(skew.test_one_slope_is_enough, ()),
]


@pytest.mark.parametrize(("test", "arguments"), WITHOUT_NODES)
def test_the_functions_stand_alone(test: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What other files test with nodes, without them."""
    with nodes.left_out():
        test(*arguments)


@pytest.mark.parametrize(("dtype", "bias", "held"), [("float32", 0.0, 2), ("float32", 50.0, 0), ("bfloat16", 0.0, 0)])
def test_the_function_holds_slopes_only_where_they_are_read(dtype: str, bias: float, held: int) -> None:
    block, given = skew.biased(bias, getattr(torch, dtype))
    with nodes.left_out():
        dy, dz = block(*given)
        assert len(dy.grad_fn.slopes) == held
        (dy.square().sum() + dz.square().sum()).backward()
    assert dy.grad_fn.slopes == []
