"""The command that draws random blocks: that it runs, that a case can be run again, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import fuzz
from fastode.dispatch import one_step


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


def test_nothing_run_is_no_success() -> None:
    assert fuzz.main(["--seed", "1", "--seconds", "0"]) == 1
