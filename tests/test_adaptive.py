"""The skew pair's solution with steps by error as one operator: that it equals the reference, step by step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from judging import assert_equal_by_either
from second_derivatives import compare_second_derivatives
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference
from fastode.dispatch.engines import BY_NAME
from fastode.dispatch.skew import read_field
from fastode.ops.resident.skew import encode
from fastode.ops.resident.solve import solver_code
from fastode.ops.schemes.by_error import interpolating, interpolating_rates
from fastode.reference.adaptive import MOST_GROWTH, MOST_SHRINKAGE, integrate, interpolated, next_factor
from fastode.reference.solvers import without_time
from fastode.steps import Watch
from fastode.testing import assert_blocks_equal, sample_input

F32, F64 = torch.float32, torch.float64
UTILITIES = ("test_schema", "test_faketensor")
ENGINES = [name for name, engine in BY_NAME.items() if engine.skew_adaptive is not None]
ALONE = [name for name in ENGINES if BY_NAME[name].steps_inside]

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
# Those whose samples are coupled by nothing but the steps.
UNCOUPLED = [case for case in range(len(CASES)) if CASES[case][3] != "batch"]


def engines_of(case: int) -> list[str]:
    return [engine for engine in ENGINES if case in UNCOUPLED or not BY_NAME[engine].solution_from_x]


RUNS = [
    pytest.param(case, engine, id=f"{case}-{engine}")
    for engine in ENGINES
    for case in range(len(CASES))
    if engine in engines_of(case)
]
# By the first root of the error the bounds of the control decide many sizes, those after rejected attempts too.
BOUNDED = dataclasses.replace(fastode.embedded.EMBEDDED["dopri5"], name="dopri5 by the first root", order=1)
EXACT = [
    *[CASES[case] for case in UNCOUPLED],
    (1, 0.1, "tanh", "none", {"method": BOUNDED, "rtol": 1e-4, "atol": 1e-5, "t1": 2.0}),
]


def block_of(case: tuple[int, float, str, str, dict[str, Any]], dtype: torch.dtype, **more: Any) -> nn.Module:
    stride, gamma, activation, norm, options = case
    torch.manual_seed(0)
    field = reference.SkewPair(3, 8, stride, gamma, activation, norm).to(dtype)
    return reference.SOBlock(field, Solver(**options, **more))


def fused(block: nn.Module, engine: str) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=engine)
    return twin


@pytest.mark.parametrize("gradient", ["solver", "constant"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_equals_the_reference(case: int, dtype: torch.dtype, gradient: str) -> None:
    block = block_of(CASES[case], dtype, gradient=gradient)
    twins = [fused(block, engine) for engine in engines_of(case)]
    assert_equal_by_either(block, twins, sample_input(2, 3, 6, 6, dtype=dtype), ("train", "input_grad"), by_error=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(3, 16, 1, 5, 4), (16, 16, 1, 4, 4), (20, 8, 2, 6, 10), (8, 16, 2, 16, 12)], ids=str)
def test_it_equals_the_reference_on_every_shape(shape: tuple[int, ...], engine: str) -> None:
    inputs, channels, stride, height, width = shape
    for batch, norm, layout in itertools.product((1, 5), ("layer", "batch"), ("contiguous", "channels_last")):
        torch.manual_seed(1)
        field = reference.SkewPair(inputs, channels, stride, 0.1, "tanh", norm).double()
        block = reference.SOBlock(field, Solver("bosh3", rtol=1e-4, atol=1e-4, first_step=0.4)).eval()
        x = sample_input(batch, inputs, height, width, dtype=F64, layout=layout)
        assert_blocks_equal(block, fused(block, engine), x, mode=("forward", "train"))


# The cases whose first error is not rounding, which a sample alone has more of: (0, 7) are left out.
@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("gradient", ["solver", "constant"])
@pytest.mark.parametrize("case", [case for case in UNCOUPLED if case not in (0, 7)])
def test_samples_alone_equal_the_reference(case: int, gradient: str, engine: str) -> None:
    for dtype in (F32, F64):
        block = block_of(CASES[case], dtype, gradient=gradient, per_sample=True)
        x = sample_input(3, 3, 6, 6, dtype=dtype)
        assert_equal_by_either(block, [fused(block, engine)], x, ("train", "input_grad"), by_error=True)


@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("case", range(len(EXACT)))
def test_its_exact_gradient_equals_the_reference(case: int, engine: str) -> None:
    for dtype in (F32, F64):
        block = block_of(EXACT[case], dtype, gradient="exact")
        x = sample_input(2, 3, 6, 6, dtype=dtype)
        assert_equal_by_either(block, [fused(block, engine)], x, ["train"], by_error=True)


# Rejected attempts, also of some samples alone, and every bound of the control.
@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("case", [2, 3, 8])
def test_the_exact_gradient_of_samples_alone_equals_the_reference(case: int, engine: str) -> None:
    for dtype, mode in ((F32, "input_grad"), (F64, "train")):
        block = block_of(EXACT[case], dtype, gradient="exact", per_sample=True)
        assert_blocks_equal(block, fused(block, engine), sample_input(3, 3, 6, 6, dtype=dtype), mode=mode)


def test_exact_cases_have_every_way_from_an_error_to_a_size() -> None:
    found = set()
    for case in EXACT:
        block = block_of(case, F64)
        x = sample_input(2, 3, 6, 6, dtype=F64).requires_grad_()
        slopes = []
        for gradient in ("solver", "exact"):
            block.gradient = gradient
            with fastode.record_steps() as log:
                slopes += torch.autograd.grad(block(x).square().sum(), x)
        # What the sizes add is far above what the rule allows.
        assert (slopes[1] - slopes[0]).norm() > 1e-5 * slopes[0].norm()
        for accepted, ratios in ((True, log[0].ratios[:-1]), (False, [ratio for *_, ratio in log[0].rejected])):
            for ratio in ratios:
                factor = next_factor(ratio, block.settings.tableau.order)
                found.add((accepted, factor if factor in (1.0, MOST_GROWTH, MOST_SHRINKAGE) else None))
    assert found == {(True, None), (True, 1.0), (True, MOST_GROWTH), (False, None), (False, MOST_SHRINKAGE)}


@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", fastode.embedded.EMBEDDED)
def test_its_exact_gradient_is_the_difference_quotient(method: str, per_sample: bool, engine: str) -> None:
    torch.manual_seed(0)
    field = reference.SkewPair(3, 4, 1, 0.1, "tanh", "group").double()
    tolerance = 1e-6 if method == "dopri8" else 1e-3
    options = {"gradient": "exact", "per_sample": per_sample, "t1": 0.5}
    twin = fused(reference.SOBlock(field, Solver(method, tolerance, tolerance, **options)), engine)
    x = sample_input(2, 3, 4, 4, dtype=F64).requires_grad_()
    with fastode.record_steps() as log:
        twin(x)
    order = twin.settings.tableau.order
    assert any(1 < next_factor(ratio, order) < MOST_GROWTH for ratio in log[0].ratios[:-1])
    assert torch.autograd.gradcheck(lambda x, *_: twin(x), (x, *twin.parameters()), fast_mode=True)


@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("gradient", ["solver", "exact"])
def test_in_bfloat16_it_equals_the_reference(gradient: str, engine: str) -> None:
    block = block_of(CASES[1], torch.bfloat16, gradient=gradient, first_step=0.25)
    x = sample_input(2, 3, 8, 8, dtype=torch.bfloat16)
    assert_blocks_equal(block, fused(block, engine), x, mode=("train", "input_grad"))


@pytest.mark.parametrize(("case", "engine"), RUNS)
def test_it_takes_the_same_steps(case: int, engine: str) -> None:
    per_sample = (False, True) if case in UNCOUPLED and BY_NAME[engine].steps_inside else (False,)
    for alone in per_sample:
        block = block_of(CASES[case], F64, per_sample=alone)
        x = sample_input(2, 3, 6, 6, dtype=F64)
        twin = fused(block, engine)
        with fastode.record_steps() as log, torch.no_grad():
            block(x), twin(x)
        half = len(log) // 2
        assert half == (2 if alone else 1)
        for one, other in zip(log[:half], log[half:], strict=True):
            assert other.times == pytest.approx(one.times, rel=1e-7)
            assert (other.evaluations, len(other.rejected)) == (one.evaluations, len(one.rejected))
            assert (other.block, other.solver, other.sample) == (one.block, one.solver, one.sample)
            # Of a first attempt that was rejected no size depends on the input.
            first_rejected = bool(one.rejected) and one.rejected[0][0] == 0
            assert first_rejected == ("first_step" in CASES[case][-1])
        # Every evaluation updates batch norms once, also those of rejected attempts.
        counts = [
            [int(norm.num_batches_tracked) for norm in b.modules() if isinstance(norm, nn.BatchNorm2d)]
            for b in (block, twin)
        ]
        assert counts[0] == counts[1] == [one.evaluations] * len(counts[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradient", ["solver", "constant", "exact"])
@pytest.mark.parametrize("case", [0, 3, 6])
def test_a_gradient_may_be_differentiated(case: int, gradient: str, engine: str) -> None:
    block = block_of(CASES[case], F64, gradient=gradient)
    twin, solver = fused(block, engine), block.settings

    def plain(x: Tensor) -> Tensor:
        state = block.field.initial_state(x)
        return integrate(without_time(block.field), state, solver, Watch("", solver))[0]

    compare_second_derivatives(block, plain, twin, sample_input(2, 3, 6, 6, dtype=F64))


@pytest.mark.parametrize("engine", ALONE)
def test_a_gradient_of_samples_alone_may_be_differentiated(engine: str) -> None:
    block = block_of(CASES[2], F64, per_sample=True)
    twin, solver = fused(block, engine), block.settings

    def plain(x: Tensor) -> Tensor:
        slope, states = without_time(block.field), (block.field.initial_state(one) for one in x.split(1))
        return torch.cat([integrate(slope, state, solver, Watch("", solver))[0] for state in states])

    compare_second_derivatives(block, plain, twin, sample_input(2, 3, 6, 6, dtype=F64))


@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "dopri8"])
def test_its_gradient_is_the_difference_quotient_where_no_size_depends_on_the_input(method: str, engine: str) -> None:
    torch.manual_seed(0)
    field = reference.SkewPair(3, 4, 1, 0.1, "tanh", "group").double()
    twin = fused(reference.SOBlock(field, Solver(method, rtol=10.0, atol=10.0, first_step=1.5)), engine)
    x = sample_input(2, 3, 4, 4, dtype=F64).requires_grad_()
    with fastode.record_steps() as log:
        twin(x)
    assert log[0].times == (0.0, 1.5)
    assert torch.autograd.gradcheck(lambda x, *_: twin(x), (x, *twin.parameters()), fast_mode=True)


@pytest.mark.parametrize("engine", ALONE)
@pytest.mark.parametrize("gradient", ["solver", "exact"])
def test_same_input_same_bits_and_nothing_is_read_before_it_is_written(gradient: str, engine: str) -> None:
    block = fused(block_of(CASES[3], F32, gradient=gradient), engine)
    x = sample_input(7, 3, 8, 8).requires_grad_()

    def run() -> list[Tensor]:
        y = block(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]

    first, before = run(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN, scratch included
    try:
        assert torch.empty(3).isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)


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


def test_auto_takes_an_engine_that_has_the_solve_as_one() -> None:
    x = sample_input(1, 3, 8, 8)
    for gradient, per_sample in itertools.product(("solver", "constant", "exact"), (False, True)):
        block = reference.SOBlock(reference.SkewPair(3, 8), gradient=gradient, per_sample=per_sample)
        (name,) = fastode.fuse(block, example=x).rows[0].engines
        assert name == ALONE[0]
    # At stride 2 y has a quarter of the pixels: no map is larger than the 256 KB of 64 channels at 32×32.
    wide = fastode.nn.SOBlock(fastode.nn.SkewPair(64, 128, stride=2))
    assert wide.against(ALONE[0], sample_input(1, 64, 32, 32)) == ""
    # A batch norm in training couples the samples inside a stage.
    block = reference.SOBlock(reference.SkewPair(3, 8, norm="batch"))
    (name,) = fastode.fuse(block, example=x).rows[0].engines
    assert name in ENGINES and name not in ALONE
    assert block.why_not(ALONE[0], x) == "a batch norm of the skew pair couples the samples, which it takes one by one"


@pytest.mark.parametrize("engine", ENGINES)
def test_it_fails_as_the_reference_does(engine: str) -> None:
    options: list[tuple[dict[str, Any], float]] = [
        ({"max_steps": 1, "first_step": 0.3}, 1.0),
        ({}, float("nan")),
        ({"first_step": 0.1}, float("inf")),
        ({"first_step": 0.1}, float("nan")),
        ({"max_steps": 1, "first_step": 0.1}, float("nan")),
    ]
    for (changes, factor), alone in itertools.product(options, (False, True)):
        block = reference.SOBlock(
            reference.SkewPair(3, 8, norm="none").double(), Solver(rtol=1e-6, atol=1e-6, per_sample=alone, **changes)
        )
        x = sample_input(2, 3, 6, 6, dtype=F64)
        x[-1] *= factor
        assert len(set(errors_of((block, fused(block, engine)), x))) == 1


def errors_of(blocks: Iterable[nn.Module], x: Tensor) -> list[str]:
    """What each block says of why it cannot be solved from x, and how many attempts it has rejected."""
    found = []
    for block in blocks:
        with pytest.raises(SolveError) as caught, fastode.record_steps() as log:
            block(x)
        found.append(f"{caught.value}, {len(log[-1].rejected)} rejected")
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_state_of_finite_slopes_fails_as_the_reference_does(engine: str) -> None:
    # tanh of infinity is one, and in the last channel of an input that is not repeated infinity meets no other one.
    # Of 16 channels no vector has lanes beside them, in which infinity would be multiplied by zero.
    for inputs, channels, first_step in ((3, 3, 0.1), (3, 2, None), (16, 16, 0.1), (16, 2, None)):
        field = reference.SkewPair(inputs, channels, activation="tanh", norm="none")
        block = reference.SOBlock(field, Solver(first_step=first_step)).double()
        x = sample_input(2, inputs, 6, 6, dtype=F64)
        x[1, -1, 0, 0] = float("inf")
        assert all(slope.isfinite().all() for slope in field(*field.initial_state(x)))
        found = errors_of((block, fused(block, engine)), x)
        assert all("the state is not finite at t = 0 with h = " in error for error in found)
        assert first_step is None or found[0] == found[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_kept_where_no_gradient_is_asked_for(engine: str) -> None:
    block = fused(reference.SOBlock(reference.SkewPair(3, 8)), engine)
    x = sample_input(1, 3, 6, 6)
    expected = block(x)
    assert expected.grad_fn is not None
    with torch.no_grad():
        assert torch.equal(block(x), expected) and block(x).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_tracer_is_told_what_the_operators_return(per_sample: bool) -> None:
    field = reference.SkewPair(3, 8, 2, 0.1, "tanh", "group")
    pair = read_field(field.weight, 2, 1, 0.1, field.activation, [], ()).pair(None)
    x = sample_input(2, 3, 6, 6)
    code = (*encode(pair, [field.weight.detach(), *[None] * 16]), *solver_code(Solver(per_sample=per_sample)))
    for raises in (False, True):
        given = (x, *code, False, 0, raises)
        torch.library.opcheck(torch.ops.fastode.resident_solve_forward.default, given, test_utils=UTILITIES)
    y, log, _ = torch.ops.fastode.resident_solve_forward.default(*given)
    for through, wanted in ((1, False), (2, True)):
        given = (x, torch.ones_like(y), log, [], *code, through, wanted, wanted)
        torch.library.opcheck(torch.ops.fastode.resident_solve_backward.default, given, test_utils=UTILITIES)
