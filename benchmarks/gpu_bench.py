"""What `benchmarks.gpu` times against eager and compiled, the most wanted first: the programs, then ie, ssp3, skew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from . import (
    contenders,
    families,
    gpu_rows,
    header,
    inside,
    measure,
    printing,
    programs,
    report,
    run,
    timing,
    workloads,
)
from .gpu_processes import Crew
from .gpu_report import Report
from .suites import Item
from .workloads import Workload

FAMILIES = {"ie": "k1", "ssp3": "", "skew": "pair"}
DTYPES = ("bfloat16", "tf32")
MODES = ("train", "forward", "input_grad")
# In which every CUDA program's block is timed, and where: the programs take no other dtype of these. Other engines are
# timed on the families' rows.
PROGRAM_MODES, PROGRAM_DTYPE, PROGRAM_OWN = programs.MODES, "bfloat16", f"fused:{inside.PROGRAM_ENGINE}"
COMPILED = ("compile-cl", "compile-ro", "vjp-compile")
SECONDS = 0.4
# Fewest rounds of a row and most: a card's times scatter by per cents, and the budget is short.
ROUNDS = (5, 30)


def measured() -> list[Workload]:
    """The workloads that are timed, each family's first shape before any family's second."""
    found = [w for w in families.everything() if w.statistics == "train" and FAMILIES.get(w.id) == w.variant]
    shapes = [[w for w in found if w.id == family] for family in FAMILIES]
    return [w for same in itertools.zip_longest(*shapes) for w in same if w is not None]


def programmed(chosen: Sequence[Workload], rivals: Sequence[str] = ()) -> list[Item]:
    """The blocks of the CUDA programs, each size in every mode before the next."""
    sizes = [list(same) for _, same in itertools.groupby(chosen, key=lambda w: w.shape)]
    return [
        Item(workload, mode, PROGRAM_DTYPE, _rivals(workload, rivals), PROGRAM_OWN, ROUNDS)
        for same in sizes
        for mode in PROGRAM_MODES
        for workload in same
    ]


def _rivals(workload: Workload, rivals: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in rivals if name != "vjp-compile" or workload.id == "ie")


def _once(items: Iterable[Item]) -> list[Item]:
    """Each measurement once, where it stands first."""
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(item.name, item)
    return list(found.values())


def plan() -> list[Item]:
    """What is timed on every engine, as plain calls and graph replays: programs, then a family's first shape first."""
    first, rest = measured()[: len(FAMILIES)], measured()[len(FAMILIES) :]
    families_ = [
        Item(workload, mode, dtype, (), rounds=ROUNDS)
        for chosen in (first, rest)
        for dtype in DTYPES
        for mode in MODES
        for workload in chosen
    ]
    return _once([*programmed(programs.timed()), *families_])


def compiled_plan() -> list[Item]:
    """Against the compiled contenders as well: the programs at two sizes, and one shape of each family."""
    families_ = [
        Item(workload, mode, dtype, _rivals(workload, COMPILED), rounds=ROUNDS)
        for dtype, mode, workload in itertools.product(DTYPES, MODES, measured()[: len(FAMILIES)])
    ]
    return _once([*programmed(programs.timed(2), COMPILED), *families_])


def smoke_plan() -> list[Item]:
    """The programs at two sizes, then the five block families, a training step each and then a forward."""
    families_ = [
        Item(workload, mode, DTYPES[0], (), rounds=ROUNDS)
        for mode in ("train", "forward")
        for workload in gpu_rows.timed()
    ]
    return _once([*programmed(programs.timed(2)), *families_])


def to_compile() -> list[str]:
    """What is compiled before anything is timed, the slowest first: "name | mode | dtype | contender"."""
    compiled = [
        f"{item.workload.name} | {item.mode} | {item.dtype} | {rival}"
        for item in compiled_plan()
        for rival in item.rivals
    ]
    fused = dict.fromkeys(f"{item.workload.name} | {item.mode} | {item.dtype} | fused" for item in plan())
    return [item for pair in itertools.zip_longest(compiled, fused) for item in pair if item is not None]


def compile_answer(item: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Run a contender once, so that what it compiles lies in Triton's and the compiler's caches on disk."""
    name, mode, dtype, contender = item.split(" | ")
    workload = next(item.workload for item in (*plan(), *compiled_plan()) if item.workload.name == name)
    measure.set_precision(dtype, device)
    block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
    found = [contenders.CONTENDERS[contender]] if contender != "fused" else [
        contenders.fused(engine) for engine, reason in contenders.engines(block, inputs, mode).items() if not reason
    ]  # fmt: skip
    for each in found:
        try:
            module, own = each.make(block, inputs)
            module.requires_grad_(mode == "train")
            workload.work(module, own, mode).run()
        except Exception as error:  # the measurement will meet it too, and say so in its row
            yield {"item": item, "errors": timing.message(error)}


def compile_all(told: Report, crew: Crew, deadline: float) -> bool:
    """Compile in many processes what will be timed in one."""
    if not crew.count:
        told.say("compile: left to the measurements, for there are no other processes")
        return True
    rows: list[dict[str, Any]] = []
    left = crew.work("compile", compile_answer, to_compile(), deadline, rows.append, told.folder / "workers.txt")
    told.say(f"compile: {len(to_compile()) - len(left)} of {len(to_compile())} compiled ahead")
    for row in rows:
        print(f"compile: {row['item']}: {row['errors']}", flush=True)
    return True


def bench(told: Report, crew: Crew, deadline: float, name: str, items: Sequence[Item]) -> bool:
    """Time a plan until the deadline; its file is rewritten after every measurement.

    Args:
        told: where the rows go.
        crew: whose device; timing is done in this process, with nothing beside it.
        deadline: on time.monotonic's clock.
        name: of the file.
        items: what to time.
    """
    device = crew.device
    path = told.folder / f"{name}.json"
    record = run.Record(path, header.header(device, name))
    run.go(items, record, device, seconds=SECONDS, deadline=deadline, graphs=device.type == "cuda")
    if not record.rows:
        told.say(f"{name}: no measurement was made")
    else:
        told.say(f"{name}: {len(record.rows)} rows; {printing.rates(record.head)}; see {path.name}")
        told.say("\n".join(report.page_table(record.rows)))
        report.plots([path])
    told.left_out(name, record.head.get("left_out", []))
    return not any(row["errors"] and row["contender"] == "fused" for row in record.rows)
