"""On CUDA, "auto" takes an engine only where a trial on that card has shown it to be equal and faster than the others.

The first call of a block on inputs of a new kind times every engine that can run it on a copy of the very call, and
judges those that are faster than the reference by the rule of fastode.testing; one that fails it is out. What was
decided is kept in a file (`decisions`), by card, versions and kind of call. FASTODE_TUNE=0 forbids trials: then what
no file holds runs as the reference.

A trial runs in a thread of its own, which has none of the caller's autocast, grad mode, saved-tensor hooks or modes. No
trial is made while torch.compile traces, while a CUDA graph is captured, or inside a trial. A traced call takes what is
known or in a file, as a constant: of a decision's engines the fastest that can be traced.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.engine import Call, Engine
from ..testing.compare import compare_blocks
from ..tracing import constant
from . import decisions
from .decisions import Decision
from .engines import ENGINES, REFERENCE, is_reference
from .registry import ancestor_of, twin_of

DEVICES = ("cuda",)  # on which there are trials
_ROUNDS = 7
_JUDGED_ENTRIES = 1 << 22  # of the inputs: as many samples as that are judged, because truth takes float64


_lock = threading.RLock()
_state = threading.local()


def under_way() -> bool:
    """Whether this thread runs a trial."""
    return getattr(_state, "under_way", False)


@constant
def allows_tf32() -> bool:
    """Whether float32 convolutions may round their factors to tf32: then they are judged and timed so."""
    settings = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if settings is None else settings.fp32_precision == "tf32"


def key(call: Call) -> str:
    """What a decision is for: the block, its inputs' shapes, dtype and layout, tf32, and which gradients are wanted."""
    # Not str(side), which a tracer refuses where the side is a symbol.
    shapes = ", ".join(["x".join([f"{side}" for side in x.shape]) for x in call.inputs])
    x = call.inputs[0]
    layout = "channels_last" if x.shape[1] > 1 and x.stride(1) == 1 else "contiguous"
    autocast = "" if call.lower is None else f" autocast to {call.lower}"
    precision = " in tf32" if (call.lower or x.dtype) == torch.float32 and allows_tf32() else ""
    return f"{call.kind} | {shapes} {x.dtype} {layout}{autocast}{precision} | {call.mode}".replace("torch.", "")


def against(engine: Engine, call: Call, make_reference: Callable[[], nn.Module] | None) -> str:
    """Why "auto" does not take an engine for this call; empty if it does. It may make a trial first.

    Args:
        engine: one that can run the call.
        call: what is to run.
        make_reference: makes the reference block; None where only what is known is asked for.
    """
    index, wanted = call.inputs[0].device.index, key(call)
    if torch.compiler.is_compiling():
        return _against_traced(engine.name, wanted, index, tuple([each.name for each in able(call)]))
    known = decisions.remembered(index, wanted)
    if known is None:
        known = _decide(index, wanted, call, make_reference)
    return _verdict(engine.name, known)


def is_known(call: Call) -> bool:
    """Whether this process knows what was decided for a call, so that the answer to it stays."""
    return decisions.remembered(call.inputs[0].device.index, key(call)) is not None


def able(call: Call) -> list[Engine]:
    """The engines that can run a call, best first."""
    return [engine for engine in ENGINES if not engine.why_not(call)]


@constant
def _against_traced(engine: str, wanted: str, index: int | None, able: tuple[str, ...]) -> str:
    """`against` where a tracer asks, which may not read files nor make trials itself."""
    known = decisions.remembered(index, wanted) or decisions.look_up(index, wanted)
    if known is not None and known.engine not in able:
        # Every engine faster than the reference was judged, so those not refused are equal to it.
        times = known.milliseconds
        equal = [name for name in able if name in times and name not in known.refused]
        known = replace(known, engine=min(equal, key=times.__getitem__, default=REFERENCE.name))
    return _verdict(engine, known)


def _verdict(engine: str, known: Decision | None) -> str:
    if known is None:
        return "no trial on this card has shown it to be equal and faster"
    if known.engine == engine:
        return ""
    if engine in known.refused:
        return f"in a trial on this card it {known.refused[engine]}"
    if engine not in known.milliseconds:
        return "a trial on this card was made without it"
    times = known.milliseconds
    return f"in a trial on this card it took {times[engine]:.3g} ms, and {known.engine} {times[known.engine]:.3g} ms"


def _decide(
    index: int | None, wanted: str, call: Call, make_reference: Callable[[], nn.Module] | None
) -> Decision | None:
    """The decision of a file or of a trial; None where no file has one and no trial may be made now."""
    if under_way():
        return None
    with _lock:  # two trials at a time would time each other
        candidates = [engine.name for engine in able(call)]
        known = decisions.remembered(index, wanted) or decisions.look_up(index, wanted, candidates)
        if known is not None or make_reference is None or state() != "on" or _capturing():
            return known
        asked = call.mode  # read here: grad mode is this thread's own
        device = call.inputs[0].device
        found = _in_thread(lambda: _try(make_reference(), candidates, call.inputs, asked, call.lower), device)
        decisions.remember(index, wanted, found)
        return found


def state() -> str:
    """Whether trials may be made, in words."""
    return "off (FASTODE_TUNE=0)" if os.environ.get("FASTODE_TUNE", "1") == "0" else "on"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _in_thread(call: Callable[[], Decision], device: torch.device) -> Decision:
    """call() in a fresh thread, whose thread-local state is torch's default, on what a device was given before."""
    results: list[Decision] = []
    errors: list[BaseException] = []

    def run() -> None:
        _state.under_way = True
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    if device.type == "cuda":
        # That thread has another stream, and copies what this one makes.
        torch.cuda.current_stream(device).synchronize()
    thread = threading.Thread(target=run, name="fastode trial")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _try(
    block: nn.Module, candidates: Sequence[str], inputs: Sequence[Tensor], mode: Any, lower: torch.dtype | None
) -> Decision:
    """Time the candidates on copies of a call; the fastest that is equal to the reference wins.

    All that are faster than the reference are judged: a call that is traced may have to take the second.
    """
    # Not copy.deepcopy alone: a parameter may be the result of a computation, which it refuses to copy.
    memo: dict[int, Any] = {id(t): _private(t) for t in itertools.chain(block.parameters(), block.buffers())}
    plain = copy.deepcopy(block, memo)
    copies = tuple(_private(x) for x in inputs)
    modules = {name: plain if is_reference(name) else _as_twin(plain, name) for name in candidates}
    device = copies[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        seconds, refused = _seconds(modules, copies, mode, lower)
        bound = seconds.get(REFERENCE.name, math.inf)
        able = [name for name in seconds if not is_reference(name) and seconds[name] <= bound]
        faster = sorted(able, key=lambda name: seconds[name])
        faults = {name: _fault(plain, modules[name], copies, mode, lower) for name in faster}
        refused |= {name: fault for name, fault in faults.items() if fault}
        engine = next((name for name in faster if not faults[name]), REFERENCE.name)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Decision(engine, {name: round(s * 1e3, 4) for name, s in seconds.items()}, refused, today)


def _private(t: Tensor) -> Tensor:
    copied = t.detach().clone().requires_grad_(t.requires_grad)
    return nn.Parameter(copied, t.requires_grad) if isinstance(t, nn.Parameter) else copied


def _as_twin(plain: nn.Module, engine: str) -> nn.Module:
    kind = type(plain)
    twin: Any = copy.deepcopy(plain)
    twin.__class__ = getattr(kind, "fused_twin", None) or twin_of(kind) or twin_of(ancestor_of(kind) or kind)
    twin.engine = engine
    parts: list[Any] = list(twin.children()) if isinstance(twin, nn.Sequential) else []
    for part in parts:  # a chain takes a block into its call where that is fused, too
        part.__class__ = twin_of(type(part)) or type(part)
        part.engine = engine
    return twin


def _seconds(
    modules: dict[str, nn.Module], inputs: tuple[Tensor, ...], mode: str, lower: torch.dtype | None
) -> tuple[dict[str, float], dict[str, str]]:
    """The median time of each module, taken in turns, and why a module has none."""
    clock = _clock(inputs[0].device)
    works = {name: _work(module, inputs, mode, lower) for name, module in modules.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    failed: dict[str, str] = {}
    for turn in range(_ROUNDS + 2):
        for name, work in works.items():
            if name in failed:
                continue
            try:
                taken = clock(work)
            except Exception as error:  # a kernel that does not launch is out, and the call goes on without it
                failed[name] = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                continue
            if turn > 1:  # the first compiles, the second warms
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items() if name not in failed}, failed


def _work(module: nn.Module, inputs: tuple[Tensor, ...], mode: str, lower: torch.dtype | None) -> Callable[[], object]:
    """The call, with the gradients that are asked for."""
    module = copy.deepcopy(module)
    if mode != "train":
        module.requires_grad_(False)
    leaves = tuple(x.detach().requires_grad_(mode != "forward" and x.is_floating_point()) for x in inputs)
    device = inputs[0].device.type

    def run() -> object:
        with torch.set_grad_enabled(mode != "forward"):
            with nullcontext() if lower is None else torch.autocast(device, lower):
                outputs = module(*leaves)
            if mode == "forward":
                return outputs
            outputs = [y for y in ((outputs,) if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
            targets = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
            return torch.autograd.grad(outputs, targets, [torch.ones_like(y) for y in outputs], allow_unused=True)

    return run


def _clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What gives the seconds of a call on a device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return clock


def _fault(
    reference: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], mode: Any, lower: torch.dtype | None
) -> str:
    """What is wrong with a module by the rule of fastode.testing, on some of the samples; empty if it is equal."""
    entries = max(x.numel() // x.shape[0] for x in inputs)
    few = tuple(x[: max(2, _JUDGED_ENTRIES // entries)] for x in inputs)
    try:
        x = few[0] if len(few) == 1 else few
        worst = compare_blocks(reference, module, x, mode=mode, autocast=lower, quick=True).worst
    except Exception as error:
        return f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return "" if worst.ok else f"was not equal: {worst.name} has {worst.ratio:.3g} of the error allowed"
