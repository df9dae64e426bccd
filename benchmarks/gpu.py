"""`python -m benchmarks.gpu`: equality, trials and speed on the machine's card, within a budget of minutes.

It needs torch and triton, nothing else, and no network; with pytest the tests that need a card run too. What it writes:
summary.md, check.txt (pytest's output), random.json and equality.json (comparisons), decisions.json (what "auto" takes,
as the package ships it), gpu.json and gpu.png (the measurements) and kernels.json. Each is on disk as soon as it is
known. `--dry` prints the plan and what each part may take, and needs no card.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastode import _build

from . import families, gpu_check, gpu_kernels, header, report, run, timing
from .contenders import BASELINES
from .gpu_check import DTYPES, Report
from .workloads import Workload

MINUTES = 9.0
STEPS = ("check", "bench", "all")
FAMILIES = {"ie": "k1", "ssp2": "", "ssp3": "", "ark": "", "skew": "pair"}
COMPILED = ("compile-cl", "compile-ro", "vjp-compile")
SECONDS = 0.4
MODES = ("train", "forward", "input_grad")
WARMERS = 6  # processes that compile kernels while the checks run
LAST = 5.0  # seconds of the budget that are left for the plot and the summary


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: in a word or two.
        step: "check" or "bench".
        share: of the budget; what it leaves falls to those behind it.
        what: it will do.
        run: does it until a time on time.monotonic's clock; True if nothing was wrong.
    """

    name: str
    step: str
    share: float
    what: str
    run: Callable[[Report, torch.device, float], bool]


def measured() -> list[Workload]:
    """The workloads of the GPU's targets, those of one family together."""
    return [w for w in families.everything() if w.statistics == "train" and FAMILIES.get(w.id) == w.variant]


def blocks() -> list[Workload]:
    """What is tried: the measured workloads, then the papers' other blocks."""
    first = measured()
    names = {(w.name, w.statistics) for w in first}
    rest = [w for w in families.everything() if w.id not in ("nets", "conv")]
    return first + [w for w in rest if (w.name, w.statistics) not in names]


def plan() -> list[run.Item]:
    """What is timed against eager, the most wanted first."""
    chosen = measured()
    return [run.Item(w, mode, dtype, ()) for dtype in DTYPES[:2] for mode in MODES for w in chosen]


def compiled_plan() -> list[run.Item]:
    """One shape of each family against the compiled contenders."""
    first = {w.id: w for w in reversed(measured())}
    items = []
    for mode, family in itertools.product(MODES, FAMILIES):
        rivals = tuple(name for name in COMPILED if name != "vjp-compile" or family == "ie")
        items.append(run.Item(first[family], mode, DTYPES[0], rivals))
    return items


def stages() -> list[Stage]:
    """The parts of the run, in order."""
    chosen = measured()
    trials, timed = partial(gpu_check.trials, chosen=blocks()), partial(bench, name="gpu", items=plan())
    rivals = partial(bench, name="gpu-compiled", items=compiled_plan())
    dtypes = ", ".join(DTYPES)
    return [
        Stage("tests", "check", 0.16, "the tests marked gpu, if there is pytest", gpu_check.card_tests),
        Stage("random", "check", 0.10, "blocks of random shapes on every engine", gpu_check.random_blocks),
        Stage(
            "workloads", "check", 0.10, f"{len(chosen)} workloads on every engine in {dtypes}",
            partial(gpu_check.workload_blocks, chosen=chosen),
        ),
        Stage("trials", "check", 0.12, f'what "auto" takes for {len(blocks())} blocks', trials),
        Stage("eager", "bench", 0.28, f"{len(plan())} rows against {', '.join(BASELINES)}", timed),
        Stage("compiled", "bench", 0.18, f"{len(compiled_plan())} rows against {', '.join(COMPILED)}", rivals),
        Stage("kernels", "bench", 0.06, "each kernel's share of its roofline", partial(
            gpu_kernels.rooflines, chosen=chosen,
        )),
    ]  # fmt: skip


def deadlines(chosen: Sequence[Stage], start: float, seconds: float) -> list[float]:
    """When each stage has to end: what an earlier one leaves falls to the next.

    Example:
        >>> two = [Stage("a", "check", 0.1, "", None), Stage("b", "check", 0.3, "", None)]
        >>> deadlines(two, 100.0, 80.0)
        [120.0, 180.0]
    """
    total = sum(stage.share for stage in chosen)
    return [start + seconds * part / total for part in itertools.accumulate(stage.share for stage in chosen)]


def bench(told: Report, device: torch.device, deadline: float, name: str, items: Sequence[run.Item]) -> bool:
    """Time a plan until the deadline; its file is rewritten after every measurement."""
    path = told.folder / f"{name}.json"
    record = run.Record(path, header.header(device, name))
    run.go(items, record, device, seconds=SECONDS, deadline=deadline, graphs=device.type == "cuda")
    left = f"; {len(record.head['left_out'])} of {len(items)} out of time" if "left_out" in record.head else ""
    if not record.rows:
        told.say(f"{name}: no measurement was made{left}")
        return True
    told.say(f"{name}: {len(record.rows)} rows{left}; {report.rates(record.head)}; see {path.name}")
    told.say("\n".join(report.readme_table(record.rows)))
    report.plots([path])
    return not any(row["errors"] and row["contender"] == "fused" for row in record.rows)


def go(chosen: Sequence[Stage], told: Report, device: torch.device, start: float, seconds: float) -> bool:
    """Run the stages; one that fails is told of, and the next goes on. True if nothing was wrong."""
    good = True
    for stage, deadline in zip(chosen, deadlines(chosen, start, seconds), strict=True):
        began = time.monotonic()
        print(f"== {stage.name}: {stage.what}; until {deadline - start:.0f} s", flush=True)
        try:
            good &= stage.run(told, device, deadline)
        except Exception as error:  # whatever it is, what comes behind it is still wanted
            told.say(f"{stage.name} failed: {timing.message(error)}")
            good = False
        print(f"== {stage.name} took {time.monotonic() - began:.0f} s", flush=True)
    return good


def start_warmers(folder: Path, device: torch.device) -> list[subprocess.Popen[bytes]]:
    """Processes that compile the kernels of the workloads while other things are checked."""
    count = min(WARMERS, (os.cpu_count() or 1) // 2 - 1)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", str(device)]
    with (folder / "warm.txt").open("wb") as log:
        return [
            subprocess.Popen([*command, "--warm", f"{part}/{count}"], cwd=header.ROOT, stdout=log, stderr=log)
            for part in range(count)
        ]


def dry(chosen: Sequence[Stage], seconds: float) -> None:
    """Print the plan."""
    began = 0.0
    for stage, end in zip(chosen, deadlines(chosen, 0.0, seconds), strict=True):
        print(f"{began:5.0f}-{end:3.0f} s  {stage.step}  {stage.name:<10}{stage.what}")
        began = end
        for item in plan() if stage.name == "eager" else compiled_plan() if stage.name == "compiled" else ():
            print(f"{'':24}{item.name}{': ' + ', '.join(item.rivals) if item.rivals else ''}")


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--step", choices=STEPS, default=environment("STEP") or "all")
    parser.add_argument("--results", type=Path, default=environment("RESULTS") or None)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself out on a machine without a card")
    parser.add_argument("--dry", action="store_true", help="print the plan and the time of each part, and stop")
    parser.add_argument("--ship", type=Path, default=None, help="add a run's decisions.json to the package, and stop")
    parser.add_argument("--warm", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and time on the card.

    Returns:
        0 if everything that was asked for ran and was equal, 1 if not, 2 without a card.
    """
    start = time.monotonic()
    arguments = arguments_of(argv)
    seconds = 60 * arguments.minutes - LAST
    chosen = [stage for stage in stages() if arguments.step in (stage.step, "all")]
    if arguments.dry or arguments.ship:
        print(gpu_check.ship(arguments.ship)) if arguments.ship else dry(chosen, seconds)
        return 0
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is false")
        return 2
    if device.type == "cuda":  # with an index, as a tensor there has one
        device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings(record=True) as caught:  # without a C++ compiler there is still Triton
        _build.load()
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        gpu_check.warm(device, measured(), part, parts)
        return 0
    folder = Path(arguments.results or header.RESULTS / header.folder_name(device))
    told = Report(folder)
    head: dict[str, Any] = header.header(device, "gpu")
    told.say(f"{head['device']}, torch {head['versions']['torch']}, commit {head['commit'][:12]}, {head['date']}")
    for warning in caught:
        told.say(str(warning.message))
    what = "; ".join(f"{stage.name}: {stage.what}" for stage in chosen)
    told.say(f"will run within {arguments.minutes:g} minutes, in {folder}: {what}")
    warmers = []
    if device.type == "cuda":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that they are stopped then too
        warmers = start_warmers(folder, device)
    checks = [stage for stage in chosen if stage.step == "check"]
    end = start + seconds
    good = True
    try:
        if checks:
            share = sum(s.share for s in checks) / sum(s.share for s in chosen)
            good &= go(checks, told, device, start, seconds * share)
    finally:
        for process in warmers:  # nothing may run beside what is timed
            process.terminate()
            process.wait()
    now = time.monotonic()
    good &= go([stage for stage in chosen if stage.step == "bench"], told, device, now, end - now)
    told.say(f"took {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
