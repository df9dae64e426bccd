"""One measurement: a workload in one mode and dtype, all its contenders, equality first, then turns."""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastode import record_steps
from fastode.testing import Judge

from . import contenders as contenders_module
from . import inside, memory, others, timing
from .contenders import BASELINES, COMPILED, OTHER_LIBRARIES, THEN_COMPILED, Contender
from .workloads import TRAINABLE, Inputs, Unavailable, Work, Workload, make, work

Row = dict[str, Any]

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "autocast": torch.float32,
}
# What autocast lowers to where a dtype stands for float32 under it.
LOWERED = {"autocast": torch.bfloat16}
# Where the rule says "not equal" and a pre-activation is within rounding of a kink, the reference runs again on this
# many moved inputs in each layout instead of one: of millions of masks one may flip in only one run of ten.
MOVES = 16
# The mode of the equality check for modes of a network that consist of several calls.
GATES = {
    "pgd_step": "input_grad",
    "pgd10": "input_grad",
    "attack_step": "train",
    "adv_train": "train",
    "trades": "train",
}


def set_precision(dtype: str, device: torch.device) -> None:
    """On a GPU, take "tf32" at its word and keep "float32" to IEEE arithmetic."""
    if device.type == "cuda":
        precision = "tf32" if dtype == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = precision


def equality(
    contender: Contender,
    reference: nn.Module,
    module: nn.Module,
    inputs: Inputs,
    mode: str,
    judge: Callable[..., Judge],
) -> Row:
    """The equality check: ok, the worst error over what is allowed, its tensor, and a note where it took more runs."""
    if contender.name in BASELINES:
        return {"ok": True, "worst": 0.0, "tensor": "", "note": "is the reference"}
    if others.steps_otherwise(contender.name, reference):
        return others.within_tolerance(reference, module, inputs)
    unused: set[str] = set()
    if contender.name in OTHER_LIBRARIES and mode == "train":
        # They return a zero gradient where the reference has None: for the unused half of the last evaluation.
        unused = {f"gradient of {name}" for name in _without_gradient(reference, inputs)}

    def judged(by: Judge) -> Row:
        # A compiled module is not copied before it is judged, so what the check changes in it is put back.
        training = {p: p.requires_grad for p in module.parameters()}
        buffers = {b: b.clone() for b in module.buffers()}
        rows = [row for row in by.compare(module, inputs).rows if row.name not in unused]
        for parameter, required in training.items():
            parameter.requires_grad_(required)
        for buffer, before in buffers.items():
            buffer.copy_(before)
        module.zero_grad(set_to_none=True)
        worst = max(rows, key=lambda row: row.ratio)
        return {"ok": all(row.ok for row in rows), "worst": finite(worst.ratio), "tensor": worst.name}

    found = judged(judge())
    if found["ok"] or judge().smooth or isinstance(found["worst"], str):
        return found
    again = judged(judge(moves=MOVES))
    again["note"] = (
        f"a kink within rounding: {found['worst']:.2g} of allowed by 4 runs of the reference, "
        f"{again['worst']:.2g} by {2 + 2 * MOVES}"
    )
    return again


def _without_gradient(reference: nn.Module, inputs: Inputs) -> list[str]:
    module = copy.deepcopy(reference)
    work(module, tuple(x[:2] for x in inputs), "train").run()
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


def finite(value: float) -> float | str:
    """A number as strict JSON takes it: infinity and nan in words."""
    return value if math.isfinite(value) else str(value)


def measure(
    workload: Workload,
    mode: str,
    dtype: str,
    device: torch.device,
    taking_part: Sequence[Contender],
    *,
    seconds: float = 8.0,
    rounds: tuple[int, int] = (7, 40),
    graphs: bool = False,
) -> list[Row]:
    """Measure a workload's contenders against each other.

    Args:
        workload: what to run.
        mode: one of its modes.
        dtype: a key of DTYPES.
        device: where.
        taking_part: the contenders; where eager is missing, the ratios to it are too.
        seconds: of the timed rounds.
        rounds: the least and the largest number of rounds.
        graphs: time CUDA-graph replays as well.

    Returns:
        One row per contender. A contender that is not equal, or fails, has its reason in "errors" and no speed.
    """
    set_precision(dtype, device)
    reference, inputs = make(workload, device, DTYPES[dtype])
    flops, moved = workload.count(reference, inputs, mode)
    # The reference runs once for all contenders, on the input that is timed.
    gate = GATES.get(mode, mode)
    judge: Callable[..., Judge] = functools.cache(
        functools.partial(Judge, reference, inputs, mode=gate, autocast=LOWERED.get(dtype))
    )
    rows: list[Row] = []
    turns: dict[str, Work] = {}
    for contender in taking_part:
        row: Row = {
            "workload": workload.id,
            "variant": workload.variant,
            "shape": workload.shape,
            "batch": int(inputs[0].shape[0]),
            "statistics": workload.statistics,
            "dtype": dtype,
            "mode": mode,
            "contender": contender.name,
            "engine": contender.engine,
            "errors": "",
        }
        rows.append(row)
        try:
            turns[contender.label] = _ready(contender, workload, reference, inputs, mode, row, judge)
            row["peak_mb"] = round(_peak(turns[contender.label], device) / 1e6, 3)
        except Exception as error:  # a contender that fails is reported as failed, with its message
            turns.pop(contender.label, None)
            row["errors"] = str(error) if isinstance(error, Unavailable) else timing.message(error)
    del judge
    machine = timing.machine(LOWERED.get(dtype, DTYPES[dtype]), device)
    clock = timing.Clock(device)
    runs: dict[str, timing.Run] = {"#matmul": machine.matmul, "#copy": machine.copy}
    runs |= {label: turn.run for label, turn in turns.items()}
    times = timing.interleave(runs, clock, seconds=seconds, rounds=rounds)
    matmul = machine.matmul_flops / times.spread("#matmul").median
    copy = machine.copy_bytes / times.spread("#copy").median
    for row, contender in zip(rows, taking_part, strict=True):
        if contender.label in times.errors:
            row["errors"] = times.errors[contender.label]
        if not row["errors"]:
            row |= _speed(contender.label, times, flops, moved, matmul, copy)
    _ratios(rows, taking_part, times)
    if graphs:
        _graphs(rows, taking_part, turns, clock, min(seconds, 2.0))
    for turn in turns.values():
        turn.clear()
    _forget(device)
    return rows


def _ready(
    contender: Contender,
    workload: Workload,
    reference: nn.Module,
    inputs: Inputs,
    mode: str,
    row: Row,
    judge: Callable[..., Judge],
) -> Work:
    """A contender's turn, called once; it must be equal, and a compiled one must have been compiled without breaks."""
    breaks = contenders_module.graph_breaks() if contender.compiled else 0
    module, own = contender.make(reference, inputs)
    if mode not in TRAINABLE:
        module.requires_grad_(False)  # before the first call, which traces a compiled module as it will be timed
    row["equality"] = equality(contender, reference, module, own, mode, judge)
    if not row["equality"]["ok"]:
        tensor, worst = row["equality"]["tensor"], row["equality"]["worst"]
        raise Unavailable(f"not equal: {tensor} has {worst} of the error allowed")
    lower = LOWERED.get(row["dtype"])
    turn = workload.work(module if lower is None else contenders_module.Autocast(module, lower), own, mode)
    with inside.engines_used() as used, record_steps() as log:
        turn.run()
    if used:
        row["used"] = dict(Counter(used.values()))
    steps = others.counted(log) if log else getattr(module, "counted", None)
    if steps:
        row["steps"] = steps
    if contender.compiled and contenders_module.graph_breaks() > breaks:
        raise Unavailable(f"graph break: {contenders_module.graph_break_reason()}")
    return turn


def _peak(turn: Work, device: torch.device) -> int:
    turn.run()
    turn.clear()
    peak = memory.peak_bytes(turn.run, device)
    turn.clear()
    return peak


def _speed(label: str, times: timing.Times, flops: int, moved: int, matmul: float, copy: float) -> Row:
    spread = times.spread(label)
    seconds = spread.median
    bound = max(flops / matmul, moved / copy)
    return {
        "median_ms": round(seconds * 1e3, 4),
        "p20": round(spread.p20 * 1e3, 4),
        "p80": round(spread.p80 * 1e3, 4),
        "rounds": len(times.seconds[label]),
        "least_gflop": flops * 1e-9,
        "least_mb": moved * 1e-6,
        "gflops": round(flops / seconds * 1e-9, 2),
        "gbs": round(moved / seconds * 1e-9, 2),
        "matmul_gflops": round(matmul * 1e-9, 2),
        "copy_gbs": round(copy * 1e-9, 2),
        "fraction_of_matmul": round(flops / seconds / matmul, 4),
        "fraction_of_copy": round(moved / seconds / copy, 4),
        "fraction_of_roofline": round(bound / seconds, 4),
        "ceiling": round(seconds / (flops / matmul), 3),
    }


def _ratios(rows: Sequence[Row], taking_part: Sequence[Contender], times: timing.Times) -> None:
    """Ratios above 1 mean that the row's contender is the faster one."""
    timed = {c.label: row for row, c in zip(rows, taking_part, strict=True) if not row["errors"]}

    def fastest(labels: list[str]) -> str | None:
        return min(labels, key=lambda label: timed[label]["median_ms"], default=None)

    eager = fastest([label for label in timed if label in BASELINES])
    for label, row in timed.items():
        others = [other for other in timed if other != label and timed[other]["contender"] != "fused"]
        plain = label.removesuffix(THEN_COMPILED)
        against = {
            "eager": "eager" if "eager" in timed else None,
            "better_eager": eager,
            "uncompiled": plain if plain != label and plain in timed else None,
            "best_other": fastest(others),
            "best_compiled": fastest([other for other in others if other in COMPILED]),
            "vjp_compile": "vjp-compile" if "vjp-compile" in others else None,
        }
        for name, other in against.items():
            if other is None:
                row[f"ratio_to_{name}"] = None
                continue
            ratio = times.ratio(label, other)
            row[f"ratio_to_{name}"] = {
                "than": other,
                "median": round(ratio.median, 4),
                "p20": round(ratio.p20, 4),
                "p80": round(ratio.p80, 4),
                "ceiling": timed[other]["ceiling"],
                "memory": round(row["peak_mb"] / timed[other]["peak_mb"], 4) if timed[other]["peak_mb"] else None,
            }


def _graphs(
    rows: Sequence[Row], taking_part: Sequence[Contender], turns: dict[str, Work], clock: timing.Clock, seconds: float
) -> None:
    """The same turns as CUDA-graph replays; "compile-ro" replays graphs of its own already."""
    replays: dict[str, timing.Run] = {}
    timed = {c.label: row for row, c in zip(rows, taking_part, strict=True) if not row["errors"]}
    for label, row in timed.items():
        if label == "compile-ro":
            continue
        try:
            turns[label].clear()
            replays[label] = timing.graphed(turns[label].run)
        except Exception as error:
            row["graph"] = {"errors": timing.message(error)}
    times = timing.interleave(replays, clock, seconds=seconds)
    eager = min((b for b in BASELINES if b in times.seconds), key=lambda b: times.spread(b).median, default=None)
    for label in times.seconds:
        spread = times.spread(label)
        timed[label]["graph"] = {
            "median_ms": round(spread.median * 1e3, 4),
            "p20": round(spread.p20 * 1e3, 4),
            "p80": round(spread.p80 * 1e3, 4),
            "ratio_to_better_eager": round(times.ratio(label, eager).median, 4) if eager else None,
        }
    for label, error in times.errors.items():
        timed[label]["graph"] = {"errors": error}


def _forget(device: torch.device) -> None:
    """Drop what a measurement compiled and cached, so that every measurement starts from the same state."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
