"""A chain of units, and a residual block that may change the shape behind it, over an engine's sweeps.

Derivation: README.md beside this file; equations are cited as (1) and (2) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....branch.layers import TENSORS_PER_UNIT, Activation
from ....branch.read import Unit
from ....native.cuda import operators
from ...function import gradients
from ...maps import channels_last, coefficients, combine, converted, last_of, promoted
from ...plan import NO_NORM, Gradients, MaybeTensor, MaybeTensors, Plan, Record, activation_codes, tracked_statistics
from ...rerun import Rerun
from ...sweeps import ForwardSweeps


@dataclass(frozen=True)
class Chain:
    """z = lead(x), and then y = activation(shortcut(z) + h branch(z)) where there is a branch, else y = z.

    Attributes:
        lead: the units in front; none where the branch begins with x itself.
        branch: the units of the branch, or None.
        shortcut: those of its shortcut; none for the identity.
        step_size: h.
        activation: after the sum, or None.
        memo: what an engine has made of it, for the tensors that it always comes with; a tracer leaves it alone.
    """

    lead: Plan
    branch: Plan | None
    shortcut: Plan | None
    step_size: float
    activation: Activation | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def lower(self) -> torch.dtype | None:
        """The dtype to which autocast lowers convolutions, None where it is off."""
        return self.lead.lower

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The lead, the branch and the shortcut, in the order of their tensors."""
        if self.branch is None or self.shortcut is None:
            return (self.lead,)
        return self.lead, self.branch, self.shortcut

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, in the order of their tensors."""
        return tuple([unit for plan in self.plans for unit in plan.units])

    def split(self, entries: Sequence[Any], each: int = TENSORS_PER_UNIT) -> list[Any]:
        """Entries of all units, `each` of every one, as those of each plan."""
        parts, first = [], 0
        for plan in self.plans:
            last = first + each * len(plan.units)
            parts.append(entries[first:last])
            first = last
        return parts

    @property
    def recovers(self) -> bool:
        """Whether the activation's slope can be told from y itself, so that the sum need not be kept."""
        return self.activation is None or self.activation.kind == "relu"


def make_function(sweeps: ForwardSweeps) -> type[torch.autograd.Function]:
    """The chain on an engine with these sweeps as an autograd Function."""

    class ChainFunction(torch.autograd.Function):
        """y and the statistics for running averages; keeps every unit's input, so that no convolution is run again."""

        @staticmethod
        def forward(ctx: Any, chain: Chain, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor) -> Any:
            y, sum_, points, statistics = forward(sweeps, chain, channels_last(x), tensors)
            tracked = _tracked(chain, statistics)
            result = y if last_of(x, tensors) else y.contiguous()
            kept = [] if chain.activation is None else [sum_ if sum_ is not None else result]
            ctx.save_for_backward(x, *tensors, *kept, *points, *statistics)
            ctx.chain, ctx.rerun, ctx.count = chain, rerun, 1 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*tracked)
            return (result, *tracked)

        @staticmethod
        def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved, chain = ctx.saved_tensors, ctx.chain
            given, kept = saved[: ctx.count], list(saved[ctx.count :])
            sum_ = None if chain.activation is None else channels_last(kept.pop(0))
            units = len(chain.units)
            points, statistics = kept[: len(kept) - units], kept[len(kept) - units :]

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), (x, *tensors) = bars, given
                assert bar is not None
                inputs = _inputs(chain, channels_last(x), points)
                return backward(sweeps, chain, inputs, statistics, sum_, tensors, channels_last(bar), wanted)

            return gradients(ctx, given, [y_bar], pull)

    return ChainFunction


def _tracked(chain: Chain, statistics: Sequence[Tensor]) -> list[Tensor]:
    """Of the statistics of all units, those with which running statistics are updated."""
    found: list[Tensor] = []
    for plan, part in zip(chain.plans, chain.split(statistics, 1), strict=True):
        found += tracked_statistics(plan, part) if plan.units else []
    return found


def _inputs(chain: Chain, x: Tensor, points: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs of every plan's units, from x and from what forward has kept."""
    rest = list(points)
    first, found = x, []
    for index, plan in enumerate(chain.plans):
        found.append([first, *[rest.pop(0) for _ in plan.units[1:]]] if plan.units else [])
        if index == 0 and plan.units and len(chain.plans) > 1:
            first = rest.pop(0)
    return found


def forward(
    sweeps: ForwardSweeps, chain: Chain, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """y; the sum where it is to be kept; what `_inputs` takes for points; and the statistics of every unit's norm."""
    points: list[Tensor] = []
    statistics: list[Tensor] = []

    def through(plan: Plan, part: MaybeTensors, h: Tensor) -> Tensor:
        if not plan.units:
            return h
        _, y, records = sweeps.value(plan, converted(plan, part, h.dtype), [h])
        points.extend(record.h for record in records[1:])
        statistics.extend(record.stats for record in records)
        return y

    lead, *parts = chain.split(tensors)
    z = through(chain.lead, lead, x)
    if chain.branch is None or chain.shortcut is None:
        return z, None, points, statistics
    if chain.lead.units:
        points.append(z)
    image = through(chain.branch, parts[0], z)
    skip = through(chain.shortcut, parts[1], z)
    # (1)
    terms, coefs = promoted([skip, image]), coefficients(1.0, chain.step_size)
    if chain.activation is None:
        return combine(terms, coefs), None, points, statistics
    codes = activation_codes(chain.activation)
    if chain.recovers:
        return operators(terms[0]).combine(terms, coefs, *codes), None, points, statistics
    sum_ = combine(terms, coefs)
    return operators(sum_).combine([sum_], coefficients(1.0), *codes), sum_, points, statistics


def backward(
    sweeps: ForwardSweeps,
    chain: Chain,
    inputs: list[list[Tensor]],
    statistics: Sequence[Tensor],
    sum_: Tensor | None,
    tensors: MaybeTensors,
    bar: Tensor,
    wanted: Sequence[bool],
) -> list[MaybeTensor]:
    """The cotangents of x and of the tensors, where they are wanted."""
    parts, owed, met = chain.split(tensors), chain.split(wanted[1:]), chain.split(statistics, 1)
    grads = [Gradients(part, wants) if any(wants) else None for part, wants in zip(parts, owed, strict=True)]

    def through(place: int, cot: Tensor, addends: list[Tensor], scale: float, need: bool) -> Tensor | None:
        plan = chain.plans[place]
        if not plan.units:
            return combine([cot, *addends], coefficients(scale, *[1.0 for _ in addends])) if addends else cot
        if grads[place] is None and not need:
            return None
        records = [Record(h, stats, None) for h, stats in zip(inputs[place], met[place], strict=True)]
        read = converted(plan, parts[place], inputs[place][0].dtype)
        coefs = coefficients(scale, *[1.0 for _ in addends])
        return sweeps.pull(plan, read, records, cot, addends, coefs, grads[place], scale, need)

    if sum_ is not None:
        # (2): the sum's cotangent
        none = torch.empty(0, dtype=torch.float64 if sum_.dtype == torch.float64 else torch.float32, device=sum_.device)
        bar, _, _ = operators(sum_).norm_act_vjp(
            sum_, bar, none, None, None, [], coefficients(1.0), False, *NO_NORM, *activation_codes(chain.activation)
        )
    found: MaybeTensor = bar
    if chain.branch is not None:
        need_z = wanted[0] or grads[0] is not None
        skip = through(2, bar, [], 1.0, need_z)
        found = through(1, bar, [] if skip is None or not need_z else [skip], chain.step_size, need_z)
    x_bar = None if found is None else through(0, found, [], 1.0, wanted[0])
    rows = [[None] * len(part) if sums is None else sums.result() for part, sums in zip(parts, grads, strict=True)]
    return [x_bar, *[bar for row in rows for bar in row]]
