"""Swapping the blocks of a model for their fused twins, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import known
from ..dispatch.engines import AUTO, NAMES, REFERENCE, is_reference
from ..dispatch.registry import ancestor_of, is_twin, named, reference_of, twin_of
from ..foreign.graph import Unreadable, alike
from ..foreign.reading import adds
from ..foreign.twin import PROVEN, Foreign, class_of, meaning_of, taken_name, twin_for
from ..native import operators
from .advice import advise
from .example import Example, Measured, Seen, engines_of
from .report import FusionReport, FusionRow


def fuse(
    model: nn.Module,
    *,
    engine: str = AUTO,
    example: Tensor | tuple[Any, ...] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    read: bool = False,
) -> FusionReport:
    """Swap every block of a model for its fused twin, in place.

    Only the class of a block changes, so the model itself, references held elsewhere, hooks, parameters, buffers and
    optimizer state stay what they are. Blocks that are fused already keep their twin and get the engine. The first swap
    of a process loads the compiled operators, which may compile them once.

    Args:
        model: any module; it may be a block itself. Blocks inside wrappers such as DistributedDataParallel are found.
        engine: "auto" picks the engine at each call; another name asks for that one, and a call it cannot run raises.
        example: a tensor, or a tuple of the model's arguments. The model runs on it in its present mode and without
            gradients: once to see the engine that each block uses, then timed, also with the reference blocks, and on
            a CPU in channels_last and without autocast where the call is otherwise. Each is timed once or, while that
            takes no half second, three times at most. Buffers and the random state are put back. Without it the report
            has the engines that could run each block.
        filter: called with (name, block); blocks for which it returns false are left alone.
        read: also read the forwards of modules that are not known, if they add maps, and swap those that are proven to
            be one of this project's blocks. A proof runs copies of the block on two examples in each mode.

    Returns:
        The report: one row for each block, with the reason where it is not swapped or an engine cannot run it. With an
        example also the share of the forward's time that runs fused, each row's gain, and what would help most.

    Raises:
        TypeError: if an argument is of the wrong kind, or the model is TorchScript.
        ValueError: if the engine is not known.
        Exception: whatever the model raises on the example; the model is then as it was before.

    Example:
        >>> import torch, fastode
        >>> from fastode import reference
        >>> branch = reference.PreActBranch(8, norm="group")
        >>> model = torch.nn.Sequential(reference.SSP2(branch), torch.nn.Flatten())
        >>> report = fastode.fuse(model, engine="reference")
        >>> [(row.name, row.reference.__name__, row.engines) for row in report.rows]
        [('0', 'SSP2', ('reference',))]
        >>> type(model[0]) is fastode.nn.SSP2
        True
    """
    _check_arguments(model, engine, example, filter, read)
    plans = _plans(model, filter, read)
    before = [(plan.block, type(plan.block), *_marks(plan.block)) for plan in plans if plan.twin]
    try:
        for plan in plans:
            if plan.twin is not None:
                _assign(plan.block, plan.twin, engine, plan.proven)
        if before and not is_reference(engine):
            operators.load()
        for plan in plans:
            if isinstance(plan.block, Foreign):
                meaning_of(plan.block)  # what is wrong with an adapter is said now
        found = _try(model, example, plans, read) if example is not None else FusionReport(tuple(map(_row, plans)))
    except BaseException:
        known.clear(model)
        for block, kind, old_engine, proven in before:
            _assign(block, kind, old_engine, proven)
        raise
    return found


def unfuse(model: nn.Module) -> FusionReport:
    """Give every fused block of a model its reference type back, in place.

    Args:
        model: any module.

    Returns:
        The report: one row for each block that was fused. One whose class was made of a twin, as parametrizing a fused
        block makes one, stays fused, and its row says so.

    Raises:
        TypeError: if the model is no module.

    Example:
        >>> from fastode import reference
        >>> model = reference.SSP2(reference.PreActBranch(8, norm="group"))
        >>> report = fuse(model, engine="reference")
        >>> unfuse(model).rows[0].reason
        'runs as the reference again'
        >>> type(model) is reference.SSP2
        True
    """
    checks.module("model", model)
    known.clear(model)
    rows = []
    for name, block in model.named_modules():
        reference = reference_of(type(block))
        if reference is not None:
            _assign(block, reference)
            rows.append(FusionRow(name, reference, None, (REFERENCE.name,), "runs as the reference again"))
        elif is_twin(type(block)):
            rows.append(_left_fused(name, block))
    return FusionReport(tuple(rows))


@dataclass(frozen=True)
class _Plan:
    """What is to become of one block: a twin, or the reason why it stays as it is."""

    name: str
    block: nn.Module
    reference: type[nn.Module]
    twin: type[nn.Module] | None
    reason: str = ""
    proven: tuple[str, ...] | None = None  # programs, where its forward was read


def _check_arguments(model: Any, engine: Any, example: Any, filter: Any, read: Any) -> None:
    checks.module("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be an nn.Module that is not scripted yet, got a torch.jit.ScriptModule")
    checks.engine(engine, NAMES)
    if not (example is None or isinstance(example, (Tensor, tuple))):
        raise TypeError(f"example must be a tensor or a tuple of arguments, got {checks.what(example)}")
    if not (filter is None or callable(filter)):
        raise TypeError(f"filter must be a function of (name, module), got {checks.what(filter)}")
    checks.flag("read", read)


def _plans(model: nn.Module, filter: Callable[[str, nn.Module], bool] | None, read: bool) -> list[_Plan]:
    plans: list[_Plan] = []
    inside: set[nn.Module] = set()  # of blocks that are swapped
    for name, block in model.named_modules():
        is_known = _is_block(block) and not (read and PROVEN in block.__dict__)
        if is_known:
            plan: _Plan | None = _plan(name, block, filter)
        else:
            plan = _plan_by_reading(name, block, filter, plans) if read and block not in inside else None
        if plan is not None:
            plans.append(plan)
            inside.update(block.modules() if plan.twin is not None else ())
    return plans


def _left_fused(name: str, block: nn.Module) -> FusionRow:
    """The row of a block whose class derives from a twin: which one it would have without it, nobody has said."""
    kind = type(block)
    twin = next(base for base in kind.__mro__ if reference_of(base) is not None)
    reference = reference_of(twin)
    assert reference is not None
    reason = f"{kind.__name__} was made of the fused {twin.__name__}, and stays fused: unfuse before it is made"
    return FusionRow(name, reference, kind, engines_of(block, None)[0], reason)


def _is_block(module: nn.Module) -> bool:
    return _reference(module) is not None


def _reference(module: nn.Module) -> type[nn.Module] | None:
    """The registered reference that a module is, or was before it was fused, subclassed or scripted."""
    if isinstance(module, torch.jit.ScriptModule):
        return named(getattr(module, "original_name", ""))
    return reference_of(type(module)) or ancestor_of(type(module))


def _plan(name: str, block: nn.Module, filter: Callable[[str, nn.Module], bool] | None) -> _Plan:
    reference = _reference(block)
    assert reference is not None
    kind = type(block)
    twin, proven = None, block.__dict__.get(PROVEN)
    known = kind if proven is not None else twin_of(reference)
    if filter is not None and not filter(name, block):
        reason = "left out by the filter"
    elif isinstance(block, torch.jit.ScriptModule):
        reason = "compiled by TorchScript: fuse before scripting"
    elif known is not kind and kind is not reference:
        reason = f"{kind.__name__} is a subclass of {reference.__name__}, and no twin is registered for it"
    elif "forward" in block.__dict__:
        reason = _REPLACED
    else:
        reason = _taken(block) if known is not None and issubclass(known, Foreign) else ""
        twin = None if reason else known
    return _Plan(name, block, reference, twin, reason, proven)


def _plan_by_reading(
    name: str, block: nn.Module, filter: Callable[[str, nn.Module], bool] | None, before: Sequence[_Plan]
) -> _Plan | None:
    """The plan of a module that is not known, after those `before`; None where its forward adds no maps."""
    kind = class_of(block)
    own = kind.__module__.split(".")[0] == "torch" or isinstance(block, torch.jit.ScriptModule)
    if own or kind.forward is nn.Module.forward:
        return None
    try:
        if not adds(block):
            return None
        reason = _REPLACED if "forward" in block.__dict__ else _taken(block)
        if filter is not None and not filter(name, block):
            reason = "left out by the filter"
        if not reason:
            operators.load()
            # A proof draws parameters of its own, and so it holds for every block that differs in these alone.
            proven = next((plan.proven for plan in before if plan.proven and alike(plan.block, block)), None)
            return _Plan(name, block, kind, twin_for(kind), "", proven or _prove(block))
    except Unreadable as error:
        reason = str(error)
    return _Plan(name, block, kind, None, reason)


def _prove(block: nn.Module) -> tuple[str, ...]:
    from ..foreign.prove import prove  # with fastode.testing, which few programs need

    return prove(block)


_REPLACED = "its forward was replaced on this very module"


def _taken(block: nn.Module) -> str:
    """Why a block of another's class cannot have a twin; empty if it can."""
    name = "" if isinstance(block, Foreign) else taken_name(block)
    return f"it has {name!r} of its own, which its twin needs" if name else ""


def _marks(block: nn.Module) -> tuple[str | None, tuple[str, ...] | None]:
    """What `_assign` has written into a block."""
    return block.__dict__.get("engine"), block.__dict__.get(PROVEN)


def _assign(
    block: nn.Module, kind: type[nn.Module], engine: str | None = None, proven: tuple[str, ...] | None = None
) -> None:
    block.__class__ = kind
    for name, value in (("engine", engine), (PROVEN, proven)):
        if value is None:
            block.__dict__.pop(name, None)
        else:
            block.__dict__[name] = value


def _try(model: nn.Module, example: Tensor | tuple[Any, ...], plans: Sequence[_Plan], read: bool) -> FusionReport:
    """The report of a model that is fused, with what an example shows."""
    trial = Example(model, example if isinstance(example, tuple) else (example,))
    used = trial.use([plan.block for plan in plans if is_twin(type(plan.block))])
    blocks = [plan.block for plan in plans]
    times = trial.measure(blocks, used)
    rows = [_measured(_row(plan, used), plan.block, times) for plan in plans]
    fused = {block for block, row in zip(blocks, rows, strict=True) if row.is_fused}
    with torch.no_grad():  # as the example ran
        advice = advise(model, list(zip(rows, blocks, strict=True)), used, times, read)
    gain = times.reference.total / times.fused.total if times.reference is not None and fused else None
    return FusionReport(tuple(rows), True, times.fused.share(fused), gain, advice)


def _measured(row: FusionRow, block: nn.Module, times: Measured) -> FusionRow:
    """The row with its share and its gain, where it was called by itself."""
    seconds = times.fused.of({block})
    if not seconds:
        return row
    before = times.reference.of({block}) if times.reference is not None and row.is_fused else 0.0
    return replace(row, share=seconds / times.fused.total, gain=before / seconds if before else None)


def _row(plan: _Plan, used: dict[nn.Module, Seen] | None = None) -> FusionRow:
    """The row of a block, once it is what it is to be."""
    block = plan.block
    if not is_twin(type(block)):
        return FusionRow(plan.name, plan.reference, None, (REFERENCE.name,), plan.reason)
    if used is None:
        engines, reason = engines_of(block, None)
    else:
        engines, reason = used.get(block, Seen((), "the example did not reach it"))[:2]
    meaning = meaning_of(block).block if isinstance(block, Foreign) else None
    means = None if meaning is None else type(meaning)
    return FusionRow(plan.name, plan.reference, type(block), engines, plan.reason or reason, means)
