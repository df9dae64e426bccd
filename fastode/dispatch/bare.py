"""A block that is left to PyTorch, as the calls of PyTorch that its modules come to.

With few samples a module's own way to its function is no small part of a call. What is known of a block, and holds,
spares it: the same functions on the same tensors, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import ResBlock, SkewPair
from ..reference.faults import batch_norm, group_norm, instance_norm
from ..reference.skew import PADDING, skew_field

Function = Callable[[Tensor], Tensor]
PairFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Without the layer, which may be the block's branch, beside which what is made here is kept.
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Function]] = {
    nn.ReLU: lambda layer: torch.relu,
    nn.LeakyReLU: lambda layer: partial(F.leaky_relu, negative_slope=layer.negative_slope),
    nn.Tanh: lambda layer: torch.tanh,
    nn.Softplus: lambda layer: partial(F.softplus, beta=layer.beta, threshold=layer.threshold),
    nn.ELU: lambda layer: partial(F.elu, alpha=layer.alpha),
    nn.SiLU: lambda layer: F.silu,
    nn.GELU: lambda layer: partial(F.gelu, approximate=layer.approximate),
    nn.Sigmoid: lambda layer: torch.sigmoid,
}


def takes(*inputs: Tensor) -> bool:
    """Whether a call with these inputs may be one of functions."""
    return usable() and all(x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in inputs)


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


def sequence_of(layers: Sequence[nn.Module], shapes: Sequence[Sequence[int]]) -> Function | None:
    """What a run of layers that were read does, as `block_of` has it; a residual block among them is called itself."""
    sizes = iter(shapes)
    found: list[Function] = []
    for layer in layers:
        functions = [layer] if isinstance(layer, ResBlock) else _functions(layer, sizes)
        if functions is None:
            return None
        found += functions
    return _one_by_one(found)


def branch_of(branch: nn.Module, shape: Sequence[int]) -> Function | None:
    """What a branch that was read does, as `block_of` has it; its maps have all the same height and width."""
    found = _functions(branch, itertools.repeat(shape))
    return None if found is None else _one_by_one(found)


def pair_of(pair: SkewPair, y: Sequence[int], z: Sequence[int]) -> PairFunction | None:
    """What a skew pair that was read does, as `block_of` has it; y and z are the shapes of its state."""
    before_y, before_z = _functions(pair.pre_norm_y, iter([y])), _functions(pair.pre_norm_z, iter([z]))
    after_y, after_z = _functions(pair.post_norm_y, iter([y])), _functions(pair.post_norm_z, iter([z]))
    functions = _functions(pair.activation, iter(()))
    if before_y is None or before_z is None or after_y is None or after_z is None or functions is None:
        return None
    norm_y, norm_z, end_y, end_z = map(_one_by_one, (before_y, before_z, after_y, after_z))
    activation, weight, stride, gamma = _one_by_one(functions), pair.weight, pair.stride, pair.gamma

    def run(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        dy, dz = skew_field(norm_y(y), norm_z(z), weight, stride, PADDING, gamma, activation)
        return end_y(dy), end_z(dz)

    return run


def _one_by_one(functions: Sequence[Function]) -> Function:
    if len(functions) == 1:
        return functions[0]

    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

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
        elif type(layer) is nn.InstanceNorm2d:
            function = _instance_norm(layer, next(shapes))
        elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            function = _convolution(layer)
        elif type(layer) in _ACTIVATIONS and not getattr(layer, "inplace", False):
            function = _ACTIVATIONS[type(layer)](layer)
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
    count = getattr(layer, "num_batches_tracked", None)
    factor, eps, training = layer.momentum, layer.eps, layer.training
    if type(layer) is not nn.BatchNorm2d or mean is None or variance is None or count is None or factor is None:
        return None
    if training and not layer.track_running_stats:  # a flag that was taken back: the buffers stay as they are
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
    if shape[0] * layer.num_channels // groups * shape[2] * shape[3] == 1:  # which F.group_norm refuses
        return None

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:  # where PyTorch's backward may be at fault
            return group_norm(x, groups, weight, bias, eps)
        return torch.group_norm(x, groups, weight, bias, eps, torch.backends.cudnn.enabled)

    return run


def _instance_norm(layer: nn.InstanceNorm2d, shape: Sequence[int]) -> Function | None:
    weight, bias, momentum, eps = layer.weight, layer.bias, layer.momentum, layer.eps
    if layer.track_running_stats or layer.running_mean is not None or momentum is None:
        return None
    if shape[2] * shape[3] == 1:  # which F.instance_norm refuses
        return None

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # where PyTorch's backward may be at fault
            return instance_norm(x, None, None, weight, bias, True, momentum, eps)
        return torch.instance_norm(x, weight, bias, None, None, True, momentum, eps, torch.backends.cudnn.enabled)

    return run
