"""How a chain runs, and a residual block that may change the shape: it is read and checked, an engine runs it.

What cannot be read, or does not fit together, runs as the reference, whose errors are then PyTorch's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, reference
from ..branch.layers import Activation
from ..branch.read import Reading, Unit, is_overridden, mixture, read, read_run, updated_twice
from ..branch.snapshot import Past
from ..ops import function
from ..ops.engine import Call, Engine, autocast_dtype
from ..ops.plan import MaybeTensor, Plan
from ..ops.rerun import Rerun, StandIn
from ..ops.schemes.chain.chain import Chain
from ..reference import ResBlock
from . import bare, choice
from .engines import AUTO, BY_NAME, ENGINES, NAMES, REFERENCE
from .known import Known, kind_of_call, known
from .one_step import check_kind, refuse_tensor, undone_on_error
from .registry import reference_of
from .running import Statistics, move_running, moved_again

_FAMILY = "chain"
Shape = tuple[int, int, int, int]  # of a map [N, C, H, W]


@dataclass
class ChainReading:
    """What was read of a chain.

    Attributes:
        parts: the readings of the lead and, where there is a block, of its branch and of its shortcut.
        step_size: of the block.
        activation: after its sum.
        inside: the block, where it stands in a chain.
        count: how many modules of a sequence they are.
        head: weight and bias of the head behind them, in which the sequence ends.
        reason: why it cannot be read, or is not worth a call, in one sentence; empty otherwise.
    """

    parts: list[Reading]
    step_size: float = 1.0
    activation: Activation | None = None
    inside: nn.Module | None = None
    count: int = 0
    head: tuple[Tensor, MaybeTensor] | None = None
    reason: str = ""
    tensors: list[MaybeTensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in self.parts:
            self.reason = self.reason or part.reason
            self.tensors = self.tensors + part.tensors
        norms = [norm for part in self.parts for norm in part.norms]
        self.reason = self.reason or mixture("block", self.tensors) or updated_twice("block", norms)

    def chain(self, lower: torch.dtype | None) -> Chain:
        """The constants under autocast to `lower`."""
        plans = [Plan(part.units or (), tuple([norm is not None for norm in part.norms]), lower) for part in self.parts]
        block = len(plans) > 1
        return Chain(
            plans[0], plans[1] if block else None, plans[2] if block else None, self.step_size, self.activation
        )

    def call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        """A call, as an engine is asked about it."""
        if self.reason:
            return Call(_FAMILY, "", None, (), inputs, self.reason)
        if self.is_head_alone:
            return self.call_of_head(inputs)
        return Call(_FAMILY, "", self.chain(autocast_dtype(inputs[0]) if inputs else None), self.tensors, inputs)

    @property
    def is_head_alone(self) -> bool:
        return self.count == 0 and self.head is not None

    def call_of_head(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        """A call of the head on what is in front of it, as a chain without units."""
        assert self.head is not None
        none = Plan((), (), autocast_dtype(inputs[0]) if inputs else None)
        return Call(_FAMILY, "", Chain(none, None, None, 1.0, None), self.head, inputs)


def read_block(block: ResBlock) -> ChainReading:
    """Read a residual block with its shortcut and the activation behind the sum."""
    refuse_tensor(block.step_size, checks.step_size)
    branch = read(block.branch, "branch", keeps_shape=False)
    shortcut, activation, reason = Reading(()), None, ""
    if block.shortcut is not None and (type(block.shortcut) is not nn.Identity or is_overridden(block.shortcut)):
        shortcut = read(block.shortcut, "shortcut", keeps_shape=False)
    if block.post_activation is not None:
        after = read(block.post_activation, "post_activation")
        units = after.units or (Unit(None, None, None),)
        activation, reason = units[0].activation, after.reason
        if not reason and (len(units) > 1 or units[0].norm is not None or units[0].conv is not None):
            reason = "its post_activation is more than one activation layer."
    return ChainReading([Reading(()), branch, shortcut], float(block.step_size), activation, reason=reason)


def read_sequence(modules: Mapping[str, nn.Module | None], block_type: type[ResBlock], engine: str) -> ChainReading:
    """Read the first of some modules: layers, a residual block behind them, and a head where that is all the rest.

    Args:
        modules: in the order of their calls.
        block_type: of the block; one of another type, with another engine or with hooks, is called by itself.
        engine: by name.
    """
    lead, count = read_run(modules, "chain")
    block = list(modules.values())[count] if count < len(modules) else None
    if (
        block is not None
        and type(block) is block_type
        and count > 0
        and not is_overridden(block)
        and getattr(block, "engine", AUTO) == engine
    ):
        found = read_block(block)
        if not found.reason and not lead.reason:
            parts = [lead, *found.parts[1:]]
            head = _read_head(modules, count + 1)
            return ChainReading(parts, found.step_size, found.activation, block, count + 1, head)
    layers = 0 if lead.units is None else sum(_layers(unit) for unit in lead.units)
    head = _read_head(modules, count)
    few = "" if layers > 1 or head is not None else "it begins with fewer than two layers that are fused."
    return ChainReading([lead], count=count, head=head, reason=lead.reason or few)


def _read_head(modules: Mapping[str, nn.Module | None], first: int) -> tuple[Tensor, MaybeTensor] | None:
    """Weight and bias of a head that is all the modules from one on: the mean of every channel and a linear layer."""
    if len(modules) != first + 3:
        return None
    pool, flatten, linear = list(modules.values())[first:]
    if type(pool) is not nn.AdaptiveAvgPool2d or type(flatten) is not nn.Flatten or type(linear) is not nn.Linear:
        return None
    if any(is_overridden(layer) for layer in (pool, flatten, linear)) or pool.output_size not in (1, (1, 1)):
        return None
    if flatten.start_dim != 1 or flatten.end_dim not in (-1, 3):
        return None
    return linear.weight, linear.bias


def _layers(unit: Unit) -> int:
    return (unit.norm is not None) + (unit.activation is not None) + (unit.conv is not None)


def run(
    x: Tensor,
    module: nn.Module,
    read_module: Callable[[], ChainReading],
    run_reference: Callable[[Tensor], Tensor],
    *,
    engine: str = AUTO,
    owner: nn.Module | None = None,
) -> tuple[Tensor, int]:
    """Run a chain: its result, and how many of the modules of a sequence that has taken.

    Args:
        x: the input [N, C, H, W].
        module: the block or the sequence.
        read_module: reads it.
        run_reference: all of it in plain PyTorch, where it cannot be read or no engine takes it.
        engine: a name of an engine, or "auto".
        owner: the module that is being called, for the report. If it is another one, it has seen that nothing changed.
    """
    chain: Chain | bare.Function | None
    if torch.compiler.is_compiling():
        reading, found = read_module(), None
        if reading.is_head_alone:
            return run_reference(x), len(module._modules)
        chosen, chain = _decide(x, reading, module, engine)
    else:
        found = known(module, read_module, _FAMILY, is_block=True, checked=owner is not module)
        reading = found.reading
        if reading.is_head_alone:
            return _run_head_alone(x, module, found, run_reference, engine, owner)
        kind = kind_of_call((_FAMILY, engine), (x,), reading) if isinstance(x, Tensor) else None
        answer = None if kind is None else found.answer(kind)
        if answer is None:
            answer = _decide(x, reading, module, engine)
            if kind is not None:
                if answer[0] is REFERENCE and engine == AUTO and found.lasts(module):
                    answer = REFERENCE, _bare(module, reading, x)
                found.keep(kind, answer, reading.call((x,)))
        chosen, chain = answer
        choice.note(owner, chosen)
    if chosen is REFERENCE or not isinstance(chain, Chain):
        if chain is not None and not isinstance(chain, Chain) and bare.usable():
            return _behind(chain(x), module, found, reading, engine)
        y = undone_on_error(run_reference, x, module) if reading.reason else run_reference(x)
        return y, len(module._modules)
    if found is not None and owner is module:
        choice.note(reading.inside, chosen)
    rerun = None
    if found is not None and found.snapshot is not None and torch.is_grad_enabled():
        rerun = Rerun(partial(_as_it_was, found.snapshot.past, reading), 1, reading.tensors)
    made = function.call(chosen.chain, (chain, rerun), (x, *reading.tensors))
    y, *statistics = chosen.apart(made, chain.plans)
    if statistics:
        _update(reading, statistics, x)
    return _behind(y, module, found, reading, engine)


def _run_head_alone(
    x: Tensor,
    module: nn.Module,
    found: Known[ChainReading],
    run_reference: Callable[[Tensor], Tensor],
    engine: str,
    owner: nn.Module | None,
) -> tuple[Tensor, int]:
    """A sequence that is nothing but a head, which runs as plain PyTorch where no engine takes it as one call."""
    checks.engine(engine, NAMES)
    checks.tensor("x", x)
    chosen = _engine_of_head(x, found, engine)
    choice.note(owner, chosen)
    if chosen is REFERENCE:
        return run_reference(x), len(module._modules)
    return _run_head(x, chosen, found), len(module._modules)


def _behind(
    x: Tensor, module: nn.Module, found: Known[ChainReading] | None, reading: ChainReading, engine: str
) -> tuple[Tensor, int]:
    """What has run and its `count`, or what a head behind it gives and that of all the modules."""
    if reading.head is None or found is None:
        return x, reading.count
    chosen = _engine_of_head(x, found, engine)
    if chosen is REFERENCE:
        return x, reading.count
    return _run_head(x, chosen, found), len(module._modules)


def _engine_of_head(x: Tensor, found: Known[ChainReading], name: str) -> Engine:
    """The engine that takes the head behind x as one call, the reference if none does."""
    if found.snapshot is None or not bare.usable():
        return REFERENCE
    kind = kind_of_call((_FAMILY, "head", name, torch.is_grad_enabled()), (x,), found.reading)
    if kind is None:
        return REFERENCE
    chosen: Engine | None = found.answer(kind)
    if chosen is None:
        checks.same_device(x, found.reading.head or ())
        call = found.reading.call_of_head((x,))
        engines = ENGINES if name == AUTO else (BY_NAME[name],)
        able = [each for each in engines if each.head is not None and not each.why_not(call)]
        chosen = next((each for each in able if name != AUTO or not each.against(call)), REFERENCE)
        found.keep(kind, chosen, call)
    return chosen


def _run_head(x: Tensor, chosen: Engine, found: Known[ChainReading]) -> Tensor:
    reading, snapshot = found.reading, found.snapshot
    assert chosen.head is not None and reading.head is not None and snapshot is not None
    rerun = None
    if torch.is_grad_enabled():
        rerun = Rerun(partial(_head_as_it_was, snapshot.past, reading.count), 1, reading.head)
    lower = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    y: Tensor = function.call(chosen.head, (lower, rerun), (x, *reading.head))
    return y


def _decide(x: Tensor, reading: ChainReading, module: nn.Module, engine: str) -> tuple[Engine, Chain | None]:
    """The engine for a call that is checked first, and the chain as constants."""
    checks.engine(engine, NAMES)
    checks.tensor("x", x)
    if not reading.reason and (x.dim() != 4 or _misfit(reading, x)):
        choice.choose(engine, Call(_FAMILY, "", None, (), (x,), f"the layers do not fit an input {list(x.shape)}"))
        return REFERENCE, None
    if not reading.reason:
        checks.feature_map("x", x)
        check_kind(x, reading.tensors)
        checks.same_device(x, reading.head or ())
        for part, map_ in _maps(reading, x):
            checks.enough_values(part, map_)
    call = reading.call((x,))
    assert call.program is None or isinstance(call.program, Chain)
    return choice.choose(engine, call, partial(_copy_of, module, reading)), call.program


def _bare(module: nn.Module, reading: ChainReading, x: Tensor) -> bare.Function | None:
    """A block or what was read of a sequence, left to PyTorch, as its functions; None where it is to be called."""
    if reading.reason or not bare.takes(x) or x.dim() != 4 or _misfit(reading, x):
        return None
    shapes = [
        shape
        for part, start in _maps(reading, x)
        for unit, shape in zip(part.units or (), _shapes(part, start), strict=False)
        if unit.norm is not None
    ]
    if isinstance(module, ResBlock):
        return bare.block_of(module, shapes)
    layers = [layer for layer in module._modules.values() if layer is not None]
    return bare.sequence_of(layers[: reading.count], shapes)


def _maps(reading: ChainReading, x: Tensor) -> Iterator[tuple[Reading, Shape]]:
    """Every part with the shape of its input."""
    shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    for index, part in enumerate(reading.parts):
        yield part, shape
        if index == 0:
            shape = _shapes(part, shape)[-1]


def _shapes(part: Reading, shape: Shape) -> list[Shape]:
    """What each unit of a part gets, and what the last one gives."""
    found = [shape]
    for unit in part.units or ():
        samples, count, height, width = found[-1]
        if unit.conv is not None:
            height, width = unit.conv.size_after(height, width)
            count = unit.conv.channels_after(count) or 0
        found.append((samples, count, height, width))
    return found


def _misfit(reading: ChainReading, x: Tensor) -> bool:
    """Whether some layer does not take what it gets, or branch and shortcut do not give the same shape."""
    ends = []
    for part, shape in _maps(reading, x):
        shapes = _shapes(part, shape)
        for unit, (_, count, _, _), (_, _, height, width) in zip(part.units or (), shapes, shapes[1:], strict=False):
            wanted = unit.norm.channels if unit.norm is not None else None
            if unit.conv is not None and not unit.conv.mean:
                wanted = unit.conv.in_channels
            if min(height, width) < 1 or (wanted is not None and wanted != count):
                return True
        ends.append(shapes[-1])
    return len(ends) > 1 and ends[1] != ends[2]


def _update(reading: ChainReading, statistics: Statistics, x: Tensor) -> None:
    """Update the running statistics that the call has met, of each norm by the size of its map."""
    if not moved_again(statistics, x):
        pairs = [pair for part, shape in _maps(reading, x) for pair in _norms_met(part, shape)]
        move_running([norm for norm, _ in pairs], statistics, [size for _, size in pairs], x)


def _norms_met(part: Reading, shape: Shape) -> list[tuple[Any, tuple[int, int]]]:
    met = zip(part.norms, _shapes(part, shape), strict=False)
    return [(norm, (samples, height * width)) for norm, (samples, _, height, width) in met if norm is not None]


def _as_it_was(past: Past, reading: ChainReading, stand_in: StandIn) -> nn.Module:
    """The reference of what ran, as it was when it was called."""
    return _plain(past.restored(stand_in), reading)


def _copy_of(module: nn.Module, reading: ChainReading) -> nn.Module:
    """The reference of what is to run, around the same layers, for a trial."""
    if isinstance(module, ResBlock):
        return _block_of(module)
    names = list(module._modules.items())[: reading.count]
    return reference.Chain(
        OrderedDict((name, _block_of(m) if isinstance(m, ResBlock) else m) for name, m in names if m is not None)
    )


def _block_of(block: ResBlock) -> ResBlock:
    return ResBlock(block.branch, block.step_size, block.shortcut, block.post_activation)


def _head_as_it_was(past: Past, first: int, stand_in: StandIn) -> nn.Module:
    """The head as it was when it was called, behind as many modules."""
    return nn.Sequential(*_layers_of(past.restored(stand_in))[first:])


def _plain(restored: nn.Module, reading: ChainReading) -> nn.Module:
    """Modules without their twins' classes, and of a sequence what ran in one call."""
    for module in restored.modules():
        module.__class__ = reference_of(type(module)) or type(module)
    return reference.Chain(*_layers_of(restored)[: reading.count]) if reading.count else restored


def _layers_of(sequence: nn.Module) -> list[nn.Module]:
    """The modules of a sequence; not children(), which leaves out a layer that has come before."""
    return [layer for layer in sequence._modules.values() if layer is not None]
