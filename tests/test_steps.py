"""Step traces and failures of adaptive solves, and blocks on fields that see the time."""

from __future__ import annotations

import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference, steps
from fastode.solver import GRADIENTS

F64 = torch.float64


class Counted(nn.Module):
    """A field of a single map that counts its evaluations, and the times at which they are made."""

    sees_time = True

    def __init__(self, slope: Any) -> None:
        super().__init__()
        self.slope = slope
        self.times: list[float] = []

    def forward(self, t: Any, u: Tensor) -> Tensor:
        self.times.append(float(t))
        return self.slope(t, u)


def explode(t: Any, u: Tensor) -> Tensor:
    return u**2


def stiff(t: Any, u: Tensor) -> Tensor:
    return 1e3 * (torch.sin(1e3 * u) + u)


@pytest.fixture(params=GRADIENTS)
def gradient(request: pytest.FixtureRequest) -> str:
    return request.param


ONE = torch.ones(1, 1, 1, 1, dtype=F64)


def test_a_log_has_every_attempt(gradient: str) -> None:
    field = Counted(lambda t, u: torch.cos(7 * u) * u)
    block = reference.ODEBlock(field, "bosh3", rtol=1e-3, atol=1e-3, t1=3.0, gradient=gradient, first_step=2.0)
    with fastode.record_steps() as log:
        block(ONE)
    (solve,) = log
    assert solve.evaluations == len(field.times)
    attempts = len(solve.times) - 1 + len(solve.rejected)
    assert len(solve.rejected) > 0 and solve.evaluations == 1 + 3 * attempts
    assert solve.times[0] == 0 and list(solve.times) == sorted(solve.times)
    assert solve.times[-2] < 3.0 <= solve.times[-1]
    assert len(solve.ratios) == len(solve.times) - 1 and all(0 <= ratio <= 1 for ratio in solve.ratios)
    assert solve.rejected[0][:2] == (0.0, 2.0) and all(ratio > 1 for _, _, ratio in solve.rejected)
    assert (solve.block, solve.solver, solve.sample, solve.error) == ("ODEBlock on Counted", block.settings, None, "")
    # The control: what follows each attempt is 0.9 of its size over the third root of its ratio, within bounds.
    first, second = solve.rejected[0], (solve.rejected[1] if len(solve.rejected) > 1 else None)
    following = second[1] if second else solve.times[1]
    assert following == pytest.approx(first[1] * max(0.2, 0.9 / first[2] ** (1 / 3)))


def test_the_two_solves_have_one_trace() -> None:
    logs = []
    for gradient in GRADIENTS:
        block = reference.SOBlock(reference.SkewPair(2, 3).double(), "dopri5", 1e-3, 1e-3, gradient=gradient)
        for parameter in block.parameters():
            nn.init.ones_(parameter)
        with fastode.record_steps() as log:
            block(torch.linspace(0, 1, 32, dtype=F64).view(1, 2, 4, 4))
        logs.append(log[0])
    for log in logs[1:]:
        assert log.times == pytest.approx(logs[0].times, rel=1e-9)
        assert log.ratios == pytest.approx(logs[0].ratios, rel=1e-6)
        assert (len(log.rejected), log.evaluations) == (len(logs[0].rejected), logs[0].evaluations)


def test_a_log_is_printed_as_a_table() -> None:
    with fastode.record_steps() as log:
        reference.ODEBlock(Counted(lambda t, u: u), Solver(per_sample=True, first_step=0.25))(torch.ones(2, 1, 1, 1))
    table = """
block                          method  tolerance  times                  error ratios    rejected  evaluations
ODEBlock on Counted, sample 0  dopri5  0.1        [0.000, 0.250, 2.750]  [0.000, 0.013]  0         13
ODEBlock on Counted, sample 1  dopri5  0.1        [0.000, 0.250, 2.750]  [0.000, 0.013]  0         13
"""
    assert str(log) == table.strip()


def test_nothing_is_recorded_outside_and_logs_nest() -> None:
    block = reference.ODEBlock(Counted(lambda t, u: -u))
    with fastode.record_steps() as outer:
        block(ONE)
        with fastode.record_steps() as inner:
            block(ONE)
        reference.ODEBlock(Counted(lambda t, u: -u), "rk4")(ONE)
    block(ONE)
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[1] == inner[0]


def failing(slope: Any, x: Tensor = ONE, **options: Any) -> SolveError:
    with pytest.raises(SolveError) as caught, fastode.record_steps() as log:
        reference.ODEBlock(Counted(slope), Solver(**options))(x)
    error = caught.value
    assert isinstance(error, RuntimeError) and error.__cause__ is None and error.__suppress_context__
    assert log[-1].error == error.reason
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is SolveError and str(again) == str(error)
    return error


def test_a_solution_that_leaves_the_finite_says_where(gradient: str) -> None:
    # u' = u² from 1 has its pole at t = 1; steps near it shrink until the time stands still.
    error = failing(explode, t1=2.0, rtol=1e-4, atol=1e-4, gradient=gradient)
    assert error.block == "ODEBlock on Counted" and error.reason == "the step is too small to move the time"
    assert abs(error.t - 1) < 1e-2 and 0 < error.h < 1e-10 and error.ratio > 1
    pattern = (
        r"ODEBlock on Counted: the step is too small to move the time at t = \S+ with h = \S+, error ratio \S+; "
        r"try larger tolerances, a solver in equal steps, or a smoother or damped field"
    )
    assert re.fullmatch(pattern, str(error))


def test_too_many_attempts(gradient: str) -> None:
    error = failing(stiff, t1=5.0, rtol=1e-6, atol=1e-6, max_steps=7, gradient=gradient)
    assert error.reason == "max_steps = 7 attempts did not reach t1 = 5"
    assert 0 <= error.t < 5 and error.h > 0 and error.ratio >= 0
    assert str(error).endswith("; raise max_steps or the tolerances, or shorten t1")


def test_as_many_attempts_as_are_allowed(gradient: str) -> None:
    for attempts in (1, 2):
        block = reference.ODEBlock(
            Counted(lambda t, u: -u), Solver(max_steps=attempts, first_step=0.6, gradient=gradient)
        )
        if attempts == 1:
            with pytest.raises(SolveError, match="max_steps = 1 "):
                block(ONE)
        else:
            assert block(ONE).isfinite().all()


def test_a_state_that_is_not_finite(gradient: str) -> None:
    for value in (math.nan, math.inf):
        error = failing(lambda t, u: 0 * u, x=value * ONE, gradient=gradient)
        assert error.reason == "the state is not finite" and error.t == 0


def test_a_slope_that_is_not_finite(gradient: str) -> None:
    error = failing(lambda t, u: u * math.nan, gradient=gradient)
    assert error.reason == "the field gave a value that is not finite" and error.t == 0
    error = failing(lambda t, u: u.clamp(max=1.2) - math.log(1) if u.max() < 1.2 else u * math.nan, gradient=gradient)
    assert error.reason == "the field gave a value that is not finite"
    error = failing(lambda t, u: u if float(t) < 0.1 else u * math.inf, gradient=gradient, first_step=0.5)
    assert error.reason == "the field gave a value that is not finite"


def test_a_sample_alone_is_named() -> None:
    x = torch.tensor([0.1, 5.0], dtype=F64).view(2, 1, 1, 1)
    error = failing(explode, x, t1=1.0, rtol=1e-4, atol=1e-4, per_sample=True)
    assert error.block == "ODEBlock on Counted, sample 1"


def test_an_assertion_of_the_field_is_its_own() -> None:
    def refuse(t: Any, u: Tensor) -> Tensor:
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match=r"^mine$"):
        reference.ODEBlock(Counted(refuse))(ONE)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "bosh3"])
def test_the_times_that_a_field_sees(method: str) -> None:
    seen = []
    for gradient in GRADIENTS:
        field = Counted(lambda t, u: u)
        reference.ODEBlock(field, Solver(method, first_step=0.5, t1=0.75, gradient=gradient, steps=2))(ONE)
        seen.append(field.times)
    assert seen[1] == pytest.approx(seen[0], rel=1e-14) and seen[2] == seen[1]
    if method == "rk4":
        assert seen[0] == pytest.approx([0, 0.125, 0.25, 0.375, 0.375, 0.5, 0.625, 0.75])
    else:
        # At a step's end the time is the last one before it, where a field may jump.
        assert seen[0].count(math.nextafter(0.5, 0)) == (2 if method == "dopri5" else 1)
        assert 0.5 not in seen[0]


def test_a_time_convolution_is_one_of_the_time_and_x() -> None:
    conv = reference.TimeConv2d(2, 4, stride=2, padding=1).double()
    assert [name for name, _ in conv.named_parameters()] == ["_layer.weight", "_layer.bias"]
    assert conv._layer.weight.shape == (4, 3, 3, 3)
    x = torch.randn(2, 2, 5, 6, dtype=F64)
    wanted = nn.functional.conv2d(x, conv._layer.weight[:, 1:], conv._layer.bias, stride=2, padding=1)
    times = torch.full_like(x[:, :1], 0.7)
    wanted = wanted + nn.functional.conv2d(times, conv._layer.weight[:, :1], stride=2, padding=1)
    for t in (0.7, torch.tensor(0.7, dtype=F64)):
        torch.testing.assert_close(conv(t, x), wanted)


def test_a_field_may_be_nested_and_work_in_place() -> None:
    inner = nn.Sequential(nn.ReLU(inplace=True), reference.TimeConv2d(2, 2, padding=1))
    x = torch.randn(1, 2, 4, 4)
    before = x.clone()
    for field in (nn.Sequential(inner, nn.Identity()), nn.ReLU(inplace=True), reference.TimeConv2d(2, 2, padding=1)):
        y = reference.ODEBlock(field, "midpoint")(x)
        assert torch.equal(x, before) and y.shape == x.shape
    t = torch.zeros(())
    torch.testing.assert_close(
        reference.ODEBlock(nn.Sequential(inner), "euler")(x), x + inner[1](t, nn.functional.relu(x))
    )


def test_a_field_that_cannot_be_read_runs_as_the_reference_and_says_so() -> None:
    block = reference.ODEBlock(nn.Sequential(nn.Mish(), reference.TimeConv2d(2, 2, padding=1)), "bosh3")
    x = torch.randn(2, 2, 4, 4)
    expected = block(x)
    row = fastode.fuse(block, example=x).rows[0]
    assert type(block) is fastode.nn.ODEBlock and row.engines == ("reference",)
    assert "field.0 (Mish) is of a type the reader does not know." in row.reason
    assert torch.equal(block(x), expected)
    fastode.unfuse(block)
    assert type(block) is reference.ODEBlock


@pytest.mark.parametrize("gradient", ["constant", "exact"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_fused_fields_are_driven_by_the_plain_solve(gradient: str, per_sample: bool) -> None:
    options = {"gradient": gradient, "per_sample": per_sample, "rtol": 0.01, "atol": 0.01}
    block = reference.SOBlock(reference.SkewPair(3, 8, 1, 0.1, "tanh", "layer").double(), **options)
    twin = fastode.nn.SOBlock(block.field, **options)
    twin.engine = "staged"
    x = torch.randn(2, 3, 6, 6, dtype=F64, requires_grad=True)
    with fastode.record_steps() as log:
        outputs = [block(x), twin(x)]
    counts = [solve.evaluations for solve in log]
    assert len(counts) == (4 if per_sample else 2) and counts[: len(counts) // 2] == counts[len(counts) // 2 :]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in outputs]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_logs_are_read_when_their_card_is_done_with_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"waits for {device}"))
    for name in ("cuda:1", "cuda:1", "cpu"):
        log: Any = SimpleNamespace(device=torch.device(name))
        steps.read_later(log, lambda log: events.append(f"reads one of {log.device}"))
    fastode.check_solves()
    assert events == ["waits for cuda:1", "reads one of cuda:1", "reads one of cuda:1", "reads one of cpu"]
