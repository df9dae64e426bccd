"""How a one-step block runs: its branch is read, everything is checked, an engine is chosen and called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _dispatch, _rule, _trial, branch
from .ops import resident
from .ops.rerun import Rerun
from .ops.sweeps import Plan

# (engine, x, plan, rerun, tensors) -> (y, *statistics)
Engine = Callable[[str, Tensor, Plan, "Rerun | None", list], tuple[Tensor, ...]]


def why_not(engine: str, reading: branch.Reading, x: Tensor | None) -> str:
    """Why an engine cannot run a block with this branch on x (or on any input); empty if it can."""
    if reading.units is None:
        return reading.reason
    reason = _dispatch.elsewhere(engine, x)
    device = x.device.type if x is not None else "cuda" if engine == "fused_convolution" else "cpu"
    reason = reason or _dispatch.no_operators(device)
    reason = reason or ("" if x is None else _dispatch.cannot_take([x], reading.tensors))
    if reason or engine not in ("resident", "fused_convolution"):
        return reason
    lower = None if x is None else _dispatch.autocast_dtype(x)
    if engine == "fused_convolution":
        from .ops.triton import convolution

        return convolution.why_not(reading.units, reading.tensors, x, lower)
    tracked = [norm is not None for norm in reading.norms]
    return resident.why_not(reading.units, tracked, reading.tensors, x, lower)


def against(
    engine: str,
    reading: branch.Reading,
    x: Tensor,
    kind: str,
    make_reference: Callable[[], nn.Module] | None = None,
) -> str:
    """Why "auto" does not take an engine that could run x; empty if it does.

    Args:
        engine: its name.
        reading: of the branch.
        x: the input.
        kind: the family of the block, one of `_rule.FAMILIES`, and what else tells its calls apart.
        make_reference: makes the reference block, where a trial may be made now.
    """
    assert reading.units is not None
    if x.device.type in _trial.DEVICES:
        wanted = _trial.key(f"{kind}, {describe(reading.units)}", [x], reading.tensors, _dispatch.autocast_dtype(x))
        able = partial(_dispatch.candidates, lambda name: why_not(name, reading, x))
        return _trial.against(engine, wanted, [x], _dispatch.autocast_dtype(x), able, make_reference)
    if engine != "resident":
        return ""
    coupled = any(unit.norm is not None and unit.norm.mode == "batch" for unit in reading.units)
    widest = max([x.shape[1], *[unit.conv.out_channels for unit in reading.units if unit.conv is not None]])
    return _rule.slower(kind.split(" ", 1)[0], coupled, x, widest)


def describe(units: Iterable[branch.Unit]) -> str:
    """A branch in words: what its operators' speed depends on."""
    words = []
    for unit in units:
        if unit.norm is not None:
            words.append(f"{unit.norm.mode} norm{f' of {unit.norm.groups}' if unit.norm.mode == 'group' else ''}")
        if unit.activation is not None:
            words.append(unit.activation.kind)
        if unit.conv is not None:
            conv = unit.conv
            spread = "" if conv.dilation == (1, 1) and conv.groups == 1 else f" d{conv.dilation} g{conv.groups}"
            words.append(f"{conv.kernel[0]}x{conv.kernel[1]} to {conv.out_channels}{spread}")
    return " ".join(words)


def run(
    x: Tensor,
    module: nn.Module,
    call_engine: Engine,
    make_reference: Callable[[], nn.Module],
    run_reference: Callable[[Tensor], Tensor],
    kind: str,
    engine: str = "auto",
    owner: nn.Module | None = None,
    traceable: bool = True,
) -> Tensor:
    """Run a one-step block.

    Args:
        x: the input [N, C, H, W].
        module: the branch.
        call_engine: calls the family's autograd Function of an engine.
        make_reference: makes the reference block, for gradients of gradients.
        run_reference: the block in plain PyTorch.
        kind: as in `against`.
        engine: a name of an engine, or "auto".
        owner: the module that is being called, for the report.
        traceable: whether torch.compile may trace the reference.
    """
    _check.engine(engine, _dispatch.ENGINES)
    reading = branch.read(module)
    if reading.units is not None:
        _check.feature_map("x", x, branch.channels(reading.units))
        _check.same_kind(x, reading.tensors)
        _check.enough_values(reading, x)
    else:
        _check.tensor("x", x)
        if x.dim() == 4:
            _check.keeps_shape(reading, x)
    chosen = _dispatch.choose(
        engine,
        lambda name: why_not(name, reading, x),
        lambda name: against(name, reading, x, kind, make_reference),
    )
    if not torch.compiler.is_compiling():
        _dispatch.note(owner, chosen)
    if chosen == "reference":
        untraced = torch.compiler.is_compiling() and not traceable
        call = torch.compiler.disable(run_reference) if untraced else run_reference
        return _undone_on_error(call, x, module) if reading.units is None else call(x)
    tracked = tuple(norm is not None for norm in reading.norms)
    plan = Plan(reading.units, tracked, _dispatch.autocast_dtype(x), fused=chosen == "fused_convolution")
    rerun = None if torch.compiler.is_compiling() else Rerun(make_reference)
    y, *statistics = call_engine(chosen, x, plan, rerun, reading.tensors)
    update_running(reading, statistics, x)
    return y


def _undone_on_error(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """call(x); if it fails, the branch's buffers are as they were."""
    if torch.compiler.is_compiling():
        return call(x)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        return call(x)
    except Exception:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        raise


def update_running(reading: branch.Reading, statistics: Iterable[Tensor], x: Tensor) -> None:
    """Update running statistics as PyTorch's norms do, once for each evaluation of the branch, in order."""
    norms = [norm for norm in reading.norms if norm is not None]
    pixels = x.shape[2] * x.shape[3]
    with torch.no_grad():
        for index, stats in enumerate(statistics):
            norm: Any = norms[index % len(norms)]
            if isinstance(norm, nn.InstanceNorm2d):
                count, stats = pixels, stats.mean(1)
                factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
            else:
                count = x.shape[0] * pixels
                norm.num_batches_tracked.add_(1)
                factor = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
            mean, variance = norm.running_mean, norm.running_var
            _move(mean, stats[0], factor)
            _move(variance, stats[1] * (count / max(count - 1, 1)), factor)


def _move(running: Tensor, now: Tensor, factor: float | Tensor) -> None:
    """running ← (1 − factor) running + factor now."""
    weight = factor.to(now.dtype) if isinstance(factor, Tensor) else factor
    running.copy_(torch.lerp(running.to(now.dtype), now, weight))
