"""`python -m benchmarks.run`: check each workload for equality, time its contenders in turns, record the results."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastode.recipes.records import write_json

from . import contenders, header, measure, memory, printing, report, suites, targets, timing, workloads
from .contenders import BASELINES, CONTENDERS, Contender
from .suites import Item


def chosen(items: Sequence[Item], arguments: argparse.Namespace, by_id: bool = True) -> list[Item]:
    """The measurements that pass the filters of the command line.

    Without `by_id` the filter `--only` is left out: for suites of parts it names these, not workloads.
    """

    def passes(value: str, wanted: Sequence[str]) -> bool:
        return not wanted or value in wanted

    return [
        item
        for item in items
        if (not by_id or passes(item.workload.id, arguments.only))
        and passes(item.workload.variant, arguments.variants)
        and passes(item.workload.shape, arguments.shapes)
        and passes(item.mode, arguments.modes)
    ]


def contenders_of(item: Item, device: torch.device, wanted: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of a measurement, and for each engine of the project that takes no part the reason.

    Args:
        item: the measurement.
        device: where.
        wanted: names ("eager", "fused", "fused:staged"); empty for all of the suite's.

    Returns:
        The contenders in the order of their turns, and for each engine that cannot run the block the reason.
    """
    names = wanted or (*BASELINES, item.own, *item.rivals)
    found: list[Contender] = []
    refusals: dict[str, str] = {}
    for name in names:
        base, _, engine = (item.workload.own if name == "fused" else name).partition(":")
        if base != "fused":
            found.append(CONTENDERS[base])
        elif engine:
            found.append(contenders.fused(engine, item.workload.read))
        else:
            block, inputs = workloads.make(item.workload, device, measure.DTYPES[item.dtype])
            refusals = contenders.engines(block, inputs, item.mode)
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
            write_json(self.path, {"header": self.head, "rows": self.rows})


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
        deadline: on time.monotonic's clock; nothing is started that the slowest so far of as many contenders would not
            finish by then.
        graphs: CUDA-graph replays as well.
    """
    slowest: dict[int, float] = {}
    said: set[str] = set()
    left: list[str] = []
    for item in _progress(items):
        start = time.monotonic()
        if deadline is not None and start + slowest.get(len(item.rivals), 0.0) > deadline:
            left.append(item.name)
            continue
        taking_part, refusals = contenders_of(item, device, wanted)
        for engine, reason in refusals.items():
            if f"{engine}: {reason}" not in said:
                said.add(f"{engine}: {reason}")
                _print(f"engine {engine} takes no part: {reason}")
        try:
            rows = measure.measure(
                item.workload,
                item.mode,
                item.dtype,
                device,
                taking_part,
                seconds=seconds,
                rounds=item.rounds,
                graphs=graphs,
            )
        except timing.OutOfTime:
            left += [each.name for each in items[items.index(item) :]]
            break
        record.add(rows)
        for row in rows:
            _print(printing.line(row))
        slowest[len(item.rivals)] = max(slowest.get(len(item.rivals), 0.0), time.monotonic() - start)
    if left:
        _print(f"out of time, left out: {', '.join(left)}")
        record.head["left_out"] = left
        record.add([])


def _bar() -> Any:
    """tqdm where it is installed and somebody watches; None in a pipe or a file, where a bar leaves only remains."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _progress(items: Sequence[Item]) -> Iterator[Item]:
    tqdm = _bar()
    if tqdm is None:
        yield from items
        return
    with tqdm(total=len(items), unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_description(item.name)
            yield item
            bar.update()


def _print(text: str) -> None:
    tqdm = _bar()
    if tqdm is None:
        print(text)
    else:
        tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, lists split at commas."""

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=suites.SUITES, default="default")
    parser.add_argument("--only", nargs="*", default=[], help="workload ids: ie, ...; of cpu and networks their parts")
    parser.add_argument("--compiled", action="store_true", help="of networks: compiled ones, too")
    parser.add_argument("--variants", type=names, default=[], help="k1,k3-detached,...")
    parser.add_argument("--shapes", type=names, default=[], help="16@32,64@8,...")
    parser.add_argument("--modes", type=names, default=[], help="forward,input_grad,train,pgd_step,...")
    parser.add_argument("--contenders", type=names, default=[], help="eager,fused,fused:staged,fused:auto-compiled,...")
    parser.add_argument("--batch", type=int, default=None, help="the first so many samples only, to try a suite out")
    parser.add_argument("--dtypes", type=names, default=["float32"], help=",".join(measure.DTYPES))
    parser.add_argument("--seconds", type=float, default=None, help="timed rounds of a row (4; parts: 2.5; all: 8)")
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
    if arguments.suite in suites.PARTS:
        suite = suites.PARTS[arguments.suite]
        known = {part.name for dtype in arguments.dtypes for part in suite.get(dtype, ())}
        for name in arguments.only:
            if name not in known:
                parser.error(f"unknown part {name} of {arguments.suite}; there are {', '.join(sorted(known))}")
    return arguments


def smaller(item: Item, batch: int | None) -> Item:
    """The measurement on the first samples of its inputs alone; of all if `batch` is None."""
    if batch is None:
        return item
    inputs = item.workload.inputs
    few = replace(item.workload, inputs=lambda device: tuple(x[:batch] for x in inputs(device)))
    return replace(item, workload=few)


def sessions(arguments: argparse.Namespace, device: torch.device) -> list[tuple[str, bool, list[Item]]]:
    """What the command line asks for: for each record its name, whether it is kept, and its measurements."""
    names = (arguments.suite, arguments.dtypes, arguments.only)
    narrowed = any((arguments.variants, arguments.shapes, arguments.modes, arguments.contenders, arguments.batch))
    if arguments.suite in suites.PARTS:
        rivals = suites.COMPILED if arguments.compiled else ()
        found = suites.parts(arguments.suite, arguments.dtypes, arguments.only, rivals)
        return [(name, not narrowed, chosen(items, arguments, by_id=False)) for name, items in found]
    filtered = narrowed or bool(arguments.only)
    # With a filter every workload can be chosen, also those outside the default suite.
    items = chosen(suites.plan("all" if filtered else arguments.suite, device, arguments.dtypes), arguments)
    if filtered and arguments.suite == "default":
        items = [Item(item.workload, item.mode, item.dtype, ()) for item in items]
    # A record of part of a family must not replace that of the whole.
    return [(suites.recorded_as(*names), not filtered or (arguments.suite == "all" and not narrowed), items)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite, or the part of "all" that the filters leave.

    Returns:
        0, 1 where the project's own contender was not equal to the reference or failed, or 2 where nothing was chosen.
    """
    arguments = arguments_of(argv)
    device = torch.device(arguments.device)
    chosen_sessions = [
        (name, kept, [smaller(item, arguments.batch) for item in items])
        for name, kept, items in sessions(arguments, device)
        if items
    ]
    if not chosen_sessions:
        print("no workload passes these filters")
        return 2
    seconds = suites.SECONDS[arguments.suite] if arguments.seconds is None else arguments.seconds
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    folder = arguments.results or header.RESULTS / header.folder_name(device)
    failed = False
    memory.keep_freed_memory()
    for name, kept, items in chosen_sessions:
        head = header.header(device, name)
        print(f"{name}: {head['device']}, {head['threads']} threads, torch {head['versions']['torch']}, {head['data']}")
        path = folder / f"{name}.json" if kept or arguments.results is not None else None
        record = Record(path, head)
        options: dict[str, Any] = {"wanted": arguments.contenders, "seconds": seconds, "deadline": deadline}
        go(items, record, device, **options, graphs=arguments.graphs)
        printing.print_table(record.head, record.rows)
        failed |= any(row["errors"] and row["contender"] == "fused" for row in record.rows)
        if path is not None:
            print(f"recorded in {path}")
            for drawn in report.plots([path]):
                print(f"drawn in {drawn}")
    if arguments.suite in suites.PARTS:
        print("\n".join(targets.lines_of(folder)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
