"""What `benchmarks.gpu` checks on a card: the tests that need one, blocks of random shapes, workloads, trials."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastode import _decisions, _dispatch
from fastode.testing import compare_blocks

from . import contenders, header, measure, timing, workloads
from .records import write_text
from .workloads import Workload

DTYPES = ("bfloat16", "tf32", "float32")
TESTS = header.ROOT / "tests"
JUDGED = 8  # samples of a workload; what is timed is judged again as a whole
Row = dict[str, Any]


class Report:
    """The summary and the results; each is on disk as soon as it is known."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it on disk."""
        print(text, flush=True)
        self.lines.append(text)
        self._replace("summary.md", "\n\n".join(self.lines) + "\n")

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        self._replace(name, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def _replace(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)


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
        if process.poll() is None:  # interrupted: it has a session of its own, which no signal to this one reaches
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if stopped.is_set() else status


def card_tests(report: Report, device: torch.device, deadline: float) -> bool:
    """The tests that need a card, where there is pytest; True unless one of them failed."""
    if find_spec("pytest") is None:
        report.say("tests on the card: pytest is not installed; the blocks of random shapes get their time")
        return True
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    seconds = deadline - time.monotonic()
    status = stream(
        [*command, "--continue-on-collection-errors"],
        report.folder / "check.txt",
        seconds,
        lambda text: print(text, flush=True),
    )
    words = {None: f"stopped after {seconds:.0f} s", 0: "passed", 5: "none collected"}
    report.say(f"tests on the card: {words.get(status, f'failed (status {status})')}; see check.txt")
    return status in (0, None)


def random_cases(half: bool, seed: int = 0) -> Iterator[tuple[dict[str, Any], str]]:
    """Cases of tests/block_cases.py without end, each with a precision; with float16, and without empty batches."""
    sys.path.insert(0, str(TESTS))
    try:
        import block_cases
    finally:
        sys.path.remove(str(TESTS))
    draw = random.Random(seed)
    more = {"size": (*block_cases.COMMON["size"], (32, 32)), "batch": (1, 2, 5, 33)}
    if half:
        more["dtype"] = (*block_cases.COMMON["dtype"], torch.float16)
    for designs in itertools.repeat((block_cases.IMPLICIT, block_cases.EXPLICIT)):
        for design in designs:
            case = {name: draw.choice(values) for name, values in (design | more).items()}
            if block_cases.possible(case):
                yield case, draw.choice(("tf32", "float32"))


def random_blocks(report: Report, device: torch.device, deadline: float, most: int | None = None) -> bool:
    """Blocks of random schemes, branches, shapes and dtypes on every engine, until the deadline; True if all equal."""
    rows: list[Row] = []
    for number, (case, precision) in enumerate(itertools.islice(random_cases(device.type == "cuda"), most)):
        if time.monotonic() > deadline:
            break
        import block_cases

        measure.set_precision(precision, device)
        plain, fused = (block.to(device) for block in block_cases.make_pair(case))
        x = block_cases.make_input(case).to(device)
        named = {"case": block_cases.name_of(case), "precision": precision}
        for engine in _dispatch.ENGINES[1:]:
            fused.engine = engine
            if engine == "reference" or not fused.why_not(engine, x):
                rows.append(named | {"engine": engine} | judged(plain, fused, x, case["mode"]))
        if number % 20 == 0:
            report.write("random.json", {"header": header.header(device, "random"), "results": rows})
    report.write("random.json", {"header": header.header(device, "random"), "results": rows})
    counts = {e: sum(row["engine"] == e for row in rows) for e in _dispatch.ENGINES[1:]}
    ran = ", ".join(f"{count} on {engine}" for engine, count in counts.items() if count)
    equal = sum(row["ok"] for row in rows)
    report.say(f"blocks of random shapes: {equal} of {len(rows)} comparisons equal ({ran or 'none was reached'})")
    return bool(rows) and equal == len(rows)


def judged(plain: nn.Module, fused: nn.Module, x: Any, mode: Any) -> Row:
    """The verdict of fastode.testing; a kernel that does not launch is a finding, not the end of the run."""
    try:
        worst = compare_blocks(plain, fused, x, mode=mode).worst
        row = {"ok": worst.ok, "worst": measure._finite(worst.ratio), "tensor": worst.name}
    except Exception as error:
        row = {"ok": False, "errors": timing.message(error)}
    if not row["ok"]:
        print(f"NOT EQUAL: {getattr(fused, 'engine', '')} {mode}: {row}", flush=True)
    return row


def workload_blocks(report: Report, device: torch.device, deadline: float, chosen: Sequence[Workload]) -> bool:
    """Every engine on every workload, dtype and mode; True if all that ran are equal."""
    rows: list[Row] = []
    cases = [(w, dtype, mode) for dtype in DTYPES for w in chosen for mode in w.modes]
    done = 0
    for workload, dtype, mode in cases:
        if time.monotonic() > deadline:
            break
        measure.set_precision(dtype, device)
        block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
        few = tuple(x[:JUDGED] for x in inputs)
        for engine, reason in contenders.engines(block, few).items():
            row = {"workload": workload.name, "dtype": dtype, "mode": mode, "engine": engine}
            if reason:
                rows.append(row | {"left_out": reason})
                continue
            module, own = contenders.fused(engine).make(block, few)
            rows.append(row | judged(block, module, own[0] if len(own) == 1 else own, mode))
        done += 1
        report.write("equality.json", {"header": header.header(device, "equality"), "results": rows})
    compared = [row for row in rows if "ok" in row]
    equal = sum(row["ok"] for row in compared)
    report.say(f"workloads: {equal} of {len(compared)} comparisons equal, {done} of {len(cases)} cases reached")
    left = sorted({f"{row['engine']}: {row['left_out']}" for row in rows if "left_out" in row})
    if left:
        report.say("engines that took no part: " + "; ".join(left))
    return bool(compared) and equal == len(compared)


def trials(report: Report, device: torch.device, deadline: float, chosen: Sequence[Workload]) -> bool:
    """What "auto" decides for the workloads, in channels_last, kept as the package would ship it."""
    before = _decisions.entries(device.index)
    for dtype, workload in itertools.product(DTYPES[:2], chosen):
        if time.monotonic() > deadline:
            break
        measure.set_precision(dtype, device)
        block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
        for mode in workload.modes:
            module, own = contenders.fused("auto").make(block, inputs)
            workloads.work(module, own, mode).run()
        report.write(_decisions.NAME, {_decisions.card(device.index): _decisions.entries(device.index)})
    found = _decisions.entries(device.index)
    fresh = {key: entry for key, entry in found.items() if key not in before}
    taken = {e: sum(entry["engine"] == e for entry in found.values()) for e in _dispatch.ENGINES[1:]}
    words = ", ".join(f"{engine} {count} times" for engine, count in taken.items() if count)
    report.say(f"trials: {len(fresh)} made, {len(found)} known; taken: {words or 'none'}; see {_decisions.NAME}")
    refused = sorted({f"{name}: {why}" for entry in found.values() for name, why in entry["refused"].items()})
    if refused:
        report.say("refused in trials: " + "; ".join(refused[:10]))
    return not refused


def ship(folder: Path, package: Path = _decisions.PACKAGE) -> Path:
    """Add the decisions of a run to those in the package.

    Args:
        folder: the results of the run.
        package: where the package's own file is.
    """
    found = json.loads((folder / _decisions.NAME).read_text())
    path = package / _decisions.NAME
    known = json.loads(path.read_text()) if path.exists() else {}
    for card, entries in found.items():
        known.setdefault(card, {}).update(entries)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return path


def warm(device: torch.device, chosen: Sequence[Workload], part: int, parts: int) -> None:
    """Compile the kernels of a share of the workloads into Triton's cache, beside what is being checked."""
    work = [(w, dtype) for dtype in DTYPES[:2] for w in chosen]
    for workload, dtype in work[part::parts]:
        measure.set_precision(dtype, device)
        block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
        for engine, reason in contenders.engines(block, inputs).items():
            if reason:
                continue
            for mode in workload.modes:
                try:
                    module, own = contenders.fused(engine).make(block, inputs)
                    workloads.work(module, own, mode).run()
                except Exception as error:  # the check will meet it too, and tell
                    print(f"{workload.name} {dtype} {engine} {mode}: {timing.message(error)}", flush=True)
