"""The way back of a solve by error through its whole control, rejected attempts too.

Derivation: README.md of skew_pair, whose (5) to (7), (11) and (12) are cited, and that beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....reference.adaptive import next_factor
from ....solver import Solver
from ....tableau import Embedded
from ...maps import dots, summed, weighing
from ..by_error import decides, interpolating, interpolating_rates
from .field import Field, Pulled, Weighted
from .start import WayBack, pull_start
from .taken import Taken, Tried


def back(own: Field, solver: Solver, at: float, taken: Taken, end_bar: Tensor, state: Tensor, entries: int) -> Tensor:
    """The cotangent of the state at time 0.

    Args:
        own: the field.
        solver: how.
        at: the part of the last step at which t₁ lies.
        taken: what the solve has left.
        end_bar: of the state at t₁.
        state: at time 0.
        entries: how many numbers it has.
    """
    tableau = solver.tableau
    assert isinstance(tableau, Embedded)
    # The cotangents of what the attempt after the one at hand starts from: its state, first slope, time and size.
    bar, carried = end_bar, None
    time_bar = size_bar = 0.0
    for index in range(len(taken.tried) - 1, -1, -1):
        tried, is_last = taken.tried[index], index == len(taken.tried) - 1
        factor = 0.0 if is_last else next_factor(tried.ratio, tableau.order)
        if not tried.left:
            size_bar *= factor
            continue
        stages, kept, slopes, ends = taken.stages.pop(), taken.kept.pop(), taken.slopes.pop(), taken.ends.pop()
        of_start: list[Tensor] = []
        of_end = [bar] if tried.accepted else []
        error: Weighted | None = None
        if not is_last and decides(tried.ratio, tableau.order):
            # (11)
            weights = [tried.size * w for w in tableau.b_error]
            ratio_bar = -size_bar * factor * tried.size / (tableau.order * tried.ratio)
            scale = ratio_bar / (entries * tried.ratio)
            terms, used = weighing(slopes, weights)
            error_bar, start_bar, stop_bar = own.pull_squares(terms, used, ends[0], ends[1], scale, solver)
            error, of_start, of_end = (error_bar, weights), [start_bar], [*of_end, stop_bar]
        weights = [tried.size * w for w in (interpolating(tableau, at) if is_last else tableau.b)]
        found = own.pull(stages, kept, weights, summed(of_end), carried if tried.accepted else None, slopes, error)
        rate = dots(end_bar, slopes).double() if is_last else None
        by_size, by_time = _of_size(tableau, found, tried, rate, at)
        # (12)
        size_bar = factor * size_bar + by_size + (time_bar if tried.accepted else 0.0)
        time_bar += by_time
        assert found.state is not None and found.first is not None
        if not tried.accepted:
            assert carried is not None
            of_start, carried = [*of_start, bar], summed([carried, found.first])
        else:
            carried = found.first
        bar = summed([found.state, *of_start])
    assert carried is not None and taken.start is not None
    if solver.first_step is not None:
        return pull_start(own, taken.start, bar, carried)
    return WayBack(own, state, entries, solver, taken.start).run(bar, carried, size_bar)


def _of_size(tableau: Embedded, found: Pulled, tried: Tried, rate: Tensor | None, at: float) -> tuple[float, float]:
    """What an attempt adds to the cotangents of its size and of the time at which it starts, read in one piece.

    Args:
        tableau: the scheme.
        found: by the attempt's pull-back.
        tried: the attempt.
        rate: of the last attempt, the inner products of its slopes with the cotangent of the state at t₁.
        at: the part of that attempt at which t₁ lies.
    """
    assert found.product is not None
    parts = [found.product.reshape(1), *(time_bar.reshape(1) for time_bar in found.times)]
    product, *rest = torch.cat(parts if rate is None else [*parts, rate]).tolist()
    times, inner = rest[: len(found.times)], rest[len(found.times) :]
    by_size = product / tried.size + sum(c * bar for c, bar in zip(tableau.c[1:], times, strict=True))
    by_time = sum(times)
    if inner:
        # t₁ lies at the part (t₁ − t)/h, and the state there moves with it.
        moved = sum(w * value for w, value in zip(interpolating_rates(tableau, at), inner, strict=True))
        by_size, by_time = by_size - moved * at, by_time - moved
    return by_size, by_time
