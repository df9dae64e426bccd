"""IE-Skip and the explicit schemes on the resident engine: one operator forwards, one backwards.

The signatures are those of the staged engine's functions, whose mathematics this engine shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..implicit_euler.autograd import Descent
from ..rerun import Rerun
from ..runge_kutta.autograd import Scheme
from ..sweeps import Plan, like_reference
from .call import align_gradients, decode_statistics, encode


def keeps(ctx) -> bool:
    """Whether forward leaves its evaluations to backward: there will be one, and no tracer asks for their shapes."""
    return any(ctx.needs_input_grad) and not torch.compiler.is_compiling()


def keeps_beside(ctx) -> bool:
    """The same for what is not among the saved tensors: where hooks save those, as torch.utils.checkpoint does to hold
    less, it would stay here.
    """
    return keeps(ctx) and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def frozen(ctx) -> bool:
    """Whether backward will be asked for no gradient but that of the input, which is argument 0."""
    return not any(ctx.needs_input_grad[1:])


def take_kept(ctx) -> list[Tensor]:
    """What forward has left, for good: backward writes over it, and a second backward computes it again."""
    kept, ctx.kept = ctx.kept, []
    return kept


class ResidentIESkipFunction(torch.autograd.Function):
    """y_K and the statistics of each evaluation of each batch norm; keeps x and what README.md says."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan, descent: Descent, rerun: Rerun | None, *tensors: Tensor | None):
        rule = (descent.steps, descent.step_size, descent.theta)
        keep = keeps_beside(ctx) and not descent.detach
        y, flat, kept = torch.ops.fastode.resident_ie_forward(x, *encode(plan, tensors), *rule, keep, frozen(ctx))
        statistics = decode_statistics(plan, tensors, flat, x.shape[1], descent.steps + 1)
        ctx.save_for_backward(x, *tensors)
        ctx.plan, ctx.descent, ctx.rerun, ctx.kept = plan, descent, rerun, kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (like_reference(y, x), *statistics)

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *_):
        x, *tensors = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if y_bar is None:
            return (None,) * (4 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(y_bar):
            x_bar, *bars = ctx.rerun.gradients([x, *tensors], tensors, wanted, 1, [y_bar])
            return (x_bar, None, None, None, *bars)
        descent = ctx.descent
        rule = (descent.steps, descent.step_size, descent.theta, descent.detach)
        x_bar, bars = torch.ops.fastode.resident_ie_backward(
            x, y_bar, take_kept(ctx), *encode(ctx.plan, tensors), *rule, any(wanted[1:])
        )
        bars = align_gradients(tensors, bars, wanted[1:]) if any(wanted[1:]) else [None] * len(tensors)
        return (x_bar if wanted[0] else None, None, None, None, *bars)


class ResidentShuOsherFunction(torch.autograd.Function):
    """u_s and the statistics of each evaluation of each batch norm; keeps x and what README.md says.

    `table` [2, s, s] holds alpha and beta, float64.
    """

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, plan: Plan, scheme: Scheme, rerun: Rerun | None, *tensors):
        y, flat, kept = torch.ops.fastode.resident_rk_forward(
            x, *encode(plan, tensors), table.contiguous(), keeps_beside(ctx), frozen(ctx)
        )
        statistics = decode_statistics(plan, tensors, flat, x.shape[1], scheme.stages)
        ctx.save_for_backward(x, table, *tensors)
        ctx.plan, ctx.rerun, ctx.kept = plan, rerun, kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (like_reference(y, x), *statistics)

    @staticmethod
    def backward(ctx, y_bar: Tensor | None, *_):
        x, table, *tensors = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        if y_bar is None:
            return (None,) * (5 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(y_bar):
            given = [x, *([table] if wanted[1] else []), *tensors]
            asked = wanted if wanted[1] else (wanted[0], *wanted[2:])
            found = ctx.rerun.gradients(given, tensors, asked, 2 if wanted[1] else 1, [y_bar])
            table_bar = found.pop(1) if wanted[1] else None
            return (found[0], table_bar, None, None, None, *found[1:])
        x_bar, bars, table_bar = torch.ops.fastode.resident_rk_backward(
            x, y_bar, take_kept(ctx), *encode(ctx.plan, tensors), table.contiguous(), any(wanted[2:]), wanted[1]
        )
        bars = align_gradients(tensors, bars, wanted[2:]) if any(wanted[2:]) else [None] * len(tensors)
        table_bar = table_bar.view(table.shape).to(table.dtype) if wanted[1] else None
        return (x_bar if wanted[0] else None, table_bar, None, None, None, *bars)
