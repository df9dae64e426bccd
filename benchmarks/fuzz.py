"""`make fuzz [CASES=...]`: random blocks on random inputs, each fused engine against the reference.

A case is drawn from a seed and an index alone, and is run by each engine that can run it. It is judged by the one rule
of fastode/testing; in float64 that is a few hundred units of rounding. A case that fails is judged once more, as
`rejudge` says, and left out where there is nothing to compare it with, as `excuses` says. A failure is printed as it is
found, with the command that runs that case again.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastode
from fastode.dispatch import choice
from fastode.testing import Judge

from . import rejudge
from .drawn import BY_ERROR, FAMILIES, Case, draw_case
from .excuses import excused
from .inside import FUSED_ENGINES

ENGINES = (*FUSED_ENGINES, "reference", "auto")


@dataclass(frozen=True)
class Failure:
    """What went wrong with one engine on one case."""

    seed: int
    index: int
    engine: str
    text: str
    what: str

    def __str__(self) -> str:
        again = f"python -m benchmarks.fuzz --seed {self.seed} --index {self.index}"
        return f"FAILED {self.engine} on {self.text}\n{self.what}\nagain: {again}"


def can_run(engine: str, block: nn.Module, x: Any) -> bool:
    """Whether an engine can run a fused block on x."""
    return engine == "auto" or choice.can_use(engine, block, x)[0]


def region(case: Case) -> torch.autocast:
    """The autocast region of a case, or one that does nothing."""
    return torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None)


def run_case(seed: int, index: int) -> tuple[list[tuple[str, str]], list[Failure]]:
    """Judge each engine on one case: (family, engine) of each that ran, and the failures."""
    case = draw_case(seed, index)
    inputs: Any = case.inputs if len(case.inputs) > 1 else case.inputs[0]
    counted, failures = [], []
    judge = Judge(case.plain, inputs, mode=case.mode, autocast=case.autocast)
    for engine in ENGINES:
        fused = copy.deepcopy(case.plain)
        fastode.fuse(fused)
        fused.block.engine = engine  # type: ignore[assignment]
        with region(case):
            able = can_run(engine, fused.block, inputs)
        if not able:
            continue
        counted.append((case.family, engine))
        what = judged(judge, fused, case)
        excuse = excused(judge, fused, case) if what else ""
        if excuse:
            print(f"left out, {excuse}: {case.text}", flush=True)
        elif what:
            failures.append(Failure(seed, index, engine, case.text, what))
    return counted, failures


def judged(judge: Judge, fused: nn.Module, case: Case) -> str:
    """What is wrong with a fused block; empty if nothing is."""
    try:
        comparison = rejudge.compare_by_either(
            judge, case.plain, fused, case.mode, case.autocast, by_error=case.family in BY_ERROR
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if comparison.ok else "\n".join(row for row in comparison.describe().splitlines() if row[:4] == "FAIL")


def until(seconds: float) -> Iterator[int]:
    """All indices from zero until time is up."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def main(arguments: list[str] | None = None) -> int:
    """Draw and judge; the exit status is 1 where anything failed or nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n")[0])
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--seconds", type=float, default=60.0, help="how long to draw (default 60)")
    count.add_argument("--cases", type=int, help="draw as many instead, the same ones on any machine")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; the clock's by default")
    count.add_argument("--index", type=int, help="run this one case of the seed")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000_000
    ran: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = cases = 0
    chosen: Iterable[int] = until(options.seconds)
    if options.cases is not None:
        chosen = range(options.cases)
    elif options.index is not None:
        chosen = (options.index,)
    for index in chosen:
        counted, failures = run_case(seed, index)
        ran.update(counted)
        cases += 1
        failed += len(failures)
        for failure in failures:
            print(failure, flush=True)
        if options.index is not None:
            print(draw_case(seed, index).text)
    for family in FAMILIES:
        counts = "  ".join(f"{engine} {ran[family, engine]}" for engine in ENGINES if ran[family, engine])
        print(f"{family:10} {counts}" if counts else f"{family:10} -")
    print(f"seed {seed}: {cases} blocks, {sum(ran.values())} comparisons, {failed} failed")
    return int(failed > 0 or not ran)


if __name__ == "__main__":
    sys.exit(main())
