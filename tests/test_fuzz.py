"""The command that draws random blocks: that it runs, that a case can be run again, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import drawn, excuses, fuzz, rejudge
from fastode import reference
from fastode.dispatch import one_step
from fastode.ops.schemes.implicit_euler import exact
from fastode.testing import Comparison, Judge, sample_input
from fastode.testing.rule import Row


def test_a_second_of_a_fixed_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "3", "--seconds", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("seed 3: ") and last.endswith(", 0 failed")


def test_every_case_can_be_drawn_again() -> None:
    families, layouts = set(), set()
    for index in range(150):
        first, second = drawn.draw_case(5, index), drawn.draw_case(5, index)
        assert first.text == second.text
        for a, b in zip(first.inputs, second.inputs, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        tensors = zip(first.plain.state_dict().values(), second.plain.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)
        families.add(first.family)
        layouts.update(x.stride() for x in first.inputs)
    assert families == set(drawn.FAMILIES) and len(layouts) > 50


def test_a_planted_fault_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = one_step.SchemeStep.apply

    def faulty(*arguments: Any) -> Any:
        y, *statistics = real(*arguments)
        return y * (1 + 1e-4), *statistics

    monkeypatch.setattr(one_step.SchemeStep, "apply", faulty)
    index = next(
        i
        for i in range(100)
        if drawn.draw_case(1, i).family == "ssp2"
        and drawn.draw_case(1, i).inputs[0].dtype is torch.float64
        and "mish" not in drawn.draw_case(1, i).text  # which runs as the reference
    )
    assert fuzz.main(["--seed", "1", "--index", str(index)]) == 1
    printed = capsys.readouterr().out
    assert f"again: python -m benchmarks.fuzz --seed 1 --index {index}" in printed
    assert "FAIL output" in printed and not printed.splitlines()[-1].endswith(" 0 failed")


def test_an_exact_step_is_compared_where_it_took_as_many_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One that staged runs, with a gradient to solve for.
    cases = ((i, drawn.draw_case(2, i)) for i in range(200))
    index = next(i for i, case in cases if case.family == drawn.EXACT and case.mode == "train")
    assert fuzz.main(["--seed", "2", "--index", str(index)]) == 0
    monkeypatch.setattr(Judge, "compare", lambda *_: Comparison((Row("output", 1.0, 0.0, None, ""),)))
    monkeypatch.setattr(rejudge, "compare_again", lambda *_: Comparison((Row("output", 1.0, 0.0, None, ""),)))
    assert fuzz.main(["--seed", "2", "--index", str(index)]) == 1
    assert "left out" not in capsys.readouterr().out
    real = exact.find_root
    monkeypatch.setattr(exact, "find_root", lambda *given: real(*given[:4], 1e-9, *given[5:]))
    fuzz.main(["--seed", "2", "--index", str(index)])
    assert "left out, its solves took other numbers of iterations" in capsys.readouterr().out


def differing(*names: str) -> Comparison:
    """A comparison in which these differ."""
    return Comparison((Row("buffer of another", 0.0, 1.0), *(Row(name, 2.0, 1.0) for name in names)))


@pytest.mark.parametrize("bias", [-9.0, 0.0])
def test_gradients_of_zero_behind_a_norm_of_constants_are_left_out(bias: float) -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3))
    nn.init.zeros_(branch[2].bias)
    branch[0].bias.data.fill_(bias)  # of -9 nothing is left behind the ReLU
    block = drawn.Asked(reference.ResBlock(nn.Sequential(nn.ZeroPad2d(1), *branch)), False)
    x = sample_input(2, 1, 4, 4)
    case, judge = drawn.Case("", "resblock", block, (x,), "train", None), Judge(block, x)
    zero = "gradient of block.branch.3.bias"  # a bias before a batch norm
    assert excuses.is_rounding(judge, differing(zero), case) == (bias < 0)
    for other in ("output", "gradient of input", "gradient of block.branch.5.bias"):
        assert not excuses.is_rounding(judge, differing(zero, other), case)
    assert not excuses.is_rounding(judge, Comparison((Row(zero, 1.0, 1.0, None, "NaN"),)), case)


def test_a_cancelled_gradient_of_a_learned_scheme_is_left_out_within_a_rounding_of_its_terms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = reference.Ark(nn.Conv2d(1, 1, 1, bias=False)).to(torch.bfloat16)
    slope = 0.25  # f(x) = x / 4
    nn.init.constant_(block.branch.weight, slope)
    x = sample_input(2, 1, 4, 4, dtype=torch.bfloat16)
    case = drawn.Case("", "ark", drawn.Asked(block, False), (x,), "train", None)
    judge = Judge(case.plain, x)
    assert judge.cotangents is not None
    f = slope * float((judge.cotangents[0].double() * x.double()).sum())  # <g, f(x)>
    beta_10, alpha_21 = float(torch.tensor(1.0).sigmoid()), float(torch.tensor(0.25).sigmoid())
    beta_21, rate = 1 / (2 * beta_10), beta_10 * (1 - beta_10)
    rate_21 = -rate / (2 * beta_10**2)
    terms = (
        rate * (alpha_21 + beta_21 * slope) * f,  # of beta_10
        -(rate_21 + alpha_21 * rate) * f,  # of beta_20
        rate_21 * (1 + beta_10 * slope) * f,  # of beta_21
    )
    name, unit = "gradient of block.b10", torch.finfo(torch.bfloat16).eps * sum(map(abs, terms))

    def excused(value: float | None, *names: str) -> bool:
        found = None if value is None else torch.tensor(value, dtype=torch.float64)
        monkeypatch.setattr(judge, "run", lambda _: {name: found})
        return excuses.is_cancelled(judge, case.plain, differing(*names), case)

    assert abs(sum(terms)) < 0.1 * sum(map(abs, terms))
    for sign in (-1.0, 1.0):
        assert excused(sum(terms) + 0.99 * sign * unit, name)
        assert not excused(sum(terms) + 1.01 * sign * unit, name)
        assert not excused(sum(terms) + 0.99 * sign * unit, name, "gradient of input")
    assert not excused(None, name) and not excused(float("nan"), name)


def test_as_many_cases_are_drawn_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "3", "--cases", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("seed 3: 4 blocks, ")


@pytest.mark.parametrize(("norm", "of_constants"), [
    (nn.BatchNorm2d(4), True), (nn.BatchNorm2d(4).eval(), False),
    (nn.BatchNorm2d(4, track_running_stats=False).eval(), True),
    (nn.InstanceNorm2d(4), True), (nn.GroupNorm(4, 4), True), (nn.GroupNorm(2, 4), False),
])  # fmt: skip
def test_what_a_norm_of_constants_is(norm: nn.Module, of_constants: bool) -> None:
    x = sample_input(2, 4, 3, 3)
    assert not excuses.sees_constants(norm, x)
    for spread in (0.0, 0.01):
        x[:, 1] = 0.3 + spread * sample_input(2, 1, 3, 3)[:, 0]
        assert excuses.sees_constants(norm, x) == of_constants


def test_maps_on_which_a_convolution_of_pytorch_is_wrong_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(dtype: torch.dtype) -> drawn.Case:
        field = reference.SkewPair(3, 4, 2, norm="none").to(dtype)
        x = sample_input(1, 3, 4, 4, dtype=dtype)
        return drawn.Case("", "soblock", drawn.Asked(reference.SOBlock(field, "euler"), False), (x,), "forward", None)

    def excuse(dtype: torch.dtype) -> str:
        case = block(dtype)
        return excuses.excused(Judge(case.plain, case.inputs[0], mode="forward"), case.plain, case)

    low, high = torch.bfloat16, torch.float32
    assert excuse(low) == excuse(high) == ""
    real = F.conv2d

    def faulty(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        y = real(x, *rest, **more)
        return y * torch.nan if x.dtype is low else y

    monkeypatch.setattr(F, "conv2d", faulty)
    assert excuse(low) == "PyTorch's convolution is wrong on its maps" and excuse(high) == ""


def test_nothing_run_is_no_success() -> None:
    assert fuzz.main(["--seed", "1", "--seconds", "0"]) == 1
