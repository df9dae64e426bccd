"""The step check of `benchmarks.gpu`: the tests that need a card, workloads, blocks of random shapes, trials."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastode.native.constants import TILES

from . import contenders, families, header, inside, measure, programs, workloads
from .gpu_processes import Crew, stream
from .gpu_report import Report
from .gpu_rows import judged
from .workloads import Workload

DTYPES = ("bfloat16", "tf32", "float32")
TESTS = header.ROOT / "tests"
JUDGED = 8  # samples of a workload; what is timed is judged again as a whole
RANDOM = 2000  # more random blocks than any budget reaches
# The families of the checks and trials, those that are timed first, by id and variant.
FAMILIES = {"ie": "k1", "ssp3": "", "skew": "pair", "res": "", "ssp2": "", "ark": ""}
# What random blocks for the CUDA programs are made of. A map of 300 gives every block of a launch several samples.
PROGRAM_FACTORS: dict[str, tuple[Any, ...]] = {
    "norm": ("batch_eval", "group", "layer", "layer_bare", "instance", "instance_input", "none"),
    "convolution": ("3x3", "3x3_no_bias"),
    "shape": ("one_layer", "two_layers"),
    "dtype": (torch.bfloat16, torch.float16),
    "batch": (1, 2, 5, 300),
    "mode": ("input_grad", "forward", "train"),
}
Row = dict[str, Any]


def checked() -> list[Workload]:
    """The CUDA programs' blocks, then the families', every family's first shape before any family's second."""
    first = programs.timed()
    names = {w.name for w in first}
    return first + [w for w in _families() if w.name not in names]


def _families() -> list[Workload]:
    found = [w for w in families.everything() if w.statistics == "train" and FAMILIES.get(w.id) == w.variant]
    turns: dict[str, int] = {}
    place = {}
    for w in found:
        place[w.name] = turns[w.id] = turns.get(w.id, -1) + 1
    return sorted(found, key=lambda w: (place[w.name], list(FAMILIES).index(w.id)))


def tried() -> list[Workload]:
    """The blocks that trials decide on: those that are checked, then the papers' others."""
    first = checked()
    names = {(w.name, w.statistics) for w in first}
    rest = [w for w in families.everything() if w.id not in ("nets", "networks", "conv")]
    return first + [w for w in rest if (w.name, w.statistics) not in names]


def card_tests(report: Report, crew: Crew, deadline: float) -> bool:
    """The tests that need a card, where there is pytest; True unless one of them failed."""
    if find_spec("pytest") is None:
        report.say("tests on the card: pytest is not installed; what follows gets their time")
        return True
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    seconds = deadline - time.monotonic()
    status = stream(
        [*command, "--continue-on-collection-errors"],
        report.folder / "tests.txt",
        seconds,
        lambda text: print(text, flush=True),
    )
    words = {None: f"stopped after {seconds:.0f} s", 0: "passed", 5: "none collected"}
    report.say(f"tests on the card: {words.get(status, f'failed (status {status})')}; see tests.txt")
    return status in (0, None)


def random_case(number: int, half: bool) -> tuple[dict[str, Any], str]:
    """A case of tests/block_cases.py, always the same for a number, and a precision.

    Args:
        number: of four two are IE-Skips and explicit schemes of any shape, and two such as the CUDA programs take.
        half: float16 as well.
    """
    sys.path.insert(0, str(TESTS))
    try:
        import block_cases
    finally:
        sys.path.remove(str(TESTS))
    draw = random.Random(number)
    design = (block_cases.IMPLICIT, block_cases.EXPLICIT)[number % 2]
    more: dict[str, Any] = {"size": (*block_cases.COMMON["size"], (32, 32)), "batch": (1, 2, 5, 33)}
    if half:
        more["dtype"] = (*block_cases.COMMON["dtype"], torch.float16)
    if half and number % 4 >= 2:
        channels, side = draw.choice(list(TILES))
        more |= PROGRAM_FACTORS | {"channels": (channels,), "size": ((side, side),)}
    while True:
        case = {name: draw.choice(values) for name, values in (design | more).items()}
        if block_cases.possible(case):
            return case, draw.choice(("tf32", "float32"))


def random_answer(item: str, device: torch.device) -> Iterator[Row]:
    """One random block on every engine that can run it, and as the reference."""
    case, precision = random_case(int(item), device.type == "cuda")
    import block_cases

    measure.set_precision(precision, device)
    plain, fused = (block.to(device) for block in block_cases.make_pair(case))
    x = block_cases.make_input(case).to(device)
    reasons = inside.refusals(fused, (x,))
    for engine in (*(name for name, reason in reasons.items() if not reason), "reference"):
        fused.engine = engine
        named = {"item": item, "case": block_cases.name_of(case), "precision": precision, "engine": engine}
        yield named | judged(plain, fused, x, case["mode"])


def random_blocks(report: Report, crew: Crew, deadline: float) -> bool:
    """Blocks of random schemes, branches, shapes and dtypes on every engine, until the deadline; True if all equal."""
    rows: list[Row] = []
    hear = _hear(report, "random.json", rows)
    crew.work("random", random_answer, list(map(str, range(RANDOM))), deadline, hear, report.folder / "workers.txt")
    hear(None)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.get("engine", "no engine: its process died")] = counts.get(row.get("engine", ""), 0) + 1
    ran = ", ".join(f"{count} on {engine}" for engine, count in counts.items())
    equal = sum(row["ok"] for row in rows)
    report.say(f"blocks of random shapes: {equal} of {len(rows)} comparisons equal ({ran or 'none was reached'})")
    return bool(rows) and equal == len(rows)


def _hear(report: Report, name: str, rows: list[Row]) -> Any:
    """What keeps rows and, every second, their file; None writes the file at once."""
    head = header.header(report.device, name.removesuffix(".json"))
    written = 0.0

    def hear(row: Row | None) -> None:
        nonlocal written
        if row is not None:
            rows.append(row)
            if row.get("ok") is False:
                print(f"NOT EQUAL or failed: {row}", flush=True)
        if row is None or time.monotonic() - written > 1:
            written = time.monotonic()
            report.write(name, {"header": head, "results": rows})

    return hear


def workload_answer(item: str, device: torch.device) -> Iterator[Row]:
    """One workload in one dtype: every mode on every engine.

    Args:
        item: "name | dtype".
        device: where.
    """
    name, _, dtype = item.partition(" | ")
    workload = next(w for w in checked() if w.name == name)
    measure.set_precision(dtype, device)
    block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
    few = tuple(x[:JUDGED] for x in inputs)
    for mode in workload.modes:
        for engine, reason in contenders.engines(block, few, mode).items():
            row = {"item": item, "workload": name, "dtype": dtype, "engine": engine, "mode": mode}
            if reason:
                yield row | {"left_out": reason}
                continue
            module, own = contenders.fused(engine).make(block, few)
            yield row | judged(block, module, own[0] if len(own) == 1 else own, mode)


def workload_blocks(report: Report, crew: Crew, deadline: float) -> bool:
    """Every engine on every workload, dtype and mode; True if all that ran are equal."""
    rows: list[Row] = []
    hear = _hear(report, "equality.json", rows)
    items = [f"{w.name} | {dtype}" for dtype in DTYPES for w in checked()]
    left = crew.work("workloads", workload_answer, items, deadline, hear, report.folder / "workers.txt")
    hear(None)
    compared = [row for row in rows if "ok" in row]
    equal = sum(row["ok"] for row in compared)
    report.say(f"workloads: {equal} of {len(compared)} comparisons equal")
    report.left_out("workloads", left)
    refused = sorted({f"{row['engine']}: {row['left_out']}" for row in rows if "left_out" in row})
    if refused:
        report.say("engines that took no part: " + "; ".join(refused))
    return bool(compared) and equal == len(compared)


def trials(report: Report, crew: Crew, deadline: float) -> bool:
    """What "auto" decides for the workloads, in channels_last, kept as the package would ship it."""
    device = crew.device
    before = inside.decisions(device.index)
    left = []
    for dtype, workload in itertools.product(DTYPES[:2], tried()):
        if time.monotonic() > deadline:
            left.append(f"{workload.name} {dtype}")
            continue
        measure.set_precision(dtype, device)
        block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
        for mode in workload.modes:
            module, own = contenders.fused("auto").make(block, inputs)
            workloads.work(module, own, mode).run()
        report.write(inside.DECISIONS, {inside.card(device.index): inside.decisions(device.index)})
    found = inside.decisions(device.index)
    fresh = {key: entry for key, entry in found.items() if key not in before}
    taken: dict[str, int] = {}
    for entry in found.values():
        taken[entry["engine"]] = taken.get(entry["engine"], 0) + 1
    words = ", ".join(f"{engine} {count} times" for engine, count in taken.items())
    report.say(f"trials: {len(fresh)} made, {len(found)} known; taken: {words or 'none'}; see {inside.DECISIONS}")
    report.left_out("trials", left)
    refused = sorted({f"{name}: {why}" for entry in found.values() for name, why in entry["refused"].items()})
    if refused:
        report.say("refused in trials: " + "; ".join(refused[:10]))
    return not refused


def ship(folder: Path, package: Path = inside.PACKAGE) -> Path:
    """Add the decisions of a run to those in the package.

    Args:
        folder: the results of the run.
        package: where the package's own file is.
    """
    found = json.loads((folder / inside.DECISIONS).read_text())
    path = package / inside.DECISIONS
    known = json.loads(path.read_text()) if path.exists() else {}
    for card, entries in found.items():
        known.setdefault(card, {}).update(entries)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return path
