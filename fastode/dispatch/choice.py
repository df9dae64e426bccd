"""Which engine runs a block, and why: the one place where that is decided, from facts that can be printed.

An engine *cannot* run a call (`Engine.why_not`), or "auto" *leaves* one that it can run: on the CPU by what was
measured (`Engine.against`), on CUDA by what trials on the card have shown (`trial`). A named engine is refused only if
it cannot.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..ops.engine import Call, Engine
from ..tracing import is_exporting_to_onnx, is_recorded
from . import trial
from .engines import AUTO, BY_NAME, ENGINES, REFERENCE, is_reference

_recorders: list[dict[nn.Module, str]] = []

MakeReference = Callable[[], nn.Module]


@runtime_checkable
class Asked(Protocol):
    """A fused block that can be asked about its engines."""

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        """A call of the block on these inputs, or without any on some input, as an engine is asked about it."""


def choose(name: str, call: Call, make_reference: MakeReference | None = None) -> Engine:
    """The engine to use: the first that can run the call and that nothing measured speaks against, or the named one.

    While torch.jit.trace is at work it is the reference.

    Args:
        name: of an engine, or "auto".
        call: what is to run.
        make_reference: makes the reference block, where a trial may be made now.

    Raises:
        ValueError: the named engine cannot run the call.
        RuntimeError: the call is exported to ONNX, which has no operators for it.
    """
    if torch.compiler.is_compiling() and not is_reference(name) and is_exporting_to_onnx():
        raise RuntimeError("ONNX has no operators for fused blocks: call fastode.unfuse(model) before the export")
    if is_recorded():
        return REFERENCE
    if name != AUTO:
        reason = BY_NAME[name].why_not(call)
        if reason:
            raise ValueError(f"engine must be one that can run this block, got {name!r}: {reason}")
        return BY_NAME[name]
    for engine in ENGINES:
        if engine is REFERENCE or not (engine.why_not(call) or against(engine, call, make_reference)):
            return engine
    raise AssertionError("the reference can run every block")


def against(engine: Engine, call: Call, make_reference: MakeReference | None = None) -> str:
    """Why "auto" does not take an engine that could run the call; empty if it does. It may make a trial first."""
    if engine is REFERENCE:
        return ""
    if call.inputs[0].device.type in trial.DEVICES:
        return trial.against(engine, call, make_reference)
    return engine.against(call)


def can_use(name: str, block: Asked, x: Tensor | tuple[Tensor, ...] | None = None) -> tuple[bool, str]:
    """Whether an engine can run a fused block on x, and if not why; without x, whether it could on some input."""
    reason = BY_NAME[name].why_not(block.describe_call(_inputs(x)))
    return not reason, reason


def would_use(name: str, block: Asked, x: Tensor | tuple[Tensor, ...] | None = None) -> tuple[bool, str]:
    """Whether "auto" would consider an engine for a block on x: whether it can, and nothing measured is against it."""
    able, reason = can_use(name, block, x)
    if able and x is not None:
        reason = against(BY_NAME[name], block.describe_call(_inputs(x)))
    return not reason, reason


def _inputs(x: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if x is None:
        return ()
    return x if isinstance(x, tuple) else (x,)


@contextmanager
def recording() -> Iterator[dict[nn.Module, str]]:
    """Collect, while in this context, the name of the engine that each fused block used last."""
    used: dict[nn.Module, str] = {}
    _recorders.append(used)
    try:
        yield used
    finally:
        _recorders.remove(used)


def note(block: nn.Module | None, engine: Engine) -> None:
    """Tell the recorders which engine a block has used; the copies that run in a trial are not reported."""
    if block is not None and _recorders and not trial.under_way():
        for used in _recorders:
            used[block] = engine.name


def describe() -> list[tuple[str, str, bool, str]]:
    """Each engine and device, whether this machine can run it there, and why (not); nothing is compiled to find out."""
    rows = []
    for engine in ENGINES:
        for device in engine.devices or ("any",):
            able, reason = engine.describe(device)
            where = f"{platform.machine()}: {reason}" if device == "cpu" else reason
            rows.append((engine.name, {"cpu": "CPU", "cuda": "CUDA"}.get(device, device), able, where))
    return rows
