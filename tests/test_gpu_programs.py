"""The CUDA programs in `benchmarks.gpu`: which there are, what a call launches, their blocks on the test machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulator import counting
from test_cuda_programs import _on_the_test_machine  # noqa: F401 - an autouse fixture: the CPU's tensors are a card's

from benchmarks import contenders, gpu_check, gpu_rows, gpu_smoke, inside, programs, workloads
from fastode.native.constants import TILES
from fastode.ops.resident import card
from fastode.ops.resident.engine import Resident

CPU = torch.device("cpu")
SMALLEST = min(TILES, key=lambda size: size[0] * size[1] ** 2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, _on_the_test_machine: None) -> None:  # noqa: F811
    """Few samples; and `fuse` asks an engine about blocks before there is an input."""
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call) if call.inputs else "")
    monkeypatch.setattr(programs, "SAMPLES", 3)


def smallest() -> list[gpu_rows.Row]:
    shape = f"{SMALLEST[0]}@{SMALLEST[1]}"
    return [row for row in gpu_rows.PROGRAMS if row.shape == shape]


def test_each_size_is_there_with_each_family_and_the_papers_sizes_come_first() -> None:
    found = [(w.id, w.variant, w.shape) for w in programs.workloads()]
    kinds = (
        ("ssp3", "eval"), ("ie", "k1"), ("res", "eval"), ("ssp3", ""), ("ie-bn", "k1"), ("soblock", "rk4"),
        ("soblock", "stride2"), ("soblock", "dopri5"),
    )  # fmt: skip
    assert set(found) == {(*kind, f"{c}@{side}") for kind in kinds for c, side in TILES}
    assert len(found) == len(kinds) * len(TILES)
    assert [shape for *_, shape in found[:: len(kinds)]][:3] == ["16@32", "64@8", "32@16"]
    assert {(w.id, w.variant, w.shape) for w in programs.timed()} == {
        (*kind, shape) for kind in (*kinds[:2], kinds[-3]) for shape in ("16@32", "64@8", "32@16")
    }


def test_the_sources_name_the_programs() -> None:
    assert {
        "SchemeForward",
        "SchemeBackward",
        "DescentForward",
        "BatchSchemeForward",
        "BatchSchemeBackward",
        "BatchDescentForward",
        "BatchDescentBackward",
        "WeightGradients",
        "FinishGradients",
        "MarchForward",
        "MarchBackward",
        "SolveForward",
        "SolveBackward",
    } <= programs.names()


def test_a_program_that_no_row_launched_is_named() -> None:
    every = programs.names() | inside.kernel_names()
    results: list[dict[str, Any]] = [{"kernels": sorted(inside.kernel_names())}, {"programs": {"SchemeForward": 1}}]
    assert gpu_smoke.unlaunched(results) == programs.names() - {"SchemeForward"}
    assert gpu_smoke.unlaunched([]) == every


def test_a_judged_input_gives_some_blocks_two_samples() -> None:
    assert programs.many(*SMALLEST).shape == (programs.SAMPLES, SMALLEST[0], SMALLEST[1], SMALLEST[1])


@pytest.mark.parametrize("row", smallest(), ids=lambda row: row.name)
def test_a_row_is_judged_and_is_as_many_launches_as_are_asked_for(row: gpu_rows.Row) -> None:
    ran = 0
    for result in gpu_rows.judge(f"{row.name} | {Resident.name} | programs", CPU):
        assert result.get("ok"), result
        mode = result["mode"]
        block, few, _ = gpu_rows.ready(row, Resident.name, mode, CPU, 1)
        module, own = contenders.fused(Resident.name).make(block, few)
        run = workloads.work(module, own, mode).run
        with counting() as counts:
            run()
        assert not programs.count_is_wrong({"any": counts["launch"]}, mode, row.variant)
        ran += 1
    assert ran == len(row.modes) > 0


def test_a_wrong_number_of_launches_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "launched", lambda run: {"SchemeForward": 2})
    found = gpu_rows.counted(lambda: None, "forward")
    assert found == {
        "programs": {"SchemeForward": 2},
        "ok": False,
        "errors": "forward launched 2 programs (SchemeForward) and not 1",
    }
    line = gpu_rows.line({"item": "a", "row": "ssp3", "engine": "b", "mode": "forward"} | found)
    assert line.endswith(" FAILED: forward launched 2 programs (SchemeForward) and not 1")
    line = gpu_rows.line({"item": "a", "row": "ssp3", "engine": "b", "mode": "forward", "worst": 0.25} | found)
    assert line.endswith(
        " equal 0.25 of the error allowed, but FAILED: forward launched 2 programs (SchemeForward) and not 1"
    )
    monkeypatch.setattr(programs, "launched", lambda run: {"SchemeForward": 1})
    assert gpu_rows.counted(lambda: None, "forward") == {"programs": {"SchemeForward": 1}}
    found = {"item": "a", "row": "ssp3", "engine": "b", "mode": "forward", "ok": True, "worst": 0.5, "kernels": []}
    found |= {"programs": {"SchemeForward": 1}, "seconds": 1.0}
    assert gpu_rows.line(found).endswith("equal 0.5 of the error allowed; 1 x SchemeForward; 1 s")


def test_half_of_the_random_blocks_on_a_card_are_such_as_the_programs_take() -> None:
    for number in (2, 3, 6, 7, 10, 11):
        case, _ = gpu_check.random_case(number, True)
        assert (case["channels"], case["size"][0]) in TILES and case["dtype"] in (torch.bfloat16, torch.float16)
    assert any(gpu_check.random_case(number, True)[0]["channels"] == 3 for number in range(0, 80, 4))
