"""Argument checks, made before anything runs.

Every refusal has one form: "<argument> must be <allowed>, got <what>". A wrong kind of object is a TypeError, a wrong
value of the right kind a ValueError. The checks are plain Python conditions on types, shapes and numbers, so they trace
under torch.compile and cost a few microseconds; this module imports nothing of the package.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .branch.read import Reading

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def steps(value: Any, name: str = "steps") -> None:
    """Refuse anything but an int of at least one (True is no count)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {what(value)}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value}")


def count(value: Any, name: str) -> None:
    """Refuse anything but an int of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 0, got {what(value)}")
    if value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value}")


def step_size(value: Any, name: str = "step_size") -> None:
    """Refuse anything but a finite number above zero."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a finite number > 0, got {what(value)}")
    # `not value > 0` is also true of NaN.
    if not value > 0 or value == math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def theta(value: Any, name: str = "theta") -> None:
    """Refuse anything but a number in [0, 1]."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1], got {what(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value}")


def finite(name: str, value: Any) -> None:
    """Refuse anything but a finite number."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a finite number, got {what(value)}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")


def flag(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {what(value)}")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a name that is not in the list of known ones."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {_listed(known)}, got {what(value)}")
    if value not in known:
        raise ValueError(f"{name} must be one of {_listed(known)}, got {value!r}")


def engine(value: Any, known: Sequence[str]) -> None:
    """Refuse an engine whose name is not known."""
    one_of("engine", value, known)


def module(name: str, value: Any) -> None:
    """Refuse anything but a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {what(value)}")


def made(name: str, make: Any, wanted: str, *arguments: Any) -> nn.Module:
    """What a function of the user's makes; refuses one that makes no module, and a module in its place."""
    if isinstance(make, nn.Module):
        raise TypeError(f"{name} must be a name or {wanted}, got a module of type {type(make).__name__}")
    module = make(*arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a name or {wanted}, got {what(module)} from it")
    return module


def groups(name: str, channels: int, most: int) -> None:
    """Refuse channels that min(most, channels) groups do not part evenly."""
    if channels > most and channels % most:
        raise ValueError(f"{name} must be at most {most} or a multiple of {most} with norm 'group', got {channels}")


def tensor(name: str, value: Any) -> None:
    """Refuse anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {what(value)}")


def feature_map(name: str, x: Any, channels: int | None = None) -> None:
    """Refuse anything but a floating-point tensor [N, C, H, W], with C = `channels` where that is given."""
    wanted = "C" if channels is None else channels
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [N, {wanted}, H, W], got {what(x)}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{name} must be of dtype float32, float64, bfloat16 or float16, got {_dtype(x)}")
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"{name} must be a tensor [N, {wanted}, H, W], got shape {list(x.shape)}")


def same_kind(x: Tensor, tensors: Iterable[Tensor | None], name: str = "x") -> None:
    """Refuse an `x` on another device than `tensors`, or of another dtype outside autocast, which casts as it goes."""
    device, dtype = x.device, x.dtype
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on the parameters' device {tensor.device}, got {device}")
        if tensor.dtype != dtype and not _autocast(device.type):
            raise TypeError(f"{name} must be of the parameters' dtype {_dtype(tensor)}, got {_dtype(x)}")


def same_device(x: Tensor, tensors: Iterable[Tensor | None], name: str = "x") -> None:
    """Refuse an `x` on another device than `tensors`, whose dtypes may be others than its own."""
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the parameters' device {tensor.device}, got {x.device}")


def device_of(model: nn.Module, images: Tensor) -> None:
    """Refuse images on another device than the model's first parameter, or buffer."""
    held = next(model.parameters(), next(model.buffers(), None))
    if held is not None and held.device != images.device:
        raise ValueError(f"images must be on the model's device {held.device}, got {images.device}")


def answered(model: nn.Module, images: Tensor) -> Any:
    """The model's answer; where it fails at images of another dtype than its own, an error that says so."""
    try:
        return model(images)
    except (RuntimeError, TypeError) as error:
        held = next((each.dtype for each in model.parameters() if each.is_floating_point()), images.dtype)
        if held == images.dtype or _autocast(images.device.type):
            raise
        wanted = f"images must be of the model's dtype {str(held).removeprefix('torch.')}, or autocast be on"
        raise TypeError(f"{wanted}, got {_dtype(images)}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def keeps_shape(reading: Reading, x: Tensor) -> None:
    """Refuse a branch that is known to change the shape of `x`: its output is added to `x`.

    A branch the reader could not follow passes here; the reference looks at what it returns.
    """
    if reading.fault:
        raise ValueError(f"branch must be a map that keeps the shape of x, got {reading.fault}")
    height, width = x.shape[2:]
    for sides in reading.geometry:
        height, width = (
            (side + total - dilation * (kernel - 1) - 1) // stride + 1
            for side, (kernel, stride, total, dilation) in zip((height, width), sides, strict=True)
        )
    if (height, width) != tuple(x.shape[2:]):
        got = f"one that takes {x.shape[2]}x{x.shape[3]} to {height}x{width}"
        raise ValueError(f"branch must be a map that keeps the shape of x, got {got}")


def enough_values(reading: Reading, shape: Sequence[int]) -> None:
    """Refuse an x of this shape where it has one value per normalised set, as PyTorch's norms do."""
    if reading.units is None:
        return
    batch, channels, height, width = shape
    for unit in reading.units:
        norm = unit.norm
        if norm is not None and norm.mode != "fixed":
            if norm.instance:
                values = height * width
            elif norm.mode == "batch":
                values = batch * height * width
            else:
                # PyTorch counts the values of the whole batch here, not those of one group of one sample.
                values = batch * channels // norm.groups * height * width
            if values == 1:
                raise ValueError(f"x must be larger than one value for each normalised set, got shape {list(shape)}")
        if unit.conv is not None:
            channels = unit.conv.channels_after(channels) or 0
            height, width = unit.conv.size_after(height, width)


def skew_pair(y: Any, z: Any, weight: Any, stride: int, padding: int) -> None:
    """Refuse a pair (y, z) that does not fit the convolution `weight`: y is its output's shape, z its input's."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [C_out, C_in, k, k], got {what(weight)}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be a tensor [C_out, C_in, k, k], got shape {list(weight.shape)}")
    steps(stride, "stride")
    count(padding, "padding")
    channels_out, channels_in, kernel, _ = weight.shape
    feature_map("y", y, channels_out)
    feature_map("z", z, channels_in)
    same_kind(y, (weight,), "y")
    same_kind(z, (weight,), "z")
    # The transposed convolution must give back z's size, or W and its transpose would act between different spaces.
    height, width = ((side - 1) * stride + kernel - 2 * padding for side in y.shape[2:])
    wanted = [y.shape[0], channels_in, height, width]
    if list(z.shape) != wanted:
        raise ValueError(f"z must be a tensor of shape {wanted} to match y, got shape {list(z.shape)}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, (float, int)) or (not isinstance(value, Tensor) and isinstance(value, numbers.Real))


def _autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def what(value: Any) -> str:
    """What was given, short enough for one line: a number or a string as it is, anything else by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"an object of type {type(value).__name__}"
