"""Solvers as values, and the adaptive solves of the reference: torchdiffeq's numbers, and three derivatives of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import fastode
from fastode import Solver, embedded, reference, tableau
from fastode.reference.adaptive import attempt, integrate, interpolated
from fastode.reference.timed import at_time
from fastode.steps import Watch
from fastode.testing import sample_input

METHODS = tuple(embedded.EMBEDDED)
TOLERANCES = {name: (0.1, 1e-3 if name in ("dopri5", "dopri8", "bosh3") else 0.01) for name in METHODS}
F64 = torch.float64


def time_field(channels: int = 3) -> nn.Sequential:
    """ODENet's field, smooth so that finite differences can be taken of it."""
    layers = []
    for _ in range(2):
        layers += [nn.GroupNorm(1, channels), nn.Tanh(), reference.TimeConv2d(channels, channels, padding=1)]
    return nn.Sequential(*layers, nn.GroupNorm(1, channels))


def pair_case() -> tuple[reference.SkewPair, Tensor]:
    return reference.SkewPair(2, 5, 1, 0.1, "tanh", "none").double(), sample_input(3, 2, 4, 4, dtype=F64)


def linear_case() -> tuple[reference.SkewLinear, Tensor]:
    return reference.SkewLinear(6, 3, 0.2, "softplus").double(), 2 * sample_input(3, 6, 1, 1, dtype=F64)[:, :, 0, 0]


def time_case() -> tuple[nn.Sequential, Tensor]:
    return time_field().double(), sample_input(2, 3, 4, 4, dtype=F64)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "pair": pair_case,
    "linear": linear_case,
    "time": time_case,
}


def block_of(field: nn.Module, **options: Any) -> nn.Module:
    kind = reference.ODEBlock if isinstance(field, nn.Sequential) else reference.SOBlock
    return kind(field, Solver(**options))


def slope_of(field: nn.Module) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    if isinstance(field, nn.Sequential):
        return lambda t, state: (at_time(field, t, state[0]),)
    return lambda t, state: field(*state)


def start_of(field: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if isinstance(field, nn.Sequential) else field.initial_state(x)


def torchdiffeqs(field: nn.Module, x: Tensor, solver: Solver) -> Tensor:
    """The solution as a user of torchdiffeq would take it."""
    times = torch.tensor([0.0, solver.t1], dtype=F64)
    options = {} if solver.first_step is None else {"options": {"first_step": solver.first_step}}
    state = odeint(
        *(slope_of(field), start_of(field, x), times),
        **{"rtol": solver.rtol, "atol": solver.atol, "method": solver.method, **options},
    )
    return state[0][-1]


def gradients(y: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad(y, [x, *module.parameters()], cotangent, retain_graph=True))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm().item(), 1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("method", "tolerance"), [(name, value) for name in METHODS for value in TOLERANCES[name]])
def test_the_plain_solve_is_torchdiffeqs_with_its_gradient(method: str, case: str, tolerance: float) -> None:
    torch.manual_seed(1)
    field, x = CASES[case]()
    x.requires_grad_()
    for first_step in (None, 0.7):
        solver = Solver(method, tolerance, tolerance / 2, t1=1.3, first_step=first_step)
        expected = torchdiffeqs(field, x, solver)
        found = integrate(slope_of(field), start_of(field, x), solver, Watch("", solver))[0]
        block = block_of(field, **dataclasses.asdict(solver))(x)
        for y in (found, block):
            assert_close([y, *gradients(y, x, field)], [expected, *gradients(expected, x, field)], 1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_per_sample_is_torchdiffeq_on_each_sample_alone(method: str, case: str) -> None:
    torch.manual_seed(2)
    field, x = CASES[case]()
    x = (x * torch.linspace(0.2, 3, len(x), dtype=F64).view(-1, *[1] * (x.dim() - 1))).requires_grad_()
    solver = Solver(method, 0.01, 0.01, t1=2.0, per_sample=True)
    with fastode.record_steps() as log:
        found = block_of(field, **dataclasses.asdict(solver))(x)
    assert [solve.sample for solve in log] == list(range(len(x)))
    expected = torch.cat([torchdiffeqs(field, x[i : i + 1], solver) for i in range(len(x))])
    assert_close([found, *gradients(found, x, field)], [expected, *gradients(expected, x, field)], 1e-10)


def test_samples_of_different_size_take_different_steps() -> None:
    field = reference.SkewLinear(4, 3, activation="tanh").double()
    x = torch.tensor([[0.01] * 4, [30.0] * 4], dtype=F64)
    with fastode.record_steps() as log:
        reference.SOBlock(field, "bosh3", 1e-4, 1e-4, t1=3.0, per_sample=True)(x)
    assert log[0].times != log[1].times


def difference(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, size: float = 1e-6) -> Tensor:
    with torch.no_grad():
        return (f(x + size * direction) - f(x - size * direction)) / (2 * size)


# (method, tolerance, first step): the second and the last reject an attempt, which the test looks at.
CONTROLS = [
    ("dopri5", 0.1, None),
    ("dopri5", 1e-4, 1.5),
    ("bosh3", 1e-2, None),
    ("adaptive_heun", 1e-2, None),
    ("fehlberg2", 1e-2, None),
    ("dopri8", 1e-6, 2.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("method", "tolerance", "first_step"), CONTROLS)
def test_exact_is_the_derivative_of_the_numbers(
    method: str, tolerance: float, first_step: float | None, case: str
) -> None:
    torch.manual_seed(3)
    field, x = CASES[case]()
    x.requires_grad_()
    options = {"method": method, "rtol": tolerance, "atol": tolerance, "t1": 2.0, "first_step": first_step}
    block = block_of(field, gradient="exact", **options)
    with fastode.record_steps() as log:
        y = block(x)
    assert bool(log[0].rejected) == (first_step is not None)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape)
    slope_x, *slopes = torch.autograd.grad(y, [x, *field.parameters()], cotangent, retain_graph=True)
    direction = torch.linspace(1, -2, x.numel(), dtype=F64).view(x.shape).sin()
    numeric = (difference(block, x, direction) * cotangent).sum()
    assert abs(numeric - (slope_x * direction).sum()) <= 1e-6 * max(abs(numeric), 0.1)
    largest = max(range(len(slopes)), key=lambda i: slopes[i].norm().item())
    parameter = list(field.parameters())[largest]

    def with_parameter(value: Tensor) -> Tensor:
        other = copy.deepcopy(block)
        list(other.parameters())[largest].data.copy_(value)
        return other(x)

    numeric = (difference(with_parameter, parameter.detach(), slopes[largest]) * cotangent).sum()
    assert abs(numeric - slopes[largest].square().sum()) <= 1e-6 * abs(numeric)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_constant_is_the_derivative_at_the_steps_that_were_taken(method: str, case: str) -> None:
    torch.manual_seed(4)
    field, x = CASES[case]()
    x.requires_grad_()
    block = block_of(field, method=method, rtol=1e-3, atol=1e-3, t1=2.0, gradient="constant")
    with fastode.record_steps() as log:
        y = block(x)
    times = torch.tensor(log[0].times, dtype=F64)
    slope, rows = slope_of(field), embedded.EMBEDDED[method]

    def replayed(x: Tensor) -> Tensor:
        state = start_of(field, x)
        first = slope(times[0], state)
        for t, h in zip(times, times.diff(), strict=False):
            end, slopes, _ = attempt(slope, state, first, t, h, rows, block.settings)
            value = interpolated(rows, state, end, slopes, h, (2.0 - t) / h)
            state, first = end, slopes[-1]
        return value[0]

    assert_close([replayed(x)], [y], 1e-10)
    assert_close(gradients(y, x, field), gradients(replayed(x), x, field), 1e-8)
    (slope_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    numeric = difference(replayed, x, torch.ones_like(x)).sum()
    assert abs(numeric - slope_x.sum()) <= 1e-6 * max(abs(numeric), 0.1)


def test_the_three_gradients_differ_and_the_outputs_do_not() -> None:
    torch.manual_seed(5)
    field, x = pair_case()
    x.requires_grad_()
    outputs, slopes = [], []
    for gradient in ("solver", "constant", "exact"):
        y = block_of(field, gradient=gradient)(x)
        outputs.append(y)
        slopes.append(gradients(y, x, field)[0])
    assert_close(outputs[1:], outputs[:1] * 2, 1e-12)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (slopes[i] - slopes[j]).norm() > 1e-3 * slopes[j].norm()


def test_the_gradients_of_equal_steps_are_one() -> None:
    field, x = pair_case()
    x.requires_grad_()
    found = [gradients(y := block_of(field, method="rk4", gradient=g)(x), x, field) for g in fastode.solver.GRADIENTS]
    assert len(y) == 3 and all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("gradient", ["constant", "exact"])
def test_gradients_of_gradients(gradient: str) -> None:
    field = reference.SkewLinear(3, 2, 0.1, "tanh").double()
    x = torch.tensor([[0.3, -0.2, 0.9]], dtype=F64, requires_grad=True)
    block = reference.SOBlock(field, Solver(gradient=gradient, rtol=0.01, atol=0.01))
    if gradient == "exact":
        assert torch.autograd.gradcheck(block, x)
        assert torch.autograd.gradgradcheck(block, x)
    else:
        (slope,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def test_tableaus_of_the_users_own() -> None:
    field, x = time_case()
    heun = tableau.Butcher("heun", a=((), (1.0,)), b=(0.5, 0.5), order=2)
    times = torch.linspace(0, 1, 4, dtype=F64)
    wanted = odeint(lambda t, u: at_time(field, t, u), x, times, method="heun2")[-1]
    assert_close([reference.ODEBlock(field, heun, steps=3)(x)], [wanted], 1e-12)
    mine = dataclasses.replace(embedded.DOPRI5, name="mine")
    assert_close([reference.ODEBlock(field, mine)(x)], [reference.ODEBlock(field, "dopri5")(x)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", fastode.solver.GRADIENTS)
def test_the_state_keeps_its_dtype(dtype: torch.dtype, gradient: str) -> None:
    for block, x in (
        (block_of(reference.SkewPair(2, 3), gradient=gradient), sample_input(2, 2, 4, 4)),
        (block_of(time_field(), gradient=gradient), sample_input(2, 3, 4, 4)),
    ):
        x = x.to(dtype).requires_grad_()
        y = block.to(dtype)(x)
        assert y.dtype is dtype and y.isfinite().all()
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype is dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("gradient", fastode.solver.GRADIENTS)
def test_a_state_of_zeros_has_a_gradient(gradient: str) -> None:
    x = torch.zeros(1, 3, 4, 4, dtype=F64, requires_grad=True)
    block_of(time_field().double(), gradient=gradient)(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_batch_of_none() -> None:
    for per_sample in (False, True):
        x = torch.zeros(0, 3, 4, 4, requires_grad=True)
        y = reference.ODEBlock(time_field(), per_sample=per_sample)(x)
        y.sum().backward()
        assert y.shape == x.shape


def test_a_block_takes_a_solver_whole_or_by_parts() -> None:
    field = reference.SkewPair(2, 3)
    solver = Solver("bosh3", 0.2, 0.3, 2.0, 4, "exact", True, 50, 0.5)
    parts = dataclasses.asdict(solver)
    method = parts.pop("method")
    made = [
        *(reference.SOBlock(field, solver), reference.SOBlock(field, method, **parts)),
        *(reference.SOClassifier(4, 3, solver=solver), reference.SOClassifier(4, 3, solver=method, **parts)),
        *(reference.ODEBlock(time_field(), solver), reference.ODEBlock(time_field(), method, **parts)),
    ]
    assert {block.settings for block in made} == {solver}
    assert reference.SOBlock(field).settings == Solver()
    assert pickle.loads(pickle.dumps(made[0])).settings == solver
    # An attribute that is changed between calls is used, and checked, at the next one.
    made[0].method, made[0].rtol = "dopri5", -1.0
    with pytest.raises(ValueError, match=r"^rtol must be a finite number > 0, got -1\.0$"):
        made[0](torch.zeros(1, 2, 4, 4))


def test_a_solver_is_frozen_and_hashable() -> None:
    assert hash(Solver()) == hash(Solver("dopri5")) and Solver().is_adaptive and not Solver("rk4").is_adaptive
    with pytest.raises(dataclasses.FrozenInstanceError):
        Solver().rtol = 1.0  # type: ignore[misc]


NAMES = "'euler', 'midpoint', 'rk4', 'dopri5', 'dopri8', 'bosh3', 'fehlberg2', 'adaptive_heun'"
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "rk5"}, ValueError, f"method must be one of {NAMES}, got 'rk5'"),
    ({"method": 5}, TypeError, f"method must be a fastode.tableau.Butcher or one of {NAMES}, got 5"),
    ({"t1": 0}, ValueError, "t1 must be a finite number > 0, got 0"),
    ({"t1": -1.0}, ValueError, "t1 must be a finite number > 0, got -1.0"),
    ({"rtol": math.nan}, ValueError, "rtol must be a finite number > 0, got nan"),
    ({"atol": "0.1"}, TypeError, "atol must be a finite number > 0, got '0.1'"),
    ({"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
    (
        {"gradient": "adjoint"},
        ValueError,
        "gradient must be one of 'solver', 'constant', 'exact', got 'adjoint'",
    ),
    ({"per_sample": 1}, TypeError, "per_sample must be True or False, got 1"),
    ({"max_steps": 0}, ValueError, "max_steps must be an int >= 1, got 0"),
    ({"first_step": math.inf}, ValueError, "first_step must be a finite number > 0, got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refused:
        Solver(**change)
    assert type(refused.value) is error and str(refused.value) == message
    name = next(iter(change))
    if name != "method":
        with pytest.raises(error) as refused:
            reference.SOBlock(reference.SkewPair(2, 3), **change)
        assert str(refused.value) == message


def test_what_blocks_refuse() -> None:
    field = reference.SkewPair(2, 3, norm="batch")
    for call, error, message in (
        (
            lambda: reference.SOBlock(field, Solver(), rtol=0.1, atol=0.2),
            TypeError,
            "solver must be a Solver, or a method with its parts, got a Solver and atol",
        ),
        (
            lambda: reference.SOBlock(field, 3),
            TypeError,
            f"solver must be a Solver, a fastode.tableau.Butcher or one of {NAMES}, got 3",
        ),
        (
            lambda: reference.SOBlock(field, per_sample=True)(torch.zeros(2, 2, 4, 4)),
            ValueError,
            "per_sample must be False where samples see each other, got a batch norm in training mode as the field's "
            "pre_norm_y",
        ),
        (lambda: reference.ODEBlock(None), TypeError, "field must be an nn.Module, got None"),
        (lambda: reference.ODEBlock(nn.ReLU())(3), TypeError, "x must be a tensor, got 3"),
        (
            lambda: reference.ODEBlock(nn.Conv2d(2, 3, 1))(torch.zeros(1, 2, 4, 4)),
            ValueError,
            "field must be a map to the shape [1, 2, 4, 4], got an output of [1, 3, 4, 4]",
        ),
        (lambda: reference.TimeConv2d(2, 3, padding=-1), ValueError, "padding must be an int >= 0, got -1"),
        (
            lambda: reference.TimeConv2d(2, 3)(0.0, torch.zeros(1, 3, 4, 4)),
            ValueError,
            "x must be a tensor [N, 2, H, W], got shape [1, 3, 4, 4]",
        ),
    ):
        with pytest.raises(error) as refused:
            call()
        assert type(refused.value) is error and str(refused.value) == message
    # Its statistics given, no sample sees another.
    assert reference.SOBlock(field.eval(), per_sample=True)(torch.zeros(2, 2, 4, 4)).shape == (2, 3, 4, 4)
