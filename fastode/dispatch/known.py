"""What earlier calls of a block have found, kept beside it: its reading, and the engine chosen for each kind of call.

An entry is asked for at every call and is only taken where its snapshot holds, so that whatever a user changes between
two calls is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..branch.snapshot import KEY, Snapshot
from ..ops.engine import Call, autocast_dtype, mode
from ..ops.plan import MaybeTensors
from ..tracing import is_recorded
from . import trial

_MOST_ANSWERS = 64  # of one reading; a block that is called with ever new shapes must not fill the memory


class _Reading(Protocol):
    reason: str  # why it could not be read, empty where it could

    @property
    def tensors(self) -> MaybeTensors: ...


Reading = TypeVar("Reading", bound=_Reading)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Known(Generic[Reading]):
    """A reading, and what was decided for the calls that followed, by their kind."""

    __slots__ = ("_answers", "reading", "snapshot")

    def __init__(self, snapshot: Snapshot | None, reading: Reading) -> None:
        self.snapshot = snapshot
        self.reading = reading
        self._answers: dict[Hashable, Any] = {}

    def holds(self, root: nn.Module) -> bool:
        return self.snapshot is not None and self.snapshot.holds(root)

    def lasts(self, root: nn.Module) -> bool:
        """Whether the next call of the module will find this."""
        beside = _beside(root)
        return beside is not None and any(each is self for each in beside.known.values())

    def answer(self, kind: Hashable) -> Any:
        return self._answers.get(kind)

    def keep(self, kind: Hashable, answer: Any, call: Call) -> None:
        """Keep what was decided for a call, unless a trial that cannot be made now may decide otherwise later."""
        if self.snapshot is None or is_recorded():
            return
        if call.inputs[0].device.type in trial.DEVICES and not trial.is_known(call):
            return
        if len(self._answers) >= _MOST_ANSWERS:
            self._answers.clear()
        self._answers[kind] = answer


class _Beside:
    """Where each `Known` of a module lies: among the module's own variables, so that all are freed together.

    Copies and pickles of the module hold None in its place.
    """

    __slots__ = ("era", "known")

    def __init__(self) -> None:
        self.known: dict[str, Known[Any]] = {}  # by what it was read as
        self.era = _era

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_era = 0  # how often everything was forgotten


def _beside(root: nn.Module) -> _Beside | None:
    beside = root.__dict__.get(KEY)
    return beside if type(beside) is _Beside and beside.era == _era else None


def kept(root: nn.Module, subject: str = "branch") -> Known[Any] | None:
    """What was kept of a module that was read as a subject, whether or not it still holds."""
    beside = _beside(root)
    return None if beside is None else beside.known.get(subject)


def known(
    root: nn.Module,
    read: Callable[[], Reading],
    subject: str = "branch",
    is_block: bool = False,
    checked: bool = False,
) -> Known[Reading]:
    """What is known of a module; it is read where nothing is, or where something has changed since.

    Args:
        root: the module.
        read: reads it.
        subject: as what, such as "branch"; a module may be read as several, where a block is another one's branch.
        is_block: whether it is a block, whose own hooks run as it is called.
        checked: whether the caller has just seen that nothing has changed.
    """
    found: Known[Reading] | None = kept(root, subject)
    if found is not None and (checked or found.holds(root)):
        return found
    reading = read()
    # Nothing is known of modules that cannot be read, nor of what their snapshot would need. While torch.jit.trace is
    # at work shapes are made of tensors: no answer is found by them, and none is to be kept.
    if reading.reason or is_recorded():
        return Known(None, reading)
    beside = _beside(root) if found is None else None
    if beside is None:
        beside = root.__dict__[KEY] = _Beside()  # before the snapshot, which has it among the variables
    snapshot = Snapshot(root, hooks_of_root=not is_block)
    # Of a sequence a part may be read although a hook ends it: this call's own, which is not kept.
    if is_block and not snapshot.holds(root):
        return Known(snapshot, reading)
    # Tensors that stand in for parameters during one call would be kept alive, with the graph behind them.
    if any(tensor.grad_fn is not None for tensor in snapshot.tensors):
        return Known(snapshot, reading)
    found = beside.known[subject] = Known(snapshot, reading)
    return found


def forget() -> None:
    """Forget all readings and choices."""
    global _era
    _era += 1


def clear(model: nn.Module) -> None:
    """Take what is kept out of a model's modules."""
    for module in model.modules():
        module.__dict__.pop(KEY, None)


def kind_of_call(constants: Hashable, inputs: tuple[Tensor, ...], reading: _Reading) -> Hashable | None:
    """Everything beside the modules that the choice of an engine depends on; None where the call is not to be kept."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    shapes = tuple([(type(x), x.dtype, x.shape, x.device, x.layout) for x in inputs])
    x = inputs[0]
    asked: Hashable = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type in trial.DEVICES:
        asked = (mode(inputs, reading.tensors), torch.is_grad_enabled(), trial.allows_tf32(), x.stride())
    lower = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None  # few calls ask for a device's name
    return constants, shapes, lower, torch.get_num_threads(), asked


def remembered(function: _Function) -> _Function:
    """Keep the results of a function of few constants; a tracer calls the function itself."""
    cached = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def call(*constants: Any) -> Any:
        return function(*constants) if torch.compiler.is_compiling() else cached(*constants)

    return call  # type: ignore[return-value]
