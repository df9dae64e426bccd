"""The gradient of a single map's solution through the sizes of its steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_ode import CASES, COUPLED, ENGINES, F64, block_of, field_of, fused, sample_of
from torch import Tensor, nn

import fastode
from fastode import Solver, reference
from fastode.testing import assert_blocks_equal, sample_input

# Of the cases, and what they get beside: rejected attempts, one where a bound decides what comes of it, all methods.
THROUGH_ALL_SIZES = [
    (0, {}),
    (1, {"first_step": 3.0}),
    (3, {}),
    (4, {"t1": 3.0, "first_step": 0.01}),
    (5, {"first_step": 3.0}),
    (6, {"first_step": 30.0}),
    (9, {"first_step": 3.0}),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("case", "changes"), THROUGH_ALL_SIZES)
def test_its_gradient_goes_through_all_sizes(case: int, changes: dict[str, Any], engine: str) -> None:
    if CASES[case][1] == "batch" and engine not in COUPLED:
        return
    block, x = block_of(CASES[case], F64, gradient="exact", **changes), sample_of(CASES[case], F64)
    assert_blocks_equal(block, fused(block, engine), x, mode="train")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("changes", [{}, {"first_step": 4.0}])
def test_the_exact_gradient_is_that_of_differences(changes: dict[str, Any], engine: str) -> None:
    torch.manual_seed(0)
    field = nn.Sequential(reference.TimeConv2d(2, 2, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1)).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(4.0)
    solver = Solver(rtol=0.01, atol=0.01, t1=2.0, gradient="exact", **changes)
    block = fused(reference.ODEBlock(field, solver), engine)
    names, values = zip(*field.named_parameters(), strict=True)

    def run(x: Tensor, *tensors: Tensor) -> Any:
        given = {f"field.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        return torch.func.functional_call(block, given, (x,))

    given = (sample_input(1, 2, 3, 2, dtype=F64), *values)
    with fastode.record_steps() as log:
        run(*given)
    assert bool(log[0].rejected) == bool(changes)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    constant = copy.deepcopy(block)
    constant.gradient = "constant"
    found = [torch.autograd.grad(b(leaves[0]).square().sum(), leaves[0])[0] for b in (block, constant)]
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()


@pytest.mark.parametrize("gradient", ["solver", "exact"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_size_may_be_bounded_by_the_trials(engine: str, gradient: str) -> None:
    # A hundred times the trial's size, which float32 rounds inside a stage.
    field = field_of(4, "none", "tanh", False, False)
    with torch.no_grad():
        field[1].weight.mul_(0.02)
        field[3].bias.fill_(100.0)
    block = reference.ODEBlock(field, Solver(gradient=gradient))
    assert_blocks_equal(block, fused(block, engine), sample_input(2, 4, 5, 4), mode="train")
