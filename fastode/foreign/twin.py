"""The twins of classes that others wrote: their forward is a call of one of this project's blocks over their modules.

What a block is, is found by an adapter, or by reading its forward (`reading`), and is a new block around the same
modules that stands beside them: it is no module of theirs, so that names and parameters stay as they are.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import checks, reference
from ..branch.layers import ACTIVATION, KNOWN
from ..branch.read import has_global_hooks, is_overridden
from ..branch.snapshot import KEY, Snapshot
from ..dispatch import choice
from ..dispatch.engines import AUTO, NAMES, REFERENCE, is_reference
from ..dispatch.registry import generated, reference_of, twin_of
from ..nn.base import Fused, note
from ..ops.engine import Call, autocast_dtype
from ..tracing import is_recorded
from .graph import NoNumbers, Unreadable, first_line
from .reading import read_forward
from .state import State, state_of

# Among a block's variables: the programs that reading its forward gave, in train and in eval mode, and that are proven.
PROVEN = "_fastode_proven"
# What hands the dtype of its input on, under autocast too.
_ACTIVATIONS = {kind for kind, (slot, _) in KNOWN.items() if slot == ACTIVATION} - {nn.Softplus}
_OF = "_fastode_of"  # of a twin: the class it is a twin of
# What is kept of a block at most: of each mode, and of a call or two with something replaced.
_MOST = 4

_MOST_LEFT, _CALLS_LEFT = 64, 99

Adapter = Callable[[Any], "nn.Module | str"]
adapters: dict[type[nn.Module], Adapter] = {}


class Meaning(NamedTuple):
    """What a block is: one of this project's blocks over its modules, or why it is none, in a sentence."""

    block: nn.Module | None
    reason: str = ""


class _Kept(NamedTuple):
    """A meaning, and on what it depends."""

    meaning: Meaning
    snapshot: Snapshot
    adapter: Adapter | None
    state: State | None  # None where their forward runs, whatever it depends on

    def holds(self, block: nn.Module, adapter: Adapter | None) -> bool:
        if self.adapter is not adapter or not self.snapshot.holds(block):
            return False
        return self.state is None or self.state.holds()


class _Beside:
    """Where a block's meanings lie: among its variables. Copies and pickles of the block hold None in its place."""

    __slots__ = ("_left", "kept")

    def __init__(self) -> None:
        self.kept: tuple[_Kept, ...] = ()
        self._left: dict[Hashable, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def leave(self, kind: Hashable) -> None:
        """Remember that "auto" has left a kind of call to their forward, which is right whatever has changed since."""
        if is_recorded():  # shapes are made of tensors, by which no later call would find it
            return
        if len(self._left) >= _MOST_LEFT:
            self._left.clear()
        self._left[kind] = _CALLS_LEFT

    def leaves(self, kind: Hashable) -> bool:
        """Whether it does, as far as is remembered; now and then it is to be asked again."""
        calls = self._left.get(kind, 0)
        if calls:
            self._left[kind] = calls - 1
        return calls > 0


class Foreign(Fused):
    """What the twins of other people's classes share; the class behind it in the order of bases is theirs."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Theirs is not called: it may want keywords, or enter the twin in a list of their classes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain: Callable[..., Any] = super().forward  # type: ignore[misc]
        kind = _kind_of_call(self, args, kwargs)
        if is_reference(self.engine) or (kind is not None and _beside(self).leaves(kind)):
            note(cast(nn.Module, self), REFERENCE)
            return plain(*args, **kwargs)
        meaning = _meaning_of_call(self, args, kwargs)
        if meaning.block is None:
            inputs = tuple(x for x in args if isinstance(x, Tensor))
            note(cast(nn.Module, self), choice.choose(self.engine, _unfused(inputs, meaning.reason)))
            return plain(*args, **kwargs)

        def theirs(x: Tensor) -> Any:
            if kind is not None and not self.describe_call((x,)).fault:
                _beside(self).leave(kind)
            return plain(x)

        return cast(Any, meaning.block).run_for(self, theirs, *args)

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        meaning = meaning_of(cast(nn.Module, self))
        if meaning.block is None:
            return _unfused(inputs, meaning.reason)
        found: Call = cast(Any, meaning.block).describe_call(inputs)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__ and made[1] == (type(self),):  # type: ignore[attr-defined]
            # The twin has no name by which a pickle could find it.
            return (_remade, (getattr(type(self), _OF),), *made[2:])
        return made


# What a twin gives its class, and so must not have been there before.
_GIVEN = ("engine", "describe_call", "why_not", "against")


def taken_name(theirs: type | nn.Module) -> str:
    """A name of their class, or of a block of it, that the twin would hide; empty if there is none."""
    return next((name for name in _GIVEN if hasattr(theirs, name)), "")


def class_of(block: nn.Module) -> type[nn.Module]:
    """Their class, whether or not the block has its twin."""
    kind: type[nn.Module] = getattr(type(block), _OF, type(block))
    return kind


def twin_for(kind: type[nn.Module]) -> type[nn.Module]:
    """The twin of a class, made when it is first asked for.

    Raises:
        Unreadable: there can be none.
    """
    if kind not in generated:
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, _OF: kind}
        try:
            generated[kind] = type(kind.__name__, (Foreign, kind), body)
        except Exception as error:  # their metaclass refuses it
            raise Unreadable(f"no twin of its class can be made: {first_line(error)}") from error
    return generated[kind]


def _remade(kind: type[nn.Module]) -> nn.Module:
    twin = twin_for(kind)
    return twin.__new__(twin)


def meaning_of(block: nn.Module) -> Meaning:
    """What a block is, as it is now.

    Raises:
        TypeError, ValueError: its adapter returned something that is not allowed; or whatever the adapter raises.
    """
    kind = class_of(block)
    adapter = None if PROVEN in block.__dict__ else adapters.get(kind)
    beside = _beside(block)
    for kept in beside.kept:
        if kept.holds(block, adapter):
            return kept.meaning
    reason = _overridden(block)
    if reason:
        return Meaning(None, reason)
    meaning, state = _adapted(block, kind, adapter) if PROVEN not in block.__dict__ else _read(block)
    snapshot = Snapshot(block, hooks_of_root=False)
    # Tensors that stand in for parameters during one call would be kept alive, with the graph behind them.
    if all(tensor.grad_fn is None for tensor in snapshot.tensors):
        beside.kept = (_Kept(meaning, snapshot, adapter, state), *beside.kept[: _MOST - 1])
    return meaning


def _beside(block: Any) -> _Beside:
    found = block.__dict__.get(KEY)
    if type(found) is not _Beside:
        found = block.__dict__[KEY] = _Beside()
    return found


def _kind_of_call(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What is remembered of calls that "auto" leaves, on a CPU, where no trial may decide otherwise; None of others."""
    if len(args) != 1 or kwargs or block.engine != AUTO or torch.compiler.is_compiling():
        return None
    x = args[0]
    if type(x) is not Tensor or not x.is_cpu:
        return None
    return x.shape, x.dtype, block.training, torch.get_num_threads(), torch._C._is_any_autocast_enabled()


def _meaning_of_call(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meaning:
    if torch.compiler.is_compiling():
        return Meaning(None, "torch.compile and torch.export trace its own forward")
    if len(args) != 1 or kwargs or type(args[0]) not in (Tensor, nn.Parameter) or args[0].dim() != 4:
        return Meaning(None, "it is called with something else than one tensor [N, C, H, W]")
    checks.engine(block.engine, NAMES)
    meaning = meaning_of(block)
    lower = autocast_dtype(args[0]) if torch._C._is_any_autocast_enabled() else None
    if lower is not None and meaning.block is not None and not _adds_alike(meaning.block, args[0], lower):
        return Meaning(None, "under autocast what it adds is of two dtypes, where a sum in place may have either")
    return meaning


def _adds_alike(found: nn.Module, x: Tensor, lower: torch.dtype) -> bool:
    """Whether all that a block adds under autocast is of the dtype that autocast lowers to."""
    chains: list[nn.Module | None] = []
    for part in (found, *found.children()):
        if part is found or isinstance(part, reference.ResBlock):
            chains += [part._modules.get("branch"), part._modules.get("shortcut")]
    lead = [part for part in found.children() if not isinstance(part, reference.ResBlock)]
    starts_low = x.dtype == lower
    if isinstance(found, reference.Chain):
        starts_low = _ends_low(lead, starts_low)
    return starts_low and all(_ends_low([chain], starts_low) for chain in chains if chain is not None)


def _ends_low(layers: Iterable[nn.Module], starts_low: bool) -> bool:
    """Whether layers give the dtype that autocast lowers to, where they get it or not."""
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            starts_low = _ends_low(layer, starts_low)
        elif isinstance(layer, nn.Conv2d):
            starts_low = True
        elif not isinstance(layer, nn.BatchNorm2d | nn.Identity) and type(layer) not in _ACTIVATIONS:
            starts_low = False
    return starts_low


def _unfused(inputs: tuple[Tensor, ...], reason: str) -> Call:
    return Call("chain", "", None, (), inputs, reason)


def _overridden(block: nn.Module) -> str:
    if has_global_hooks():
        return "a hook is registered on all modules, and a fused block would not call it."
    for name, part in block.named_modules():
        if part is not block and is_overridden(part):
            return (
                f"{name} ({type(part).__name__}) has hooks or a replaced forward, which a fused block would not call."
            )
    return ""


def _read(block: nn.Module) -> tuple[Meaning, State | None]:
    """By its forward, which must still be one that was proven."""
    try:
        state = state_of(block)
    except Unreadable as error:
        return Meaning(None, str(error)), None
    if any(name[:2] != "__" and name != _OF for name in vars(type(block))):
        return Meaning(None, "its twin was given something that its own class does not have."), state
    try:
        found, program = read_forward(block)
    except Unreadable as error:
        return Meaning(None, str(error)), state
    if program not in block.__dict__[PROVEN]:
        why = "its forward does something else now than when its reading was proven: fuse it again."
        return Meaning(None, why), state
    return Meaning(as_twins(found, block)), state


def _adapted(block: nn.Module, kind: type[nn.Module], adapter: Adapter | None) -> tuple[Meaning, State | None]:
    if adapter is None:
        return Meaning(None, f"no adapter is registered for {kind.__name__}."), None
    state, reason = None, ""
    try:
        state = state_of(block, adapter)
    except Unreadable as error:
        reason = str(error)
    try:
        with NoNumbers("its adapter"):
            found = adapter(block)
    except Unreadable as error:
        return Meaning(None, str(error)), None
    if isinstance(found, str):
        return Meaning(None, found or f"the adapter of {kind.__name__} gave an empty reason."), _settled(state)
    _check(kind, block, found)
    return Meaning(None, reason) if reason else Meaning(as_twins(found, block)), _settled(state)


def _settled(state: State | None) -> State | None:
    """Without what an adapter itself has changed, as one that counts its calls does."""
    return None if state is None else state.without_changes()


def allowed() -> tuple[str, ...]:
    """The names of the reference blocks that another block may be."""
    kinds = (getattr(reference, name) for name in reference.__all__)
    return tuple(sorted(kind.__name__ for kind in kinds if hasattr(twin_of(kind), "run_for")))


def _check(kind: type[nn.Module], block: nn.Module, found: Any) -> None:
    what = f"what the adapter of {kind.__name__} returns must be"
    if reference_name(found) not in allowed():
        names = ", ".join(allowed())
        raise TypeError(f"{what} a block of fastode.reference ({names}) or a reason, got {checks.what(found)}")
    theirs = {id(part): name for name, part in block.named_modules()}
    if id(found) in theirs:
        raise ValueError(f"{what} a new block, got the block's own module {theirs[id(found)] or 'itself'}")
    held = {id(tensor) for _, tensor in _tensors(block)}
    used = {id(tensor) for _, tensor in _tensors(found)}
    for name, tensor in _tensors(found):
        if id(tensor) not in held:
            raise ValueError(
                f"{what} made of the block's own parameters and buffers, got {name}, which is none of them"
            )
    for name, tensor in _tensors(block):
        if id(tensor) not in used:
            raise ValueError(f"{what} made of all of the block's parameters and buffers, got a block without {name}")


def reference_name(found: Any) -> str:
    """The name of the reference block that something is, or whose twin it is; empty if it is neither."""
    kind = reference_of(type(found)) or type(found)
    return kind.__name__ if twin_of(kind) is not None and getattr(reference, kind.__name__, None) is kind else ""


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def as_twins(found: nn.Module, block: nn.Module) -> nn.Module:
    """A block over another's modules as its twin, which runs it by the other's engine."""
    theirs = {id(part) for part in block.modules()}
    for part in (found, *found.children()):
        if part is found or (isinstance(part, reference.ResBlock) and id(part) not in theirs):
            twin = twin_of(reference_of(type(part)) or type(part))
            assert twin is not None
            part.__class__ = twin
            part.__dict__["engine"] = block.__dict__.get("engine", AUTO)
    if id(found._modules.get("branch")) in theirs:
        # A branch keeps what is read of it among its variables, and theirs are to stay as they are.
        found.branch = nn.Sequential(found.branch)  # type: ignore[arg-type]
    return found
