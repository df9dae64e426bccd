"""The kernels of a card by what launches them: the one table that the steps smoke and sanitize work through.

A row is a block at one shape. It is run on every engine that can run it, so an engine that is added is met without a
line here; a row is added where a kernel is launched by none of them, which the smoke test says by the kernel's name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastode.testing import compare_blocks

from . import contenders, families, gpu_kernels, inside, measure, programs, timing, workloads
from .workloads import Workload

DTYPE = "bfloat16"
SAMPLES = 8  # of a row that is judged
SANITIZED_SAMPLES = 2
# Of a row of programs: at its size a card runs a block on each multiprocessor, and some blocks take two samples.
SANITIZED_SIZE, SANITIZED_PROGRAM_SAMPLES = "64@8", programs.SAMPLES
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A family of kernels.

    Attributes:
        launches: which kernels, in words.
        id: of the workload that launches them.
        variant: of the workload.
        shape: of the workload.
        timed: whether it is one of the block families whose times the smoke test takes.
        modes: in which it is judged, each by itself.
        program: whether it is there for the CUDA programs, and run on their engine alone.
    """

    launches: str
    id: str
    variant: str
    shape: str
    timed: bool = True
    modes: tuple[str, ...] = ("train",)
    program: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.id, self.variant, self.shape) if part)

    @property
    def engines(self) -> tuple[str, ...]:
        """On which it is run."""
        return (inside.PROGRAM_ENGINE,) if self.program else inside.FUSED_ENGINES


TABLE = (
    Row("one program per normalised set: value, tangent, cotangent, second order", "ie", "k1", "16@32"),
    Row("explicit schemes: sums over the batch in chunks, combinations of stages", "ssp3", "", "16@32"),
    Row("the pair's two convolutions in one launch", "skew", "pair", "64@32"),
    Row("the pair at every stage of a solver", "skew", "soblock-rk4", "64@32"),
    Row("a residual block", "res", "", "16@32"),
    Row("tangents and second order in chunks", "ie-bn", "k1", "16@32", timed=False),
    Row("inner products for a learned coefficient", "ark", "", "16@32", timed=False),
)


PROGRAMS = tuple(
    Row("a block in one launch, and its input's gradient", w.id, w.variant, w.shape, False, programs.MODES, True)
    for w in programs.workloads()
)


def rows() -> tuple[Row, ...]:
    """All of them; those of the programs first, for nothing of them is compiled on the way."""
    return (*PROGRAMS, *TABLE)


def sanitized() -> tuple[Row, ...]:
    """What the sanitizer runs: of the programs' rows those of one small size, each program once."""
    small = [row for row in PROGRAMS if row.shape == SANITIZED_SIZE]
    return (*(row for row in small if (row.id, row.variant) in programs.SANITIZED), *TABLE)


def workload(row: Row) -> Workload:
    """The workload of a row."""
    known = programs.workloads() if row.program else [w for w in families.everything() if w.statistics == "train"]
    (found,) = (w for w in known if (w.id, w.variant, w.shape) == (row.id, row.variant, row.shape))
    return found


def described() -> list[str]:
    """The rows with what they launch, in words."""
    return [f"{row.name}: {row.launches}" for row in rows()]


def items() -> list[str]:
    """What is shared out to processes: "row | engine", of the programs' rows with "programs" behind it."""
    return [f"{row.name} | {engine}{' | programs' if row.program else ''}" for row in rows() for engine in row.engines]


def is_program(item: str) -> bool:
    """Whether one of `items` is of the CUDA programs' rows."""
    return item.endswith(" | programs")


def timed() -> list[Workload]:
    """The workloads of the five block families."""
    return [workload(row) for row in TABLE if row.timed]


def judge(item: str, device: torch.device) -> Iterator[Result]:
    """Run an item and judge it by the rule of fastode.testing: a result for each mode, with the kernels it launched.

    Args:
        item: one of `items`.
        device: where.
    """
    name, engine, *kind = item.split(" | ")
    row = next(row for row in (PROGRAMS if kind else TABLE) if row.name == name)
    for mode in row.modes:
        yield {"item": item, "row": name, "engine": engine, "mode": mode} | _judge(row, engine, mode, device)


def _judge(row: Row, engine: str, mode: str, device: torch.device) -> Result:
    start = time.monotonic()
    block, few, reason = ready(row, engine, mode, device, SAMPLES)
    if reason:
        return {"left_out": reason}
    if row.program:
        few = (programs.many(*few[0].shape[1:3]).to(few[0]),)
    module, own = contenders.fused(engine).make(block, few)
    with gpu_kernels.recorded() as launches:
        verdict = judged(block, module, own[0] if len(own) == 1 else own, mode)
        if verdict["ok"] and not row.program:
            workloads.work(module, own, "forward").run()  # under no_grad other kernels are launched
    found = verdict | {"kernels": sorted({launch.name for launch in launches})}
    if row.program and verdict["ok"] and device.type == "cuda":
        found |= counted(workloads.work(module, own, mode).run, mode, row.variant)
    return found | {"seconds": round(time.monotonic() - start, 1)}


def counted(run: Callable[[], object], mode: str, variant: str = "") -> Result:
    """The programs that a call launches; with an error where they are not as many as there should be."""
    run()  # what is made once is made
    found = programs.launched(run)
    wrong = programs.count_is_wrong(found, mode, variant)
    return {"programs": found} | ({"ok": False, "errors": wrong} if wrong else {})


def launch(name: str, device: torch.device) -> Iterator[Result]:
    """Run a row once on every engine that can, with no reference beside it: for a sanitizer.

    Args:
        name: of the row, as `sanitized` has it.
        device: where.
    """
    row = next(row for row in sanitized() if row.name == name)
    samples = SANITIZED_PROGRAM_SAMPLES if row.program else SANITIZED_SAMPLES
    for engine in row.engines:
        ran = False
        for mode in row.modes if row.program else ("train", "forward"):
            block, few, reason = ready(row, engine, mode, device, samples)
            if reason:
                yield {"row": name, "engine": engine, "mode": mode, "left_out": reason}
                continue
            if row.program:
                few = (programs.many(*few[0].shape[1:3])[:samples].to(few[0]),)
            module, own = contenders.fused(engine).make(block, few)
            workloads.work(module, own, mode).run()
            ran = True
        if device.type == "cuda":
            torch.cuda.synchronize()
        if ran:
            yield {"row": name, "engine": engine, "ok": True}


def ready(
    row: Row, engine: str, mode: str, device: torch.device, samples: int
) -> tuple[nn.Module, workloads.Inputs, str]:
    """The reference block of a row, its few inputs, and why the engine cannot run it in a mode, "" where it can."""
    measure.set_precision(DTYPE, device)
    block, inputs = workloads.make(workload(row), device, measure.DTYPES[DTYPE])
    few = tuple(x[:samples] for x in inputs)
    return block, few, contenders.engines(block, few, mode)[engine]


def judged(plain: nn.Module, fused: nn.Module, x: Any, mode: Any) -> Result:
    """The verdict of fastode.testing; a kernel that does not launch is a finding, not the end of the run."""
    try:
        worst = compare_blocks(plain, fused, x, mode=mode).worst
        return {"ok": worst.ok, "worst": measure.finite(worst.ratio), "tensor": worst.name}
    except Exception as error:
        return {"ok": False, "errors": timing.message(error)}


def line(result: Result) -> str:
    """A result in one line."""
    if "row" not in result:  # of a process that died on it
        return f"{result['item']}: FAILED: {result['errors']}"
    first = f"{result['row']:<28}{result['engine']:<18}{'' if result['mode'] == 'train' else result['mode']:<11}"
    if "errors" in result:
        equal = f"equal {float(result['worst']):.2g} of the error allowed, but " if "worst" in result else ""
        return f"{first} {equal}FAILED: {result['errors']}"
    verdict = "equal" if result["ok"] else f"NOT EQUAL: {result['tensor']} has"
    verdict += f" {float(result['worst']):.2g} of the error allowed"
    launches = [f"{len(result['kernels'])} Triton kernels"] if "programs" not in result else [
        f"{count} x {name}" for name, count in result["programs"].items()
    ]  # fmt: skip
    return f"{first} {verdict}; {', '.join(launches)}; {result['seconds']:.0f} s"


def no_part(results: Iterable[Result]) -> list[str]:
    """For each reason why engines took no part a line, with the rows it was said of."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "left_out" in result:
            mode = "" if result["mode"] == "train" else f" {result['mode']}"
            found.setdefault(f"{result['engine']}: {result['left_out']}", []).append(result["row"] + mode)
    return [f"{reason} ({', '.join(rows)})" for reason, rows in found.items()]
