"""What the autograd Functions of all engines share: which gradients a backward owes, and the ways it may be asked.

Every Function takes its constants first, the `Rerun` last among them, and then only tensors, the block's inputs before
its parameters: apply(*constants, rerun, *inputs, *tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import MaybeTensor, MaybeTensors

# (cotangents, wanted) -> a gradient for each of the tensors given
Pull = Callable[[Sequence[MaybeTensor], Sequence[bool]], Sequence[MaybeTensor]]


class NoGraph:
    """Stands for the context of a Function whose forward runs without a graph: it keeps nothing."""

    needs_input_grad: tuple[bool, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def save_for_backward(self, *tensors: MaybeTensor) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


_NO_GRAPH = NoGraph()


def call(function: type[torch.autograd.Function], constants: Sequence[Any], tensors: MaybeTensors) -> Any:
    """function.apply(*constants, *tensors), without the cost of a node where no gradient can be asked for."""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ):
        return function.apply(*constants, *tensors)
    return function.forward(_NO_GRAPH, *constants, *tensors)


def gradients(ctx: Any, given: MaybeTensors, cotangents: Sequence[MaybeTensor], pull: Pull) -> tuple[MaybeTensor, ...]:
    """What a Function's backward returns: None for each constant, then a gradient for each tensor that has one.

    Args:
        ctx: the Function's context, with `rerun`.
        given: the tensors that it was called with, the block's inputs first.
        cotangents: of the block's outputs, None where there is none.
        pull: makes the gradients; it may be called several times.

    Raises:
        RuntimeError: from `pull`, or from the reference where that runs instead.
    """
    constants = len(ctx.needs_input_grad) - len(given)
    if all(bar is None for bar in cotangents):
        return (None,) * (constants + len(given))
    wanted = _owed(ctx, given, constants)
    if ctx.rerun is not None:
        ctx.rerun.habit.input_only = not any(wanted[ctx.rerun.inputs :])
    level = _legacy_level(cotangents)
    if level:
        found = _each(level, cotangents, lambda bars: _gradients(ctx, given, bars, wanted, pull))
    else:
        found = _gradients(ctx, given, cotangents, wanted, pull)
    pairs = zip(found, wanted, strict=True)
    return (*(None,) * constants, *(bar if want else None for bar, want in pairs))


def _gradients(
    ctx: Any,
    given: MaybeTensors,
    cotangents: Sequence[MaybeTensor],
    wanted: Sequence[bool],
    pull: Pull,
) -> Sequence[MaybeTensor]:
    if ctx.rerun is not None and ctx.rerun.needed(cotangents):
        return ctx.rerun.gradients(given, wanted, cotangents)
    return pull(cotangents, wanted)


def _owed(ctx: Any, given: MaybeTensors, constants: int) -> tuple[bool, ...]:
    """For each tensor, whether autograd will use its gradient.

    needs_input_grad is true for every trainable parameter, also where only the gradient of an image was asked for.
    """
    needed: tuple[bool, ...] = ctx.needs_input_grad[constants:]
    if torch.compiler.is_compiling() or not any(needed):
        return needed
    nodes = iter(ctx.next_functions)  # one for each argument that is a tensor
    return tuple(
        tensor is not None and _will_run(next(nodes)[0], need) for tensor, need in zip(given, needed, strict=True)
    )


def _will_run(node: Any, need: bool) -> bool:
    if not need or node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad was asked for
        return True


def _legacy_level(cotangents: Sequence[MaybeTensor]) -> int:
    """The level of the older vmap, which is_grads_batched uses, where a cotangent is many at once; 0 where none is."""
    if torch.compiler.is_compiling():
        return 0
    if not any(bar is not None and torch._C._functorch.is_legacy_batchedtensor(bar) for bar in cotangents):
        return 0
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _each(
    level: int, cotangents: Sequence[MaybeTensor], run: Callable[[list[MaybeTensor]], Sequence[MaybeTensor]]
) -> list[MaybeTensor]:
    """run() for each of the cotangents that the older vmap holds at once; under it some plain sums are wrong."""
    batched = [bar is not None and torch._C._functorch.is_legacy_batchedtensor(bar) for bar in cotangents]
    # The size is only used for tensors that are not batched.
    plain = [
        torch._remove_batch_dim(b, level, 1, 0) if many else b for b, many in zip(cotangents, batched, strict=True)
    ]
    count = next(bar.shape[0] for bar, many in zip(plain, batched, strict=True) if many)
    rows = [run([bar[i] if many else bar for bar, many in zip(plain, batched, strict=True)]) for i in range(count)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in columns]
