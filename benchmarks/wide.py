"""A truth for blocks in float64: the reference run in long double, whose rounding is 1/2048 of what is judged."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastode.reference.replaced import Replaced
from fastode.testing.compare import Mode, cotangents_of, run

from .long_double import WIDER, Wide

__all__ = ["WIDER", "Norms", "Wide", "truth", "widened"]


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


class Norms(Replaced):
    """Norms as arithmetic, which has derivatives of any order in long double."""

    replacements: ClassVar = {
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.group_norm: _group_norm,
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
    with Norms():
        found = run(widened(block), tuple(map(Wide.of, inputs)), tuple(map(Wide.of, cotangents)), mode)
    return {name: t.rounded() if isinstance(t, Wide) else t for name, t in found.items()}
