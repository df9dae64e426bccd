"""What the autograd Functions of all engines share: which gradients a backward owes, and the ways it may be asked.

Every Function takes its constants first, the `Rerun` last among them, and then only tensors, the block's inputs before
its parameters: apply(*constants, rerun, *inputs, *tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from .plan import MaybeTensor, MaybeTensors
from .rerun import Rerun

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
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*constants, *tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                # What Function.apply ends in, but for its look at every constant.
                plain = [t if t is None else unwrap_if_dead(t) for t in tensors]
                return super(torch.autograd.Function, function).apply(*constants, *plain)  # type: ignore[misc]
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
    needs: tuple[bool, ...] = ctx.needs_input_grad
    constants = len(needs) - len(given)
    bars = [bar for bar in cotangents if bar is not None]
    if not bars:
        return (None,) * len(needs)
    if torch.compiler.is_compiling():
        wanted = needs[constants:]
        found = pull(cotangents, wanted)
    else:
        wanted = _owed(ctx, given, needs[constants:])
        rerun: Rerun = ctx.rerun
        rerun.habit.input_only = not any(wanted[rerun.inputs :])
        if any(map(is_legacy_batchedtensor, bars)):
            found = _each(cotangents, lambda bars: _gradients(rerun, given, bars, wanted, pull))
        else:
            found = _gradients(rerun, given, cotangents, wanted, pull)
    absent: tuple[MaybeTensor, ...] = (None,) * constants
    return absent + tuple([bar if want else None for bar, want in zip(found, wanted, strict=True)])


def _gradients(
    rerun: Rerun, given: MaybeTensors, cotangents: Sequence[MaybeTensor], wanted: Sequence[bool], pull: Pull
) -> Sequence[MaybeTensor]:
    return rerun.gradients(given, wanted, cotangents) if rerun.needed(cotangents) else pull(cotangents, wanted)


def _owed(ctx: Any, given: MaybeTensors, needed: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each tensor, whether autograd will use its gradient.

    needs_input_grad is true for every trainable parameter, also where only the gradient of an image was asked for.
    """
    edges = iter(ctx.next_functions)  # one for each argument that is a tensor
    nodes: list[Any] = [None if tensor is None else next(edges)[0] for tensor in given]
    runs = torch._C._will_engine_execute_node
    try:
        return tuple([need and runs(node) for node, need in zip(nodes, needed, strict=True)])
    except RuntimeError:  # not all are nodes that the engine is asked about
        return tuple([need and _will_run(node) for node, need in zip(nodes, needed, strict=True)])


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad was asked for, or no engine calls this backward
        return True


def _each(
    cotangents: Sequence[MaybeTensor], run: Callable[[list[MaybeTensor]], Sequence[MaybeTensor]]
) -> list[MaybeTensor]:
    """run() for each of the cotangents that the older vmap, of is_grads_batched, holds at once.

    Under it some plain sums are wrong, so that nothing may be left to it.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = [bar is not None and is_legacy_batchedtensor(bar) for bar in cotangents]
    # The size is only used for tensors that are not batched.
    plain = [
        torch._remove_batch_dim(bar, level, 1, 0) if many and bar is not None else bar
        for bar, many in zip(cotangents, batched, strict=True)
    ]
    count = next(bar.shape[0] for bar, many in zip(plain, batched, strict=True) if many and bar is not None)
    rows = [
        run([bar[i] if many and bar is not None else bar for bar, many in zip(plain, batched, strict=True)])
        for i in range(count)
    ]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in columns]
