"""What a model does with an example: the engine that each block uses, and how long the parts take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import choice, trial
from ..dispatch.engines import AUTO, ENGINES, is_reference
from ..dispatch.registry import reference_of
from .times import Times, timed

# What the report calls the engine of a user's own twin, which chooses for itself.
_OWN = "own"
LAYOUT, PLAIN = "an example in channels_last", "no autocast"
ROUNDS, ENOUGH = 3, 0.5  # forwards at most, and the seconds after which none is started
# The names of engines, and why none that comes before them is among them.
Engines = tuple[tuple[str, ...], str]


class Seen(NamedTuple):
    """What was seen of a fused block: its engine, why it was not another, and an empty tensor like its input."""

    engines: tuple[str, ...]
    reason: str
    like: Tensor | None = None
    shape: tuple[int, ...] = ()


class Measured(NamedTuple):
    """The times of a model with fused blocks, with reference blocks, and called otherwise, by what is changed.

    Reference blocks have None where they cannot run.
    """

    fused: Times
    reference: Times | None
    otherwise: dict[str, Times]


def engines_of(block: nn.Module, x: Tensor | None) -> Engines:
    """The engines that can run a fused block on x (or on any), best first, and why none comes before the first."""
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
    for name, _, why in itertools.takewhile(lambda each: not each[1], found):
        unable.setdefault(why, []).append(name)
    return able, "; ".join(f"{', '.join(names)}: {why}" for why, names in unable.items())


class Example:
    """A model and the arguments of a call. Calls leave no trace: buffers and the random state are put back."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.model = model
        self.arguments = arguments
        tensors = [*model.parameters(), *model.buffers(), *(item for item in arguments if isinstance(item, Tensor))]
        self.devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})

    def use(self, blocks: Sequence[nn.Module]) -> dict[nn.Module, Seen]:
        """What each of these fused blocks uses in a call that reaches it."""
        used: dict[nn.Module, Seen] = {}

        def ask(block: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
            x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            able, reason = engines_of(block, x)
            like, shape = (None, ()) if x is None else (x.new_empty(0), tuple(x.shape))
            used[block] = Seen((noted[block],) if block in noted else able[:1], reason, like, shape)

        # No hook on a block inside another one: it would keep the outer block from being fused as a whole.
        inner = {
            part for block in blocks for part in block.modules() if part is not block and isinstance(part, choice.Asked)
        }
        handles = [block.register_forward_hook(ask) for block in blocks if block not in inner]
        try:
            with self._traceless(), choice.recording() as noted:
                self.model(*self.arguments)
        finally:
            for handle in handles:
                handle.remove()
        return {block: Seen((name,), engines_of(block, None)[1]) for block, name in noted.items()} | used

    def measure(self, blocks: Iterable[nn.Module], used: dict[nn.Module, Seen]) -> Measured:
        """Time a forward with the fused blocks, and one with reference blocks after another that warms up.

        Args:
            blocks: all blocks of the report.
            used: what `use` has seen; its call has warmed the fused blocks up.
        """
        blocks = set(blocks)
        watched = self._watched(blocks, used)
        fused = self._timed(self.arguments, watched)
        otherwise = dict(self._otherwise(watched))
        try:
            with _references(blocks):
                with self._traceless():
                    self.model(*self.arguments)
                reference = self._timed(self.arguments, watched)
        except RuntimeError:  # in inference mode, or within the memory there is, only the fused blocks may run
            return Measured(fused, None, otherwise)
        return Measured(fused, reference, otherwise)

    def _otherwise(self, watched: Sequence[nn.Module]) -> Iterator[tuple[str, Times]]:
        """The times of calls in another layout, and without autocast."""
        x = self.arguments[0] if self.arguments else None
        # On a card new kinds of calls have trials, which take seconds and are kept.
        if not isinstance(x, Tensor) or x.device.type in trial.DEVICES or self.devices:
            return
        if _can_move(x):
            yield LAYOUT, self._timed((x.contiguous(memory_format=torch.channels_last), *self.arguments[1:]), watched)
        if torch.is_autocast_enabled(x.device.type):
            try:
                with torch.autocast(x.device.type, enabled=False):
                    yield PLAIN, self._timed(self.arguments, watched)
            except RuntimeError:  # of inputs that have a lower dtype than the parameters
                return

    def _timed(self, arguments: tuple[Any, ...], watched: Sequence[nn.Module]) -> Times:
        """The least times of a few forwards, of one where it takes long."""
        found: Times | None = None
        start = time.perf_counter()
        for _ in range(ROUNDS):
            with self._traceless():
                times = timed(lambda: self.model(*arguments), watched, self.devices)
            found = times if found is None else found.least(times)
            if time.perf_counter() - start > ENOUGH:
                break
        assert found is not None
        return found

    def _watched(self, blocks: set[nn.Module], used: dict[nn.Module, Seen]) -> list[nn.Module]:
        """The blocks that no fused block runs itself, and what stands outside of all blocks."""
        hidden: set[nn.Module] = set()  # a hook there would change what is measured
        inside: set[nn.Module] = set()
        for block in blocks:
            inner = set(block.modules()) - {block}
            inside |= inner
            if block in used and not all(map(is_reference, used[block].engines)):
                hidden |= inner
        modules = [part for part in self.model.modules() if not isinstance(part, torch.jit.ScriptModule)]
        return [part for part in modules if part not in hidden and (part in blocks or part not in inside)]

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        with (
            _buffers_put_back(self.model),
            torch.random.fork_rng(devices=self.devices),
            # Compiled code has its engines fixed and notes nothing.
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            yield


def _can_move(x: Tensor) -> bool:
    """Whether x is a map that is in another layout than channels_last."""
    if x.dim() != 4 or x.shape[1] == 1 or not x.is_contiguous():
        return False
    return not x.is_contiguous(memory_format=torch.channels_last)


@contextmanager
def _references(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Give fused blocks their reference class for a while."""
    before = [(block, type(block), reference_of(type(block))) for block in blocks]
    try:
        for block, _, reference in before:
            if reference is not None:
                block.__class__ = reference
        yield
    finally:
        for block, kind, _ in before:
            block.__class__ = kind


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
