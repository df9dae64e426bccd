"""`python -m benchmarks.run`: check each workload for equality, time its contenders in turns, record the results."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import contenders, header, measure, report, workloads
from .contenders import BASELINES, CONTENDERS, Contender
from .workloads import Workload

SUITES = ("default", "all")
# The default suite's one row against compiled: (id, variant, shape, mode) and the contender.
COMPILED_ROW = ("ie", "k1", "64@8", "input_grad")
COMPILED_RIVAL = "vjp-compile"


@dataclass(frozen=True)
class Item:
    """One measurement to make: a workload, in one mode and one dtype, with its contenders' names."""

    workload: Workload
    mode: str
    dtype: str
    rivals: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.mode} {self.dtype}"


def plan(suite: str, device: torch.device, dtypes: Sequence[str]) -> list[Item]:
    """Every measurement of a suite, in order; in "default" all but one leave the compiled contenders out."""
    items = []
    for workload in workloads.everything():
        if suite == "default" and not workload.default:
            continue
        for dtype in dtypes:
            for mode in workload.modes:
                rivals = workload.rivals
                if suite == "default":
                    row = (workload.id, workload.variant, workload.shape, mode)
                    rivals = (COMPILED_RIVAL,) if row == COMPILED_ROW else ()
                elif device.type == "cuda" and "compile-cl" in rivals:
                    rivals = (*rivals, "compile-ro")
                items.append(Item(workload, mode, dtype, rivals))
    return items


def chosen(items: Sequence[Item], arguments: argparse.Namespace) -> list[Item]:
    """The measurements that pass the filters of the command line."""

    def passes(value: str, wanted: Sequence[str]) -> bool:
        return not wanted or value in wanted

    return [
        item
        for item in items
        if passes(item.workload.id, arguments.only)
        and passes(item.workload.variant, arguments.variants)
        and passes(item.workload.shape, arguments.shapes)
        and passes(item.mode, arguments.modes)
    ]


def contenders_of(item: Item, device: torch.device, wanted: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part, and why an engine of the project does not.

    Args:
        item: the measurement.
        device: where.
        wanted: names ("eager", "fused", "fused:staged"); empty for all of the suite's.

    Returns:
        The contenders in the order of their turns, and for each engine that cannot run the block the reason.
    """
    names = wanted or (*BASELINES, "fused", *item.rivals)
    found: list[Contender] = []
    refusals: dict[str, str] = {}
    for name in names:
        base, _, engine = name.partition(":")
        if base != "fused":
            found.append(CONTENDERS[base])
        elif engine:
            found.append(contenders.fused(engine))
        elif item.workload.network:
            found.append(contenders.fused("auto"))
        else:
            block, inputs = workloads.make(item.workload, device, measure.DTYPES[item.dtype])
            refusals = contenders.engines(block, inputs)
            found += [contenders.fused(engine) for engine, reason in refusals.items() if not reason]
            refusals = {engine: reason for engine, reason in refusals.items() if reason}
    return found, refusals


class Record:
    """The results file, rewritten whole after every measurement, so that a run that is stopped has what it finished."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.rows: list[measure.Row] = []

    def add(self, rows: Sequence[measure.Row]) -> None:
        self.rows += rows
        for key in ("matmul_gflops", "copy_gbs"):
            for dtype in {row["dtype"] for row in self.rows}:
                rates = [row[key] for row in self.rows if row["dtype"] == dtype and key in row]
                if rates:
                    self.head.setdefault(key, {})[dtype] = round(statistics.median(rates), 2)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".json.part")
            beside.write_text(json.dumps({"header": self.head, "rows": self.rows}, indent=1, sort_keys=True) + "\n")
            os.replace(beside, self.path)


def go(
    items: Sequence[Item],
    record: Record,
    device: torch.device,
    *,
    wanted: Sequence[str] = (),
    seconds: float = 6.0,
    deadline: float | None = None,
    graphs: bool = False,
) -> None:
    """Make the measurements one after the other, print each row when it is there, and keep the record on disk.

    Args:
        items: what to measure.
        record: where the rows go.
        device: where.
        wanted: contenders by name; empty for the suite's.
        seconds: of timed rounds for each measurement.
        deadline: on time.monotonic's clock; nothing is started that the slowest so far would not finish by then.
        graphs: CUDA-graph replays as well.
    """
    slowest = 0.0
    said: set[str] = set()
    for item in _progress(items):
        start = time.monotonic()
        if deadline is not None and start + slowest > deadline:
            _print(f"out of time: {item.name} and what follows it is left out")
            record.head["left_out"] = [left.name for left in items[items.index(item) :]]
            record.add([])
            return
        taking_part, refusals = contenders_of(item, device, wanted)
        for engine, reason in refusals.items():
            if f"{engine}: {reason}" not in said:
                said.add(f"{engine}: {reason}")
                _print(f"engine {engine} takes no part: {reason}")
        rows = measure.measure(
            item.workload, item.mode, item.dtype, device, taking_part, seconds=seconds, graphs=graphs
        )
        record.add(rows)
        for row in rows:
            _print(report.line(row))
        slowest = max(slowest, time.monotonic() - start)


def _progress(items: Sequence[Item]) -> Iterator[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(total=len(items), unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_description(item.name)
            yield item
            bar.update()


def _print(text: str) -> None:
    try:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
    except ImportError:
        print(text)
    sys.stdout.flush()


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, lists split at commas."""

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="default")
    parser.add_argument("--only", nargs="*", default=[], help="workload ids: ie, ssp3, ...")
    parser.add_argument("--variants", type=names, default=[], help="k1,k3-detached,...")
    parser.add_argument("--shapes", type=names, default=[], help="16@32,64@8,...")
    parser.add_argument("--modes", type=names, default=[], help="forward,input_grad,train,pgd10,adv_train")
    parser.add_argument("--contenders", type=names, default=[], help="eager,eager-cl,fused,fused:staged,...")
    parser.add_argument("--dtypes", type=names, default=["float32"], help=",".join(measure.DTYPES))
    parser.add_argument("--seconds", type=float, default=None, help="timed rounds per measurement (default 4; all: 8)")
    parser.add_argument("--minutes", type=float, default=None, help="start nothing that would end later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graphs", action="store_true", help="CUDA-graph replays as well")
    parser.add_argument("--results", type=Path, default=None, help="folder; default benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    for name in arguments.contenders:
        if name.partition(":")[0] not in (*CONTENDERS, "fused"):
            parser.error(f"unknown contender {name}; there are {', '.join((*CONTENDERS, 'fused'))}")
    for dtype in arguments.dtypes:
        if dtype not in measure.DTYPES:
            parser.error(f"unknown dtype {dtype}; there are {', '.join(measure.DTYPES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite, or the part of "all" that the filters leave.

    Returns:
        0, or 1 where the project's own contender was not equal to the reference or failed.
    """
    arguments = arguments_of(argv)
    device = torch.device(arguments.device)
    suite = arguments.suite
    filtered = any((arguments.only, arguments.variants, arguments.shapes, arguments.modes, arguments.contenders))
    # A filter picks from everything: what is asked for by name need not be in the default suite.
    items = chosen(plan("all" if filtered else suite, device, arguments.dtypes), arguments)
    if filtered and suite == "default":
        items = [Item(item.workload, item.mode, item.dtype, ()) for item in items]
    if not items:
        print("no workload passes these filters")
        return 2
    path = None
    whole = suite == "all" and not any((arguments.variants, arguments.shapes, arguments.modes, arguments.contenders))
    recorded_as = "-".join([suite, *arguments.only, *(arguments.dtypes if arguments.dtypes != ["float32"] else [])])
    if arguments.results is not None:
        path = arguments.results / f"{recorded_as}.json"
    elif whole or not filtered:  # part of a family must not replace the record of the whole
        path = header.RESULTS / header.folder_name(device) / f"{recorded_as}.json"
    head = header.header(device, recorded_as)
    print(f"{head['device']}, {head['threads']} threads, torch {head['versions']['torch']}, {head['data']}")
    record = Record(path, head)
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    default_seconds = 4.0 if suite == "default" else 8.0
    go(
        items,
        record,
        device,
        wanted=arguments.contenders,
        seconds=default_seconds if arguments.seconds is None else arguments.seconds,
        deadline=deadline,
        graphs=arguments.graphs,
    )
    report.print_table(record.head, record.rows)
    if path is not None:
        print(f"recorded in {path}")
        for drawn in report.plots([path]):
            print(f"drawn in {drawn}")
    return int(any(row["errors"] and row["contender"] == "fused" for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
