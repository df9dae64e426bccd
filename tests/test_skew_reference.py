"""The skew pair and its ODE blocks in plain PyTorch: that they are the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastode import reference
from fastode.reference.skew import skew_field
from fastode.testing import sample_input

FIXED = ("euler", "midpoint", "rk4")


def test_the_linear_pair_is_skew_symmetric() -> None:
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    y, p = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    z, q = torch.randn(2, 2, 3, 6, 8, dtype=torch.float64)
    dy, dz = skew_field(y, z, weight, 2, 1, 0.0, nn.Identity())
    dp, dq = skew_field(p, q, weight, 2, 1, 0.0, nn.Identity())
    torch.testing.assert_close((dy * p).sum() + (dz * q).sum(), -(dp * y).sum() - (dq * z).sum())
    torch.testing.assert_close((dy * y).sum() + (dz * z).sum(), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("solver", FIXED)
def test_fixed_solvers_are_those_of_torchdiffeq(solver: str) -> None:
    from torchdiffeq import odeint

    field = reference.SkewPair(3, 5, gamma=0.2, activation="tanh").double()
    block = reference.SOBlock(field, solver=solver, t1=0.7, steps=3)
    x = sample_input(2, 3, 5, 4, dtype=torch.float64)
    times = torch.linspace(0.0, 0.7, 4, dtype=torch.float64)
    solution = odeint(lambda _, state: field(*state), field.initial_state(x), times, method=solver)
    torch.testing.assert_close(block(x), solution[0][-1])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_measured_order_of_the_solvers(solver: str, order: int) -> None:
    field = reference.SkewLinear(4, 3, gamma=0.1, activation="tanh").double()
    x = torch.randn(2, 4, dtype=torch.float64)

    def at(scheme: str, steps: int) -> Tensor:
        return reference.SOBlock(field, solver=scheme, steps=steps)(x)

    exact = at("rk4", 256)
    errors = [torch.linalg.vector_norm(at(solver, steps) - exact) for steps in (8, 16)]
    assert abs(torch.log2(errors[0] / errors[1]).item() - order) < 0.2


def test_initial_state() -> None:
    x = sample_input(2, 3, 4, 6)
    y, z = reference.SkewPair(3, 8, norm="none").initial_state(x)
    assert z is x
    assert torch.equal(y, torch.cat([x, x, x[:, :2]], 1))
    y, _ = reference.SkewPair(3, 2, stride=2, norm="none").initial_state(x)
    assert torch.equal(y, nn.functional.interpolate(x, scale_factor=0.5, mode="nearest")[:, :2])


def test_classifier_of_the_paper_and_of_its_code() -> None:
    x = torch.randn(2, 4)
    paper = reference.SOClassifier(4, 3, gamma=0.1, solver="euler", t1=0.5)
    w, act = paper.field.weight, nn.functional.leaky_relu
    torch.testing.assert_close(paper(x), 1 + 0.5 * act(x @ w.T - 0.1))
    assert [name for name, _ in paper.named_parameters()] == ["field.weight"]
    code = reference.SOClassifier(4, 3, gamma=0.1, released=True, solver="euler", t1=0.5)
    w = code.field.weight
    torch.testing.assert_close(code(x), 0.1 + 0.5 * (act(x) @ w.T + code.field.bias_y - 0.1 * 0.1))
    _, dz = code.field(*code.field.initial_state(x))
    torch.testing.assert_close(dz, -act(torch.full((2, 3), 0.1)) @ w + code.field.bias_z - 0.1 * x)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_in_place_changes_nothing_outside(inplace: bool) -> None:
    for released in (False, True):
        field = reference.SkewLinear(4, 3, activation=lambda: nn.ReLU(inplace), released=released)
        y, z = torch.randn(2, 3), torch.randn(2, 4)
        before = y.clone(), z.clone()
        field(y, z)
        assert torch.equal(y, before[0]) and torch.equal(z, before[1])
