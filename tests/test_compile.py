"""A model with fused blocks compiles in one graph and gives what it gives uncompiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_cases import case_of, make_input, make_pair
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.testing import Comparison, compare_tensors, sample_input


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results(model: nn.Module, step: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step of the model, called as `step`."""
    leaf = x.detach().requires_grad_()
    y = step(leaf)
    y.square().sum().backward()
    found = {"output": y.detach(), "gradient of input": leaf.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {f"buffer {name}": b for name, b in model.named_buffers()}


def compare(model: nn.Module, x: Tensor, **options: Any) -> Comparison:
    """A compiled training step against the float64 one; R is the step uncompiled."""
    eager, exact, compiled = copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model)
    truth, run = results(exact, exact, x.double()), results(eager, eager, x)
    found = results(compiled, torch.compile(compiled, fullgraph=True, **options), x)
    return compare_tensors(found, truth, [run], 8 * 9 * 25)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        reference.IESkip(reference.PreActBranch(8, norm="layer", activation="tanh"), steps=2),
        reference.SSP2(reference.PreActBranch(8, norm="batch", activation="softplus")),
        reference.Ark(reference.PreActBranch(8, norm="group", activation="silu"), learn_a21=True),
        nn.AdaptiveAvgPool2d(1),
    )
    report = fastode.fuse(model, example=sample_input(2, 3, 5, 5))
    assert report.fused == 3, str(report)
    return model


def test_model_in_one_graph() -> None:
    comparison = compare(small_model(), sample_input(2, 3, 5, 5), backend="aot_eager")
    assert comparison.ok, comparison.describe()


def test_model_by_inductor() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), reference.IESkip(reference.PreActBranch(8, norm="layer", activation="tanh"))
    )
    fastode.fuse(model)
    comparison = compare(model, sample_input(2, 3, 5, 5))
    assert comparison.ok, comparison.describe()


@pytest.mark.parametrize(
    ("family", "norm"), [("ie", "batch"), ("ssp3", "batch_cumulative"), ("res", "instance_running")]
)
def test_block_in_one_graph(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, dtype=torch.float32, channels=8)
    _, fused = make_pair(case)
    comparison = compare(fused, make_input(case), backend="aot_eager")
    assert comparison.ok, comparison.describe()


@pytest.mark.parametrize("parts", [{}, {"gradient": "constant", "rtol": 1e-3, "atol": 1e-3}, {"per_sample": True}])
def test_steps_by_error_in_one_graph(parts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = reference.SOBlock(reference.SkewPair(3, 8, 1, 0.1, "tanh"), **parts)
    fastode.fuse(block, engine="resident")
    twin, x = copy.deepcopy(block), sample_input(2, 3, 6, 6)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    found = results(twin, compiled, x)
    # The compiled backward takes the steps again, to the same bits.
    for name, expected in results(block, block, x).items():
        assert torch.equal(found[name], expected)
    with pytest.raises(RuntimeError, match="SOBlock: the step is not finite, or too small to move the time at t = 0 "):
        compiled(x * float("nan"))


def test_no_grad_in_one_graph() -> None:
    model = small_model().eval()
    x = sample_input(2, 3, 5, 5)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        run, truth = model(x), copy.deepcopy(model).double()(x.double())
    comparison = compare_tensors({"output": found}, {"output": truth}, [{"output": run}], 8 * 9)
    assert comparison.ok, comparison.describe()


def test_another_batch_size() -> None:
    model = small_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = sample_input(batch, 3, 5, 5)
        found, run, truth = compiled(x), model(x), copy.deepcopy(model).double()(x.double())
        comparison = compare_tensors(
            {"output": found.detach()}, {"output": truth.detach()}, [{"output": run.detach()}], 8 * 9
        )
        assert comparison.ok, comparison.describe()


def test_a_block_that_runs_as_the_reference_does_not_break_the_rest() -> None:
    unreadable = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.0))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), reference.SSP2(unreadable)).double()
    fastode.fuse(model)
    x = sample_input(2, 3, 5, 5, dtype=torch.float64)
    found = torch.compile(model, backend="aot_eager")(x)
    comparison = compare_tensors({"output": found.detach()}, {"output": model(x).detach()}, [], 8 * 9)
    assert comparison.ok, comparison.describe()
