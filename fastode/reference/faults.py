"""Norms that are right, and alive, on a CPU where PyTorch's are not (docs/pytorch-faults.md has both faults).

Each repair hands a map [N, C, H, W] to the same function as [N, C, H·W], for which there is no channels_last:

- the backward of `batch_norm`, and so of `instance_norm`, reads a cotangent in channels_last as if it were contiguous
  where strides can be taken for either: in a batch of one, and in maps of one row or one column;
- the backward of `group_norm` in channels_last writes through a null pointer where its weight or bias needs a gradient
  and its input does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .replaced import Replaced

_Result = TypeVar("_Result")

# Beside activations the layers that call no norm. A convolution may give a map of a single row or column, but what then
# gives a map of x's shape again is none of these.
_HARMLESS = (nn.Conv2d, nn.Identity, nn.Dropout)


def call_repaired(
    call: Callable[..., _Result], modules: Iterable[nn.Module], *inputs: Tensor, keeps_shape: bool = True
) -> _Result:
    """call(*inputs), with its norms repaired where PyTorch's may be faulty.

    Args:
        call: calls the modules.
        modules: what may hold norms.
        inputs: feature maps, to which the modules or their like are applied.
        keeps_shape: whether the modules' inner maps are as high and wide as the inputs.
    """
    x = inputs[0]
    # Only a backward pass is faulty, and torch.compile makes its kernels itself.
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return call(*inputs)
    # Where all inputs need a gradient, so does every map that is made of them.
    in_graph = all(x.requires_grad for x in inputs)
    ambiguous = not keeps_shape or any(_has_single(x) for x in inputs)
    # The mode costs a microsecond for each call of torch: it is entered only where it may be needed.
    if any(_may_be_faulty(module, in_graph, ambiguous) for module in modules):
        with repaired_norms():
            return call(*inputs)
    return call(*inputs)


def batch_norm(input: Tensor, *rest: Any, **more: Any) -> Tensor:
    """F.batch_norm without the fault of its backward."""
    ambiguous = input.dim() == 4 and _has_single(input) and not _suggests_channels_last(input)
    return _flat(F.batch_norm, input, *rest, **more) if ambiguous else F.batch_norm(input, *rest, **more)


def instance_norm(input: Tensor, *rest: Any, **more: Any) -> Tensor:
    """F.instance_norm without the fault of its backward."""
    # Inside it is a batch norm of one sample of N·C channels, whatever N is.
    return _flat(F.instance_norm, input, *rest, **more)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """F.group_norm without the fault of its backward."""
    learned = any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    if input.requires_grad or not learned or not _suggests_channels_last(input):
        return F.group_norm(input, num_groups, weight, bias, eps)
    if input.numel() == num_groups:  # one value in each: PyTorch's error
        return F.group_norm(input, num_groups, weight, bias, eps)
    # A single pixel, too: its strides may be those of channels_last.
    y = F.group_norm(input.flatten(2), num_groups, weight, bias, eps).view(input.shape)
    return y.contiguous(memory_format=torch.channels_last)


class repaired_norms(Replaced):
    """Context manager under which F.batch_norm, F.instance_norm and F.group_norm avoid PyTorch's faults on a CPU.

    Example:
        >>> with repaired_norms():
        ...     print(torch.nn.InstanceNorm2d(1)(torch.ones(1, 1, 2, 2)).abs().sum().item())
        0.0
    """

    replacements: ClassVar = {
        F.batch_norm: batch_norm,
        F.instance_norm: instance_norm,
        F.group_norm: group_norm,
    }


def _flat(norm: Callable[..., Tensor], input: Tensor, *rest: Any, **more: Any) -> Tensor:
    """norm on [N, C, H·W]; a single pixel has no order to be read in, and is left to PyTorch with its errors."""
    if input.dim() != 4 or input.shape[2] * input.shape[3] == 1:
        return norm(input, *rest, **more)
    return norm(input.flatten(2), *rest, **more).view(input.shape)


def _may_be_faulty(module: nn.Module, in_graph: bool, ambiguous: bool) -> bool:
    """Whether the module may call a norm in a way that is faulty; what is not PyTorch's own layer may call any."""
    kind = type(module)
    if kind.forward is nn.Sequential.forward:
        children = module._modules.values()
        return any(_may_be_faulty(child, in_graph, ambiguous) for child in children if child is not None)
    if kind is nn.GroupNorm:
        return not in_graph
    if issubclass(kind, _NormBase) and kind.__module__.startswith("torch.nn."):
        return ambiguous or issubclass(kind, _InstanceNorm)
    return not (kind.__module__ == "torch.nn.modules.activation" or kind in _HARMLESS)


def _has_single(x: Tensor) -> bool:
    """Whether x is a batch of one, or of a single row or column."""
    shape = x.shape
    return 1 in shape[:1] or 1 in shape[2:]


def _suggests_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes x for channels_last by its strides, as it does where it has to choose a format."""
    if x.dim() != 4:
        return False
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0 or 0 in sizes:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d]
    return True
