"""The skew pair's solution with steps by error as one operator: that it equals the reference, step by step."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference
from fastode.dispatch.engines import BY_NAME
from fastode.ops.schemes.skew_pair.adaptive import interpolating, interpolating_rates
from fastode.reference.adaptive import integrate, interpolated
from fastode.reference.solvers import without_time
from fastode.steps import Watch
from fastode.testing import assert_blocks_equal, sample_input

F32, F64 = torch.float32, torch.float64
ENGINE = next(name for name, engine in BY_NAME.items() if engine.skew_adaptive is not None)

# Stride, γ, activation, norm, and the solver. A first step of 2 is too long for its tolerance, so that it is rejected;
# dopri8 has it everywhere: at tolerances that it meets by far its error estimate is rounding.
CASES: list[tuple[int, float, str, str, dict[str, Any]]] = [
    (1, 0.1, "tanh", "group", {"method": "dopri5"}),
    (2, 0.0, "leaky_relu", "none", {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}),
    (1, 0.3, "tanh", "instance", {"method": "dopri5", "rtol": 1e-3, "atol": 1e-2, "t1": 0.6}),
    (2, 0.0, "softplus", "layer", {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "t1": 2.0, "first_step": 2.0}),
    (1, 0.0, "softplus", "layer", {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3}),
    (2, 0.2, "elu", "batch", {"method": "bosh3"}),
    (1, 0.1, "tanh", "none", {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-3}),
    (2, 0.0, "leaky_relu", "group", {"method": "fehlberg2", "t1": 2.0}),
    (1, 0.0, "tanh", "none", {"method": "dopri8", "rtol": 1e-6, "atol": 1e-6, "t1": 2.0, "first_step": 2.0}),
    (1, 0.0, "leaky_relu", "batch", {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2, "first_step": 5.0}),
]


def block_of(case: tuple[int, float, str, str, dict[str, Any]], dtype: torch.dtype, **more: Any) -> nn.Module:
    stride, gamma, activation, norm, options = case
    torch.manual_seed(0)
    field = reference.SkewPair(3, 8, stride, gamma, activation, norm).to(dtype)
    return reference.SOBlock(field, Solver(**options, **more))


def fused(block: nn.Module, engine: str = ENGINE) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=engine)
    return twin


@pytest.mark.parametrize("gradient", ["solver", "constant"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_equals_the_reference(case: int, dtype: torch.dtype, gradient: str) -> None:
    block = block_of(CASES[case], dtype, gradient=gradient)
    for mode in ("train", "input_grad"):
        assert_blocks_equal(block, fused(block), sample_input(2, 3, 6, 6, dtype=dtype), mode=mode)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_takes_the_same_steps(case: int) -> None:
    block = block_of(CASES[case], F64)
    x = sample_input(2, 3, 6, 6, dtype=F64)
    twin = fused(block)
    with fastode.record_steps() as log, torch.no_grad():
        block(x), twin(x)
    one, other = log
    assert other.times == pytest.approx(one.times, rel=1e-7)
    assert (other.evaluations, len(other.rejected)) == (one.evaluations, len(one.rejected))
    assert (other.block, other.solver) == (one.block, one.solver)
    # Of a first attempt that was rejected no size depends on the input.
    first_rejected = bool(one.rejected) and one.rejected[0][0] == 0
    assert first_rejected == ("first_step" in CASES[case][-1])
    # Every evaluation updates batch norms once, also those of rejected attempts.
    counts = [
        [int(norm.num_batches_tracked) for norm in b.modules() if isinstance(norm, nn.BatchNorm2d)]
        for b in (block, twin)
    ]
    assert counts[0] == counts[1] == [one.evaluations] * len(counts[0])


@pytest.mark.parametrize("gradient", ["solver", "constant"])
@pytest.mark.parametrize("case", [0, 3, 6])
def test_a_gradient_may_be_differentiated(case: int, gradient: str) -> None:
    block = block_of(CASES[case], F64, gradient=gradient)
    twin, solver = fused(block), block.settings

    def plain(x: Tensor) -> Tensor:
        state = block.field.initial_state(x)
        return integrate(without_time(block.field), state, solver, Watch("", solver))[0]

    found = []
    for solve in (plain, twin):
        x = sample_input(2, 3, 6, 6, dtype=F64).requires_grad_()
        parameters = list((block if solve is plain else twin).parameters())
        (slope,) = torch.autograd.grad(solve(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *parameters], allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and one.norm() > 1e-8:
            assert (one - other).norm() <= 1e-8 * one.norm()


@pytest.mark.parametrize("name", fastode.embedded.EMBEDDED)
def test_the_interpolant_is_a_step_with_other_weights(name: str) -> None:
    tableau, generator = fastode.embedded.EMBEDDED[name], torch.Generator().manual_seed(0)
    state, *slopes = torch.randn(1 + tableau.stages, 4, dtype=F64, generator=generator)
    h, at = torch.tensor([0.7, 0.4], dtype=F64)
    end = state + h * sum(b * k for b, k in zip(tableau.b, slopes, strict=True))
    (wanted,) = interpolated(tableau, (state,), (end,), [(k,) for k in slopes], h, at)
    weights = interpolating(tableau, float(at))
    torch.testing.assert_close(state + h * sum(w * k for w, k in zip(weights, slopes, strict=True)), wanted)
    above, below = (interpolating(tableau, float(at) + step) for step in (1e-6, -1e-6))
    rates = [(a - b) / 2e-6 for a, b in zip(above, below, strict=True)]
    assert interpolating_rates(tableau, float(at)) == pytest.approx(rates, abs=1e-7)
    assert interpolating(tableau, 1.0) == pytest.approx(tableau.b, abs=1e-12)


def test_auto_takes_the_engine_that_has_the_solve_as_one() -> None:
    x = sample_input(1, 3, 8, 8)
    for gradient, per_sample in itertools.product(("solver", "constant", "exact"), (False, True)):
        block = reference.SOBlock(reference.SkewPair(3, 8), gradient=gradient, per_sample=per_sample)
        (name,) = fastode.fuse(block, example=x).rows[0].engines
        own = gradient != "exact" and not per_sample
        assert (BY_NAME[name].skew_adaptive is not None) == own or not own
    others = [name for name in BY_NAME if name != ENGINE and "cpu" in BY_NAME[name].devices]
    twin = fastode.nn.SOBlock(fastode.nn.SkewPair(3, 8))
    assert [twin.against(name, x) for name in others] == [
        "it runs steps by error one evaluation at a time, which was measured slower than the solve as one"
    ] * len(others)
    assert [twin.why_not(name, x) for name in others] == [""] * len(others)


def test_it_fails_as_the_reference_does() -> None:
    options: list[tuple[dict[str, Any], float]] = [
        ({"max_steps": 1, "first_step": 0.3}, 1.0),
        ({}, float("nan")),
        ({"first_step": 0.1}, float("inf")),
    ]
    for changes, factor in options:
        block = reference.SOBlock(
            reference.SkewPair(3, 8, norm="none").double(), Solver(rtol=1e-6, atol=1e-6, **changes)
        )
        x = factor * sample_input(1, 3, 6, 6, dtype=F64)
        found = []
        for solve in (block, fused(block)):
            with pytest.raises(SolveError) as caught:
                solve(x)
            found.append(caught.value)
        assert (found[0].block, found[0].reason, found[0].t) == (found[1].block, found[1].reason, found[1].t)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    block = fused(reference.SOBlock(reference.SkewPair(3, 8)))
    x = sample_input(1, 3, 6, 6)
    expected = block(x)
    assert expected.grad_fn is not None
    with torch.no_grad():
        assert torch.equal(block(x), expected) and block(x).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
