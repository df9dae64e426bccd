"""The attack that everyone runs: parameters stay trainable, and only the image's gradient is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastode
from fastode import reference
from fastode.testing import compare_tensors, sample_input

ENGINES = ("resident", "staged")
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "ie": lambda: reference.IESkip(reference.PreActBranch(8, norm="group", activation="tanh"), steps=2),
    "ie, batch": lambda: reference.IESkip(reference.PreActBranch(8, norm="batch", activation="tanh")),
    "ssp3": lambda: reference.SSP3(reference.PreActBranch(8, norm="group", activation="tanh")),
    "ssp3, batch": lambda: reference.SSP3(reference.PreActBranch(8, norm="batch", activation="tanh")),
    "ark": lambda: reference.Ark(reference.PreActBranch(8, norm="group", activation="tanh")),
    "residual": lambda: reference.ResBlock(reference.PreActBranch(8, norm="none", activation="tanh")),
    "solution": lambda: reference.SOBlock(reference.SkewPair(8, 8, norm="layer", activation="tanh"), solver="midpoint"),
}


def fused(block: nn.Module, engine: str) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=engine)
    return twin


def image_gradient(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    return {"gradient of image": torch.autograd.grad(block(x).square().sum(), x)[0]}


def training_gradients(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    named = {name: p for name, p in block.named_parameters() if name != "a21"}  # whose gradient is rounding
    found = torch.autograd.grad(block(x).square().sum(), [x, *named.values()])
    return dict(zip(["gradient of image", *(f"gradient of {name}" for name in named)], found, strict=True))


def by_backward_inputs(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    block.zero_grad()
    block(x).square().sum().backward(inputs=[x])
    assert all(p.grad is None for p in block.parameters())
    assert x.grad is not None
    return {"gradient of image": x.grad}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_attacks_and_training_steps_in_any_order(kind: str, engine: str) -> None:
    torch.manual_seed(1)
    plain = BLOCKS[kind]().double()
    block, x = fused(plain, engine), sample_input(3, 8, 5, 4, dtype=torch.float64)
    for ask in (image_gradient, image_gradient, training_gradients, image_gradient, by_backward_inputs,
                training_gradients, training_gradients):  # fmt: skip
        comparison = compare_tensors(ask(block, x), ask(plain, x), [], 9 * 8 * 20)
        assert comparison.ok, f"{ask.__name__}: {comparison.describe()}"


class Asked(TorchDispatchMode):
    """Of each backward operator of a convolution or of a whole block, whether it was asked for weight gradients."""

    PLACES: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "aten.convolution_backward": lambda given: given[-1][1] or given[-1][2],
        "fastode.norm_act_vjp": lambda given: given[7],
        "fastode.norm_act_second": lambda given: given[9],
        "fastode.resident_ie_backward": lambda given: given[-2],
        "fastode.resident_rk_backward": lambda given: given[-3] or given[-2],
        "fastode.resident_march_backward": lambda given: given[-2] or given[-1],
        "fastode.resident_skew_backward": lambda given: given[-2] or given[-1],
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function).removesuffix(".default")
        if name in self.PLACES:
            self.found.append(bool(self.PLACES[name](arguments)))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_no_weight_gradient_is_computed_for_an_image_alone(kind: str, engine: str) -> None:
    block, x = fused(BLOCKS[kind](), engine), sample_input(2, 8, 5, 4)
    for ask, wanted in ((image_gradient, False), (by_backward_inputs, False), (training_gradients, True)):
        with Asked() as asked:
            ask(block, x)
        assert asked.found and any(asked.found) == wanted, ask.__name__


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_parameters_that_are_asked_for_have_a_gradient(engine: str) -> None:
    plain = BLOCKS["ssp3"]().double()
    block, x = fused(plain, engine), sample_input(2, 8, 4, 4, dtype=torch.float64)
    calls: list[str] = []
    for name, parameter in block.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(name))
    first = dict(block.named_parameters())["branch.2.weight"]
    first_plain = dict(plain.named_parameters())["branch.2.weight"]
    (found,) = torch.autograd.grad(block(x).square().sum(), [first])
    (truth,) = torch.autograd.grad(plain(x).square().sum(), [first_plain])
    comparison = compare_tensors({"weight": found}, {"weight": truth}, [], 9 * 8 * 20)
    assert comparison.ok, comparison.describe()
    assert calls == ["branch.2.weight"]
    calls.clear()
    block(x).square().sum().backward(inputs=[first])
    block(x).square().sum().backward()
    assert sorted(calls) == sorted(["branch.2.weight", *dict(block.named_parameters())])
    plain(x).square().sum().backward(inputs=[first_plain])
    plain(x).square().sum().backward()
    grads = ({f"gradient of {name}": p.grad for name, p in module.named_parameters()} for module in (block, plain))
    comparison = compare_tensors(*grads, [], 9 * 8 * 20)
    assert comparison.ok, comparison.describe()


def test_a_retained_graph_answers_both_questions() -> None:
    plain = BLOCKS["ssp3"]().double()
    for engine in ENGINES:
        block, x = fused(plain, engine), sample_input(2, 8, 4, 4, dtype=torch.float64).requires_grad_()
        loss, truth = block(x).square().sum(), plain(x).square().sum()
        for asked, expected in (([x], [x]), ([x, *block.parameters()], [x, *plain.parameters()]), ([x], [x])):
            found = torch.autograd.grad(loss, asked, retain_graph=True)
            known = torch.autograd.grad(truth, expected, retain_graph=True)
            comparison = compare_tensors(
                {f"gradient of {i}": t for i, t in enumerate(found)},
                {f"gradient of {i}": t for i, t in enumerate(known)},
                [],
                9 * 8 * 20,
            )
            assert comparison.ok, comparison.describe()
