"""`python -m benchmarks.gpu`: equality and speed on the machine's card, within a budget of minutes.

It needs torch, triton and pytest, nothing else, and no network. What it writes, at most 8 files: check.txt (pytest's
output), equality.json, gpu.json and gpu.png (the measurements), summary.md. Each is on disk as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import contenders, header, measure, report, run, timing, workloads
from .contenders import BASELINES
from .workloads import Workload

MINUTES = 9.0
STEPS = ("check", "bench", "all")
# Shares of the budget: what pytest and the equality of the workloads may take when both steps run.
PYTEST_SHARE, EQUALITY_SHARE = 0.35, 0.15
DTYPES = ("bfloat16", "tf32", "float32")
FAMILIES = {"ie": "k1", "ssp2": "", "ssp3": "", "ark": "", "skew": "pair"}
COMPILED = ("compile-cl", "compile-ro", "vjp-compile")
SECONDS = 0.8


def measured() -> list[Workload]:
    """The workloads of the GPU's targets, those of one family together."""
    return [w for w in workloads.everything() if w.statistics == "train" and FAMILIES.get(w.id) == w.variant]


def plan(dtypes: Sequence[str] = DTYPES) -> list[run.Item]:
    """What is timed, the most wanted first: every block against eager, then one shape of each against compiled."""
    chosen = measured()
    items = [run.Item(w, mode, dtype, ()) for dtype in dtypes[:2] for w in chosen for mode in w.modes]
    first = {w.id: w for w in reversed(chosen)}
    for dtype in dtypes[:1]:
        for family in FAMILIES:
            rivals = tuple(name for name in COMPILED if name != "vjp-compile" or family == "ie")
            items += [run.Item(first[family], mode, dtype, rivals) for mode in first[family].modes]
    return items


class Report:
    """The summary, rewritten whenever a line is added."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it on disk."""
        print(text, flush=True)
        self.lines.append(text)
        (self.folder / "summary.md").write_text("\n\n".join(self.lines) + "\n")

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        (self.folder / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def stream(command: Sequence[str], log: Path, seconds: float, echo: Callable[[str], object] = print) -> int | None:
    """Run a command, echoing its lines as they come and keeping them in a file.

    Args:
        command: the program and its arguments, run from the repository's root.
        log: where its output goes.
        seconds: after which it and its children are stopped.
        echo: called with each line.

    Returns:
        Its exit status, or None if it was stopped.
    """
    process = subprocess.Popen(
        list(command),
        cwd=header.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(seconds, 1.0), stop)
    timer.start()
    try:
        assert process.stdout is not None
        with log.open("w") as file:
            for text in process.stdout:
                file.write(text)
                file.flush()
                echo(text.rstrip("\n"))
        status = process.wait()
    finally:
        timer.cancel()
    return None if stopped.is_set() else status


def check_tests(report_: Report, seconds: float) -> bool:
    """The tests that need a card; True if they passed."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    status = stream(
        [*command, "--continue-on-collection-errors"],
        report_.folder / "check.txt",
        seconds,
        lambda text: print(text, flush=True),
    )
    words = {None: f"stopped after {seconds:.0f} s", 0: "passed", 5: "none collected"}
    report_.say(f"tests on the card: {words.get(status, f'failed (status {status})')}; see check.txt")
    return status == 0


def check_equality(report_: Report, device: torch.device, deadline: float) -> bool:
    """Every engine on every workload, dtype and mode through fastode.testing; True if all that ran are equal."""
    rows: list[dict[str, Any]] = []
    cases = [(w, dtype, mode) for dtype in DTYPES for w in measured() for mode in w.modes]
    done = 0
    for workload, dtype, mode in cases:
        if time.monotonic() > deadline:
            break
        measure.set_precision(dtype, device)
        block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
        for engine, reason in contenders.engines(block, inputs).items():
            row = {"workload": workload.name, "dtype": dtype, "mode": mode, "engine": engine}
            if reason:
                rows.append(row | {"left_out": reason})
                continue
            contender = contenders.fused(engine)
            try:
                module, own = contender.make(block, inputs)
                rows.append(row | measure.equality(contender, block, module, own, mode))
            except Exception as error:  # a kernel that does not launch is a finding, not the end of the run
                rows.append(row | {"ok": False, "errors": timing.message(error)})
            if not rows[-1]["ok"]:
                print(f"NOT EQUAL: {rows[-1]}", flush=True)
        done += 1
        report_.write("equality.json", {"header": header.header(device, "equality"), "results": rows})
    judged = [row for row in rows if "ok" in row]
    equal = sum(row["ok"] for row in judged)
    report_.say(f"equality: {equal} of {len(judged)} comparisons equal, {done} of {len(cases)} cases reached")
    left = sorted({f"{row['engine']}: {row['left_out']}" for row in rows if "left_out" in row})
    if left:
        report_.say("engines that took no part: " + "; ".join(left))
    return bool(judged) and equal == len(judged)


def bench(report_: Report, device: torch.device, deadline: float) -> None:
    """Time the plan until the deadline; gpu.json is rewritten after every measurement."""
    record = run.Record(report_.folder / "gpu.json", header.header(device, "gpu"))
    run.go(plan(), record, device, seconds=SECONDS, deadline=deadline, graphs=device.type == "cuda")
    if not record.rows:
        report_.say("no measurement was made: out of time")
        return
    fused = [row for row in record.rows if row["contender"] == "fused"]
    report_.say(f"measured: {len(record.rows)} rows, {len(fused)} of this project; {report.rates(record.head)}")
    report_.say("\n".join(report.readme_table(record.rows)))
    report.plots([report_.folder / "gpu.json"])


def main(argv: Sequence[str] | None = None) -> int:
    """Check and time on the card.

    Returns:
        0 if everything that was asked for ran and was equal, 1 if not, 2 without a card.
    """
    environment = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--step", choices=STEPS, default=environment("STEP") or "all")
    parser.add_argument("--results", type=Path, default=environment("RESULTS") or None)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself out on a machine without a card")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is false")
        return 2
    start = time.monotonic()
    budget = 60 * arguments.minutes
    end = start + budget
    folder = Path(arguments.results or header.RESULTS / header.folder_name(device))
    told = Report(folder)
    head = header.header(device, "gpu")
    told.say(f"{head['device']}, torch {head['versions']['torch']}, commit {head['commit'][:12]}, {head['date']}")
    steps = STEPS[:2] if arguments.step == "all" else (arguments.step,)
    alone = len(steps) == 1
    what = {
        "check": f"the tests marked gpu, then {len(measured())} workloads' equality in {', '.join(DTYPES)}",
        "bench": f"{len(plan())} measurements against {', '.join(BASELINES)} and compiled, with graph replays",
    }
    told.say(f"will run within {arguments.minutes:g} minutes: {'; '.join(what[step] for step in steps)}; in {folder}")
    good = True
    if "check" in steps:
        good &= check_tests(told, budget * (0.7 if alone else PYTEST_SHARE))
        stop = end if alone else min(end, time.monotonic() + budget * EQUALITY_SHARE)
        good &= check_equality(told, device, stop)
    if "bench" in steps:
        bench(told, device, end - 10)  # the plot and the summary come after the last measurement
    told.say(f"took {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
