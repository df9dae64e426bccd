"""What the resident operators return, in shapes and types only: for torch.compile and FakeTensor.

Nothing is kept for backward under a tracer: what would be depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._constants import CONV_WEIGHT, NORM_CODE, UNIT_INTEGERS
from . import skew_fake


def _feature_map(x: Tensor) -> Tensor:
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def _statistics(x: Tensor, units: Sequence[int], evaluations: int) -> Tensor:
    size, channels = 0, x.shape[1]
    for at in range(0, len(units), UNIT_INTEGERS):
        norm, _, _, out_channels, _, _, bits = units[at : at + UNIT_INTEGERS]
        size += 2 * channels if norm == NORM_CODE["batch"] else 0
        channels = out_channels if bits & CONV_WEIGHT else channels
    return x.new_empty(evaluations * size, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _gradients(parameters: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters] if wanted else []


def _ie_forward(x, parameters, units, numbers, steps, step_size, theta, keep, frozen):
    return _feature_map(x), _statistics(x, units, steps + 1), []


def _ie_backward(x, cotangent, kept, parameters, units, numbers, steps, step_size, theta, detach, gradients):
    return _feature_map(x), _gradients(parameters, gradients)


def _rk_forward(x, parameters, units, numbers, table, keep, frozen):
    return _feature_map(x), _statistics(x, units, table.shape[1]), []


def _rk_backward(x, cotangent, kept, parameters, units, numbers, table, gradients, table_gradient):
    table_bar = x.new_empty(table.numel() if table_gradient else 0, dtype=torch.float64)
    return _feature_map(x), _gradients(parameters, gradients), table_bar


def register() -> None:
    """Register them all; the operators must have been loaded."""
    for name, fake in {**_FAKES, **skew_fake.FAKES}.items():
        torch.library.register_fake(f"fastode::resident_{name}", fake)


_FAKES = {
    "ie_forward": _ie_forward,
    "ie_backward": _ie_backward,
    "rk_forward": _rk_forward,
    "rk_backward": _rk_backward,
}
