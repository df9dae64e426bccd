"""What the benchmarks use of fastode beyond its public names: all of it is here, but for the Triton kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from fastode import _dispatch

# The engines that fuse something, in the project's order of preference.
FUSED_ENGINES: tuple[str, ...] = tuple(name for name in _dispatch.ENGINES if name not in ("auto", "reference"))


def refusals(twin: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """For every engine that fuses, why it cannot run a fused block on these inputs; "" where it can."""
    x = inputs[0] if len(inputs) == 1 else inputs
    reasons = {}
    for name in FUSED_ENGINES:
        able, reason = _dispatch.can_use(name, twin, x)
        reasons[name] = "" if able else reason
    return reasons


def engines_used() -> AbstractContextManager[dict[nn.Module, str]]:
    """A context that collects which engine each fused block used last."""
    return _dispatch.recording()
