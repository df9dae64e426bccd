"""The kernels of a card by what launches them: the one table that the steps smoke and sanitize work through.

A row is a block at one shape. It is run on every engine that can run it, so an engine that is added is met without a
line here; a row is added where a kernel is launched by none of them, which the smoke test says by the kernel's name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastode.testing import compare_blocks

from . import contenders, families, gpu_kernels, inside, measure, timing, workloads
from .workloads import Workload

DTYPE = "bfloat16"
SAMPLES = 8  # of a row that is judged
SANITIZED_SAMPLES = 2
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
    """

    launches: str
    id: str
    variant: str
    shape: str
    timed: bool = True

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.id, self.variant, self.shape) if part)


TABLE = (
    Row("one program per normalised set: value, tangent, cotangent, second order", "ie", "k1", "16@32"),
    Row("explicit schemes: sums over the batch in chunks, combinations of stages", "ssp3", "", "16@32"),
    Row("the pair's two convolutions in one launch", "skew", "pair", "64@32"),
    Row("the pair at every stage of a solver", "skew", "soblock-rk4", "64@32"),
    Row("a residual block", "res", "", "16@32"),
    Row("tangents and second order in chunks", "ie-bn", "k1", "16@32", timed=False),
    Row("inner products for a learned coefficient", "ark", "", "16@32", timed=False),
)


def workload(row: Row) -> Workload:
    """The workload of a row."""
    (found,) = (
        w
        for w in families.everything()
        if (w.id, w.variant, w.shape, w.statistics) == (row.id, row.variant, row.shape, "train")
    )
    return found


def described() -> list[str]:
    """The rows with what they launch, in words."""
    return [f"{row.name}: {row.launches}" for row in TABLE]


def items() -> list[str]:
    """What is shared out to processes: "row | engine"."""
    return [f"{row.name} | {engine}" for row in TABLE for engine in inside.FUSED_ENGINES]


def timed() -> list[Workload]:
    """The workloads of the five block families."""
    return [workload(row) for row in TABLE if row.timed]


def judge(item: str, device: torch.device) -> Iterator[Result]:
    """Run an item and judge it by the rule of fastode.testing: one result, with the Triton kernels it launched.

    Args:
        item: one of `items`.
        device: where.
    """
    name, _, engine = item.partition(" | ")
    found: Result = {"item": item, "row": name, "engine": engine}
    start = time.monotonic()
    block, few, reason = ready(name, engine, device, SAMPLES)
    if reason:
        yield found | {"left_out": reason}
        return
    module, own = contenders.fused(engine).make(block, few)
    with gpu_kernels.recorded() as launches:
        verdict = judged(block, module, own[0] if len(own) == 1 else own, "train")
        run = workloads.work(module, own, "forward").run
        if verdict["ok"]:
            run()  # under no_grad other kernels are launched
    kernels = sorted({launch.name for launch in launches})
    yield found | verdict | {"kernels": kernels, "seconds": round(time.monotonic() - start, 1)}


def launch(name: str, device: torch.device) -> Iterator[Result]:
    """Run a row's forward and backward once on every engine that can, with no reference beside it: for a sanitizer.

    Args:
        name: of the row.
        device: where.
    """
    for engine in inside.FUSED_ENGINES:
        block, few, reason = ready(name, engine, device, SANITIZED_SAMPLES)
        if reason:
            yield {"row": name, "engine": engine, "left_out": reason}
            continue
        module, own = contenders.fused(engine).make(block, few)
        for mode in ("train", "forward"):
            workloads.work(module, own, mode).run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield {"row": name, "engine": engine, "ok": True}


def ready(name: str, engine: str, device: torch.device, samples: int) -> tuple[nn.Module, workloads.Inputs, str]:
    """The reference block of a row, its few inputs, and why the engine cannot run it, "" where it can."""
    row = next(row for row in TABLE if row.name == name)
    measure.set_precision(DTYPE, device)
    block, inputs = workloads.make(workload(row), device, measure.DTYPES[DTYPE])
    few = tuple(x[:samples] for x in inputs)
    return block, few, contenders.engines(block, few)[engine]


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
    first = f"{result['row']:<28}{result['engine']:<18}"
    if "left_out" in result:
        return f"{first} takes no part: {result['left_out']}"
    if "errors" in result:
        return f"{first} FAILED: {result['errors']}"
    verdict = "equal" if result["ok"] else f"NOT EQUAL: {result['tensor']} has"
    verdict += f" {float(result['worst']):.2g} of the error allowed"
    return f"{first} {verdict}; {len(result['kernels'])} Triton kernels; {result['seconds']:.0f} s"
