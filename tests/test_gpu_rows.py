"""The table of kernels that `benchmarks.gpu` works through, and the processes that it is shared out to."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_processes, gpu_rows, header, inside
from benchmarks.gpu_processes import Crew, share_out, stream
from benchmarks.workloads import Workload
from fastode import reference
from fastode.testing import sample_input

CPU = torch.device("cpu")

# A worker of the protocol that computes nothing: what it does is what the item says.
WORKER = """
import json, os, sys, time
from benchmarks.gpu_processes import serve

def answer(item):
    print("noise about", item, flush=True)
    yield {"item": item, "pid": os.getpid()}
    if item.startswith("dies"):
        os._exit(7)
    if item.startswith("sleeps"):
        time.sleep(100)

serve(answer)
"""


def test_every_row_names_a_workload_and_the_five_families_are_timed() -> None:
    for row in gpu_rows.rows():
        assert gpu_rows.workload(row).name == row.name
    for rows in (gpu_rows.TABLE, gpu_rows.PROGRAMS, gpu_rows.sanitized()):
        assert len({row.name for row in rows}) == len(rows)
    assert [w.id + w.variant for w in gpu_rows.timed()] == ["iek1", "ssp3", "skewpair", "skewsoblock-rk4", "res"]
    assert len(gpu_rows.items()) == len(gpu_rows.TABLE) * len(inside.FUSED_ENGINES) + len(gpu_rows.PROGRAMS)


def tiny() -> Workload:
    def build() -> torch.nn.Module:
        return reference.ResBlock(reference.PreActBranch(4, norm="layer", activation="tanh"))

    return Workload("res", "", "4@3", build, lambda device: (sample_input(2, 4, 3, 3),))


def test_a_row_is_run_on_every_engine_that_can(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_rows, "workload", lambda row: tiny())
    name = gpu_rows.TABLE[0].name
    judged = [result for engine in inside.FUSED_ENGINES for result in gpu_rows.judge(f"{name} | {engine}", CPU)]
    assert {result["engine"] for result in judged if result.get("ok")} == {"resident", "staged"}
    assert gpu_rows.no_part(judged + judged) == [f"fused_convolution: it runs on CUDA only ({name}, {name})"]
    # As the sanitizer runs it.
    assert gpu.main(["--device", "cpu", "--launch", name]) == 0
    out = capsys.readouterr().out
    assert out.count("'ok': True") == 2 and out.count("it runs on CUDA only") == 2  # in two modes


def test_what_is_wrong_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"item": "a | b", "row": "a", "engine": "b", "mode": "train", "kernels": [], "seconds": 1.0}
    assert "NOT EQUAL: output has 3 of the error" in gpu_rows.line(
        found | {"ok": False, "worst": 3.0, "tensor": "output"}
    )
    assert "NOT EQUAL: output has inf of" in gpu_rows.line(found | {"ok": False, "worst": "inf", "tensor": "output"})
    assert gpu_rows.line({"item": "a | b", "ok": False, "errors": "died"}) == "a | b: FAILED: died"

    def illegal(*_: Any, **__: Any) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu_rows, "compare_blocks", illegal)
    monkeypatch.setattr(gpu_rows, "workload", lambda row: tiny())
    (result,) = gpu_rows.judge(f"{gpu_rows.TABLE[0].name} | staged", CPU)
    assert not result["ok"] and "FAILED: RuntimeError: illegal memory access" in gpu_rows.line(result)


@pytest.fixture(name="command")
def worker(tmp_path: Path) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(header.ROOT)!r})\n{WORKER}")
    return [sys.executable, str(path)]


def test_items_are_shared_out_and_a_process_that_dies_costs_its_item(command: list[str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    items = ["a", "dies", "b", "c", "dies too", "d"]
    assert not share_out(items, command, 2, time.monotonic() + 100, rows.append, tmp_path / "log.txt")
    assert sorted(row["item"] for row in rows if "pid" in row) == sorted(items)
    failed = [row for row in rows if "errors" in row]
    assert {row["item"] for row in failed} == {"dies", "dies too"} and not any(row["ok"] for row in failed)
    assert failed[0]["errors"] == "its process ended with status 7"
    assert 1 < len({row["pid"] for row in rows if "pid" in row}) <= 4
    assert "noise about c" in (tmp_path / "log.txt").read_text()


def test_what_runs_at_the_deadline_is_stopped_and_left(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    timers: list[Any] = []

    class Timer:
        """Ends when the item that sleeps has begun, not after its seconds."""

        def __init__(self, seconds: float, function: Any) -> None:
            timers.append((seconds, function))

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    def hear(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["item"] == "sleeps":
            threading.Thread(target=timers[0][1]).start()

    monkeypatch.setattr(gpu_processes.threading, "Timer", Timer)
    start = time.monotonic()
    left = share_out(["a", "sleeps", "b"], command, 1, start + 500, hear, tmp_path / "log.txt")
    assert left == ["sleeps", "b"] and 490 < timers[0][0] <= 500 and time.monotonic() - start < 60
    assert [row["item"] for row in rows] == ["a", "sleeps"] and not any("errors" in row for row in rows)
    for row in rows:
        with pytest.raises(ProcessLookupError):
            os.kill(row["pid"], 0)
    assert share_out(["a"], command, 1, time.monotonic() - 1, hear, tmp_path / "log.txt") == ["a"] and len(rows) == 2


def test_without_processes_everything_is_done_here_until_the_deadline(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    def answer(item: str, device: torch.device) -> Any:
        yield {"item": item, "device": str(device)}

    crew = Crew(CPU, 0)
    assert not crew.work("any", answer, ["a", "b"], time.monotonic() + 100, rows.append, tmp_path / "log.txt")
    assert rows == [{"item": "a", "device": "cpu"}, {"item": "b", "device": "cpu"}]
    assert crew.work("any", answer, ["a"], time.monotonic() - 1, rows.append, tmp_path / "log.txt") == ["a"]


def test_a_command_that_runs_too_long_is_stopped(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import time; print('started', flush=True); time.sleep(60)"
    status = stream([sys.executable, "-c", code], tmp_path / "log.txt", 3.0, lines.append)
    assert status is None and lines == ["started"] and (tmp_path / "log.txt").read_text() == "started\n"


def test_a_command_does_not_outlive_its_caller(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        stream([sys.executable, "-c", code], tmp_path / "log.txt", 50.0, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
