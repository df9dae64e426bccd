"""A truth for blocks in float64: the reference run in long double, whose rounding is 1/2048 of what is judged."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastode.reference.replaced import Replaced
from fastode.testing.compare import Mode, cotangents_of, run

from .long_double import WIDER, Wide

__all__ = ["WIDER", "Arithmetic", "Wide", "truth", "widened"]


def _column(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * _column(weight, x)
    return x if bias is None else x + _column(bias, x)


def _moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _update(running: Tensor | None, now: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.add_((now.detach().reshape(running.shape) - running) * momentum)


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training:
        assert running_mean is not None and running_var is not None
        return _affine((x - _column(running_mean, x)) * (_column(running_var, x) + eps).rsqrt(), weight, bias)
    count = x.numel() // x.shape[1]
    average, spread = _moments(x, [d for d in range(x.dim()) if d != 1])
    _update(running_mean, average, momentum)
    _update(running_var, spread * count / max(count - 1, 1), momentum)
    return _affine((x - average) * (spread + eps).rsqrt(), weight, bias)


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    count = x[0, 0].numel()
    average, spread = _moments(x, list(range(2, x.dim())))
    _update(running_mean, average.mean(0), momentum)
    _update(running_var, spread.mean(0) * count / max(count - 1, 1), momentum)
    return _affine((x - average) * (spread + eps).rsqrt(), weight, bias)


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    average, spread = _moments(rows, [2])
    return _affine(((rows - average) * (spread + eps).rsqrt()).view(x.shape), weight, bias)


_PI = np.longdouble("3.14159265358979323846264338327950288")
_SERIES = 160  # terms, of which at 10 the last is below rounding


def _constant(x: Tensor, value: Any) -> Any:
    """A number in the precision of x."""
    return Wide(np.asarray(value, np.longdouble)) if isinstance(x, Wide) else float(value)


class _NormalDistribution(torch.autograd.Function):
    """P(X ≤ x), by a series of positive terms: ½ + φ(x) (x + x³/3 + x⁵/(3·5) + …)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if not isinstance(x, Wide):
            return torch.special.ndtr(x)
        t = np.clip(x.values, -10, 10)  # beyond, no digit of it differs from 0 or 1
        total = term = t
        for n in range(3, 2 * _SERIES + 3, 2):
            term = term * t * t / n
            total = total + term
        return Wide(np.longdouble(0.5) + total * np.exp(-t * t / 2) / np.sqrt(2 * _PI))

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        density: Tensor = (x * x * -0.5).exp() * _constant(x, 1 / np.sqrt(2 * _PI))
        return bar * density


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * _NormalDistribution.apply(x)
    linear = np.sqrt(8 / _PI)
    cubic = _constant(x, linear * 44715 / 1000000)
    return x * torch.sigmoid(x * (cubic * x * x + _constant(x, linear)))


class Arithmetic(Replaced):
    """Norms and GELU as arithmetic, which has derivatives of any order in long double."""

    replacements: ClassVar = {
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.group_norm: _group_norm,
        F.gelu: _gelu,
    }


def widened(block: nn.Module) -> nn.Module:
    """A copy of a block in float64 whose parameters and floating-point buffers are long doubles."""
    twin = copy.deepcopy(block)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Wide.of(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = Wide.of(buffer)
    return twin


def truth(
    block: nn.Module, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...] | None, mode: Mode
) -> dict[str, Tensor | None]:
    """What a block in float64 yields, computed in long double and rounded to float64: a `Truth` of fastode.testing.

    Raises:
        NotImplementedError: the block calls an operator that is not written here.
    """
    if cotangents is None:
        outputs = run(block, inputs, None, "forward")
        cotangents = cotangents_of(
            tuple(t for name, t in outputs.items() if name.startswith("output") and t is not None)
        )
    with Arithmetic():
        found = run(widened(block), tuple(map(Wide.of, inputs)), tuple(map(Wide.of, cotangents)), mode)
    return {name: t.rounded() if isinstance(t, Wide) else t for name, t in found.items()}
