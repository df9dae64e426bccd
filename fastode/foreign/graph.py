"""What a block's forward computes, as a graph of torch.fx, and what else it does."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ..branch.snapshot import KEY, Snapshot
from ..dispatch.registry import reference_of

ROOT = "block"  # the block's name in its graph
_INTERNAL = {*nn.Module().__dict__, KEY}


class Unreadable(Exception):
    """Why a forward cannot be read, in a sentence that begins with "its forward"."""


class Draws(Unreadable):
    """It draws random numbers in the present mode, and may be readable in the other one."""


# What makes numbers for Python of a tensor's.
_NUMBERS = {torch.equal, torch.allclose, torch.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.is_nonzero}
_NUMBERS |= {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.data_ptr, Tensor.__array__, Tensor.__contains__}
_NUMBERS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__}


class NoNumbers(TorchFunctionMode):
    """Refuses to make numbers for Python of a tensor's: when these change, what was made of them would not be asked."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _NUMBERS and any(isinstance(each, Tensor) for each in args):
            raise Unreadable(f"{self._who} asks for the numbers in a tensor, of which changes are not seen.")
        return function(*args, **(kwargs or {}))


class _Caller(nn.Module):
    """A call of a block with one argument; the others have their defaults."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any) -> Any:
        return self.block(x)


class _Tracer(fx.Tracer):
    def __init__(self, block: nn.Module, inside: bool) -> None:
        super().__init__()
        self._block, self._inside = block, inside

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self._block:
            return False
        return not self._inside or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As the base has it, but for a module that the forward makes: without tensors it is what its forward calls."""
        if m in (self.submodule_paths or ()):
            return super().call_module(m, forward, args, kwargs)
        if next(m.parameters(), None) is not None or next(m.buffers(), None) is not None:
            raise Unreadable(f"its forward makes a {type(m).__name__} of its own at each call.")
        return forward(*args, **kwargs)


def copy_of(block: nn.Module, stand_in: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A block as it was before it was fused, without hooks, around `stand_in` of its tensors; buffers are copies."""
    made = Snapshot(block, hooks_of_root=False).past.restored(stand_in)
    for module in made.modules():
        module.__class__ = reference_of(type(module)) or type(module)
        for name, value in _variables(module).items():
            if isinstance(value, list | dict | set):
                module.__dict__[name] = value.copy()
    return made


def graph_of(block: nn.Module, inside: bool = True) -> fx.Graph:
    """What the forward of a block computes from its first argument.

    Args:
        block: in the mode that is meant; it is left as it is.
        inside: whether modules that are not PyTorch's own are followed, too; else each module is one node.

    Raises:
        Unreadable: it cannot be followed, or does more than to compute what it returns.
    """
    if any(map(is_lazy, (*block.parameters(), *block.buffers()))):
        raise Unreadable("it has parameters that are made at its first call: call it before it is fused.")
    try:
        shell = copy_of(block)
        watch = Watch(shell)
    except Exception as error:
        raise Unreadable(f"it cannot be copied: {first_line(error)}") from error
    try:
        with NoNumbers("its forward"):
            graph = _Tracer(shell, inside).trace(_Caller(shell))
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"its forward cannot be followed by torch.fx: {first_line(error)}") from error
    finally:
        done = watch.changes()
    if done:
        raise Unreadable(done)
    return graph


class Watch:
    """A block, and all random numbers, before a call: to see what the call changes beside what it returns."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [(name, module, _held(module)) for name, module in block.named_modules()]
        self._buffers = [
            (name, buffer, buffer.clone(), 0 if buffer.is_inference() else buffer._version)
            for name, buffer in block.named_buffers()
        ]
        self._random = _random_states()

    def changes(self, buffers: bool = True) -> str:
        """What was changed, in a sentence; empty if nothing was. Random states are put back.

        Args:
            buffers: whether changed buffers count.
        """
        if _drawn(_random_states(), self._random):
            _put_back(self._random)
            return "its forward draws random numbers."
        for path, module, then in self._modules:
            now = _held(module)
            for name in {**then, **now}:
                if name not in now or name not in then or not _equal(now[name], then[name]):
                    return f"its forward changes {f'{path}.' if path else ''}{name}, which its next call may see."
        for name, buffer, value, version in self._buffers if buffers else ():
            if buffer._version != version if buffer.is_meta else not torch.equal(buffer, value):
                return f"its forward changes the buffer {name} itself."
        return ""


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks differ in the values of their tensors alone."""
    return _equal(_described(one), _described(other))


def _described(block: nn.Module) -> tuple[Any, ...]:
    places: dict[int, int] = {}  # of each tensor, where it came first: what is shared in one is shared in the other
    rows = []
    for name, module in block.named_modules():
        tensors = [
            (key, tensor.shape, tensor.dtype, type(tensor), places.setdefault(id(tensor), len(places)))
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        kind = reference_of(type(module)) or type(module)
        rows.append((name, kind, tuple(sorted(_variables(module).items())), tuple(tensors)))
    return tuple(rows)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _variables(module: nn.Module) -> dict[str, Any]:
    """A module's variables that are not nn.Module's own."""
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module holds, its contents by their names."""
    held = {
        name: value.copy() if isinstance(value, list | dict | set) else value
        for name, value in _variables(module).items()
    }
    return {**held, **module._parameters, **module._buffers, **module._modules, "training": module.training}


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()[1:]


def _drawn(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    of_torch, of_python, of_numpy = zip(now, then, strict=True)
    if not torch.equal(*of_torch) or of_python[0] != of_python[1]:
        return True
    return of_numpy[0] is not None and not _equal(*of_numpy)


def _put_back(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(("MT19937", *states[2]))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(_equal, a, b))
        return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
    except Exception:
        return False
