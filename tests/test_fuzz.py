"""The command that draws random blocks: that it runs, that a case can be run again, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import fuzz, rejudge
from fastode.dispatch import one_step
from fastode.ops.schemes.implicit_euler import exact
from fastode.testing import Comparison, Judge
from fastode.testing.rule import Row


def test_a_second_of_a_fixed_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "3", "--seconds", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("seed 3: ") and last.endswith(", 0 failed")


def test_every_case_can_be_drawn_again() -> None:
    families, layouts = set(), set()
    for index in range(150):
        first, second = fuzz.draw_case(5, index), fuzz.draw_case(5, index)
        assert first.text == second.text
        for a, b in zip(first.inputs, second.inputs, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        tensors = zip(first.plain.state_dict().values(), second.plain.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)
        families.add(first.family)
        layouts.update(x.stride() for x in first.inputs)
    assert families == set(fuzz.FAMILIES) and len(layouts) > 50


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
        if fuzz.draw_case(1, i).family == "ssp2"
        and fuzz.draw_case(1, i).inputs[0].dtype is torch.float64
        and "mish" not in fuzz.draw_case(1, i).text  # which runs as the reference
    )
    assert fuzz.main(["--seed", "1", "--index", str(index)]) == 1
    printed = capsys.readouterr().out
    assert f"again: python -m benchmarks.fuzz --seed 1 --index {index}" in printed
    assert "FAIL output" in printed and not printed.splitlines()[-1].endswith(" 0 failed")


def test_an_exact_step_is_compared_where_it_took_as_many_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One that staged runs, with a gradient to solve for.
    index = next(i for i in range(200) if (case := fuzz.draw_case(2, i)).family == fuzz.EXACT and case.mode == "train")
    assert fuzz.main(["--seed", "2", "--index", str(index)]) == 0
    monkeypatch.setattr(Judge, "compare", lambda *_: Comparison((Row("output", 1.0, 0.0, None, ""),)))
    monkeypatch.setattr(rejudge, "compare_again", lambda *_: Comparison((Row("output", 1.0, 0.0, None, ""),)))
    assert fuzz.main(["--seed", "2", "--index", str(index)]) == 1
    assert "left out" not in capsys.readouterr().out
    real = exact.find_root
    monkeypatch.setattr(exact, "find_root", lambda *given: real(*given[:4], 1e-9, *given[5:]))
    fuzz.main(["--seed", "2", "--index", str(index)])
    assert "left out, its solves took other numbers of iterations" in capsys.readouterr().out


def test_nothing_run_is_no_success() -> None:
    assert fuzz.main(["--seed", "1", "--seconds", "0"]) == 1
