"""`python -m benchmarks.gpu`: try, check and time the project on the machine's card, in five steps of a few minutes.

It needs torch and triton, nothing else, and no network; with pytest the tests that need a card run too. A step keeps to
its budget and says what it had no time for. What it has found lies in benchmarks/results/<device>/ at once, so that a
run that is killed has lost only what it was at: a summary for each step, and its results as JSON. `--dry` prints the
plan and needs no card.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import STARTED, gpu_bench, gpu_check, gpu_kernels, gpu_rows, gpu_smoke, header, inside, timing
from .contenders import BASELINES
from .gpu_processes import Crew, serve
from .gpu_report import Report
from .suites import Item

# Seconds of each step, from the start of the command: fourteen and a half minutes where nothing is built yet.
BUDGETS = {"build": 180.0, "smoke": 90.0, "check": 180.0, "bench": 240.0, "sanitize": 180.0}
LAST = 5.0  # seconds of a budget that are left for the plot and the summary
GRACE = 1.0  # seconds after its end at which a stage that is still at something is interrupted
# What worker processes can be asked, by the name after --worker.
ANSWERS = {
    "launches": gpu_rows.judge,
    "random": gpu_check.random_answer,
    "workloads": gpu_check.workload_answer,
    "compile": gpu_bench.compile_answer,
}


@dataclass(frozen=True)
class Stage:
    """A part of a step.

    Attributes:
        name: in a word or two.
        share: of the step's budget; what it leaves falls to those behind it.
        what: it will do.
        run: does it until a time on time.monotonic's clock; True if nothing was wrong.
        plan: its items in words, for `--dry`.
    """

    name: str
    share: float
    what: str
    run: Callable[[Report, Crew, float], bool]
    plan: Callable[[], Sequence[str]] = tuple


def names(items: Callable[[], Sequence[Item]]) -> Callable[[], Sequence[str]]:
    """The items of a plan in words."""
    return lambda: [f"{item.name}{': ' + ', '.join(item.rivals) if item.rivals else ''}" for item in items()]


def stages(step: str) -> list[Stage]:
    """The parts of a step, in order."""
    timed = partial(gpu_bench.bench, name="gpu", items=gpu_bench.plan())
    rivals = partial(gpu_bench.bench, name="gpu-compiled", items=gpu_bench.compiled_plan())
    times = partial(gpu_bench.bench, name="gpu-smoke", items=gpu_bench.smoke_plan())
    rooflines = partial(gpu_kernels.rooflines, chosen=gpu_bench.measured()[:3])
    eager, compiled, rows = ", ".join(BASELINES), ", ".join(gpu_bench.COMPILED), len(gpu_rows.rows())
    built = "the C++ operators and the CUDA programs"
    return {
        "build": [Stage("build", 1.0, built, gpu_smoke.build)],
        "smoke": [
            Stage("build", 0.5, f"{built}, but what the step build has left", gpu_smoke.build),
            Stage("launches", 0.25, f"{rows} blocks that launch every kernel, judged on every engine",
                  gpu_smoke.launches, gpu_rows.described),
            Stage("times", 0.25, f"the CUDA programs, then the five block families, against {eager}", times,
                  names(gpu_bench.smoke_plan)),
        ],
        "check": [
            Stage("tests", 0.3, "the tests marked gpu, if there is pytest", gpu_check.card_tests),
            Stage("workloads", 0.3, f"{len(gpu_check.checked())} workloads on every engine in "
                  f"{', '.join(gpu_check.DTYPES)}", gpu_check.workload_blocks),
            Stage("random", 0.15, "blocks of random shapes on every engine", gpu_check.random_blocks),
            Stage("trials", 0.25, f'what "auto" takes for {len(gpu_check.tried())} blocks', gpu_check.trials),
        ],
        "bench": [
            Stage("compile", 0.25, "what will be timed, in many processes", gpu_bench.compile_all,
                  gpu_bench.to_compile),
            Stage("eager", 0.35, f"{len(gpu_bench.plan())} rows against {eager}", timed, names(gpu_bench.plan)),
            Stage("compiled", 0.35, f"{len(gpu_bench.compiled_plan())} rows against {compiled}", rivals,
                  names(gpu_bench.compiled_plan)),
            Stage("kernels", 0.05, "each kernel's share of its roofline", rooflines),
        ],
        "sanitize": [
            Stage("compile", 0.25, "what will be sanitized, judged once more", gpu_smoke.prepare, gpu_rows.described),
            Stage("tools", 0.75, f"{len(gpu_rows.sanitized())} blocks under {', '.join(gpu_smoke.TOOLS)}",
                  gpu_smoke.sanitize),
        ],
    }[step]  # fmt: skip


def deadlines(chosen: Sequence[Stage], start: float, seconds: float) -> list[float]:
    """When each stage has to end: what an earlier one leaves falls to the next.

    Example:
        >>> two = [Stage("a", 0.1, "", None), Stage("b", 0.3, "", None)]
        >>> deadlines(two, 100.0, 80.0)
        [120.0, 180.0]
    """
    total = sum(stage.share for stage in chosen)
    return [start + seconds * part / total for part in itertools.accumulate(stage.share for stage in chosen)]


def go(chosen: Sequence[Stage], told: Report, crew: Crew, start: float, seconds: float) -> bool:
    """Run the stages; one that fails is told of, and the next goes on. True if nothing was wrong."""
    good = True
    for stage, deadline in zip(chosen, deadlines(chosen, start, seconds), strict=True):
        began = time.monotonic()
        print(f"== {stage.name}: {stage.what}; until {deadline - start:.0f} s", flush=True)
        try:
            with timing.until(deadline + GRACE):
                good &= stage.run(told, crew, deadline)
        except timing.OutOfTime:
            told.say(f"{stage.name}: stopped at its time")
        except Exception as error:  # whatever it is, what comes behind it is still wanted
            told.say(f"{stage.name} failed: {timing.message(error)}")
            good = False
        print(f"== {stage.name} took {time.monotonic() - began:.0f} s", flush=True)
    return good


def dry(step: str, seconds: float) -> None:
    """Print the plan of a step."""
    began, chosen = 0.0, stages(step)
    for stage, end in zip(chosen, deadlines(chosen, 0.0, seconds - LAST), strict=True):
        print(f"{step:<9}{began:4.0f}-{end:3.0f} s  {stage.name:<10}{stage.what}")
        began = end
        for item in stage.plan():
            print(f"{'':32}{item}")


def do(step: str, crew: Crew, folder: Path, start: float, seconds: float) -> bool:
    """Do one step within its budget; True if nothing was wrong."""
    told = Report(folder, step, crew.device)
    head = header.header(crew.device, step)
    versions = ", ".join(f"{name} {head['versions'].get(name, 'missing')}" for name in ("python", "torch", "triton"))
    told.say(f"{step}: {head['device']}, {versions}, commit {head['commit'][:12]}, {head['date']}")
    print(f"within {seconds:.0f} s, in {folder}", flush=True)
    good = go(stages(step), told, crew, start, seconds - LAST)
    verdict = "what was reached is right" if good else "something is WRONG, see above"
    told.say(f"{step}: {verdict}; {time.monotonic() - start:.0f} s")
    return good


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--step", choices=(*BUDGETS, "all"), default=environment("STEP") or "all")
    parser.add_argument("--results", type=Path, default=environment("RESULTS") or None)
    parser.add_argument("--seconds", type=float, default=None, help="instead of each step's own budget")
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself out on a machine without a card")
    parser.add_argument("--processes", type=int, default=None, help="beside this one; 0 does all in it, in turn")
    parser.add_argument("--dry", action="store_true", help="print the plan and the time of each part, and stop")
    parser.add_argument("--ship", type=Path, default=None, help="add a run's decisions.json to the package, and stop")
    parser.add_argument("--worker", choices=ANSWERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--launch", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _device(name: str) -> torch.device:
    """With an index, as a tensor there has one."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Do the steps that are asked for.

    Args:
        argv: the command line.
        started: when the budget of the first step began, on time.monotonic's clock; now if None.

    Returns:
        0 if everything that was asked for ran and was right, 1 if not, 2 without a card.
    """
    arguments = arguments_of(argv)
    steps = list(BUDGETS) if arguments.step == "all" else [arguments.step]
    budgets = {step: BUDGETS[step] if arguments.seconds is None else arguments.seconds for step in steps}
    if arguments.ship:
        print(gpu_check.ship(arguments.ship))
        return 0
    if arguments.dry:
        for step in steps:
            dry(step, budgets[step])
        return 0
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is false")
        return 2
    device = _device(arguments.device)
    if arguments.worker or arguments.launch:
        return _as_told(arguments, device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its processes are stopped too
    count = max(1, (os.cpu_count() or 1) - 2) if arguments.processes is None else arguments.processes
    folder = Path(arguments.results or header.RESULTS / header.folder_name(device))
    start, good = time.monotonic() if started is None else started, True
    for step in steps:
        good &= do(step, Crew(device, count), folder, start, budgets[step])
        start = time.monotonic()
    return 0 if good else 1


def _as_told(arguments: argparse.Namespace, device: torch.device) -> int:
    """Be a process of another one: answer its items, or launch one row's kernels."""
    # Workers are as many as the cores; the compiler's own pool in each would crowd them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with warnings.catch_warnings():  # the process that started this one tells what could not be built
        warnings.simplefilter("ignore")
        inside.build()
    if arguments.worker:
        serve(lambda item: ANSWERS[arguments.worker](item, device))
        return 0
    for result in gpu_rows.launch(arguments.launch, device):
        print(result, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
