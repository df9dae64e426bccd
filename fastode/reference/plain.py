"""Training-mode norms as plain arithmetic, for derivatives of any order.

PyTorch's own third derivatives of batch_norm, instance_norm and layer_norm on the input's statistics are silently wrong
(pytorch#186256, seen on 2.13). Written as means and variances, autograd gets them right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .replaced import Replaced


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        value = F.batch_norm(x.detach(), running_mean, running_var, weight, bias, training, momentum, eps)
    dims = [d for d in range(x.dim()) if d != 1]
    return _normalise(x, dims, eps, _per_channel(weight, x), _per_channel(bias, x), value.dtype)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    with torch.no_grad():
        value = F.instance_norm(x.detach(), running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    dims = list(range(2, x.dim()))
    return _normalise(x, dims, eps, _per_channel(weight, x), _per_channel(bias, x), value.dtype)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    with torch.no_grad():
        value = F.layer_norm(x.detach(), normalized_shape, weight, bias, eps)
    return _normalise(x, list(range(-len(normalized_shape), 0)), eps, weight, bias, value.dtype)


class plain_norms(Replaced):
    """Context manager under which norms on the input's own statistics run as mean-and-variance arithmetic.

    It acts on F.batch_norm (training), F.instance_norm (on input statistics) and F.layer_norm, and so on the modules
    that call them. Errors and running-statistics updates are PyTorch's own; group_norm and norms on running statistics
    are left alone.

    Example:
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> with plain_norms():
        ...     print(torch.nn.BatchNorm2d(1)(x).sum().abs().item() < 1e-6)
        True
    """

    # PyTorch's own function runs first in each, without a graph: it checks the arguments, updates the running
    # statistics and tells the result's dtype; only its value is not used.
    replacements: ClassVar = {
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.layer_norm: _layer_norm,
    }


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(1, -1, *[1] * (x.dim() - 2))


def _normalise(
    x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """w (x − mean) / √(var + ε) + b over `dims`, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    out = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(dtype)
