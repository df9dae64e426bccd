"""The proof of a reading: a block and its twin give the same on examples, before one takes the other's place."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..branch.read import Unit, channels
from ..dispatch.engines import ENGINES, is_reference
from ..ops.engine import Call
from ..ops.plan import Plan
from ..ops.schemes.chain.chain import Chain
from ..testing import Comparison, Rule, moved, sample_input
from ..testing.compare import run
from .graph import Draws, Unreadable, Watch, copy_of
from .reading import read_forward
from .state import state_of
from .twin import PROVEN, as_twins, twin_for

SIZES = ((2, 6, 8), (3, 12, 4))  # of the examples: samples, height and width
_CHANNELS = 4  # where the block takes any


def prove(block: nn.Module) -> tuple[str, ...]:
    """Read a block's forward in both modes and prove the readings.

    Copies of the block and of its twin, in float64 on the CPU and with random parameters (of those that the block has
    some may be zero, as the last norm's weight is at first), run forwards and backwards on two examples: outputs, every
    gradient and every buffer are compared by the rule of fastode.testing.

    Args:
        block: theirs; nothing of it changes.

    Returns:
        The programs that were proven, of train and of eval mode; of one of them where the block draws random numbers in
        the other, which then runs as it is.

    Raises:
        Unreadable: it cannot be read, or the two differ, with the reason.
    """
    if any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
        raise Unreadable("it is on the meta device, where nothing can be proven.")
    # Whatever the program that calls this has set for its own tensors.
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.enable_grad():
        programs, drawn = [], []
        for training in (True, False):
            try:
                programs.append(_proven(_in_float64(block).train(training)))
            except Draws as error:
                drawn.append(error)
    if not programs:
        raise drawn[0]
    return tuple(dict.fromkeys(programs))


def _proven(plain: nn.Module) -> str:
    """The program of a copy, in the mode that it is in."""
    found, program = read_forward(plain)
    call: Call = cast(Any, as_twins(found, plain)).describe_call()
    if call.fault:
        raise Unreadable(call.fault)
    twin = copy_of(plain, _again)
    twin.__class__ = twin_for(type(plain))
    twin.__dict__[PROVEN] = (program,)
    for samples, height, width in SIZES:
        x = sample_input(samples, _channels_of(call), height, width, dtype=torch.float64)
        _compare(plain, twin, found, x, "train" if plain.training else "eval")
    with torch.no_grad():
        if read_forward(plain)[1] != program:
            raise Unreadable("its forward is another one where no gradients are recorded.")
    return program


def _in_float64(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu().clone()
        shape, learned = tensor.shape, isinstance(tensor, nn.Parameter)
        if tensor.dim() > 1:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(tensor[0].numel())
        else:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        return nn.Parameter(values) if learned else values

    return copy_of(block, drawn)


def _again(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied


def _channels_of(call: Call) -> int:
    program = call.program
    plans: Sequence[Plan] = program.plans if isinstance(program, Chain) else (program,)  # type: ignore[assignment]
    units: list[tuple[Unit, ...]] = [plan.units for plan in plans]
    return next((count for count in map(channels, units) if count is not None), _CHANNELS)


def _compare(plain: nn.Module, twin: nn.Module, found: nn.Module, x: Tensor, mode: str) -> None:
    where = f"in {mode} mode on an input {list(x.shape)}"
    try:
        _check_calls(plain, x, where)
        state_of(plain)  # what it depends on can be kept in sight
        truth, near = (run(plain, (each,), None, "train") for each in (x, _moved(x)))
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"its forward raises {type(error).__name__} {where}: {error}") from error
    twin.__dict__["engine"] = _engine(found, x)  # which refuses to run the block as theirs
    try:
        again = run(twin, (x,), None, "train")
    except Exception as error:
        raise Unreadable(f"its reading raises {type(error).__name__} {where}: {error}") from error
    sums = max([x[:, 0].numel(), *(p[0].numel() for p in plain.parameters() if p.dim() > 1)])
    rule = Rule(truth, [near], sums, torch.float64, False, lambda: near)
    outcome = Comparison(tuple(rule.row(name, again[name]) for name in truth))
    if not outcome.ok:
        row = outcome.worst
        what = row.note or f"by {row.err:.1e}, where {row.allowed:.1e} is rounding"
        raise Unreadable(f"its forward is not what was read of it: the {row.name} differs {where}, {what}.")


def _check_calls(plain: nn.Module, x: Tensor, where: str) -> None:
    """Refuse a block of which a call does more than to return what depends on its input."""
    called, before = copy.deepcopy(plain), x.clone()
    watch = Watch(called)
    with torch.no_grad():
        first, second = called(x), called(x.clone())
    if not torch.equal(x, before):
        raise Unreadable("its forward changes its input in place.")
    if not torch.equal(first, second):
        raise Unreadable(f"its forward gives something else {where} when it is called again.")
    done = watch.changes(buffers=False)
    if done:
        raise Unreadable(done)


def _moved(x: Tensor) -> Tensor:
    return moved(x, 1).to(memory_format=torch.channels_last)


def _engine(found: nn.Module, x: Tensor) -> str:
    """The first engine that fuses what was read on x."""
    call: Call = cast(Any, found).describe_call((x,))
    why = {engine.name: engine.why_not(call) for engine in ENGINES if not is_reference(engine.name)}
    able = [name for name, reason in why.items() if not reason]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        raise Unreadable(f"no engine can run its reading, to prove it ({reasons}).")
    return able[0]
