"""Which engine runs a block, and why: the one place where that is decided, from facts that can be printed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _build

# In the order of preference; "reference" is always able.
_ORDER = ("resident", "staged", "reference")
ENGINES = ("auto", *_ORDER)

_STORAGE = (torch.float32, torch.float64, torch.bfloat16)
_recorders: list[dict[nn.Module, str]] = []


def can_use(engine: str, block: nn.Module, x: Tensor | None = None) -> tuple[bool, str]:
    """Whether an engine can run a fused block on x, and if not why; without x, whether it could on some input."""
    if engine == "reference":
        return True, ""
    reason = block.why_not(engine, x)
    return not reason, reason


def choose(engine: str, why_not: Callable[[str], str]) -> str:
    """The engine to use: the first that can, or the one that was named.

    Raises:
        ValueError: the named engine cannot run the block.
    """
    if engine != "auto":
        reason = "" if engine == "reference" else why_not(engine)
        if reason:
            raise ValueError(f"engine must be one that can run this block, got {engine!r}: {reason}")
        return engine
    for name in _ORDER:
        if name == "reference" or not why_not(name):
            return name
    raise AssertionError("the reference can run every block")


def no_operators() -> str:
    """Why the C++ operators cannot be called, after building them if that has not been tried."""
    return "" if _build.loaded() else (_build.load() or "")


def cannot_take(inputs: Sequence[Tensor], tensors: Iterable[Tensor | None]) -> str:
    """Why the staged engine cannot take these inputs and parameters; empty if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    for x in inputs:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if x.device.type != "cpu":
            return f"the input is on {x.device.type}, and there are kernels for the CPU only"
        if x.dtype not in _STORAGE:
            return f"there are no CPU kernels for {x.dtype}"
        if x.numel() == 0:
            return "the input is empty"
    lower = autocast_dtype(inputs[0])
    if lower is not None and lower not in _STORAGE:
        return f"there are no CPU kernels for autocast to {lower}"
    dtype = inputs[0].dtype
    if any(tensor.dtype not in (dtype, torch.float32) for tensor in present):
        return "its parameters are neither float32 nor of the input's dtype"
    if _is_transformed([*inputs, *present]):
        return "a torch.func transform or forward-mode differentiation is at work"
    return ""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast lowers convolutions here, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_transformed(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@contextmanager
def recording() -> Iterator[dict[nn.Module, str]]:
    """Collect, while in this context, which engine each fused block used last."""
    used: dict[nn.Module, str] = {}
    _recorders.append(used)
    try:
        yield used
    finally:
        _recorders.remove(used)


def note(block: nn.Module | None, engine: str) -> None:
    """Tell the recorders which engine a block has used."""
    if block is not None:
        for used in _recorders:
            used[block] = engine


def describe() -> list[tuple[str, bool, str]]:
    """Each engine, whether this machine can run it, and why (not); nothing is compiled to find out."""
    able, reason = _build.available()
    cpu = f"the CPU ({platform.machine()}): " + (reason or "its operators are ready")
    return [("resident", able, cpu), ("staged", able, cpu), ("reference", True, "plain PyTorch, on any device")]
