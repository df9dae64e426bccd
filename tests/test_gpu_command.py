"""`python -m benchmarks.gpu` as far as a machine without a card can try it: its plan, its budget, what is on disk."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_check, gpu_kernels, header, run, timing
from benchmarks.gpu_check import Report
from benchmarks.workloads import Workload
from fastode import _build, _decisions, _trial, reference
from fastode.testing import sample_input

CPU = torch.device("cpu")


def tiny() -> Workload:
    def build() -> nn.Module:
        return reference.IESkip(reference.PreActBranch(4, norm="layer", activation="tanh"))

    return Workload("ie", "k1", "4@3", build, lambda device: (sample_input(3, 4, 3, 3),))


@pytest.fixture(autouse=True)
def _built() -> None:
    assert _build.load(announce=False) is None


def stage(name: str, share: float, run: Any = lambda *_: True) -> gpu.Stage:
    return gpu.Stage(name, "check", share, f"what {name} does", run)


def test_what_a_stage_leaves_falls_to_the_next() -> None:
    stages = gpu.stages()
    assert sum(s.share for s in stages) == pytest.approx(1.0)
    ends = gpu.deadlines(stages, 5.0, 100.0)
    assert ends == sorted(ends) and ends[-1] == pytest.approx(105.0)
    # Deadlines and not lengths: a stage that takes nothing leaves all of its time.
    assert gpu.deadlines(stages[-2:], 0.0, 24.0) == pytest.approx([18.0, 24.0])


def test_the_budget_is_kept_and_a_failure_is_not_the_end(tmp_path: Path, capsys: Any) -> None:
    met: list[float] = []

    def takes(report: Report, device: torch.device, deadline: float) -> bool:
        met.append(deadline)
        return True

    def fails(*_: Any) -> bool:
        raise RuntimeError("no such kernel")

    told = Report(tmp_path)
    start = time.monotonic()
    chosen = [stage("a", 0.5, takes), stage("b", 0.25, fails), stage("c", 0.25, takes)]
    assert not gpu.go(chosen, told, CPU, start, 40.0)
    assert met == pytest.approx([start + 20.0, start + 40.0])
    assert told.lines == ["b failed: RuntimeError: no such kernel"]
    assert (tmp_path / "summary.md").read_text() == "b failed: RuntimeError: no such kernel\n"
    assert gpu.go(chosen[:1], told, CPU, start, 40.0) and not gpu.go(
        [stage("d", 1.0, lambda *_: False)], told, CPU, 0, 1
    )
    assert "== b: what b does; until 30 s" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_starts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "go", lambda *_: pytest.fail("started"))
    assert gpu.main(["--dry"]) == 0
    out = capsys.readouterr().out
    for each in gpu.stages():
        assert each.what in out
    assert f"{60 * gpu.MINUTES - gpu.LAST:.0f} s  bench  kernels" in out
    for item in (*gpu.plan(), *gpu.compiled_plan()):
        assert item.name in out
    assert gpu.main(["--dry", "--step", "check"]) == 0
    out = capsys.readouterr().out
    assert "rows against" not in out and "every engine" in out


def test_the_plan_has_every_target_once_and_training_steps_first() -> None:
    items = gpu.plan()
    assert len({(i.workload.name, i.mode, i.dtype) for i in items}) == len(items)
    assert {i.workload.id for i in items[: len(gpu.measured())]} == set(gpu.FAMILIES)
    assert {i.mode for i in items[: len(gpu.measured())]} == {"train"}
    rivals = {name for item in gpu.compiled_plan() for name in item.rivals}
    assert rivals == set(gpu.COMPILED) and {i.workload.id for i in gpu.compiled_plan()} == set(gpu.FAMILIES)
    names = [(w.name, w.statistics) for w in gpu.blocks()]
    assert names[: len(gpu.measured())] == [(w.name, w.statistics) for w in gpu.measured()]
    assert len(set(names)) == len(names) > 40 and not any(w.id == "nets" for w in gpu.blocks())


def small_machine(dtype: torch.dtype = torch.float32, device: Any = "cpu") -> timing.Machine:
    x = torch.ones(64, 64, dtype=dtype)
    return timing.Machine(lambda: x @ x, lambda: x.clone(), 2.0 * 64**3, 2.0 * 64**2)


@pytest.mark.parametrize("with_pytest", [False, True])
def test_the_tests_run_where_there_is_pytest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_pytest: bool
) -> None:
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: with_pytest or None)
    streamed: list[str] = []
    for status, good, word in ((0, True, "passed"), (1, False, "failed (status 1)"), (5, False, "none collected")):
        monkeypatch.setattr(gpu_check, "stream", lambda command, *_, s=status: streamed.extend(command) or s)
        told = Report(tmp_path)
        assert gpu_check.card_tests(told, CPU, time.monotonic() + 9) == (good or not with_pytest)
        assert told.lines[0].startswith(f"tests on the card: {word if with_pytest else 'pytest is not installed'}")
    assert ("gpu" in streamed) == with_pytest


def test_everything_that_runs_is_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "measured", lambda: [tiny()])
    monkeypatch.setattr(gpu, "blocks", lambda: [tiny()])
    monkeypatch.setattr(gpu, "FAMILIES", {"ie": "k1"})
    monkeypatch.setattr(gpu, "COMPILED", ())
    monkeypatch.setattr(gpu_check, "random_blocks", partial(gpu_check.random_blocks, most=2))
    monkeypatch.setattr(gpu_check, "stream", lambda *_: 0)
    monkeypatch.setattr(gpu, "MODES", ("train",))
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "machine", small_machine)
    assert gpu.main(["--device", "cpu", "--minutes", "3", "--results", str(tmp_path)]) == 0
    summary = (tmp_path / "summary.md").read_text()
    out = capsys.readouterr().out
    assert out.index("will run within 3 minutes") < out.index("== tests") < out.index("== kernels")
    for line in summary.splitlines():
        assert not line or line in out
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(read) == {
        "random.json",
        "equality.json",
        "decisions.json",
        "gpu.json",
        "gpu-compiled.json",
        "kernels.json",
    }
    assert not list(tmp_path.glob("*.part"))
    engines = {row["engine"] for row in read["equality.json"]["results"]}
    assert engines == {"resident", "fused_convolution", "staged"}
    assert {row["engine"] for row in read["random.json"]["results"]} == {"resident", "staged", "reference"}
    rows = read["gpu.json"]["rows"]
    assert {row["mode"] for row in rows} == set(gpu.MODES) and not any(row["errors"] for row in rows)
    assert f"{len(rows)} rows; matrix product" in summary and "decisions.json" in summary


def test_what_is_out_of_time_is_left_out_and_said(tmp_path: Path) -> None:
    told, past = Report(tmp_path), time.monotonic() - 1
    assert gpu.bench(told, CPU, past, "gpu", [run.Item(tiny(), "train", "float32", ())])
    assert "gpu: no measurement was made; 1 of 1 out of time" in told.lines
    assert json.loads((tmp_path / "gpu.json").read_text())["header"]["left_out"] == ["ie k1 4@3 train float32"]
    # A check that reached nothing has shown nothing.
    assert not gpu_check.workload_blocks(told, CPU, past, [tiny()])
    assert not gpu_check.random_blocks(told, CPU, past)
    assert gpu_check.trials(told, CPU, past, [tiny()])
    assert gpu_kernels.rooflines(told, CPU, past, [])


class Wrong(reference.IESkip):
    engine = "staged"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * super().forward(x)


class Raises(Wrong):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal memory access")


@pytest.mark.parametrize(("kind", "said"), [(Wrong, '"ok": false'), (Raises, "illegal memory access")])
def test_what_is_not_equal_is_found_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, kind: type[nn.Module], said: str
) -> None:
    def make(block: nn.Module, inputs: Any) -> Any:
        module = copy.deepcopy(block)
        module.__class__ = kind
        return module, inputs

    monkeypatch.setattr(
        gpu_check.contenders, "fused", lambda engine: type("Contender", (), {"make": staticmethod(make)})
    )
    monkeypatch.setattr(gpu_check, "DTYPES", ("float32",))
    told = Report(tmp_path)
    assert not gpu_check.workload_blocks(told, CPU, time.monotonic() + 100, [tiny()])
    assert "workloads: 0 of 6 comparisons equal, 3 of 3 cases reached" in told.lines
    assert said in (tmp_path / "equality.json").read_text() and "NOT EQUAL: staged train" in capsys.readouterr().out


def test_decisions_are_written_as_the_package_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(_trial, "_clock", lambda device: lambda run: (run(), 1.0)[1])
    _decisions._memory.clear()
    told = Report(tmp_path / "results")
    assert gpu_check.trials(told, CPU, time.monotonic() + 100, [tiny()])
    assert any(line.startswith("trials: 6 made, 6 known; taken: resident 6 times") for line in told.lines)
    package = tmp_path / "package"
    package.mkdir()
    (package / _decisions.NAME).write_text('{"another card": {"key": {}}}')
    path = gpu_check.ship(told.folder, package)
    assert set(json.loads(path.read_text())) == {"another card", _decisions.card(None)}
    versions = _decisions.versions()
    monkeypatch.setattr(_decisions, "versions", lambda: versions)
    monkeypatch.setattr(_decisions, "PACKAGE", package)
    for key in json.loads((told.folder / _decisions.NAME).read_text())[_decisions.card(None)]:
        _decisions.path().unlink(missing_ok=True)
        found = _decisions.look_up(None, key, ["resident", "reference"])
        assert found is not None and found.engine == "resident"
    _decisions._memory.clear()


def test_a_kernel_is_held_against_the_rates_of_the_card() -> None:
    x, y = torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 8, 8)
    weight = torch.zeros(32, 16, 3, 3)
    passing = gpu_kernels.Launch("pass", 4, ((x, y), x, None, 3.0), {"warps": 4})
    assert passing.least_bytes == 4 * (x.numel() + y.numel()) and passing.flops == 0
    row = gpu_kernels.row_of(passing, 1e-6, 1e12, passing.least_bytes * 2e6)
    assert row["fraction_of_roofline"] == 0.5 and row["bound_by"] == "copy" and row["microseconds"] == 1.0
    sizes = {"CI": 16, "CO": 32, "KH": 3, "KW": 3}
    multiplying = gpu_kernels.Launch("product", 4, (x, weight, y), sizes)
    assert multiplying.flops == 2 * 2 * 64 * 16 * 32 * 9
    assert gpu_kernels.Launch("product", 4, (x, weight, y), sizes | {"STEP": 2}).flops == multiplying.flops // 4
    row = gpu_kernels.row_of(multiplying, 1.0, multiplying.flops / 0.75, 1e12)
    assert row["fraction_of_roofline"] == 0.75 and row["bound_by"] == "matrix product"
    assert passing.key != multiplying.key == gpu_kernels.Launch("product", 4, (x, weight, y), sizes).key


def test_launches_are_kept_and_timed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastode.ops.triton import launch, passes

    done: list[str] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, programs, *rest, **constants: done.append(kernel))
    monkeypatch.setattr(passes, "launch", launch.launch)
    real = launch.launch

    def step(module: Any, inputs: Any, mode: str) -> Any:
        def work() -> None:
            for kernel in ("first", "second", "first"):
                passes.launch(kernel, 3, inputs[0], warps=4)

        return type("Work", (), {"run": staticmethod(work)})

    monkeypatch.setattr(gpu_kernels.workloads, "work", step)
    told = Report(tmp_path)
    assert gpu_kernels.rooflines(told, CPU, time.monotonic() + 100, [tiny()], lambda run, n: (run(), 1e-3)[1])
    assert passes.launch is real and launch.launch is real
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["first", "second"] * 2
    assert done == ["first", "second", "first", "first", "second"] * 2
    assert {row["dtype"] for row in rows} == {"bfloat16", "tf32"} and "| first | bfloat16 | 1 |" in told.lines[-1]


def test_kernels_are_compiled_beside_the_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: started.append(command))
    gpu.start_warmers(tmp_path, CPU)
    assert [command[-1] for command in started] == [f"{part}/{gpu.WARMERS}" for part in range(gpu.WARMERS)]
    ran: list[str] = []
    monkeypatch.setattr(gpu, "measured", lambda: [tiny()] * 3)
    monkeypatch.setattr(gpu, "FAMILIES", {"ie": "k1"})
    monkeypatch.setattr(
        gpu_check, "warm", lambda device, chosen, part, parts: ran.append(f"{len(chosen)} {part} {parts}")
    )
    assert gpu.main(["--device", "cpu", "--warm", "2/6"]) == 0 and ran == ["3 2 6"]


def test_every_workload_is_somebodys_to_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, str]] = []

    def step(module: Any, inputs: Any, mode: str) -> Any:
        met.append((str(inputs[0].dtype), mode))
        return type("Work", (), {"run": staticmethod(lambda: None)})

    monkeypatch.setattr(gpu_check.workloads, "work", step)
    for part in range(3):
        gpu_check.warm(CPU, [tiny()], part, 3)
    assert len(met) == 2 * 3 * 2 and len(set(met)) == 6  # dtypes, modes, and the two engines of the CPU


def test_a_command_that_runs_too_long_is_stopped(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import time; print('started', flush=True); time.sleep(60)"
    status = gpu_check.stream([sys.executable, "-c", code], tmp_path / "log.txt", 3.0, lines.append)
    assert status is None and lines == ["started"] and (tmp_path / "log.txt").read_text() == "started\n"


def test_a_command_does_not_outlive_its_caller(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.stream([sys.executable, "-c", code], tmp_path / "log.txt", 50.0, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_machine_without_a_card_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "none")]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_nothing_but_torch_and_triton_is_imported() -> None:
    """What else is installed here may be missing where the card is."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'pytest', 'sklearn', 'matplotlib', 'tqdm', 'rich', 'hypothesis'}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from benchmarks import gpu, gpu_check\n"
        "assert gpu.main(['--dry']) == 0\n"
        "next(gpu_check.random_cases(True))\n"
        "workload = gpu.measured()[0]\n"
        "workload.inputs('cpu')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=header.ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
