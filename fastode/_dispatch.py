"""Which engine runs a block, and why: the one place where that is decided, from facts that can be printed.

An engine *cannot* run a block (`why_not`) or, asked for "auto", *had better not* (`against`): on the CPU by a measured
rule (`_rule`), on CUDA by what trials on the card have shown (`_trial`). A named engine is refused only if it cannot.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _build, _cuda, _trial

# In the order of preference; "reference" is always able.
_ORDER = ("resident", "fused_convolution", "staged", "reference")
ENGINES = ("auto", *_ORDER)

_CPU_STORAGE = (torch.float32, torch.float64, torch.bfloat16)
_STORAGE = {"cpu": _CPU_STORAGE, "cuda": (*_CPU_STORAGE, torch.float16)}
_NAMES = {"cpu": "CPU", "cuda": "CUDA"}
# The engines that are for one type of device.
_HOME = {"resident": "cpu", "fused_convolution": "cuda"}
_recorders: list[dict[nn.Module, str]] = []

# Of an engine, why not; empty where there is nothing to say.
Reason = Callable[[str], str]


def can_use(engine: str, block: nn.Module, x: Tensor | None = None) -> tuple[bool, str]:
    """Whether an engine can run a fused block on x, and if not why; without x, whether it could on some input."""
    if engine == "reference":
        return True, ""
    reason = block.why_not(engine, x)
    return not reason, reason


def would_use(engine: str, block: nn.Module, x: Tensor | None = None) -> tuple[bool, str]:
    """Whether "auto" would consider an engine for a block on x: whether it can, and nothing measured is against it."""
    able, reason = can_use(engine, block, x)
    if able and engine != "reference" and x is not None and hasattr(block, "against"):
        reason = block.against(engine, x)
    return not reason, reason


def nothing_against(engine: str) -> str:
    """The `against` of whoever has measured nothing."""
    return ""


def choose(engine: str, why_not: Reason, against: Reason = nothing_against) -> str:
    """The engine to use: the first that can and had not better not, or the one that was named.

    Args:
        engine: its name, or "auto".
        why_not: why an engine cannot run the block.
        against: why "auto" does not take an engine that can.

    Raises:
        ValueError: the named engine cannot run the block.
    """
    if engine != "auto":
        reason = "" if engine == "reference" else why_not(engine)
        if reason:
            raise ValueError(f"engine must be one that can run this block, got {engine!r}: {reason}")
        return engine
    for name in _ORDER:
        if name == "reference" or not (why_not(name) or against(name)):
            return name
    raise AssertionError("the reference can run every block")


def candidates(why_not: Reason) -> list[str]:
    """The engines that can run a block, best first."""
    return [name for name in _ORDER if name == "reference" or not why_not(name)]


def elsewhere(engine: str, x: Tensor | None) -> str:
    """Why an engine cannot run where x is (or, without x, on this machine): it is for another device; empty if not."""
    home = _HOME.get(engine)
    if x is not None and home is not None and x.device.type != home:
        return f"it runs on {'the CPU' if home == 'cpu' else 'CUDA'} only"
    return _cuda.why_not() if home == "cuda" and x is None else ""


def no_operators(device: str = "cpu") -> str:
    """Why the operators cannot be called on a device, after building them if that has not been tried."""
    reason = "" if _build.loaded() else (_build.load() or "")
    return _cuda.no_kernels() if device == "cuda" else reason


def cannot_take(inputs: Sequence[Tensor], tensors: Iterable[Tensor | None]) -> str:
    """Why the staged engine cannot take these inputs and parameters; empty if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    for x in inputs:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if x.layout is not torch.strided:
            return f"the input's layout is {x.layout}, not strided"
        device = x.device.type
        if device not in _STORAGE:
            return f"the input is on {device}, and there are kernels for the CPU and CUDA only"
        if x.dtype not in _STORAGE[device]:
            return f"there are no {_NAMES[device]} kernels for {x.dtype}"
        if x.numel() == 0:
            return "the input is empty"
    device, lower = inputs[0].device.type, autocast_dtype(inputs[0])
    if lower is not None and lower not in _STORAGE[device]:
        return f"there are no {_NAMES[device]} kernels for autocast to {lower}"
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
    """Tell the recorders which engine a block has used; what runs in a trial is nobody's block."""
    if block is not None and _recorders and not _trial.under_way():
        for used in _recorders:
            used[block] = engine


def describe() -> list[tuple[str, str, bool, str]]:
    """Each engine and device, whether this machine can run it there, and why (not); nothing is compiled to find out."""
    able, reason = _build.available()
    cpu = f"{platform.machine()}: {reason}"
    missing = _cuda.why_not()
    cuda = missing or "Triton compiles each kernel when it is first launched"
    return [
        ("resident", "CPU", able, cpu),
        ("fused_convolution", "CUDA", not missing, cuda),
        ("staged", "CPU", able, cpu),
        ("staged", "CUDA", not missing, cuda),
        ("reference", "any", True, "plain PyTorch, on any device"),
    ]
