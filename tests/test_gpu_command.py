"""`python -m benchmarks.gpu` as far as a machine without a card can try it: its plan, its budgets, what is on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_bench, gpu_check, gpu_kernels, gpu_rows, gpu_smoke, header, timing
from benchmarks.gpu_processes import Crew
from benchmarks.gpu_report import Report
from benchmarks.suites import Item
from benchmarks.workloads import Workload
from fastode import reference
from fastode.dispatch import decisions, trial
from fastode.native import operators
from fastode.testing import sample_input

CPU = torch.device("cpu")
HERE = Crew(CPU, 0)  # everything in this process


def tiny() -> Workload:
    def build() -> nn.Module:
        return reference.IESkip(reference.PreActBranch(4, norm="layer", activation="tanh"))

    return Workload("ie", "k1", "4@3", build, lambda device: (sample_input(3, 4, 3, 3),))


@pytest.fixture(autouse=True)
def _built() -> None:
    assert operators.load(announce=False) is None


def stage(name: str, share: float, run: Any = lambda *_: True) -> gpu.Stage:
    return gpu.Stage(name, share, f"what {name} does", run)


def test_the_steps_fit_a_short_lease() -> None:
    assert gpu.BUDGETS == {"build": 180.0, "smoke": 90.0, "check": 180.0, "bench": 240.0, "sanitize": 180.0}
    assert sum(gpu.BUDGETS.values()) < 15 * 60
    assert list(gpu.BUDGETS)[:2] == ["build", "smoke"], "the shortest comes first, and before it what takes its time"
    for step in gpu.BUDGETS:
        assert sum(s.share for s in gpu.stages(step)) == pytest.approx(1.0)


def test_what_a_stage_leaves_falls_to_the_next() -> None:
    stages = gpu.stages("bench")
    ends = gpu.deadlines(stages, 5.0, 100.0)
    assert ends == sorted(ends) and ends[-1] == pytest.approx(105.0)
    # Deadlines and not lengths: a stage that takes nothing leaves all of its time.
    assert gpu.deadlines([stage("a", 0.18), stage("b", 0.06)], 0.0, 24.0) == pytest.approx([18.0, 24.0])


def test_the_budget_is_kept_and_a_failure_is_not_the_end(tmp_path: Path, capsys: Any) -> None:
    met: list[float] = []

    def takes(report: Report, crew: Crew, deadline: float) -> bool:
        met.append(deadline)
        return True

    def fails(*_: Any) -> bool:
        raise RuntimeError("no such kernel")

    told = Report(tmp_path, "check", CPU)
    start = time.monotonic()
    chosen = [stage("a", 0.5, takes), stage("b", 0.25, fails), stage("c", 0.25, takes)]
    assert not gpu.go(chosen, told, HERE, start, 40.0)
    assert met == pytest.approx([start + 20.0, start + 40.0])
    assert told.lines == ["b failed: RuntimeError: no such kernel"]
    assert (tmp_path / "summary-check.md").read_text() == "b failed: RuntimeError: no such kernel\n"
    assert gpu.go(chosen[:1], told, HERE, start, 40.0)
    assert not gpu.go([stage("d", 1.0, lambda *_: False)], told, HERE, start, 40.0)
    assert "== b: what b does; until 30 s" in capsys.readouterr().out


def test_a_stage_that_does_not_end_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    reached: list[str] = []

    def sleeps(*_: Any) -> bool:
        try:
            time.sleep(60)
        except Exception:  # as a contender's failure is taken
            reached.append("taken for a failure")
        return True

    told = Report(tmp_path, "smoke", CPU)
    start = time.monotonic()
    chosen = [stage("a", 0.5, sleeps), stage("b", 0.5, lambda *_: reached.append("b") or True)]
    gpu.go(chosen, told, HERE, start, 1.0)
    assert time.monotonic() - start < 30 and told.lines == ["a: stopped at its time"] and reached == ["b"]


def test_a_build_is_not_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a compiler has half done would be thrown away, and made again by who comes next."""
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    ended: list[str] = []

    def build() -> str:
        time.sleep(1.0)
        ended.append("built")
        return ""

    monkeypatch.setattr(gpu_smoke.inside, "build", build)
    monkeypatch.setattr(gpu_smoke.inside, "build_programs", lambda device: pytest.fail("it is out of time"))
    told = Report(tmp_path, "build", CPU)
    gpu.go(gpu.stages("build"), told, HERE, time.monotonic(), 0.2)
    assert ended == ["built"] and told.lines == ["build: stopped at its time"]


def test_a_measurement_that_is_interrupted_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(workload: Workload, mode: str, *_: Any, **__: Any) -> Any:
        raise timing.OutOfTime

    monkeypatch.setattr(gpu_bench.run.measure, "measure", measured)
    told = Report(tmp_path, "bench", CPU)
    items = [Item(tiny(), mode, "float32", ()) for mode in ("train", "forward")]
    gpu_bench.bench(told, HERE, time.monotonic() + 100, "gpu", items)
    left = ["ie k1 4@3 train float32", "ie k1 4@3 forward float32"]
    assert json.loads((tmp_path / "gpu.json").read_text())["header"]["left_out"] == left
    assert told.lines[-1] == f"gpu: out of time for 2: {', '.join(left)}"


def test_rows_of_few_contenders_go_on_where_those_of_many_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan of fake clocks: a row with rivals takes 50 s, one without 5 s, and there are 100 s."""
    now = [1000.0]
    done: list[str] = []

    def measured(workload: Workload, mode: str, dtype: str, *_: Any, **__: Any) -> Any:
        done.append(f"{mode} {dtype}")
        now[0] += 50.0 if mode == "train" else 5.0
        return []

    monkeypatch.setattr(gpu_bench.run.measure, "measure", measured)
    monkeypatch.setattr(gpu_bench.run.time, "monotonic", lambda: now[0])
    many = [Item(tiny(), "train", dtype, ("compile-cl",)) for dtype in ("float32", "bfloat16", "tf32")]
    few = [Item(tiny(), "forward", dtype, ()) for dtype in ("float32", "bfloat16")]
    record = gpu_bench.run.Record(tmp_path / "gpu.json", {})
    gpu_bench.run.go([few[0], *many, few[1]], record, CPU, deadline=1060.0)
    assert done == ["forward float32", "train float32", "forward bfloat16"]
    assert record.head["left_out"] == ["ie k1 4@3 train bfloat16", "ie k1 4@3 train tf32"]


def test_a_dry_run_prints_the_plan_and_starts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "go", lambda *_: pytest.fail("started"))
    assert gpu.main(["--dry"]) == 0
    out = capsys.readouterr().out
    for step, seconds in gpu.BUDGETS.items():
        for each in gpu.stages(step):
            assert each.what in out
        assert f"-{seconds - gpu.LAST:3.0f} s" in out
    for item in (*gpu_bench.plan(), *gpu_bench.compiled_plan(), *gpu_bench.smoke_plan()):
        assert item.name in out
    assert gpu.main(["--dry", "--step", "check"]) == 0
    out = capsys.readouterr().out
    assert "rows against" not in out and "every engine" in out


def test_the_cuda_programs_come_first_at_each_size_in_every_mode() -> None:
    items, blocks = gpu_bench.plan(), gpu_bench.programs.timed()
    modes = ("forward", "input_grad", "train")
    leading = [(i.workload.name, i.mode, i.dtype) for i in items[: len(modes) * len(blocks)]]
    first = [w.name for w in gpu_bench.programs.timed(1)]
    assert first == ["ssp3 eval 16@32", "ie k1 16@32", "soblock rk4 16@32"]
    assert leading[:9] == [(name, mode, "bfloat16") for mode in modes for name in first]
    assert {(name, mode) for name, mode, _ in leading} == {(w.name, mode) for w in blocks for mode in modes}
    assert len({i.name for i in items}) == len(items)
    for plan in (gpu_bench.compiled_plan(), gpu_bench.smoke_plan()):
        assert [i.name for i in plan[:18]] == [i.name for i in items[:18]] and len({i.name for i in plan}) == len(plan)
    assert all("compile-ro" in i.rivals for i in gpu_bench.compiled_plan())
    assert [w.name for w in gpu_check.checked()[: len(blocks)]] == [w.name for w in blocks]


def test_the_plan_has_every_family_mode_and_dtype_before_any_second_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench.programs, "timed", lambda sizes=0: [])
    items = gpu_bench.plan()
    assert len({(i.workload.name, i.mode, i.dtype) for i in items}) == len(items)
    first = items[: len(gpu_bench.FAMILIES) * 3 * 2]
    assert {(i.workload.id, i.mode, i.dtype) for i in first} == {
        (family, mode, dtype) for family in ("ie", "ssp3", "skew") for mode in workload_modes() for dtype in DTYPES
    }
    compiled = gpu_bench.compiled_plan()
    assert {(i.workload.name, i.mode, i.dtype) for i in compiled} == {(i.workload.name, i.mode, i.dtype) for i in first}
    assert all({"compile-cl", "compile-ro"} <= set(i.rivals) for i in compiled)
    assert {i.workload.id for i in compiled if "vjp-compile" in i.rivals} == {"ie"}
    for item in gpu_bench.to_compile():
        name, mode, dtype, _ = item.split(" | ")
        assert any((i.workload.name, i.mode, i.dtype) == (name, mode, dtype) for i in items), item
    names = [(w.name, w.statistics) for w in gpu_check.tried()]
    assert names[: len(gpu_check.checked())] == [(w.name, w.statistics) for w in gpu_check.checked()]
    assert len(set(names)) == len(names) > 40 and not any(w.id == "nets" for w in gpu_check.tried())


DTYPES = ("bfloat16", "tf32")


def workload_modes() -> tuple[str, ...]:
    return ("forward", "input_grad", "train")


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
        told = Report(tmp_path, "check", CPU)
        assert gpu_check.card_tests(told, HERE, time.monotonic() + 9) == (good or not with_pytest)
        assert told.lines[0].startswith(f"tests on the card: {word if with_pytest else 'pytest is not installed'}")
    assert ("gpu" in streamed) == with_pytest


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small block instead of the papers', and short rounds."""
    monkeypatch.setattr(gpu_rows, "workload", lambda row: tiny())
    monkeypatch.setattr(gpu_rows, "TABLE", gpu_rows.TABLE[:2])
    monkeypatch.setattr(gpu_rows, "PROGRAMS", ())
    monkeypatch.setattr(gpu_bench.programs, "timed", lambda sizes=0: [])
    monkeypatch.setattr(gpu_bench, "measured", lambda: [tiny()])
    monkeypatch.setattr(gpu_bench, "compiled_plan", lambda: [Item(tiny(), "forward", "bfloat16", (), rounds=(2, 2))])
    monkeypatch.setattr(gpu_bench, "MODES", ("train",))
    monkeypatch.setattr(gpu_bench, "DTYPES", ("float32",))
    monkeypatch.setattr(gpu_check, "DTYPES", ("float32",))
    monkeypatch.setattr(gpu_rows, "DTYPE", "float32")
    for name in ("checked", "tried"):
        monkeypatch.setattr(gpu_check, name, lambda: [tiny()])
    monkeypatch.setattr(gpu_check, "RANDOM", 2)
    monkeypatch.setattr(gpu_check, "stream", lambda *_: 0)
    monkeypatch.setattr(gpu_smoke, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu_bench, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "machine", small_machine)


def test_every_step_leaves_on_disk_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    small(monkeypatch)
    arguments = ["--device", "cpu", "--processes", "0", "--seconds", "200", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 0
    out = capsys.readouterr().out
    order = ["build: ", "smoke: ", "== launches", "check: ", "== trials", "bench: ", "== kernels"]
    order += ["sanitize: ", "== tools"]
    assert [out.index(text) for text in order] == sorted(out.index(text) for text in order)
    for step in gpu.BUDGETS:
        for line in (tmp_path / f"summary-{step}.md").read_text().splitlines():
            assert not line or line in out
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(read) == {
        "launches-smoke.json", "gpu-smoke.json", "random.json", "equality.json", "decisions.json", "gpu.json",
        "gpu-compiled.json", "kernels.json",
    }  # fmt: skip
    assert not list(tmp_path.glob("*.part"))
    results = read["launches-smoke.json"]["results"]
    assert len(results) == 2 * 3 and {r["engine"] for r in results if r.get("ok")} == {"resident", "staged"}
    assert {row["engine"] for row in read["equality.json"]["results"]} == {"resident", "fused_convolution", "staged"}
    assert {row["engine"] for row in read["random.json"]["results"]} == {"resident", "staged", "reference"}
    for name in ("gpu.json", "gpu-smoke.json", "gpu-compiled.json"):
        assert read[name]["rows"] and not any(row["errors"] for row in read[name]["rows"])
    assert "sanitize: skipped, compute-sanitizer is not on this machine" in out


def test_a_killed_run_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    real, calls = gpu_rows.judge, []

    def judge(item: str, device: torch.device) -> Any:
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from real(item, device)

    monkeypatch.setattr(gpu_rows, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--step", "smoke", "--processes", "0", "--results", str(tmp_path)])
    assert len(json.loads((tmp_path / "launches-smoke.json").read_text())["results"]) == 2
    assert sum(line.startswith("ie k1 16@32") for line in (tmp_path / "summary-smoke.md").read_text().splitlines()) == 1


def test_what_is_out_of_time_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    told, past = Report(tmp_path, "all", CPU), time.monotonic() - 1
    assert gpu_bench.bench(told, HERE, past, "gpu", [Item(tiny(), "train", "float32", ())])
    assert told.lines == ["gpu: no measurement was made", "gpu: out of time for 1: ie k1 4@3 train float32"]
    assert json.loads((tmp_path / "gpu.json").read_text())["header"]["left_out"] == ["ie k1 4@3 train float32"]
    # A check that reached nothing has shown nothing.
    assert not gpu_smoke.launches(told, HERE, past) and "launches: out of time for 6: ie k1 16@32" in told.lines[-1]
    assert not gpu_check.workload_blocks(told, HERE, past)
    assert told.lines[-1] == "workloads: out of time for 1: ie k1 4@3 | float32"
    assert not gpu_check.random_blocks(told, HERE, past)
    assert gpu_check.trials(told, HERE, past)
    assert told.lines[-1] == "trials: out of time for 1: ie k1 4@3 float32"
    assert gpu_kernels.rooflines(told, HERE, past, [])


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
    small(monkeypatch)

    def make(block: nn.Module, inputs: Any) -> Any:
        module = tiny().build()
        module.load_state_dict(block.state_dict())
        module.__class__ = kind
        return module.to(inputs[0].dtype), inputs

    wrong = type("Contender", (), {"make": staticmethod(make)})
    monkeypatch.setattr(gpu_check.contenders, "fused", lambda engine: wrong)
    told = Report(tmp_path, "check", CPU)
    assert not gpu_check.workload_blocks(told, HERE, time.monotonic() + 100)
    assert "workloads: 0 of 6 comparisons equal" in told.lines
    assert said in (tmp_path / "equality.json").read_text() and "NOT EQUAL or failed" in capsys.readouterr().out
    assert (
        not gpu_smoke.launches(told, HERE, time.monotonic() + 100)
        and "launches: 0 of 4 comparisons equal" in told.lines
    )


@pytest.mark.parametrize("processes", [4, 0])
def test_the_programs_are_judged_by_a_process_of_their_own(
    processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are what was tried least: one that crashes or hangs takes neither this process nor the others' time."""
    asked: list[tuple[int, bool, float]] = []

    def work(crew: Crew, kind: str, answer: Any, items: Any, deadline: float, *_: Any) -> list[str]:
        (programs,) = {gpu_rows.is_program(item) for item in items}
        asked.append((crew.count, programs, deadline))
        return []

    monkeypatch.setattr(Crew, "work", work)
    deadline = time.monotonic() + 90
    gpu_smoke.launches(Report(tmp_path, "smoke", CPU), Crew(CPU, processes), deadline)
    assert [each[:2] for each in asked] == [(min(1, processes), True), (processes, False)]
    assert asked[0][2] == pytest.approx(deadline - 30, abs=1) and asked[1][2] == deadline


def test_a_kernel_that_no_row_launched_is_named() -> None:
    names = sorted(gpu_smoke.inside.kernel_names())
    assert len(names) > 15 and "convolution_kernel" in names
    results: list[dict[str, Any]] = [{"kernels": names[1:3]}, {"errors": "its process ended"}, {"kernels": names[2:]}]
    assert gpu_smoke.unlaunched(results) - gpu_smoke.programs.names() == {names[0]}


# A stand-in for compute-sanitizer, which says what the tool would and does not run the command.
SANITIZER = """#!{python}
import sys, time
tool = sys.argv[2]
assert sys.argv[1] == "--tool" and sys.argv[3:5] == ["--error-exitcode", "9"], sys.argv
assert sys.argv[6:9] == ["-m", "benchmarks.gpu", "--launch"], sys.argv
print("========= COMPUTE-SANITIZER", flush=True)
kind = {kind!r}
if kind == "refuses":
    print("========= Error: Device not supported. Please refer to the documentation")
    sys.exit(1)
if tool == "synccheck" and kind == "sleeps":
    time.sleep(100)
if tool == "racecheck" and kind == "finds":
    print("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
    sys.exit(9)
if tool == "memcheck" and kind == "breaks":
    sys.exit(3)
print("========= ERROR SUMMARY: 0 errors")
"""


def sanitized(
    monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, seconds: float = 100.0
) -> tuple[bool, list[str]]:
    small(monkeypatch)
    program = folder / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable, kind=kind))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_smoke, "sanitizer", lambda: str(program))
    told = Report(folder, "sanitize", CPU)
    return gpu_smoke.sanitize(told, HERE, time.monotonic() + seconds), told.lines


def test_every_row_is_sanitized_by_every_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, lines = sanitized(monkeypatch, tmp_path, "is content")
    rows = [row.name for row in gpu_rows.TABLE]
    assert good and lines[-1] == f"sanitize: {3 * len(rows)} of {3 * len(rows)} clean"
    found = {(r["tool"], r["row"]) for r in json.loads((tmp_path / "sanitize.json").read_text())["results"]}
    assert found == {(tool, row) for tool in ("memcheck", "racecheck", "synccheck") for row in rows}
    assert not list(tmp_path.glob("*.txt"))


@pytest.mark.parametrize(
    ("kind", "tool", "said"),
    [
        ("finds", "racecheck", "FOUND 2 hazards displayed (2 errors, 0 warnings)"),
        ("breaks", "memcheck", "FAILED with status 3"),
    ],
)
def test_what_the_sanitizer_finds_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, tool: str, said: str
) -> None:
    good, lines = sanitized(monkeypatch, tmp_path, kind)
    log = f"{tool}-ie-k1-16-32.txt"
    assert f"{tool} ie k1 16@32 {said}; see {log}" in [" ".join(line.split()) for line in lines]
    assert not good and lines[-1] == "sanitize: 4 of 6 clean"
    assert (tmp_path / log).read_text().startswith("========= COMPUTE-SANITIZER")


def test_a_sanitizer_that_is_missing_or_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, lines = sanitized(monkeypatch, tmp_path, "refuses")
    assert good and len(lines) == 1 and "skipped, compute-sanitizer refuses this machine: Error: Device not" in lines[0]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    told = Report(tmp_path, "sanitize", CPU)
    past = time.monotonic() - 1
    assert gpu_smoke.prepare(told, HERE, past) and gpu_smoke.sanitize(told, HERE, past)
    assert told.lines == ["sanitize: skipped, compute-sanitizer is not on this machine"]


def test_the_sanitizer_is_found_in_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_smoke.sanitizer() == str(program)


def test_a_program_that_outlasts_the_step_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, lines = sanitized(monkeypatch, tmp_path, "sleeps", 3.0)
    assert good and lines[-1] == "sanitize: out of time for 2: synccheck ie k1 16@32, synccheck ssp3 16@32"
    assert "sanitize: 4 of 4 clean" in lines


def test_decisions_are_written_as_the_package_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_check, "tried", lambda: [tiny()])
    monkeypatch.setattr(trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(trial, "_clock", lambda device: lambda run: (run(), 1.0)[1])
    decisions._memory.clear()
    told = Report(tmp_path / "results", "check", CPU)
    assert gpu_check.trials(told, HERE, time.monotonic() + 100)
    assert any(line.startswith("trials: 6 made, 6 known; taken: resident 6 times") for line in told.lines)
    package = tmp_path / "package"
    package.mkdir()
    (package / decisions.NAME).write_text('{"another card": {"key": {}}}')
    path = gpu_check.ship(told.folder, package)
    assert set(json.loads(path.read_text())) == {"another card", decisions.card(None)}
    versions = decisions.versions()
    monkeypatch.setattr(decisions, "versions", lambda: versions)
    monkeypatch.setattr(decisions, "PACKAGE", package)
    for key in json.loads((told.folder / decisions.NAME).read_text())[decisions.card(None)]:
        decisions.path().unlink(missing_ok=True)
        found = decisions.look_up(None, key, ["resident", "reference"])
        assert found is not None and found.engine == "resident"
    decisions._memory.clear()


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
    monkeypatch.setattr(timing, "machine", small_machine)  # without AVX-512 a CPU takes minutes for bfloat16
    told = Report(tmp_path, "bench", CPU)
    assert gpu_kernels.rooflines(told, HERE, time.monotonic() + 100, [tiny()], lambda run, n: (run(), 1e-3)[1])
    assert passes.launch is real and launch.launch is real
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["first", "second"] * 4
    # For two dtypes and the CPU's two engines: a step, and each kernel of it alone.
    assert done == ["first", "second", "first", "first", "second"] * 4
    assert {row["dtype"] for row in rows} == {"bfloat16", "tf32"} and "| first | bfloat16 | 2 |" in told.lines[-1]


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
        "gpu_check.random_case(0, True)\n"
        "gpu_check.checked()[0].inputs('cpu')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=header.ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
