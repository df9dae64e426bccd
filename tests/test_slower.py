"""The command that looks for blocks which "auto" makes slower: that a case is drawn again, and that it finds one."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import slower, workloads


def test_every_case_can_be_drawn_again() -> None:
    words = set()
    for index in range(40):
        first, second = slower.draw_case(3, index), slower.draw_case(3, index)
        assert first.text == second.text
        tensors = zip(first.block.state_dict().values(), second.block.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)
        assert all(torch.equal(a, b) for a, b in zip(first.inputs, second.inputs, strict=True))
        words.update(re.split(", | norm", first.text))
    assert {*slower.FAMILIES, *slower.PAIRS, *slower.NORMS, *slower.ACTIVATIONS, *slower.DTYPES} <= words


def test_what_is_slower_is_measured_again_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = iter([0.5, 0.9, 0.9, 1.1, 2.0])
    asked = []

    def ratios(case: slower.Case, rounds: int = slower.ROUNDS) -> dict[str, float]:
        asked.append(rounds)
        return dict.fromkeys(workloads.BLOCK_MODES, next(known))

    monkeypatch.setattr(slower, "ratios", ratios)
    assert slower.slower(1, iter(range(3)), float("inf"), 0.95, slower.DTYPES) == (3, 1)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("forward 0.90, input_grad 0.90, train 0.90: ") and first.endswith("(--index 0)")
    assert last == "3 blocks, 1 with a mode below 0.95 of eager's speed; median 1.10"
    assert asked == [slower.ROUNDS, slower.AGAIN, slower.ROUNDS, slower.AGAIN, slower.ROUNDS]


def test_a_case_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert slower.main(["--seed", "1", "--index", "0", "--below", "0", "--threads", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 blocks, 0 with a mode below 0 of eager's speed")
