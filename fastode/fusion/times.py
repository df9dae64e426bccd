"""How long the parts of a model take in one forward, by hooks around their calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Span:
    """One call of a module.

    Attributes:
        module: that was called.
        parent: the index of the call that it was made in; -1 where there is none.
        own: the seconds that it took, without those of the calls made in it.
    """

    module: nn.Module
    parent: int
    own: float


@dataclass(frozen=True)
class Times:
    """The seconds of one forward.

    Attributes:
        rest: what no watched module took.
        spans: of each call of a watched module, in the order of their starts.
    """

    rest: float
    spans: tuple[Span, ...] = ()

    @property
    def total(self) -> float:
        """The seconds of the whole."""
        return self.rest + sum(span.own for span in self.spans)

    def of(self, modules: Collection[nn.Module]) -> float:
        """The seconds in calls of these modules; what one of them spends in another counts once."""
        wanted, seconds = set(modules), 0.0
        inside: list[bool] = []
        for span in self.spans:
            inside.append(span.module in wanted or (span.parent >= 0 and inside[span.parent]))
            seconds += span.own if inside[-1] else 0.0
        return seconds

    def share(self, modules: Collection[nn.Module]) -> float:
        """Their share of the whole."""
        return self.of(modules) / self.total

    def least(self, other: Times) -> Times:
        """The less of each part in two forwards; the shorter forward where other modules were called."""
        if [(span.module, span.parent) for span in self.spans] != [(span.module, span.parent) for span in other.spans]:
            return min(self, other, key=lambda times: times.total)
        pairs = zip(self.spans, other.spans, strict=True)
        spans = tuple(replace(one, own=min(one.own, two.own)) for one, two in pairs)
        return Times(min(self.rest, other.rest), spans)


def timed(call: Callable[[], Any], modules: Iterable[nn.Module], devices: Sequence[int] = ()) -> Times:
    """Time a call, and those of modules within it.

    Args:
        call: what to run, once.
        modules: to be watched; their hooks are taken off again.
        devices: the CUDA devices to wait for at each reading of the clock.
    """
    called: list[tuple[nn.Module, int]] = []
    own: list[float] = [0.0]  # of what is outside of all calls, then of each call
    under_way = [0]
    last = 0.0

    def pass_on() -> None:
        """Give the time since the last event to what was under way."""
        nonlocal last
        for device in devices:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        own[under_way[-1]] += now - last
        last = now

    def enter(module: nn.Module, _: Any) -> None:
        pass_on()
        called.append((module, under_way[-1] - 1))
        own.append(0.0)
        under_way.append(len(called))

    def leave(*_: Any) -> None:
        pass_on()
        under_way.pop()

    handles = []
    try:
        for module in modules:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        pass_on()
        own[0] = 0.0
        call()
        pass_on()
    finally:
        for handle in handles:
            handle.remove()
    spans = [Span(module, parent, seconds) for (module, parent), seconds in zip(called, own[1:], strict=True)]
    return Times(own[0], tuple(spans))
