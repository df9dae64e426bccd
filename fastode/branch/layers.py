"""The layers a branch may be made of, each as a part of a unit: primitives, and the tensors beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..tracing import is_exporting

TENSORS_PER_UNIT = 6
# For the two sides of a feature map: (kernel, stride, padding before and after together, dilation).
Sides = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


class Norm(NamedTuple):
    """A normalisation of `channels` channels: over groups of each sample, over the batch, or by fixed statistics.

    Instance norm on the input's own statistics is "group" with one channel a group; `instance` tells it apart only
    because PyTorch refuses other inputs for it.
    """

    mode: Literal["group", "batch", "fixed"]
    groups: int
    eps: float
    channels: int | None = None
    instance: bool = False

    def has_narrow_groups(self, channels: int) -> bool:
        """Whether it has several groups of fewer than 16 of these channels: PyTorch's is slow then in bfloat16."""
        return self.groups > 1 and channels < 16 * self.groups


class Activation(NamedTuple):
    """A pointwise map; leaky_relu: p = slope; softplus: p = beta, q = threshold; elu: p = alpha;
    gelu: p = 1 for the form with tanh.
    """

    kind: Literal["relu", "leaky_relu", "tanh", "softplus", "elu", "silu", "gelu", "sigmoid"]
    p: float = 0.0
    q: float = 0.0


class Conv(NamedTuple):
    """A convolution, or a mean over a window of each channel.

    In a branch that keeps the shape it is a convolution of stride 1 whose padding keeps the size. One that sees the
    time has it as one more channel in front of its `in_channels`, the first of its weight's.

    Attributes:
        mean: whether it is a mean over the kernel, which has no weight and takes any number of channels: its own are 0.
        added: how many channels of zeros a mean appends.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    stride: tuple[int, int] = (1, 1)
    mean: bool = False
    added: int = 0
    sees_time: bool = False

    def channels_after(self, channels: int | None) -> int | None:
        """How many channels it returns for so many; None where that is not known."""
        if not self.mean:
            return self.out_channels
        return None if channels is None else channels + self.added

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """The size of its output for an input of this size; below one where the input is too small."""
        height += 2 * self.padding[0] - self.dilation[0] * (self.kernel[0] - 1) - 1
        width += 2 * self.padding[1] - self.dilation[1] * (self.kernel[1] - 1) - 1
        return height // self.stride[0] + 1, width // self.stride[1] + 1


NORM, ACTIVATION, CONV = 0, 1, 2

# A reader gets the layer and its unit's row of tensors, which it fills. It returns the part of the unit it read, and
# with it the norm module to update or the sides of the convolution; or None and what is wrong.
Reader = Callable[[Any, list[Tensor | None]], tuple[Any, Any]]


def _take(layer: nn.Module, row: list[Tensor | None], at: int) -> str:
    """Put weight and bias of a layer into the row; returns what is wrong with them."""
    parameters = layer._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return "has a weight or bias that is not a parameter of its own"
    weight, bias = parameters["weight"], parameters["bias"]
    if not (is_plain(weight) and is_plain(bias)):
        return "has a weight or bias of a tensor subclass"
    row[at], row[at + 1] = weight, bias
    return ""


def is_plain(tensor: Tensor | None) -> bool:
    """Whether this is no tensor of a subclass, but for those that stand in for plain ones while torch.export traces."""
    if tensor is None or type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return True
    return is_exporting() and isinstance(tensor, torch._subclasses.FakeTensor)


def _read_group_norm(layer: nn.GroupNorm, row: list[Tensor | None]) -> tuple[Norm | None, Any]:
    wrong = _take(layer, row, 0)
    if wrong:
        return None, wrong
    return Norm("group", layer.num_groups, float(layer.eps), _norm_channels(row, layer.num_channels)), None


def _take_with_running(
    layer: nn.BatchNorm2d | nn.InstanceNorm2d, row: list[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, str]:
    """`_take` of a norm, with its running mean and variance: both, or neither."""
    wrong = _take(layer, row, 0)
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    if not wrong and (not (is_plain(mean) and is_plain(var)) or (mean is None) != (var is None)):
        wrong = "has only one of the running statistics, or has them as a tensor subclass"
    return mean, var, wrong


def _read_batch_norm(layer: nn.BatchNorm2d, row: list[Tensor | None]) -> tuple[Norm | None, Any]:
    mean, var, wrong = _take_with_running(layer, row)
    if wrong:
        return None, wrong
    count = _norm_channels(row, layer.num_features)
    if layer.training or mean is None:
        update = layer if layer.training and layer.track_running_stats and mean is not None else None
        return Norm("batch", 1, float(layer.eps), count), update
    row[2], row[3] = mean, var
    return Norm("fixed", 1, float(layer.eps), count), None


def _read_instance_norm(layer: nn.InstanceNorm2d, row: list[Tensor | None]) -> tuple[Norm | None, Any]:
    mean, var, wrong = _take_with_running(layer, row)
    if wrong:
        return None, wrong
    count = _norm_channels(row, layer.num_features)
    if layer.training or not layer.track_running_stats:
        # PyTorch updates the running statistics whenever the input's own are used, in eval mode too.
        return Norm("group", count, float(layer.eps), count, True), None if mean is None else layer
    if mean is None:
        return None, "has no running statistics, which it uses in eval mode"
    row[2], row[3] = mean, var
    return Norm("fixed", 1, float(layer.eps), count), None


def _norm_channels(row: list[Tensor | None], declared: int) -> int:
    return declared if row[0] is None else row[0].shape[0]


def _read_conv(layer: nn.Conv2d, row: list[Tensor | None]) -> tuple[Conv | None, Any]:
    wrong = _take(layer, row, 4)
    weight = row[4]
    if wrong or weight is None or weight.dim() != 4:
        return None, wrong or "has no weight of four dimensions"
    if layer.padding_mode != "zeros":
        return None, f"has padding_mode {layer.padding_mode!r}, where the reader knows only 'zeros'"
    out_channels, in_channels, height, width = weight.shape
    stride, dilation = layer.stride, layer.dilation
    if not (_is_pair(stride) and _is_pair(dilation) and (isinstance(layer.padding, str) or _is_pair(layer.padding))):
        return None, "has a stride, padding or dilation that is not a pair"
    total: tuple[int, int]
    if layer.padding == "same":
        total = (dilation[0] * (height - 1), dilation[1] * (width - 1))
    elif layer.padding == "valid":
        total = (0, 0)
    else:
        before: Any = layer.padding
        total = (2 * before[0], 2 * before[1])
    conv = Conv(
        in_channels * layer.groups,
        out_channels,
        (height, width),
        (total[0] // 2, total[1] // 2),
        (dilation[0], dilation[1]),
        layer.groups,
        (stride[0], stride[1]),
    )
    return conv, ((height, stride[0], total[0], dilation[0]), (width, stride[1], total[1], dilation[1]))


def read_time_conv(layer: Any, row: list[Tensor | None]) -> tuple[Conv | None, Any]:
    """The reader of `TimeConv2d`, whose own convolution has the time as its first channel."""
    conv, note = _read_conv(layer._layer, row)
    if conv is None:
        return None, note
    own = (conv.out_channels, conv.kernel, conv.padding, conv.dilation, conv.groups)
    return Conv(conv.in_channels - 1, *own, sees_time=True), note


def _read_average(layer: nn.AvgPool2d, row: list[Tensor | None]) -> tuple[Conv | None, Any]:
    sides = [
        (value, value) if isinstance(value, int) else value
        for value in (layer.kernel_size, layer.stride, layer.padding)
    ]
    if not all(map(_is_pair, sides)):
        return None, "has a kernel, stride or padding that is not a number or a pair"
    kernel, stride, padding = sides
    if padding != (0, 0) or layer.ceil_mode or layer.divisor_override is not None:
        return None, "has a padding, a ceil_mode or a divisor_override, which the reader does not follow"
    mean = Conv(0, 0, (kernel[0], kernel[1]), (0, 0), (1, 1), 1, (stride[0], stride[1]), True)
    return mean, ((kernel[0], stride[0], 0, 1), (kernel[1], stride[1], 0, 1))


def _read_zero_channels(layer: nn.ConstantPad3d | nn.ZeroPad3d, row: list[Tensor | None]) -> tuple[Conv | None, Any]:
    padding = layer.padding
    if not (isinstance(padding, tuple) and len(padding) == 6) or any(padding[:5]) or padding[5] < 0:
        return None, "pads otherwise than with channels behind the input's"
    if getattr(layer, "value", 0.0) != 0:
        return None, "pads with another value than zero"
    return Conv(0, 0, (1, 1), (0, 0), (1, 1), 1, (1, 1), True, padding[5]), ((1, 1, 0, 1), (1, 1, 0, 1))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _activation(kind: Any, p: Any, q: Any = 0.0) -> tuple[Activation | None, Any]:
    # A tensor would be a parameter of the activation, with a gradient that the units do not know.
    if not (isinstance(p, (int, float)) and isinstance(q, (int, float))):
        return None, "has a parameter that is not a number"
    return Activation(kind, float(p), float(q)), None


def _read_relu(layer: nn.ReLU, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return Activation("relu"), None


def _read_leaky_relu(layer: nn.LeakyReLU, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return _activation("leaky_relu", layer.negative_slope)


def _read_tanh(layer: nn.Tanh, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return Activation("tanh"), None


def _read_softplus(layer: nn.Softplus, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return _activation("softplus", layer.beta, layer.threshold)


def _read_elu(layer: nn.ELU, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return _activation("elu", layer.alpha)


def _read_silu(layer: nn.SiLU, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return Activation("silu"), None


def _read_gelu(layer: nn.GELU, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    if layer.approximate not in ("none", "tanh"):
        return None, f"has approximate {layer.approximate!r}, where the reader knows only 'none' and 'tanh'"
    return Activation("gelu", float(layer.approximate == "tanh")), None


def _read_sigmoid(layer: nn.Sigmoid, row: list[Tensor | None]) -> tuple[Activation | None, Any]:
    return Activation("sigmoid"), None


KNOWN: dict[type, tuple[int, Reader]] = {
    nn.GroupNorm: (NORM, _read_group_norm),
    nn.BatchNorm2d: (NORM, _read_batch_norm),
    nn.InstanceNorm2d: (NORM, _read_instance_norm),
    nn.ReLU: (ACTIVATION, _read_relu),
    nn.LeakyReLU: (ACTIVATION, _read_leaky_relu),
    nn.Tanh: (ACTIVATION, _read_tanh),
    nn.Softplus: (ACTIVATION, _read_softplus),
    nn.ELU: (ACTIVATION, _read_elu),
    nn.SiLU: (ACTIVATION, _read_silu),
    nn.GELU: (ACTIVATION, _read_gelu),
    nn.Sigmoid: (ACTIVATION, _read_sigmoid),
    nn.Conv2d: (CONV, _read_conv),
}
# In a chain that may change the shape there are these, too.
SHAPING: dict[type, tuple[int, Reader]] = {
    nn.AvgPool2d: (CONV, _read_average),
    nn.ConstantPad3d: (CONV, _read_zero_channels),
    nn.ZeroPad3d: (CONV, _read_zero_channels),
}
