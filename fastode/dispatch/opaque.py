"""A block whose work depends on the data as one operator, which a tracing compiler does not look into.

What is traced are the block's tensors and a key. The key stands for a copy of the block on the meta device, of which
everything but the tensors was read while it was traced, and so is guarded by the compiler. The operator calls that copy
with the tensors. What a solve keeps depends on how many steps it takes, and no compiler has room for that: on the CPU
the operator returns a ticket, which stands for the call's own graph, and its backward goes through that. Where there is
no ticket, or a second backward comes, it calls the copy again. An operator with a gradient may not write into what it
is given, so that buffers which the block moves come back as new ones, and are copied into the block's own in what is
traced.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..native import nodes
from ..ops.engine import autocast_dtype
from ..steps import unrecorded
from ..tracing import are_leaves
from . import known

_NAME = "fastode_blocks::solution"
_copies: list[nn.Module] = []
_locks: list[threading.Lock] = []  # of each copy, which has the tensors of one call at a time
# The graphs of calls by the numbers of their tickets: the leaves, and the result.
_graphs: dict[int, tuple[list[Tensor], Tensor]] = {}
_numbers = itertools.count()


class _Ticket(bytearray):
    """The memory of a tensor that stands for a graph: its number, which has a graph until this memory is freed."""

    def __del__(self) -> None:
        _graphs.pop(int.from_bytes(self, sys.byteorder), None)


def _ticket_for(leaves: list[Tensor], y: Tensor) -> Tensor:
    number = next(_numbers)
    _graphs[number] = leaves, y
    return torch.frombuffer(_Ticket(number.to_bytes(8, sys.byteorder)), dtype=torch.int64)


def key_of(block: nn.Module) -> int:
    """The key of a copy of the block without its tensors' values; for each trace one."""
    with torch.no_grad():
        twin = copy.deepcopy(block).to("meta")
    known.clear(twin)
    _locks.append(threading.Lock())
    _copies.append(twin)
    return len(_copies) - 1


Numbers = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


def numbers_of(block: nn.Module) -> Numbers:
    """The floats among the attributes of a block's modules: of each that has some its path, their names and values.

    A norm's momentum is among them also where it is None or an integer: nothing else reads it while it is traced.
    """
    found = []
    for path, module in block.named_modules():
        numbers = tuple([each for each in vars(module).items() if type(each[1]) is float or each[0] == "momentum"])
        if numbers:
            found.append((path, numbers))
    return tuple(found)


def run(block: nn.Module, key: int, x: Tensor, shape: Sequence[int], moves: bool) -> Tensor:
    """The block on x as the operator, while it is traced.

    Args:
        block: the block.
        key: of its copy.
        x: its input.
        shape: of its output.
        moves: whether it changes its buffers.
    """
    buffers = list(block.buffers())
    # Of those that move copies, because a backward reads them after the block's own have moved.
    tensors = [*block.parameters(), *([buffer.clone() for buffer in buffers] if moves else buffers)]
    buffers = buffers if moves else []
    # Without a gradient, and on a card, where it was not measured, there is no ticket.
    keep = torch.is_grad_enabled() and x.device.type == "cpu"
    wanted = [keep and tensor.requires_grad for tensor in (x, *tensors)]
    leaves = are_leaves([tensor for tensor in tensors if tensor.requires_grad])
    y, *moved = _solution(x, tensors, key, shape, autocast_dtype(x), len(buffers), leaves, wanted)
    with torch.no_grad():
        for buffer, new in zip(buffers, moved[: len(buffers)], strict=True):
            buffer.copy_(new.detach())
    return y


@torch.library.custom_op(_NAME, mutates_args=())
def _solution(
    x: Tensor,
    tensors: list[Tensor],
    key: int,
    shape: Sequence[int],
    lower: torch.dtype | None,
    moving: int,
    leaves: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The solution, the last `moving` of the tensors as they are after it, and a ticket if any gradient is wanted.

    `leaves` says that the tensors with a gradient are parameters, so that autograd's engine knows which ones it uses.
    """
    fixed = len(tensors) - moving
    if not any(wanted):
        given = _with_own(tensors, moving)
        with torch.no_grad():
            return [_call([x, *given], key, lower), *given[fixed:]]
    # The graph has copies, because a compiler writes other maps into memory that its own graph has done with.
    with _autograd():
        own = _leaves([tensor.clone() for tensor in (x, *tensors)], wanted)
        y = _call(own, key, lower)
    return [y.detach().clone(), *[leaf.detach().clone() for leaf in own[1 + fixed :]], _ticket_for(own, y)]


@_solution.register_fake
def _(x: Tensor, tensors: list[Tensor], key: int, shape: Sequence[int], *others: Any) -> list[Tensor]:
    moving, _, wanted = others[-3:]
    ticket = [torch.empty(1, dtype=torch.int64, device="cpu")] if any(wanted) else []
    return [x.new_empty(shape), *(t.new_empty(t.shape) for t in tensors[len(tensors) - moving :]), *ticket]


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=())
def _backward(
    x: Tensor,
    tensors: list[Tensor],
    bar: Tensor,
    tickets: list[Tensor],
    wanted: list[bool],
    key: int,
    lower: torch.dtype | None,
    moving: int,
    leaves: bool,
) -> list[Tensor]:
    # Hooks on saved tensors may have made another number of it.
    whole = bool(tickets) and tickets[0].dtype == torch.int64
    graph = _graphs.pop(int(tickets[0]), None) if whole else None
    # The graph was traced for all of `wanted`, where an attack asks for the image's gradient alone.
    used = list(wanted)
    if leaves and nodes.go_unused([tensor for tensor, want in zip(tensors, wanted[1:], strict=True) if want]):
        used[1:] = [False] * len(tensors)
    with _autograd():
        if graph is None:
            own = _leaves([x, *_with_own(tensors, moving)], wanted)
            with unrecorded():
                y = _call(own, key, lower)
        else:
            own, y = graph
        asked = [tensor for tensor, use in zip(own, used, strict=True) if use]
        found = iter(torch.autograd.grad(y, asked, bar, allow_unused=True) if asked else ())
    bars = [next(found) if use else None for use in used]
    each = zip(bars, own, wanted, strict=True)
    return [tensor.new_zeros(tensor.shape) if g is None else g.contiguous() for g, tensor, want in each if want]


@_backward.register_fake
def _(
    x: Tensor, tensors: list[Tensor], bar: Tensor, tickets: list[Tensor], wanted: list[bool], *_: Any
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip((x, *tensors), wanted, strict=True) if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, ctx.key, _, ctx.lower, ctx.moving, ctx.leaves, _ = inputs
    ctx.count = 1 + len(tensors)
    ctx.save_for_backward(x, *tensors, *output[1 + ctx.moving :])
    ctx.wanted = [t.requires_grad for t in (x, *tensors)]


def _pull(ctx: Any, given: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    x, *tensors = saved[: ctx.count]
    tickets = list(saved[ctx.count :])
    found = iter(_backward(x, tensors, given[0], tickets, ctx.wanted, ctx.key, ctx.lower, ctx.moving, ctx.leaves))
    bars = [next(found) if want else None for want in ctx.wanted]
    return bars[0], bars[1:], None, None, None, None, None, None


_solution.register_autograd(_pull, setup_context=_setup)


def _with_own(tensors: list[Tensor], moving: int) -> list[Tensor]:
    """The tensors, the last of them as copies that may be written over."""
    fixed = len(tensors) - moving
    return [*tensors[:fixed], *(t.clone() for t in tensors[fixed:])]


def _leaves(tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    """The tensors, out of any graph, and at the beginning of one where a gradient is wanted."""
    return [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]


def _call(given: list[Tensor], key: int, lower: torch.dtype | None) -> Tensor:
    x, *tensors = given
    twin = _copies[key]
    names = [name for name, _ in twin.named_parameters()] + [name for name, _ in twin.named_buffers()]
    autocast = torch.autocast(x.device.type, lower) if lower is not None else contextlib.nullcontext()
    with _locks[key]:
        try:
            with autocast:
                y: Tensor = torch.func.functional_call(twin, dict(zip(names, tensors, strict=True)), (x,))
        finally:
            known.clear(twin)  # what was kept of it holds the tensors
    return y.contiguous()


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Gradients as outside of an operator, where autograd is shut out."""
    keys = torch._C.DispatchKey
    shut = torch._C._SetExcludeDispatchKeyGuard
    with shut(keys.AutogradFunctionality, False), shut(keys.ADInplaceOrView, False), torch.enable_grad():
        yield
