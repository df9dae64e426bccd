"""A residual block that is left to PyTorch, as the calls of PyTorch that its modules come to.

With few samples a module's own way to its function is no small part of a call. What is known of a block, and holds,
spares it: the same functions on the same tensors, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..reference import ResBlock
from ..reference.faults import batch_norm, group_norm

Function = Callable[[Tensor], Tensor]

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Softplus, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid)


def usable() -> bool:
    """Whether nothing looks at the calls of modules, or of functions, in this context."""
    return torch._C._len_torch_function_stack() == 0 and torch._C._get_tracing_state() is None


def block_of(block: ResBlock, shapes: Sequence[Sequence[int]]) -> Function | None:
    """What a block that was read does, as functions, until anything about it changes; None where it is to be called.

    Args:
        block: on the CPU.
        shapes: of the maps that its norms get: those of the branch, then those of the shortcut.
    """
    sizes = iter(shapes)
    branch, shortcut = _functions(block.branch, sizes), _functions(block.shortcut, sizes)
    after = _functions(block.post_activation, sizes)
    if branch is None or shortcut is None or after is None:
        return None
    step = block.step_size

    def run(x: Tensor) -> Tensor:
        skip = x
        for function in shortcut:
            skip = function(skip)
        y = x
        for function in branch:
            y = function(y)
        y = torch.add(skip, y, alpha=step)
        for function in after:
            y = function(y)
        return y

    return run


def _functions(module: nn.Module | None, shapes: Iterator[Sequence[int]]) -> list[Function] | None:
    found: list[Function] = []
    for layer in () if module is None else _layers(module):
        if type(layer) is nn.Identity:
            continue
        function: Function | None
        if isinstance(layer, nn.BatchNorm2d):
            function = _norm(layer, next(shapes))
        elif type(layer) is nn.GroupNorm:
            function = _group_norm(layer, next(shapes))
        elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            function = _convolution(layer)
        elif type(layer) in _ACTIVATIONS and not getattr(layer, "inplace", False):
            function = torch.relu if type(layer) is nn.ReLU else layer.forward
        else:
            function = None
        if function is None:
            return None
        found.append(function)
    return found


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested sequences, in order."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for child in module._modules.values():
        if child is not None:
            yield from _layers(child)


def _convolution(layer: nn.Conv2d) -> Function:
    weight, bias, stride, padding = layer.weight, layer.bias, layer.stride, layer.padding
    dilation, groups = layer.dilation, layer.groups
    return lambda x: torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _norm(layer: nn.BatchNorm2d, shape: Sequence[int]) -> Function | None:
    weight, bias, mean, variance = layer.weight, layer.bias, layer.running_mean, layer.running_var
    count, factor, eps, training = layer.num_batches_tracked, layer.momentum, layer.eps, layer.training
    if type(layer) is not nn.BatchNorm2d or mean is None or variance is None or count is None or factor is None:
        return None
    momentum, single = float(factor), 1 in (shape[0], *shape[2:])

    def run(x: Tensor) -> Tensor:
        if training:
            count.add_(1)
        if single and torch.is_grad_enabled():  # where PyTorch's backward may be at fault
            return batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
        return torch.batch_norm(x, weight, bias, mean, variance, training, momentum, eps, False)

    return run


def _group_norm(layer: nn.GroupNorm, shape: Sequence[int]) -> Function | None:
    weight, bias, groups, eps = layer.weight, layer.bias, layer.num_groups, layer.eps
    if shape[0] * shape[1] // groups * shape[2] * shape[3] == 1:  # which F.group_norm refuses
        return None

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:  # where PyTorch's backward may be at fault
            return group_norm(x, groups, weight, bias, eps)
        return torch.group_norm(x, groups, weight, bias, eps, torch.backends.cudnn.enabled)

    return run
