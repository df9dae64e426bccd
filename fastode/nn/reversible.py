"""The fused twins of RevNet's blocks, whose backward keeps one map for a whole chain and makes the others again.

Of blocks y₁ = x₁ + f(x₂), y₂ = x₂ + g(y₁), from the last to the first, with the cotangents ȳ₁ and ȳ₂:

    x₂ = y₂ − g(y₁),   ȳ₁ += J_g(y₁)ᵀ ȳ₂,   ḡ_w = (∂g/∂w)ᵀ ȳ₂
    x₁ = y₁ − f(x₂),   x̄₂ = ȳ₂ + J_f(x₂)ᵀ ȳ₁,   f̄_w = (∂f/∂w)ᵀ ȳ₁,   x̄₁ = ȳ₁

which takes each branch's forward twice and its backward once. A subtraction gives x back but for rounding.

Source: Gomez et al. 2017, Algorithm 1, which paper 002 cites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from .. import reference
from ..branch.read import has_global_hooks
from ..dispatch import choice
from ..dispatch.registry import register
from ..ops.engine import Call
from ..reference.blocks import evaluate
from ..reference.connections import halves
from ..tracing import is_recorded
from .base import Fused, note

__all__ = ["RevBlock", "RevSequence"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Evaluation:
    """A branch's evaluation that can be made again: of its tensors, with its random numbers, under its autocast."""

    def __init__(self, name: str, branch: nn.Module, places: dict[int, int]) -> None:
        self.name, self.branch = name, branch
        self.modes = [module.training for module in branch.modules()]
        # Tensors of another call may be in the module by then, as torch.func.functional_call puts them there.
        self.places = {key: places[id(p)] for _, key, p in _held(branch, "_parameters")}

    def first(self, x: Tensor) -> Tensor:
        """branch(x)."""
        kind = x.device.type
        self.buffers, self.before = _buffers(self.branch)
        self.autocast = None  # devices without it, as meta, have no dtype of its own to ask for
        if torch.amp.is_autocast_available(kind):
            self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        before = _random_states(x)
        out = evaluate(self.name, self.branch, x)
        drawn = not all(map(torch.equal, before, _random_states(x)))
        self.random = before if drawn else []
        return out

    def again(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The same with these parameters, without a trace: random state and buffers stay as they are."""
        if [module.training for module in self.branch.modules()] != self.modes:
            raise RuntimeError(
                f"{self.name} of a RevBlock must be in the mode of its forward when backward makes its values again, "
                "got another one: call backward before train() or eval()"
            )
        tensors = {key: parameters[place] for key, place in self.places.items()}
        # A second backward needs them as well, so that what an evaluation may write into is a copy.
        copies = {place: buffer.clone() for place, buffer in self.before.items()}
        tensors |= {key: copies[id(buffer)] for key, buffer in self.buffers.items()}
        # Every place has its tensor: a module that comes twice would be left with what it got for its second name.
        call = partial(torch.func.functional_call, self.branch, tensors, tie_weights=False)
        with ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(*self.autocast))
            if self.random:
                devices = [x.device] if x.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self.random[0])
                for device, state in zip(devices, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            return evaluate(self.name, self.branch, x, call=call)


def _buffers(branch: nn.Module) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """A branch's buffers by name, and what each is to be when the branch is evaluated again, by its identity.

    That is a copy, because an evaluation may read what it writes (spectral norm's vectors). The norms of PyTorch never
    do: in training they only write their running statistics, and in eval mode only read them.
    """
    buffers: dict[str, Tensor] = {}
    before: dict[int, Tensor] = {}
    for module, name, buffer in _held(branch, "_buffers"):
        buffers[name] = buffer
        if isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.modules."):
            before.setdefault(id(buffer), buffer)
        else:
            before[id(buffer)] = buffer.clone()
    return buffers, before


def _held(branch: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each module of a branch once, with the name and the tensor of each of its parameters, or buffers."""
    for path, module in branch.named_modules():
        for name, tensor in module.__dict__[kind].items():
            if tensor is not None:
                yield module, f"{path}.{name}" if path else name, tensor


def _random_states(x: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(x.device)] if x.device.type == "cuda" else states


class _Chain(torch.autograd.Function):
    """The output of blocks one after the other; keeps its two halves and the parameters."""

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[reference.RevBlock], x: Tensor, *parameters: Tensor) -> Tensor:
        first, second = halves(x)
        ctx.evaluations = []
        places = {id(p): place for place, p in enumerate(parameters)}
        for block in blocks:
            f, g = _Evaluation("f", block.f, places), _Evaluation("g", block.g, places)
            first = first + f.first(second)
            second = second + g.first(first)
            ctx.evaluations.append((f, g))
        ctx.save_for_backward(first, second, *parameters)
        return torch.cat([first, second], 1)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: a gradient without a graph would be wrong in silence
            raise RuntimeError(
                "gradients of gradients need maps that a reversible chain does not keep: call fastode.unfuse(model)"
            )
        first, second, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        parameters = [_without_hooks(p, want) for p, want in zip(parameters, wanted, strict=True)]
        grads: list[Tensor | None] = [None] * len(parameters)
        first_bar, second_bar = halves(bar)
        for f, g in reversed(ctx.evaluations):
            second, first_bar = _undo(g, first, second, first_bar, second_bar, parameters, wanted, grads)
            first, second_bar = _undo(f, second, first, second_bar, first_bar, parameters, wanted, grads)
        x_bar = torch.cat([first_bar, second_bar], 1) if ctx.needs_input_grad[1] else None
        return (None, x_bar, *grads)


def _without_hooks(parameter: Tensor, wanted: bool) -> Tensor:
    """A parameter to take gradients of, which are parts of its own: its hooks are for the sum, which autograd gives it.

    It is itself where that is the same, so that fused blocks in a branch find the tensors that they know.
    """
    if not parameter._backward_hooks and parameter.requires_grad == wanted and parameter.is_leaf:
        return parameter
    return parameter.detach().requires_grad_(wanted)


def _undo(
    evaluation: _Evaluation,
    at: Tensor,
    total: Tensor,
    at_bar: Tensor,
    total_bar: Tensor,
    parameters: Sequence[Tensor],
    wanted: Sequence[bool],
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Of total = before + branch(at): before, and the cotangent of `at` with what comes through the branch."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        out = evaluation.again(leaf, parameters)
    before = total - out.detach()
    if not out.requires_grad:
        return before, at_bar
    own = sorted({place for place in evaluation.places.values() if wanted[place]})
    inputs = [leaf, *(parameters[place] for place in own)]
    through, *found = torch.autograd.grad(out, inputs, total_bar.to(out.dtype), allow_unused=True)
    for place, grad in zip(own, found, strict=True):
        met = grads[place]
        if grad is not None:
            grads[place] = grad if met is None else met + grad
    return before, at_bar if through is None else at_bar + through


class _Reversible(Fused, nn.Module):
    """A chain of RevBlocks, one of which is a chain of one."""

    def describe_call(self, inputs: tuple[Tensor, ...] = ()) -> Call:
        reason = "its branches run as PyTorch has them; what it saves is memory, as its backward keeps no maps"
        return Call("reversible", "", None, (), inputs, reason)

    def _blocks(self) -> list[reference.RevBlock]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        note(self, choice.choose(self.engine, self.describe_call((x,))))
        parameters = list(self.parameters())
        if self._runs_plainly(x, parameters):
            plain: Tensor = super().forward(x)
            return plain
        found: Tensor = _Chain.apply(self._blocks(), x, *parameters)
        return found

    def _runs_plainly(self, x: Any, parameters: Sequence[Tensor]) -> bool:
        """Whether nothing is kept anyway, or what is traced, transformed or watched by hooks must be all there is."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(x, Tensor):
            return True
        if not any(t.requires_grad for t in (x, *parameters)) or torch._C._are_functorch_transforms_active():
            return True
        if is_recorded() or unpack_dual(x).tangent is not None or has_global_hooks():
            return True
        if parametrize._cache_enabled:  # what is computed without a graph here would be found there in the backward
            return True
        return any(module.__dict__[name] for module in self.modules() if module is not self for name in _HOOKS)


@register(reference.RevBlock)
class RevBlock(_Reversible, reference.RevBlock):
    __doc__ = reference.RevBlock.__doc__

    def _blocks(self) -> list[reference.RevBlock]:
        return [self]


@register(reference.RevSequence)
class RevSequence(_Reversible, reference.RevSequence):
    __doc__ = reference.RevSequence.__doc__

    def _blocks(self) -> list[reference.RevBlock]:
        return [block for block in self if isinstance(block, reference.RevBlock)]
