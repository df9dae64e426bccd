"""Reading a branch: the nn.Sequential a user already has, as a list of units norm -> activation -> convolution.

A unit is made of primitives only, so that it can travel through torch.compile as a constant; the tensors stand beside
it in a flat list and are looked up in the user's modules at every call, so whatever trains or replaces them is seen.
What cannot be read is no error: the block then runs as the reference, and the reading says in one sentence why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .layers import CONV, KNOWN, NORM, SHAPING, TENSORS_PER_UNIT, Activation, Conv, Norm, Reader, Sides

_Layer = tuple[str, nn.Module, int, Reader]
_CONV_WEIGHT = 4  # where it stands among the tensors of a unit
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Unit(NamedTuple):
    """Norm, activation and convolution, applied in this order, each of them optional."""

    norm: Norm | None
    activation: Activation | None
    conv: Conv | None


@dataclass
class Reading:
    """What `read` found.

    Attributes:
        units: the units in order, or None where the branch cannot be read.
        reason: why it cannot, in one sentence; empty otherwise.
        tensors: six for each unit: norm weight, norm bias, running mean, running variance (these two only where the
            norm normalises by them), convolution weight, convolution bias; None where absent.
        norms: for each unit the norm module whose running statistics a forward call must update, else None.
        fault: what keeps the branch from being a residual branch on any input, as "one that takes 8 channels and
            returns 16"; empty where nothing of the kind is known.
        geometry: the sides of every convolution, where `units` is None although every layer is of a known kind.
    """

    units: tuple[Unit, ...] | None
    reason: str = ""
    tensors: list[Tensor | None] = field(default_factory=list)
    norms: list[nn.Module | None] = field(default_factory=list)
    fault: str = ""
    geometry: tuple[Sides, ...] = ()


def read(module: nn.Module, name: str = "branch", timed: bool = False, keeps_shape: bool = True) -> Reading:
    """Read a branch into units.

    Readable are nested nn.Sequentials (and subclasses that keep its forward) of GroupNorm, BatchNorm2d, InstanceNorm2d,
    Identity, ReLU, LeakyReLU, Tanh, Softplus, ELU, SiLU, GELU, Sigmoid, and Conv2d with stride 1, zero padding that
    keeps the size and any kernel, dilation and groups. Not readable: other types, subclasses, hooks, parametrizations,
    tensors of several dtypes, and norms that would update the same running statistics twice.

    Args:
        module: the branch; its mode (train or eval) decides which statistics each norm uses.
        name: what the reasons call it.
        timed: whether it is told the time, so that convolutions that see it can be read.
        keeps_shape: False also reads convolutions of any stride and padding, AvgPool2d, and a ConstantPad3d that
            appends channels of zeros; the output may then have another shape.

    Returns:
        The reading. It is made anew whenever something that it depends on has changed (`snapshot`).

    Example:
        >>> branch = nn.Sequential(nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
        >>> read(branch).units[0].activation
        Activation(kind='relu', p=0.0, q=0.0)
        >>> read(nn.Sequential(nn.Dropout())).reason
        'branch.0 (Dropout) is of a type the reader does not know.'
    """
    if has_global_hooks():
        return Reading(None, f"a hook is registered on all modules, and a fused {name} would not call it.")
    layers: list[_Layer] = []
    reason = _flatten(name, module, layers, keeps_shape)
    if not reason and not layers:
        reason = f"the {name} has no layer."
    return Reading(None, reason) if reason else _read_layers(name, layers, keeps_shape, timed)


def read_run(modules: Mapping[str, nn.Module | None], name: str) -> tuple[Reading, int]:
    """Read the first of some modules, as many as are of known types; they may change the shape.

    Args:
        modules: called one after the other.
        name: what the reasons call what holds them.

    Returns:
        The reading of those together, without units where there are none, and how many they are.
    """
    layers: list[_Layer] = []
    count = 0
    for key, module in modules.items():
        more: list[_Layer] = []
        if module is None or _flatten(f"{name}.{key}", module, more, False):
            break
        layers += more
        count += 1
    return _read_layers(name, layers, False) if layers else Reading(()), count


def _read_layers(name: str, layers: list[_Layer], keeps_shape: bool, timed: bool = False) -> Reading:
    """Layers in the order of their evaluation, as units."""
    units: list[Unit] = []
    tensors: list[Tensor | None] = []
    norms: list[nn.Module | None] = []
    geometry: list[Sides] = []
    uneven = ""
    parts: list[Any] = [None, None, None]
    row: list[Tensor | None] = [None] * TENSORS_PER_UNIT
    update = None
    last = -1
    for path, layer, slot, reader in layers:
        # A unit is full as soon as a layer comes that would have to go before one it already has.
        if slot <= last:
            units.append(Unit(parts[0], parts[1], parts[2]))
            tensors += row
            norms.append(update)
            parts, row, update = [None, None, None], [None] * TENSORS_PER_UNIT, None
        last = slot
        part, note = reader(layer, row)
        if part is None:
            return Reading(None, f"{path} ({type(layer).__name__}) {note}.")
        if not timed and isinstance(part, Conv) and part.sees_time:
            return Reading(None, f"{path} ({type(layer).__name__}) sees the time, which this block does not tell.")
        parts[slot] = part
        if slot == NORM:
            update = note
        elif slot == CONV:
            geometry.append(note)
            kind = type(layer).__name__
            if keeps_shape:
                if not uneven and not _keeps_size(note, part):
                    uneven = f"{path} ({kind}) has a stride or a padding that changes the size, or pads unevenly."
            elif not uneven and not _pads_evenly(note, part):
                uneven = f"{path} ({kind}) pads unevenly."
    units.append(Unit(parts[0], parts[1], parts[2]))
    tensors += row
    norms.append(update)

    reason, fault = _follow_channels(name, units, tensors, keeps_shape)
    reason = reason or uneven or mixture(name, tensors) or updated_twice(name, norms)
    if reason:
        return Reading(None, reason, [], [], fault, tuple(geometry))
    return Reading(tuple(units), "", tensors, norms)


def channels(units: tuple[Unit, ...]) -> int | None:
    """The number of input channels that the units ask for; None if any number will do, or a mean comes first.

    Example:
        >>> channels(read(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1))).units)
        8
    """
    for unit in units:
        if unit.norm is not None:
            return unit.norm.channels
        if unit.conv is not None:
            return None if unit.conv.mean else unit.conv.in_channels
    return None


def convolves(tensors: Sequence[Tensor | None]) -> bool:
    """Whether convolutions are among the tensors of units.

    These ask for maps of their own dtype. PyTorch's norms take others, as where a network of bfloat16 keeps them in
    float32, and of parts that have norms alone the reference runs.
    """
    return any(tensors[at] is not None for at in range(_CONV_WEIGHT, len(tensors), TENSORS_PER_UNIT))


def has_global_hooks() -> bool:
    """Whether calling any module does more than its class's forward."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _flatten(name: str, module: nn.Module, layers: list[_Layer], keeps_shape: bool) -> str:
    """Append the layers of a module in the order of their evaluation; returns what stands in the way."""
    kind = type(module)
    known = KNOWN.get(kind)
    if known is None and not keeps_shape:
        known = SHAPING.get(kind)
    sequential = known is None and (kind is nn.Sequential or is_sequential(kind))
    if known is None and not sequential and kind is not nn.Identity:
        if "parametrizations" in module._modules:
            return f"{name} ({kind.__name__}) has parametrizations, which the reader does not follow."
        return f"{name} ({kind.__name__}) is of a type the reader does not know."
    if is_overridden(module):
        return f"{name} ({kind.__name__}) has hooks or a replaced forward, which a fused branch would not call."
    if known is not None:
        for key, inner in module._modules.items():
            # A convolution that sees the time calls one of PyTorch's.
            if type(inner) is not nn.Conv2d or is_overridden(inner):
                return f"{name}.{key} ({type(inner).__name__}) is no plain Conv2d, which the reader knows alone."
        layers.append((name, module, known[0], known[1]))
    elif sequential:
        for key, child in module._modules.items():
            if child is None:
                return f"{name}.{key} is None."
            reason = _flatten(f"{name}.{key}", child, layers, keeps_shape)
            if reason:
                return reason
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this very module runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_overridden(module: nn.Module) -> bool:
    """Whether calling this very module does more, or other things, than its class's forward."""
    # A tracer guards what it got from a module, and not what the module's variables lack.
    return has_hooks(module) or module.forward is None or "forward" in module.__dict__


def is_sequential(kind: type) -> bool:
    """Whether instances run as an nn.Sequential does."""
    return (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
    )


def _keeps_size(sides: Sides, conv: Conv) -> bool:
    """Whether a convolution keeps the size of any input, with as much padding before as after."""
    for (kernel, stride, total, dilation), half in zip(sides, conv.padding, strict=True):
        if stride != 1 or total != dilation * (kernel - 1) or total != 2 * half:
            return False
    return True


def _pads_evenly(sides: Sides, conv: Conv) -> bool:
    return all(total == 2 * half for (_, _, total, _), half in zip(sides, conv.padding, strict=True))


def _follow_channels(name: str, units: list[Unit], tensors: list[Tensor | None], keeps_shape: bool) -> tuple[str, str]:
    """Follow the channels through the units: (why they cannot be read, the fault in them)."""
    first = now = channels(tuple(units))
    for index, unit in enumerate(units):
        if unit.norm is not None and now is None:
            now = unit.norm.channels  # behind a mean
        if unit.norm is not None and unit.norm.channels != now:
            wanted = unit.norm.channels
            # Without weight, bias and running statistics PyTorch's norms take any number of channels.
            at = TENSORS_PER_UNIT * index
            if tensors[at] is None and tensors[at + 1] is None and tensors[at + 2] is None:
                return f"a norm declared for {wanted} channels gets {now}.", ""
            return _misfit(name, "norm", wanted, now)
        if unit.conv is not None:
            if now is not None and not unit.conv.mean and unit.conv.in_channels != now:
                return _misfit(name, "convolution", unit.conv.in_channels, now)
            now = unit.conv.channels_after(now)
    if now != first and keeps_shape:
        fault = f"one that takes {first} channels and returns {now}"
        return f"the {name} is {fault}.", fault
    return "", ""


def _misfit(name: str, layer: str, wanted: int | None, given: int | None) -> tuple[str, str]:
    fault = f"one in which a {layer} for {wanted} channels is given {given}"
    return f"the {name} is {fault}.", fault


def mixture(name: str, tensors: list[Tensor | None]) -> str:
    """What is wrong with the dtypes of tensors; empty if they are of one that there are kernels for."""
    dtype = None
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            if dtype is not None:
                return f"the {name} has tensors of {dtype} and of {tensor.dtype}."
            dtype = tensor.dtype
            if dtype not in _DTYPES:
                return f"the {name} has tensors of {dtype}, for which there are no kernels."
    return ""


def updated_twice(name: str, norms: list[nn.Module | None]) -> str:
    """Two updates of the same running statistics within one evaluation would have to follow one another."""
    for index, norm in enumerate(norms):
        if norm is not None:
            for other in norms[:index]:
                if other is not None and other._buffers["running_mean"] is norm._buffers["running_mean"]:
                    return f"two norms of the {name} update the same running statistics."
    return ""
