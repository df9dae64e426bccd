"""The benchmark of a call's overhead: its turns, its verdicts, its refusal of a block that is not equal, its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import contenders, overhead, report, timing
from benchmarks.contenders import Contender
from fastode import reference

RES_BLOCK = overhead.CASES[0]


def given(times: dict[str, float]) -> Callable[[timing.Run, int], float]:
    """A clock that takes eager, eager-cl and fused in turns and gives each its time, a per cent more every round."""
    turns = iter(range(10**6))
    names = (*contenders.BASELINES, overhead.FUSED)

    def clock(run: timing.Run, repeats: int) -> float:
        run()
        turn = next(turns)
        return times[names[turn % 3]] * (1 + 0.01 * (turn // 3))

    return clock


@pytest.mark.parametrize(("fused", "reached"), [(0.7e-4, True), (0.8e-4, False)])
def test_the_ratio_is_to_the_faster_layout_and_paired(fused: float, reached: bool) -> None:
    clock = given({"eager": 1.5e-4, "eager-cl": 1e-4, "fused": fused})
    rows = overhead.measured(RES_BLOCK, "forward", clock, 0.0, (4, 4))
    assert [row["contender"] for row in rows] == ["eager", "eager-cl", "fused"]
    ours = rows[-1]
    ratio = fused * 1e4
    assert ours["of_better_eager"] == {"median": ratio, "p20": ratio, "p80": ratio, "than": "eager-cl"}
    assert ours["of_eager"]["median"] == pytest.approx(fused / 1.5e-4, abs=1e-4)
    assert (ours["asked"], ours["reached"]) == (0.75, reached)
    (line,) = overhead.table(rows)[2:]
    verdict = "yes" if reached else "**no**"
    assert line.endswith(f"| {ratio:.2f} ({ratio:.2f}–{ratio:.2f}) | 0.75 | {verdict} |")


def test_a_block_for_information_has_no_verdict() -> None:
    case = next(case for case in overhead.CASES if not case.asked)
    rows = overhead.measured(case, "train", given({"eager": 1.0, "eager-cl": 1.0, "fused": 3.0}), 0.0, (2, 2))
    assert rows[-1]["reached"] is None and rows[-1]["of_better_eager"]["median"] == 3.0
    assert overhead.table(rows)[-1].endswith("| – |  |")


class Wrong(reference.ResBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * super().forward(x)


def test_a_block_that_is_not_equal_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(engine: str) -> Contender:
        def build(module: nn.Module, inputs: Any) -> nn.Module:
            module.__class__ = Wrong
            return module

        return Contender("fused", engine, True, False, build)

    monkeypatch.setattr(contenders, "fused", wrong)
    rows = overhead.measured(RES_BLOCK, "train", lambda run, repeats: 1.0, 0.0, (2, 2))
    assert rows[-1]["errors"].startswith("not equal: ")
    assert not {"microseconds", "reached", "of_eager"} & set(rows[-1])
    assert "| failed | – | – | not equal: " in overhead.table(rows)[-1]


@pytest.mark.parametrize("case", overhead.CASES, ids=lambda case: case.name)
def test_a_call_with_backward_makes_every_gradient_anew(case: overhead.Case) -> None:
    module, inputs = overhead.make(case)
    run = overhead.call_of(module, inputs, "train")
    run()
    # An SOBlock returns y, and leaves the parameters of its last step's z without a gradient.
    first = {p: p.grad.clone() for p in module.parameters() if p.grad is not None}
    assert len(first) >= 5
    run()
    for parameter, before in first.items():
        assert torch.equal(parameter.grad, before)
    assert overhead.call_of(module, inputs, "forward")() is not None


def test_what_is_asked_has_both_modes_of_the_three_blocks() -> None:
    asked = {case.name: dict(case.asked) for case in overhead.CASES if case.asked}
    assert {name: set(modes) for name, modes in asked.items()} == {
        name: set(overhead.MODES) for name in ("ResBlock", "SSP3", "IESkip")
    }


def test_the_command_prints_the_table_and_keeps_the_record(tmp_path: Path, capsys: Any) -> None:
    threads = torch.get_num_threads()
    arguments = ["--only", "ResBlock", "--seconds", "0", "--results", str(tmp_path)]
    assert overhead.main(arguments) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert found["header"]["suite"] == "overhead" and found["header"]["threads"] == 1
    assert [(row["mode"], row["contender"]) for row in found["results"]] == [
        (mode, name) for mode in overhead.MODES for name in ("eager", "eager-cl", "fused")
    ]
    out = capsys.readouterr().out
    assert all(line in out for line in overhead.table(found["results"]))
    assert torch.get_num_threads() == threads


def test_a_record_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    assert overhead.main(["--only", "ResBlock", "--modes", "forward", "--seconds", "0", "--results", str(folder)]) == 0
    rows = json.loads((folder / "overhead.json").read_text())["results"]
    text = report.markdown(tmp_path)
    assert "**Overhead of a call**" in text and "\n".join(overhead.table(rows)) in text


def test_a_profile_names_the_operators_and_the_functions(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(overhead, "PROFILED_CALLS", 5)
    assert overhead.main(["--only", "ResBlock", "--modes", "forward", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "ResBlock, forward, no_grad: " in out and "fastode::" in out and "overhead.py" in out
