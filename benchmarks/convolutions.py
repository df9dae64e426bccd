"""The fused convolutions as blocks launch them, on maps without memory: what benchmarks/kernels.py compiles of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastode.branch import Activation, Norm
from fastode.ops.fused import pair as fused_pair
from fastode.ops.schemes.skew_pair.pair import POST_Y, POST_Z, Pair
from fastode.ops.triton import convolution, passes

RELU, SILU = 1, 6


@dataclass(frozen=True)
class Convolution:
    """A convolution between two units.

    Attributes:
        name: in the table.
        shape: [N, C, H, W] of its input and its output.
        norm: its code, as in the operators' schemas; GroupNorm has one group.
        kernel: its side.
        act: the activation's code.
        dtypes: of the maps; "tf32" and "float32" differ in what PyTorch allows the products.
    """

    name: str
    shape: tuple[int, int, int, int]
    norm: int = passes.GROUP
    kernel: int = 3
    act: int = RELU
    dtypes: tuple[str, ...] = ("bfloat16", "tf32", "float32")


CONVOLUTIONS = (
    Convolution("64 channels, 32×32, one group", (128, 64, 32, 32)),
    Convolution("16 channels, 32×32, one group", (128, 16, 32, 32)),
    Convolution("32 channels, 16×16, one group", (128, 32, 16, 16)),
    Convolution("64 channels, 8×8, one group", (128, 64, 8, 8)),
    Convolution("128 channels, 4×4, one group", (128, 128, 4, 4)),
    Convolution("16 channels, 32×32, batch", (128, 16, 32, 32), passes.BATCH),
    Convolution("64 channels, 32×32, batch", (128, 64, 32, 32), passes.BATCH, dtypes=("bfloat16", "float16")),
    Convolution("160 channels, 32×32, one group", (128, 160, 32, 32), dtypes=("bfloat16", "tf32")),
    Convolution("640 channels, 8×8, one group", (128, 640, 8, 8), dtypes=("bfloat16", "tf32")),
    Convolution("256 channels, 14×14, 1×1, batch", (128, 256, 14, 14), passes.BATCH, 1, dtypes=("bfloat16",)),
    Convolution("64 channels, 32×32, no norm, silu", (128, 64, 32, 32), passes.NONE, 3, SILU, ("bfloat16",)),
    Convolution("64 channels, 32×32, fixed", (128, 64, 32, 32), passes.FIXED, dtypes=("bfloat16",)),
)
# What the tests compile, for one architecture.
DEFAULTS = (("bfloat16", CONVOLUTIONS[0]), ("tf32", CONVOLUTIONS[0]), ("bfloat16", CONVOLUTIONS[1]))
STORAGE = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32,
}  # fmt: skip


@contextmanager
def allowed(dtype: str) -> Iterator[None]:
    """PyTorch's own setting for convolutions of float32 maps, as `dtype` names it."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def call_allowed(dtype: str, call: Callable[[], Any]) -> None:
    """Call with PyTorch's setting for `dtype`."""
    with allowed(dtype):
        call()


def _map(each: Convolution, dtype: str) -> Tensor:
    return torch.empty(each.shape, dtype=STORAGE[dtype], device="meta", memory_format=torch.channels_last)


def operators(each: Convolution | SkewPair, dtype: str) -> dict[str, Callable[[], Any]]:
    """What a block's forward and backward launch, by name; call them with `allowed(dtype)`."""
    return _of_pair(each, dtype) if isinstance(each, SkewPair) else _of_convolution(each, dtype)


def _of_convolution(each: Convolution, dtype: str) -> dict[str, Callable[[], Any]]:
    x, channels = _map(each, dtype), each.shape[1]
    weight = torch.empty(channels, channels, each.kernel, each.kernel, dtype=x.dtype, device="meta")
    row = torch.empty(channels, device="meta") if each.norm != passes.NONE else None
    bias = torch.empty(channels, dtype=x.dtype, device="meta")
    unit = convolution.Unit(x, each.norm, 1, 1e-5, each.act, 1.0, 20.0)
    value = convolution.value_of(unit, unit.statistics(), row, row)
    unknown = replace(value, stats=None) if each.norm in (passes.GROUP, passes.BATCH) else value
    three = torch.ones(3, dtype=torch.float64)
    norm = (each.norm, 1)

    def pulled() -> convolution.Pulled:
        return convolution.pull(convolution.Operand(x), weight, value, param_grads=True)

    return {
        "convolution": lambda: convolution.convolution(value, weight, bias, norm=norm),
        "convolution of two terms": lambda: convolution.convolution(
            value, weight, bias, (1, 1), [x, x], three, norm=norm
        ),
        "convolution of a new map, two terms": lambda: convolution.convolution(
            unknown, weight, bias, (1, 1), [x, x], three, norm=norm
        ),
        "pull": lambda: convolution.pull(convolution.Operand(x), weight, value, (1, 1), [x, x], three),
        "pull of a pulled map": lambda: convolution.pull(pulled().operand, weight, value, param_grads=True),
        "weight gradient": lambda: convolution.weight_gradient(
            value, convolution.Operand(x), (each.kernel, each.kernel), bias=True
        ),
        "weight gradient of a pulled map": lambda: convolution.weight_gradient(
            value, pulled().operand, (each.kernel, each.kernel), bias=True
        ),
    }


@dataclass(frozen=True)
class SkewPair:
    """A skew pair with GroupNorm before and after it, and damping.

    Attributes:
        name: in the table.
        channels: of y and of z.
        size: (H, W) of y.
        stride: of W.
        dtypes: as of a Convolution.
    """

    name: str
    channels: tuple[int, int]
    size: tuple[int, int]
    stride: int = 1
    dtypes: tuple[str, ...] = ("bfloat16", "tf32", "float32")


PAIRS = (
    SkewPair("pair 64 with 64 channels, 32×32", (64, 64), (32, 32)),
    SkewPair("pair 128 with 64 channels, stride 2, 16×16", (128, 64), (16, 16), 2),
    SkewPair("pair 64 with 3 channels, 32×32", (64, 3), (32, 32), dtypes=("bfloat16", "tf32")),
    SkewPair("pair 256 with 128 channels, stride 2, 8×8", (256, 128), (8, 8), 2, ("bfloat16", "tf32")),
)


def _of_pair(each: SkewPair, dtype: str) -> dict[str, Callable[[], Any]]:
    storage, (height, width) = STORAGE[dtype], each.size
    activation = Activation("leaky_relu", 0.01, 0.0)
    norm = Norm("group", 8, 1e-5)
    pair = Pair(each.stride, 1, 0.1, activation, (norm,) * 4, (False,) * 4, None)
    side = each.stride + 2
    weight = torch.empty(*each.channels, side, side, dtype=storage, device="meta")
    states = []
    for channels, scale in zip(each.channels, (1, each.stride), strict=True):
        shape = (128, channels, height * scale, width * scale)
        x = torch.empty(shape, dtype=storage, device="meta", memory_format=torch.channels_last)
        row = torch.empty(channels, device="meta")
        unit = convolution.Unit(x, passes.GROUP, 8 if channels % 8 == 0 else 1, 1e-5, 0, 0.0, 0.0)
        states.append(convolution.value_of(unit, unit.statistics(), row, row))
    y, z = states
    codes = (2, 0.01, 0.0)

    def forward(want_y: bool = True, want_z: bool = True) -> Any:
        halves = (
            fused_pair.slope_half(pair, POST_Y, y, z, weight, 1.0, want_y),
            fused_pair.slope_half(pair, POST_Z, z, y, weight, -1.0, want_z),
        )
        return fused_pair.launch_pair(pair, weight, *halves, codes)

    def backward() -> Any:
        halves = (
            fused_pair.image_half(y.x, z.x, y, True, -0.1, True),
            fused_pair.image_half(z.x, y.x, z, True, 0.1, True),
        )
        return fused_pair.launch_pair(pair, weight, *halves, pull=True)

    pairs = [(z, convolution.Operand(y.x)), (convolution.Operand(z.x), y)]
    return {
        "pair": forward,
        "pair, y alone": lambda: forward(want_z=False),
        "pull of a pair": backward,
        "weight gradient": lambda: convolution.sum_weight_gradients(
            pairs, (side, side), (1, 1), each.stride, (1, 1), False, storage
        ),
    }
