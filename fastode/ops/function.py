"""What the autograd Functions of all engines share: which gradients a backward owes, and the ways it may be asked.

Every Function takes its constants first, the `Rerun` last among them, and then only tensors, the block's inputs before
its parameters: apply(*constants, rerun, *inputs, *tensors). One that is a `NodeFunction` has a node in C++ as well,
which plain calls use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from ..native import nodes
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


class HandedOver:
    """Stands for the context of a Function in a backward that its node in C++ hands over: nothing is kept in it.

    Attributes:
        owed: for each of the tensors, whether autograd will use its gradient.
    """

    kept: Sequence[Tensor] = ()
    slopes: Sequence[Tensor] = ()
    signs = 0
    code: Any = None  # what a forward leaves to its backward of constants as its operator takes them

    def __init__(
        self, constants: Sequence[Any], given: tuple[MaybeTensor, ...], owed: tuple[bool, ...], kept_all: bool
    ) -> None:
        self.saved_tensors, self.owed, self.kept_all = given, owed, kept_all
        self.count = len(given)
        self.needs_input_grad = (False,) * len(constants) + owed


class NodeFunction(torch.autograd.Function):
    """A Function that has a node in C++ (csrc/autograd), for calls that no transform or hook looks into.

    Attributes:
        constants: the names that the constants have in the context.
    """

    constants: tuple[str, ...]

    @classmethod
    def through_node(cls, *arguments: Any) -> Any:
        """forward(*arguments), a node in C++ behind it if gradients can be asked for; NotImplemented if it cannot."""
        raise NotImplementedError

    @classmethod
    def backward_of_node(
        cls,
        constants: tuple[Any, ...],
        given: tuple[MaybeTensor, ...],
        owed: tuple[bool, ...],
        kept_all: bool,
        cotangents: tuple[MaybeTensor, ...],
    ) -> tuple[MaybeTensor, ...]:
        """The gradients for `given` where the node leaves them to Python, as in a backward that is differentiated."""
        context = HandedOver(cls.constants, given, owed, kept_all)
        vars(context).update(zip(cls.constants, constants[1:], strict=True))
        return cls.backward(context, *cotangents)[len(cls.constants) :]


def call(function: type[torch.autograd.Function], constants: Sequence[Any], tensors: MaybeTensors) -> Any:
    """function.apply(*constants, *tensors), without the cost of a node where no gradient can be asked for."""
    traced = torch.compiler.is_compiling()
    if traced or torch._C._are_functorch_transforms_active():
        # A tracer's context says what needs a gradient without a look at the mode.
        if traced and not torch.is_grad_enabled():
            return function.forward(_NO_GRAPH, *constants, *tensors)
        return function.apply(*constants, *tensors)
    if issubclass(function, NodeFunction) and nodes.usable():
        found = function.through_node(*constants, tensors)
        if found is not NotImplemented:
            return found
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                # What Function.apply ends in, but for its look at every constant.
                plain = [t if t is None else unwrap_if_dead(t) for t in tensors]
                return super(torch.autograd.Function, function).apply(*constants, *plain)  # type: ignore[misc]
    return function.forward(_NO_GRAPH, *constants, *tensors)


def savable(x: Tensor) -> Tensor:
    """x, or a copy where it was made in inference mode: autograd saves no such tensor, and the reference none of x."""
    if torch.compiler.is_compiling() or not x.is_inference() or not torch.is_grad_enabled():
        return x
    return x.clone()


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
        wanted = ctx.owed if isinstance(ctx, HandedOver) else _owed(ctx, given, needs[constants:])
        rerun: Rerun = ctx.rerun
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
