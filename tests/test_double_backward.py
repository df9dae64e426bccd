"""Gradients of gradients, torch.func transforms and forward-mode differentiation through fused blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from block_cases import FAMILIES, case_of, make_input, make_pair
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastode
from fastode import fuse, reference
from fastode.testing import assert_blocks_equal, compare_tensors, sample_input


class InputGradient(nn.Module):
    """The gradient of sum(c * block(x)) with respect to x, differentiable: what a gradient penalty is made of.

    The truth evaluates norms on their input's statistics as plain arithmetic: PyTorch's third derivatives are wrong.
    """

    def __init__(self, block: nn.Module, plain: bool) -> None:
        super().__init__()
        self.block, self.plain = block, plain

    def forward(self, x: Tensor) -> Tensor:
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        weights = sample_input(*x.shape, dtype=torch.bfloat16, seed=9).to(x.dtype)
        with torch.enable_grad(), reference.plain_norms() if self.plain else nullcontext():
            return torch.autograd.grad((self.block(leaf) * weights).sum(), leaf, create_graph=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["layer", "batch", "batch_eval", "instance_running", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_penalty(family: str, norm: str, dtype: torch.dtype) -> None:
    case = case_of(family, norm=norm, dtype=dtype)
    plain, fused = make_pair(case)
    assert_blocks_equal(InputGradient(plain, plain=True), InputGradient(fused, plain=False), make_input(case))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_penalty_of_several_steps(norm: str, detach: bool) -> None:
    case = case_of("ie", norm=norm, steps=2, theta=0.5, detach=detach, activation="softplus")
    plain, fused = make_pair(case)
    assert_blocks_equal(InputGradient(plain, plain=True), InputGradient(fused, plain=False), make_input(case))


def test_gradgradcheck() -> None:
    for family in FAMILIES:
        case = case_of(family, channels=2, size=(2, 2), shape="one_layer")
        _, fused = make_pair(case)
        assert torch.autograd.gradgradcheck(fused, make_input(case).requires_grad_(), fast_mode=True)


Transform = Callable[[nn.Module, Tensor, Tensor], Tensor]


def grad(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.grad(lambda x: (block(x) * t).sum())(x)


def vjp(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vjp(block, x)[1](t)[0]


def jvp(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jvp(block, (x,), (t,))[1]


def vmap(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vmap(block)(torch.stack([x, t]))


def per_sample_grad(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    return torch.cat([g.flatten() for g in found.values()])


def forward_mode(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(block(forward_ad.make_dual(x, t))).tangent


def hessian_vector(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jvp(torch.func.grad(lambda x: block(x).square().sum()), (x,), (t,))[1]


@pytest.mark.parametrize("transform", [grad, vjp, jvp, vmap, per_sample_grad, forward_mode, hessian_vector])
@pytest.mark.parametrize("norm", ["layer", "batch_eval", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transforms(family: str, norm: str, transform: Transform) -> None:
    case = case_of(family, norm=norm)
    plain, fused = make_pair(case)
    fused.engine = "auto"
    x, t = make_input(case), make_input(case, seed=1)
    expected, found = ({"result": transform(block, x, t).detach()} for block in (plain, fused))
    comparison = compare_tensors(found, expected, [], 9 * case["channels"] * 15)
    assert comparison.ok, comparison.describe()


def many_cotangents(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    y = block(point)

    def gradients(bar: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [point, *block.parameters()], bar, retain_graph=True, materialize_grads=True)

    found = torch.func.vmap(gradients)(torch.stack([t, y.detach()]))
    return torch.cat([g.detach().flatten() for g in found])


@pytest.mark.parametrize("engine", ["resident", "staged"])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_cotangents_at_once(family: str, norm: str, engine: str) -> None:
    case = case_of(family, norm=norm)
    plain, fused = make_pair(case)
    fused.engine = engine
    x, t = make_input(case), make_input(case, seed=1)
    expected, found = ({"result": many_cotangents(block, x, t)} for block in (plain, fused))
    comparison = compare_tensors(found, expected, [], 9 * case["channels"] * 15)
    assert comparison.ok, comparison.describe()


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("engine", ["resident", "staged"])
def test_many_cotangents_of_a_skew_pair(solver: str, engine: str) -> None:
    plain = reference.SOBlock(reference.SkewPair(3, 4), solver=solver).double()
    fused = copy.deepcopy(plain)
    fuse(fused, engine=engine)
    x, t = (sample_input(2, c, 3, 5, dtype=torch.float64, seed=c) for c in (3, 4))
    expected, found = ({"result": many_cotangents(block, x, t)} for block in (plain, fused))
    comparison = compare_tensors(found, expected, [], 9 * 4 * 15)
    assert comparison.ok, comparison.describe()


def sources_of(block: nn.Module, leaves: list[Tensor]) -> dict[str, Tensor]:
    """What gradients are asked of: all but Ark's a21, whose gradient is rounding."""
    parameters = {name: p for name, p in block.named_parameters() if name != "a21"}
    return {f"input {i}": x for i, x in enumerate(leaves)} | parameters


def batched(block: nn.Module, inputs: tuple[Tensor, ...], create_graph: bool) -> dict[str, Tensor]:
    """The gradients of inputs and parameters for three cotangents at once, as is_grads_batched gives them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = block(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(4)
    bars = [torch.randn(3, *y.shape, dtype=y.dtype, generator=generator) for y in outputs]
    sources = sources_of(block, leaves)
    found = torch.autograd.grad(
        outputs, list(sources.values()), bars, is_grads_batched=True, create_graph=create_graph, allow_unused=True
    )
    return {name: torch.zeros(3) if g is None else g for name, g in zip(sources, found, strict=True)}


def looped(block: nn.Module, inputs: tuple[Tensor, ...], create_graph: bool) -> dict[str, Tensor]:
    """The same, one cotangent after the other."""
    rows = []
    generator = torch.Generator().manual_seed(4)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = block(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    bars = [torch.randn(3, *y.shape, dtype=y.dtype, generator=generator) for y in outputs]
    sources = sources_of(block, leaves)
    for k in range(3):
        rows.append(
            torch.autograd.grad(
                outputs, list(sources.values()), [b[k] for b in bars], retain_graph=True, allow_unused=True
            )
        )
    columns = zip(*rows, strict=True)
    return {n: torch.zeros(3) if c[0] is None else torch.stack(c) for n, c in zip(sources, columns, strict=True)}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("engine", ["resident", "staged"])
@pytest.mark.parametrize("family", [*FAMILIES, "SkewPair", "SOBlock"])
def test_is_grads_batched(family: str, engine: str, create_graph: bool) -> None:
    if family in FAMILIES:
        plain, fused = make_pair(case_of(family))
        inputs: tuple[Tensor, ...] = (make_input(case_of(family)),)
    else:
        plain = reference.SkewPair(3, 4, norm="layer").double()
        inputs = tuple(torch.randn(2, c, 3, 3, dtype=torch.float64) for c in (4, 3))
        if family == "SOBlock":
            plain, inputs = reference.SOBlock(plain, solver="midpoint"), inputs[1:]
        fused = copy.deepcopy(plain)
        fastode.fuse(fused)
    fused.engine = engine
    comparison = compare_tensors(
        batched(fused, inputs, create_graph), looped(plain.double(), inputs, create_graph), [], 9 * 16
    )
    assert comparison.ok, comparison.describe()


@pytest.mark.parametrize("engine", ["resident", "staged"])
def test_a_vectorized_jacobian(engine: str) -> None:
    plain, fused = make_pair(case_of())
    fused.engine = engine
    x = make_input(case_of())[:1, :, :2, :2]
    found, expected = (
        torch.autograd.functional.jacobian(block, x, vectorize=vectorize)
        for block, vectorize in ((fused, True), (plain, False))
    )
    comparison = compare_tensors({"jacobian": found}, {"jacobian": expected}, [], 9 * 16)
    assert comparison.ok, comparison.describe()
