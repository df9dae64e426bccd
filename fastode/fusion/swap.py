"""Swapping the blocks of a model for their fused twins, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import choice, known
from ..dispatch.engines import AUTO, ENGINES, NAMES, REFERENCE, is_reference
from ..dispatch.registry import ancestor_of, is_twin, named, reference_of, twin_of
from ..foreign.graph import Unreadable, alike
from ..foreign.reading import adds
from ..foreign.twin import PROVEN, Foreign, class_of, meaning_of, taken_name, twin_for
from ..native import operators
from .report import FusionReport, FusionRow

# What the report calls the engine of a user's own twin, which chooses for itself.
_OWN = "own"


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
        example: a tensor, or a tuple of the model's arguments. The model runs on it once, in its present mode and
            without gradients, and the report then has the engine that each block used; buffers and the random state are
            put back. Without it the report has the engines that could run each block.
        filter: called with (name, block); blocks for which it returns false are left alone.
        read: also read the forwards of modules that are not known, if they add maps, and swap those that are proven to
            be one of this project's blocks. A proof runs copies of the block on two examples in each mode.

    Returns:
        The report: one row for each block, with the reason where it is not swapped or an engine cannot run it.

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
        used = None if example is None else _run(model, example, [p.block for p in plans if is_twin(type(p.block))])
    except BaseException:
        known.clear(model)
        for block, kind, old_engine, proven in before:
            _assign(block, kind, old_engine, proven)
        raise
    return FusionReport(tuple(_row(plan, used) for plan in plans), example is not None)


def unfuse(model: nn.Module) -> FusionReport:
    """Give every fused block of a model its reference type back, in place.

    Args:
        model: any module.

    Returns:
        The report: one row for each block that was fused.

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


def _row(plan: _Plan, used: dict[nn.Module, _Engines] | None) -> FusionRow:
    """The row of a block, once it is what it is to be."""
    block = plan.block
    if not is_twin(type(block)):
        return FusionRow(plan.name, plan.reference, None, (REFERENCE.name,), plan.reason)
    if used is None:
        engines, reason = _engines(block, None)
    else:
        engines, reason = used.get(block, ((), "the example did not reach it"))
    meaning = meaning_of(block).block if isinstance(block, Foreign) else None
    means = None if meaning is None else type(meaning)
    return FusionRow(plan.name, plan.reference, type(block), engines, plan.reason or reason, means)


# The names of engines, and why others are not among them.
_Engines = tuple[tuple[str, ...], str]


def _engines(block: nn.Module, x: Tensor | None) -> _Engines:
    """The engines that can run a fused block on x (or on some input), best first, and why the others cannot."""
    if not isinstance(block, choice.Asked):
        return (_OWN,), ""
    asked = getattr(block, "engine", AUTO)
    # "auto" never takes an engine for another device, so why that cannot run is not worth a word.
    here = [engine.name for engine in ENGINES if not engine.elsewhere(x)]
    names = here if asked == AUTO else [asked]
    ask = choice.would_use if asked == AUTO else choice.can_use
    found = [(name, *ask(name, block, x)) for name in names]
    able = tuple(name for name, can, _ in found if can)
    unable: dict[str, list[str]] = {}
    for name, can, why in found:
        if not can:
            unable.setdefault(why, []).append(name)
    return able, "; ".join(f"{', '.join(names)}: {why}" for why, names in unable.items())


def _run(model: nn.Module, example: Tensor | tuple[Any, ...], blocks: list[nn.Module]) -> dict[nn.Module, _Engines]:
    """Run the model once, and leave no trace but the engine that each block used, and why it was not another."""
    arguments = example if isinstance(example, tuple) else (example,)
    tensors = [*model.parameters(), *model.buffers(), *(item for item in arguments if isinstance(item, Tensor))]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    used: dict[nn.Module, _Engines] = {}

    def ask(block: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        able, reason = _engines(block, x)
        used[block] = (noted[block],) if block in noted else able[:1], reason

    # No hook on a block inside another one: it would keep the outer block from being fused as a whole.
    inner = {
        part for block in blocks for part in block.modules() if part is not block and isinstance(part, choice.Asked)
    }
    handles = [block.register_forward_hook(ask) for block in blocks if block not in inner]
    try:
        with (
            _buffers_put_back(model),
            torch.random.fork_rng(devices=devices),
            # Compiled code has its engines fixed and notes nothing.
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            choice.recording() as noted,
        ):
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return {block: ((name,), _engines(block, None)[1]) for block, name in noted.items()} | used


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        # Inference mode may write into any tensor, one that was made in it too.
        with torch.inference_mode():
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer
                # An autograd graph may hold a buffer, so only changed ones are written; batch norm raises no version.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
