"""`python -m benchmarks.overhead`: what a call costs where there is nothing to compute.

One image of 8 channels, 2x2, float32, one thread: the time of a call is Python, dispatch and packing. The fused blocks
and both layouts of the reference take turns in one process, each judged equal first. A ratio is fused time over eager
time, so less is better; it counts against the faster layout of the reference. Results go to
benchmarks/results/<device>/overhead.json. `--profile` shows where the Python time of a fused call goes, and times
nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastode import reference
from fastode.recipes.records import write_json
from fastode.testing import Judge

from . import contenders, data, header, inside, measure, timing
from .contenders import BASELINES
from .printing import markdown_table
from .workloads import Unavailable

BATCH, CHANNELS, SIZE = 1, 8, 2
FUSED = "fused"
MODES = {"forward": "forward, no_grad", "train": "forward and backward"}
SECONDS = 2.0
ROUNDS = (20, 200)
PROFILED_CALLS = 2000
PROFILED_LINES = 25

Inputs = tuple[Tensor, ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A block whose call is timed.

    Args:
        name: in the table.
        build: makes the reference block.
        maps: how many feature maps it takes.
        asked: the ratio to eager that is asked of it in each mode; empty where it is shown for information.
    """

    name: str
    build: Callable[[], nn.Module]
    maps: int = 1
    asked: Mapping[str, float] = field(default_factory=dict)


def branch() -> nn.Module:
    """GroupNorm, ReLU, convolution, twice."""
    return reference.PreActBranch(CHANNELS, norm="group")


def pair() -> nn.Module:
    """SONet's skew pair, as wide in z as in y."""
    return reference.SkewPair(CHANNELS, CHANNELS, norm="group")


CASES = (
    Case("ResBlock", lambda: reference.ResBlock(branch()), asked={"forward": 0.75, "train": 0.6}),
    Case("SSP3", lambda: reference.SSP3(branch()), asked={"forward": 0.25, "train": 0.5}),
    Case("IESkip", lambda: reference.IESkip(branch(), steps=1), asked={"forward": 0.2, "train": 0.25}),
    Case("SkewPair", pair, maps=2),
    Case("SOBlock euler", lambda: reference.SOBlock(pair(), solver="euler")),
)


def make(case: Case) -> tuple[nn.Module, Inputs]:
    """The reference block and its inputs, always the same values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = case.build()
    map_ = data.feature_maps(BATCH, CHANNELS, SIZE)
    return block, tuple(map_.roll(i, dims=1) for i in range(case.maps))


def call_of(module: nn.Module, inputs: Inputs, mode: str) -> Callable[[], object]:
    """One call: the outputs under no_grad, or the gradients of their sum for the inputs and every parameter."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return module(*inputs)

        return forward
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    holders = [*module.parameters(), *leaves]

    def both() -> None:
        for holder in holders:
            holder.grad = None
        outputs = module(*leaves)
        loss = outputs.sum() if isinstance(outputs, Tensor) else sum(y.sum() for y in outputs)
        loss.backward()

    return both


def measured(
    case: Case, mode: str, clock: Callable[[timing.Run, int], float], seconds: float, rounds: tuple[int, int]
) -> list[Row]:
    """Eager in both layouts and the fused block in turns.

    Args:
        case: the block.
        mode: "forward" or "train".
        clock: seconds per call of a run and a number of repeats.
        seconds: of the timed rounds.
        rounds: the least and the largest number of rounds.

    Returns:
        A row for each of the three. Where the fused block is not equal, or fails, its row has the reason in "errors"
        and no time.
    """
    block, inputs = make(case)
    judge: Callable[..., Judge] = functools.cache(partial(Judge, block, inputs, mode=mode))
    rows: list[Row] = []
    runs: dict[str, timing.Run] = {}
    for contender in (*(contenders.CONTENDERS[name] for name in BASELINES), contenders.fused("auto")):
        row: Row = {"block": case.name, "mode": mode, "contender": contender.name, "errors": ""}
        rows.append(row)
        try:
            module, own = contender.make(block, inputs)
            row["equality"] = measure.equality(contender, block, module, own, mode, judge)
            if not row["equality"]["ok"]:
                worst = row["equality"]
                raise Unavailable(f"not equal: {worst['tensor']} has {worst['worst']} of the error allowed")
            run = call_of(module, own, mode)
            with inside.engines_used() as used:
                run()
            row["engine"] = used.get(module)
            runs[contender.name] = run
        except Exception as error:  # a block that fails is reported as failed, with its message
            row["errors"] = str(error) if isinstance(error, Unavailable) else timing.message(error)
    times = timing.interleave(runs, clock, seconds=seconds, rounds=rounds, warm=20)
    for row in rows:
        row["errors"] = row["errors"] or times.errors.get(row["contender"], "")
        if not row["errors"]:
            found = times.spread(row["contender"])
            row |= {key: round(1e6 * getattr(found, name), 2) for key, name in _SPREAD.items()}
            row["rounds"] = len(times.seconds[row["contender"]])
    fused = rows[-1]
    if not fused["errors"]:
        _compare(fused, times, case.asked.get(mode))
    return rows


_SPREAD = {"microseconds": "median", "p20": "p20", "p80": "p80"}


def _compare(fused: Row, times: timing.Times, asked: float | None) -> None:
    """Add the ratios to both layouts, and the verdict by the faster one."""
    for name in BASELINES:
        # Times.ratio tells how many times faster its first name is: eager's over fused's is fused time over eager time.
        found = times.ratio(name, FUSED)
        fused[f"of_{name}"] = {key: round(getattr(found, key), 4) for key in ("median", "p20", "p80")}
    better = min(BASELINES, key=lambda name: times.spread(name).median)
    fused["of_better_eager"] = fused[f"of_{better}"] | {"than": better}
    fused["asked"] = asked
    fused["reached"] = None if asked is None else fused["of_better_eager"]["median"] <= asked


COLUMNS = ("block", "mode", "eager µs", "eager-cl µs", "fused µs", "fused / eager (p20–p80)", "asked", "reached")


def table(rows: Sequence[Row]) -> list[str]:
    """The fused blocks' rows beside eager's, as lines of a markdown table."""

    def microseconds(row: Row) -> str:
        return "failed" if row["errors"] else f"{row['microseconds']:.1f}"

    by_name = {(row["block"], row["mode"], row["contender"]): row for row in rows}
    lines = []
    for block, mode in dict.fromkeys((row["block"], row["mode"]) for row in rows):
        fused = by_name[block, mode, FUSED]
        cells = [block, MODES[mode], *(microseconds(by_name[block, mode, name]) for name in (*BASELINES, FUSED))]
        if fused["errors"]:
            lines.append([*cells, "–", "–", fused["errors"].replace("|", "/")])
            continue
        ratio, asked = fused["of_better_eager"], fused["asked"]
        span = f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
        verdict = "" if asked is None else "yes" if fused["reached"] else "**no**"
        lines.append([*cells, span, "–" if asked is None else f"{asked:.2f}", verdict])
    return markdown_table(COLUMNS, lines, last="---")


def profile(case: Case, mode: str) -> None:
    """Print which Python functions the time of a fused call is spent in, beside the operators' own time."""
    block, inputs = make(case)
    module, own = contenders.fused("auto").make(block, inputs)
    run = call_of(module, own, mode)
    for _ in range(50):
        run()
    plain = min(timing.Clock()(run, 200) for _ in range(5))
    print(f"\n{case.name}, {MODES[mode]}: {1e6 * plain:.1f} µs a call, fused")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as operators:
        for _ in range(200):
            run()
    own_time = {e.key: e.self_cpu_time_total / 200 for e in operators.key_averages() if e.key.startswith("fastode::")}
    told = ", ".join(f"{name} {microseconds:.1f} µs" for name, microseconds in own_time.items())
    print(f"operators, under the profiler: {told or 'none was called'}")
    with cProfile.Profile() as profiler:
        for _ in range(PROFILED_CALLS):
            run()
    found = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    watched = 1e6 * sum(entry[2] for entry in found.values()) / PROFILED_CALLS
    print(f"Python functions, {watched:.1f} µs a call while watched: own time, time with callees, calls, name")
    slowest = sorted(found.items(), key=lambda item: -item[1][2])[:PROFILED_LINES]
    for (file, line, name), (_, count, alone, together, _) in slowest:
        place = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        each, whole = (1e6 * seconds / PROFILED_CALLS for seconds in (alone, together))
        print(f"  {each:7.2f} µs {whole:8.2f} µs {count / PROFILED_CALLS:6.1f}  {place}")


def main(argv: Sequence[str] | None = None) -> int:
    """Time every block, print the table and keep the record.

    Returns:
        0, or 1 where a fused block was not equal or failed. A ratio that is missed is printed, and is no failure.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in CASES], metavar="BLOCK")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of timed rounds for each row ({SECONDS:g})")
    parser.add_argument("--profile", action="store_true", help="show where the Python time of a fused call goes")
    parser.add_argument("--results", type=Path, default=None, help="folder; default benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if arguments.profile:
            for case in chosen:
                for mode in arguments.modes:
                    profile(case, mode)
            return 0
        return _record(chosen, arguments)
    finally:
        torch.set_num_threads(before)


def _record(chosen: Sequence[Case], arguments: argparse.Namespace) -> int:
    cpu = torch.device("cpu")
    head = header.header(cpu, "overhead")
    print(f"overhead: {head['device']}, 1 thread, torch {head['versions']['torch']}, commit {head['commit'][:12]}")
    folder = arguments.results or header.RESULTS / header.folder_name(cpu)
    # Part of the blocks must not replace the record of all.
    kept = arguments.results is not None or (len(chosen) == len(CASES) and list(arguments.modes) == list(MODES))
    rows: list[Row] = []
    for case in chosen:
        for mode in arguments.modes:
            rows += measured(case, mode, timing.Clock(cpu), arguments.seconds, ROUNDS)
            if kept:
                write_json(folder / "overhead.json", {"header": head, "results": rows})
    print("\n".join(table(rows)))
    if kept:
        print(f"recorded in {folder / 'overhead.json'}")
    return int(any(row["errors"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
