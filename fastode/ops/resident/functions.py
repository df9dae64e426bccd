"""IE-Skip and the explicit schemes on the resident engine: one operator forwards, one backwards.

The mathematics is that of ops/schemes, in C++.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...native import nodes
from ...native.constants import KEEP_NOTHING, KEEP_PIECES, KEEP_TICKET
from ...tracing import are_leaves, is_exporting
from ..function import NodeFunction, gradients
from ..maps import like_reference
from ..plan import MaybeTensor, MaybeTensors, Plan
from ..rerun import Rerun
from ..schemes.implicit_euler.descent import Descent
from ..schemes.runge_kutta.stages import Scheme
from .call import beside, encode, encode_again, met_by, tracks

LESS_MEMORY = "FASTODE_LESS_MEMORY"
_PROGRAM = "resident node"  # in a plan's memo


def keeps(ctx: Any, x: Tensor) -> int:
    """What forward keeps of what it evaluated for a call on x (csrc/constants.h): nothing where no backward will come.

    A tracer needs fixed shapes: a ticket stands for what is kept (csrc/cpu/resident/ticket.h).
    """
    if True not in ctx.needs_input_grad:
        return KEEP_NOTHING
    if not torch.compiler.is_compiling():
        return KEEP_PIECES
    return KEEP_TICKET if x.device.type == "cpu" and not is_exporting() else KEEP_NOTHING


def keeps_beside(ctx: Any, x: Tensor) -> int:
    """`keeps`, for maps that are no saved tensors: not where hooks save tensors, or checkpoints could not free them."""
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return keeps(ctx, x)
    return KEEP_NOTHING


def keeps_all(ctx: Any, tensors: MaybeTensors) -> bool:
    """Whether forward keeps all that spares its backward a convolution.

    Where less memory is asked for it does so with frozen parameters alone: to compute it again would be most of what
    the input's gradient takes.
    """
    less = os.environ.get(LESS_MEMORY, "0") not in ("", "0")
    return not less or True not in ctx.needs_input_grad[-len(tensors) :]


def save(ctx: Any, tensors: MaybeTensors, kept: list[Tensor], results: Sequence[Tensor] = ()) -> None:
    """Save what forward was called with, results of its own, and what it has kept: a ticket is a saved tensor, too."""
    saved, traced = (*tensors, *results), torch.compiler.is_compiling()
    ctx.count, ctx.kept_from = len(tensors), len(saved)
    ctx.save_for_backward(*saved, *(kept if traced else ()))
    ctx.kept = [] if traced else kept


def with_leaves(kept: Sequence[Tensor], tensors: MaybeTensors, wanted: Sequence[bool]) -> list[Tensor]:
    """What a backward is given of what forward kept: of a traced one, behind the ticket also what it is traced for.

    A graph is traced for all gradients that may be asked for; by these tensors an operator asks which ones will be.

    Args:
        kept: the tensors that forward kept.
        tensors: the block's parameters.
        wanted: which of them a gradient is wanted of.
    """
    if not kept or not torch.compiler.is_compiling():
        return list(kept)
    leaves = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
    return [*kept, *leaves] if are_leaves(leaves) else list(kept)


def take_kept(ctx: Any, wanted: Sequence[bool]) -> list[Tensor]:
    """Hand over what forward kept, once: backward overwrites it, and a second backward computes everything again.

    Args:
        ctx: the Function's context.
        wanted: which gradients are asked for, of the tensors that forward was called with.
    """
    if torch.compiler.is_compiling():
        return with_leaves(ctx.saved_tensors[ctx.kept_from :], ctx.saved_tensors[1 : ctx.count], wanted[1:])
    kept: list[Tensor] = ctx.kept
    ctx.kept = []
    return kept


def _arguments(
    cls: type[NodeFunction], constants: tuple[Plan, Any, Rerun | None], given: MaybeTensors, inputs: int
) -> tuple[Any, ...]:
    """What every call of csrc/autograd/nodes.cpp around a branch begins with; the first `inputs` are no parameters."""
    plan = constants[0]
    program = plan.memo.get(_PROGRAM)
    if program is None:
        program = plan.memo[_PROGRAM] = nodes.module.program(*encode(plan, given[inputs:])[1:])
    return program, (cls, *constants), given


def _of_node(found: Any, plan: Plan, rule: Descent | Scheme) -> Any:
    """The results of a Function from what such a call returned."""
    if type(found) is not tuple:
        return found if found is NotImplemented else (found,)
    return (found[0], *met_by([plan], plan.memo, found[1], used(rule)))


def packed(ctx: Any, y: Tensor, flat: Tensor, plans: Sequence[Plan]) -> tuple[Tensor, ...]:
    """What a forward returns: with y what its norms have met, where their running statistics are to be moved.

    In one tensor, because each that a Function returns costs a tracer a look at all that it was given.
    """
    if not tracks(plans):
        return (y,)
    ctx.mark_non_differentiable(flat)
    return y, flat


def used(rule: Descent | Scheme) -> list[bool]:
    """Of each evaluation that the operator makes, whether the block makes it: a scheme where a coefficient asks."""
    if isinstance(rule, Descent):
        return [True] * (rule.steps + 1)
    return [rule.uses(k) for k in range(rule.stages)]


class ResidentIESkipFunction(NodeFunction):
    """y_K and the statistics of each evaluation of each batch norm; keeps x and what README.md says."""

    constants = ("plan", "descent", "rerun")

    @classmethod
    def through_node(cls, plan: Plan, descent: Descent, rerun: Rerun | None, given: MaybeTensors) -> Any:
        rule = (descent.steps, descent.step_size, descent.theta, descent.detach)
        found = nodes.module.descent(*_arguments(cls, (plan, descent, rerun), given, 1), *rule)
        return _of_node(found, plan, descent)

    @staticmethod
    def forward(ctx: Any, plan: Plan, descent: Descent, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor) -> Any:
        rule = (descent.steps, descent.step_size, descent.theta)
        keep, everything = KEEP_NOTHING if descent.detach else keeps_beside(ctx, x), keeps_all(ctx, tensors)
        present, *code = encode(plan, tensors)
        y, flat, kept = torch.ops.fastode.resident_ie_forward.default(x, present, *code, *rule, keep, everything)
        save(ctx, (x, *tensors), kept)
        ctx.plan, ctx.descent, ctx.rerun, ctx.kept_all, ctx.code = plan, descent, rerun, everything, code
        ctx.set_materialize_grads(False)
        return packed(ctx, like_reference(y, x), flat, [plan])

    @staticmethod
    def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        given, descent = ctx.saved_tensors[: ctx.count], ctx.descent
        rule = (descent.steps, descent.step_size, descent.theta, descent.detach)

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, *tensors = given
            code = encode_again(ctx, tensors, lambda: encode(ctx.plan, tensors))
            x_bar, found = torch.ops.fastode.resident_ie_backward.default(
                x, bars[0], take_kept(ctx, wanted), *code, *rule, any(wanted[1:]), ctx.kept_all
            )
            return [x_bar, *beside(tensors, found)]

        return gradients(ctx, given, [y_bar], pull)


class ResidentShuOsherFunction(NodeFunction):
    """u_s and the statistics of each evaluation of each batch norm; keeps x and what README.md says.

    `table` [2, s, s] holds alpha and beta, float64.
    """

    constants = ("plan", "scheme", "rerun")

    @classmethod
    def through_node(cls, plan: Plan, scheme: Scheme, rerun: Rerun | None, given: MaybeTensors) -> Any:
        found = nodes.module.scheme(*_arguments(cls, (plan, scheme, rerun), given, 2))
        return _of_node(found, plan, scheme)

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, scheme: Scheme, rerun: Rerun | None, x: Tensor, table: Tensor, *tensors: MaybeTensor
    ) -> Any:
        everything = keeps_all(ctx, (table, *tensors))
        present, *code = encode(plan, tensors)
        y, flat, kept = torch.ops.fastode.resident_rk_forward.default(
            x, present, *code, table.contiguous(), keeps_beside(ctx, x), everything
        )
        save(ctx, (x, table, *tensors), kept)
        ctx.plan, ctx.rerun, ctx.kept_all, ctx.code = plan, rerun, everything, code
        ctx.set_materialize_grads(False)
        return packed(ctx, like_reference(y, x), flat, [plan])

    @staticmethod
    def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        given = ctx.saved_tensors[: ctx.count]

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, table, *tensors = given
            code = encode_again(ctx, tensors, lambda: encode(ctx.plan, tensors))
            x_bar, found, table_bar = torch.ops.fastode.resident_rk_backward.default(
                x, bars[0], take_kept(ctx, wanted), *code, table.contiguous(), any(wanted[2:]), wanted[1], ctx.kept_all
            )
            table_bar = table_bar.view(table.shape).to(table.dtype) if wanted[1] else None
            return [x_bar, table_bar, *beside(tensors, found)]

        return gradients(ctx, given, [y_bar], pull)
