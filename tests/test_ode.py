"""The solution of a single map's equation as one Function: that it equals the reference, step by step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from second_derivatives import compare_second_derivatives
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference
from fastode.dispatch.engines import BY_NAME
from fastode.reference.adaptive import integrate
from fastode.reference.solvers import solve_fixed
from fastode.reference.timed import at_time
from fastode.solver import GRADIENTS
from fastode.steps import Watch
from fastode.testing import assert_blocks_equal, sample_input

F32, F64 = torch.float32, torch.float64
ENGINES = [name for name, engine in BY_NAME.items() if "ode_solution" in vars(type(engine))]
COUPLED = [name for name in ENGINES if not BY_NAME[name].solution_from_x]  # which have batch norms in training, too

NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "group": lambda c: [nn.GroupNorm(min(4, c), c)],
    "layer": lambda c: [nn.GroupNorm(1, c)],
    "instance": lambda c: [nn.InstanceNorm2d(c, affine=True)],
    "none": lambda c: [],
    "batch": lambda c: [nn.BatchNorm2d(c)],
}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus, "elu": nn.ELU, "silu": nn.SiLU}

# Channels, norm, activation, whether the convolutions see the time, whether the field ends in a norm, and the solver.
# A given first step is too long for its tolerance, so that it is rejected.
Case = tuple[int, str, str, bool, bool, dict[str, Any]]
CASES: list[Case] = [
    (8, "group", "relu", True, True, {"method": "dopri5"}),
    (8, "group", "tanh", True, True, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}),
    (6, "instance", "softplus", True, False, {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3, "t1": 0.7}),
    (5, "none", "elu", False, False, {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6, "t1": 2.0, "first_step": 9.0}),
    (8, "layer", "silu", True, True, {"method": "fehlberg2", "t1": 2.0}),
    (4, "none", "tanh", True, False, {"method": "adaptive_heun", "rtol": 1e-2, "atol": 1e-2}),
    (4, "layer", "tanh", True, False, {"method": "dopri8", "rtol": 1e-6, "atol": 1e-6, "t1": 2.0, "first_step": 2.0}),
    (8, "group", "relu", True, True, {"method": "rk4", "steps": 3}),
    (8, "layer", "tanh", False, True, {"method": "midpoint", "steps": 2}),
    (6, "batch", "tanh", True, True, {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}),
    (6, "batch", "elu", True, False, {"method": "euler", "steps": 2}),
]
RUNS = [
    pytest.param(case, engine, id=f"{case}-{engine}")
    for engine in ENGINES
    for case in range(len(CASES))
    if CASES[case][1] != "batch" or engine in COUPLED
]


def field_of(channels: int, norm: str, activation: str, timed: bool, ends_in_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        conv = reference.TimeConv2d if timed else nn.Conv2d
        layers += [*NORMS[norm](channels), ACTIVATIONS[activation](), conv(channels, channels, 3, padding=1)]
    return nn.Sequential(*layers, *(NORMS[norm](channels) if ends_in_norm else []))


def block_of(case: Case, dtype: torch.dtype, **more: Any) -> reference.ODEBlock:
    torch.manual_seed(0)
    return reference.ODEBlock(field_of(*case[:-1]).to(dtype), Solver(**case[-1] | more))


def fused(block: nn.Module, engine: str) -> Any:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=engine)
    return twin


def sample_of(case: Case, dtype: torch.dtype, batch: int = 2) -> Tensor:
    return sample_input(batch, case[0], 5, 4, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("case", "engine"), RUNS)
def test_it_equals_the_reference(case: int, engine: str, dtype: torch.dtype) -> None:
    # Each case meets all gradients: in one dtype the first and in the other, in turn, one of the others.
    others = GRADIENTS[1:]
    gradient = others[(case + ENGINES.index(engine)) % 2] if (dtype is F64) == bool(case % 2) else GRADIENTS[0]
    block = block_of(CASES[case], dtype, gradient=gradient)
    assert_blocks_equal(block, fused(block, engine), sample_of(CASES[case], dtype), mode=("train", "input_grad"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 1, 5), (16, 7, 7), (20, 2, 3), (8, 12, 9)])
def test_it_equals_the_reference_on_every_shape(channels: int, height: int, width: int, engine: str) -> None:
    options = ({"method": "bosh3", "rtol": 1e-3, "atol": 1e-3}, {"method": "rk4"})
    for batch, layout in itertools.product((1, 5), ("contiguous", "channels_last")):
        torch.manual_seed(1)
        wide = nn.Sequential(
            *(nn.Tanh(), reference.TimeConv2d(channels, 2 * channels, 5, padding=2, bias=False)),
            *(nn.GroupNorm(1, 2 * channels), nn.SiLU(), reference.TimeConv2d(2 * channels, channels, 1)),
        )
        block = reference.ODEBlock(wide.double(), Solver(**options[batch == 1]))
        x = sample_input(batch, channels, height, width, dtype=F64, layout=layout)
        assert_blocks_equal(block, fused(block, engine), x, mode=("forward", "train"))


@pytest.mark.parametrize(("case", "engine"), [run for run in RUNS if "rtol" in CASES[run.values[0]][-1]])
def test_it_takes_the_same_steps(case: int, engine: str) -> None:
    for alone in (False,) if CASES[case][1] == "batch" else (False, True):
        block = block_of(CASES[case], F64, per_sample=alone)
        twin, x = fused(block, engine), sample_of(CASES[case], F64)
        with fastode.record_steps() as log, torch.no_grad():
            block(x), twin(x)
        half = len(log) // 2
        assert half == (2 if alone else 1)
        for one, other in zip(log[:half], log[half:], strict=True):
            assert other.times == pytest.approx(one.times, rel=1e-7)
            assert (other.evaluations, len(other.rejected)) == (one.evaluations, len(one.rejected))
            assert (other.block, other.solver, other.sample) == (one.block, one.solver, one.sample)
            assert bool(one.rejected) == ("first_step" in CASES[case][-1])
        # Every evaluation updates batch norms once.
        counts = [
            [int(norm.num_batches_tracked) for norm in b.modules() if isinstance(norm, nn.BatchNorm2d)]
            for b in (block, twin)
        ]
        assert counts[0] == counts[1] == [one.evaluations] * len(counts[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_alone_equal_the_reference(engine: str) -> None:
    for case, gradient in ((1, "solver"), (3, "constant"), (1, "exact")):
        block = block_of(CASES[case], F64, gradient=gradient, per_sample=True)
        assert_blocks_equal(block, fused(block, engine), sample_of(CASES[case], F64, 3), mode="train")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("case", "gradient"), [(1, "solver"), (1, "constant"), (3, "solver"), (3, "exact"), (7, "solver")]
)
def test_a_gradient_may_be_differentiated(case: int, gradient: str, engine: str) -> None:
    block = block_of(CASES[case], F64, gradient=gradient)
    twin, solver = fused(block, engine), block.settings

    def slope(t: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (at_time(block.field, t, state[0]),)

    def plain(x: Tensor) -> Tensor:
        if solver.is_adaptive:
            return integrate(slope, (x,), solver, Watch("", solver))[0]
        return solve_fixed(slope, (x,), solver.tableau, solver.t1, solver.steps)[0]

    compare_second_derivatives(block, plain, twin, sample_of(CASES[case], F64))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradient", ["solver", "exact"])
def test_same_input_same_bits_and_nothing_is_read_before_it_is_written(engine: str, gradient: str) -> None:
    block = fused(block_of(CASES[1], F32, gradient=gradient), engine)
    x = sample_input(7, 8, 6, 5).requires_grad_()
    y = block(x)
    # A second way back through the same graph finds the same.
    found = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()], retain_graph=True) for _ in range(2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN, scratch included
    try:
        again = block(x)
        found.append(torch.autograd.grad(again.square().sum(), [x, *block.parameters()]))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(again, y)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_kept_where_no_gradient_is_asked_for(engine: str) -> None:
    block = fused(block_of(CASES[0], F32), engine)
    x = sample_of(CASES[0], F32)
    expected = block(x)
    assert expected.grad_fn is not None
    with torch.no_grad():
        assert torch.equal(block(x), expected) and block(x).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_some_parameters_alone(engine: str) -> None:
    block = block_of(CASES[1], F64)
    x, twin = sample_of(CASES[1], F64).requires_grad_(), fused(block, engine)
    for name in ("2._layer.weight", "5._layer.bias", "3.weight"):
        one, other = (torch.autograd.grad(b(x).square().sum(), b.field.get_parameter(name))[0] for b in (block, twin))
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_fails_as_the_reference_does(engine: str) -> None:
    options: list[tuple[dict[str, Any], float]] = [
        ({"max_steps": 1, "first_step": 0.3}, 1.0),
        ({}, float("nan")),
        ({}, float("inf")),
        ({"first_step": 0.1}, float("inf")),
    ]
    for (changes, factor), alone in itertools.product(options, (False, True)):
        field = field_of(4, "none", "tanh", True, False).double()
        block = reference.ODEBlock(field, Solver(rtol=1e-6, atol=1e-6, per_sample=alone, **changes))
        x = sample_input(2, 4, 4, 4, dtype=F64)
        x[-1] *= factor
        found = []
        for solve in (block, fused(block, engine)):
            with pytest.raises(SolveError) as caught:
                solve(x)
            found.append(caught.value)
        assert str(found[0]) == str(found[1])


Change = Callable[[Any], Any]
CHANGES: dict[str, Change] = {
    "a weight written over": lambda b: b.field[2]._layer.weight.data.mul_(1.5),
    "a weight replaced": lambda b: setattr(b.field[5]._layer, "weight", nn.Parameter(b.field[2]._layer.weight.data)),
    "a layer replaced": lambda b: b.field.__setitem__(1, nn.SiLU()),
    "a hook": lambda b: b.field[2]._layer.register_forward_hook(lambda m, given, out: 2 * out),
    "the tolerance": lambda b: setattr(b, "rtol", 1e-5),
    "the method": lambda b: setattr(b, "solver", "rk4"),
}


def everything(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    parameters = dict(block.named_parameters())
    found = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return {"output": y.detach()} | dict(zip(["gradient of x", *parameters], found, strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_seen(change: str) -> None:
    block = block_of(CASES[1], F64)
    twin = fused(block, "auto")
    x = sample_of(CASES[1], F64)
    for step in range(3):
        if step == 1:
            for each in (block, twin):
                CHANGES[change](each)
        found, expected = everything(twin, x), everything(block, x)
        for name, one in expected.items():
            assert (found[name] - one).norm() <= 1e-10 * one.norm(), name


def test_functional_call_is_seen_and_leaves_nothing() -> None:
    block = block_of(CASES[7], F64)
    twin, x = fused(block, "auto"), sample_of(CASES[7], F64)
    before = twin(x)
    other = {name: p.detach() * 1.5 for name, p in block.named_parameters()}
    expected, found = (torch.func.functional_call(each, other, (x,)) for each in (block, twin))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_run_is_refused_in_a_sentence(engine: str) -> None:
    x = sample_input(2, 8, 5, 4)
    timed = field_of(*CASES[0][:-1])
    cases: list[tuple[nn.Module, dict[str, Any], Tensor, str]] = [
        (timed, {}, x.bfloat16(), "it solves a single map's equation in float32 and float64 only"),
        (nn.Sequential(nn.ReLU()), {}, x[0], "the input is no feature map [N, C, H, W]"),
        (nn.Sequential(nn.Mish()), {}, x, "field.0 (Mish) is of a type the reader does not know."),
    ]
    for field, options, given, reason in cases:
        block = fastode.nn.ODEBlock(field.to(given.dtype), **options)
        assert block.why_not(engine, given) == reason
        block.engine = engine
        with pytest.raises(ValueError, match="engine must be one that can run this block"):
            block(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastode.nn.ODEBlock(timed).why_not(engine, x) == "autocast would lower the time as well"


def test_a_batch_norm_in_training_leaves_it_to_an_engine_that_has_one() -> None:
    block = fastode.nn.ODEBlock(field_of(8, "batch", "relu", True, True))
    x = sample_input(2, 8, 5, 4)
    without = [name for name in ENGINES if name not in COUPLED]
    for name in without:
        assert "batch norm of the field couples the samples" in block.why_not(name, x)
    with fastode.dispatch.choice.recording() as used:
        block(x)
        block.eval()(x)
    assert used[block] in ENGINES
    assert all(not block.why_not(name, x) for name in ENGINES)  # in eval mode its statistics are fixed


@pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), nn.LeakyReLU, nn.Sigmoid, nn.GELU])
def test_a_field_may_end_in_an_activation(activation: type[nn.Module]) -> None:
    # What fills up a vector of channels must be and stay zero, or the error's norm would count it.
    torch.manual_seed(0)
    field = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), activation()).double()
    block = reference.ODEBlock(field, Solver("bosh3", rtol=1e-3, atol=1e-3))
    x, ran = sample_input(2, 3, 4, 4, dtype=F64), 0
    for engine in ENGINES:
        twin = fused(block, engine)
        reason = twin.why_not(engine, x)
        if reason:
            assert reason.startswith("a field that ends in ")
        else:
            assert_blocks_equal(block, twin, x, mode="train")
            ran += 1
    assert ran


def test_other_blocks_are_not_told_the_time() -> None:
    branch = nn.Sequential(nn.ReLU(), reference.TimeConv2d(8, 8, padding=1))
    reasons = {fastode.nn.ResBlock(branch).why_not(engine, sample_input(1, 8, 4, 4)) for engine in ENGINES}
    assert reasons == {"branch.1 (TimeConv2d) sees the time, which this block does not tell."}


def test_bad_input_is_refused_before_anything_runs() -> None:
    block = fastode.nn.ODEBlock(field_of(8, "batch", "relu", True, True))
    for x, error, words in (
        (torch.zeros(1, 4, 3, 3), ValueError, r"x must be a tensor \[N, 8, H, W\], got shape \[1, 4, 3, 3\]"),
        (torch.zeros(1, 8, 3, 3).double(), TypeError, "x must be of the parameters' dtype float32, got float64"),
        (torch.zeros(1, 8, 1, 1), ValueError, "x must be larger than one value for each normalised set"),
    ):
        with pytest.raises(error, match=words):
            block(x)
    assert all(int(norm.num_batches_tracked) == 0 for norm in block.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_compiler_takes_steps_by_error_as_one_operator() -> None:
    for engine, case in (("auto", 0), (ENGINES[-1], 7)):
        block = fused(block_of(CASES[case], F64), engine)
        x = sample_of(CASES[case], F64)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            expected, found = everything(block, x), everything(compiled, x)
            assert all(torch.equal(found[f"{name}"], one) for name, one in expected.items() if name in found)
            block.field[2]._layer.weight.data.mul_(1.5)


def test_auto_takes_what_was_measured_to_be_faster() -> None:
    wide = fastode.nn.ODEBlock(nn.Sequential(nn.ReLU(), nn.Conv2d(520, 520, 1)), "euler")
    x = sample_input(1, 520, 2, 2)
    first, *others = ENGINES
    assert wide.against(first, x) == "with more than 512 channels it was not measured"
    for name in others:
        words = "with more than 256 channels it was measured to be slower than plain PyTorch"
        assert wide.against(name, x) == words
    assert fastode.fuse(nn.Sequential(wide), example=x).rows[0].engines == ("reference",)
    assert fastode.fuse(block_of(CASES[0], F32), example=sample_of(CASES[0], F32)).rows[0].engines == (first,)
