"""What the operators return, in shapes and types only: for torch.compile, torch.export and FakeTensor.

What the resident operators keep for backward depends on the machine: under a tracer a ticket stands for it, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .constants import BIAS, CONV_BIAS, CONV_WEIGHT, KEEP_TICKET, NORM_CODE, RUNNING, UNIT_INTEGERS, WEIGHT

MaybeTensor = Tensor | None


def _map(like: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)


# ---- staged


def _feature_map(x: Tensor, samples: int | None = None) -> Tensor:
    shape = (x.shape[0] if samples is None else samples, *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vector(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_accumulator(x))


def _statistics(x: Tensor, norm: int, groups: int) -> Tensor:
    if norm == NORM_CODE["group"]:
        return _vector(x, 2, x.shape[0], groups)
    return _vector(x, 2, x.shape[1] if norm else 0)


def _combine(terms: Sequence[Tensor], coefs: Tensor, act: int, p: float, q: float) -> Tensor:
    return _feature_map(terms[0])


def _combine_pair(first: Sequence[Tensor], second: Sequence[Tensor], coefs: Tensor) -> Tensor:
    return _feature_map(first[0], 2 * first[0].shape[0])


def _norm_act(
    terms: Sequence[Tensor], coefs: Tensor, weight: MaybeTensor, bias: MaybeTensor, stats: MaybeTensor, norm: int,
    groups: int, eps: float, act: int, p: float, q: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = terms[0]
    made = _statistics(x, 0 if stats is not None else norm, groups)
    return _feature_map(x, None if coefs.numel() else 0), _feature_map(x), made


def _norm_act_vjp(
    h: Tensor, cot: Tensor, stats: Tensor, weight: MaybeTensor, bias: MaybeTensor, addends: Sequence[Tensor],
    coefs: Tensor, param_grads: bool, norm: int, groups: int, eps: float, act: int, p: float, q: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count = h.shape[1] if param_grads else 0
    return _feature_map(h), _vector(h, count), _vector(h, count)


def _norm_act_dual(
    h: Tensor, t: Tensor, weight: MaybeTensor, bias: MaybeTensor, stats: MaybeTensor, norm: int, groups: int,
    eps: float, act: int, p: float, q: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = _statistics(h, 0 if stats is not None else norm, groups)
    return _feature_map(h, 2 * h.shape[0]), made, _statistics(h, 0 if norm == NORM_CODE["fixed"] else norm, groups)


def _norm_act_second(
    h: Tensor, t: Tensor, cot: Tensor, stats: Tensor, tstats: Tensor, weight: MaybeTensor, bias: MaybeTensor,
    addends: Sequence[Tensor], coefs: Tensor, param_grads: bool, tangent: bool, norm: int, groups: int, eps: float,
    act: int, p: float, q: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count = h.shape[1] if param_grads else 0
    return _feature_map(h, (2 if tangent else 1) * h.shape[0]), _vector(h, count), _vector(h, count)


def _dots(v: Tensor, terms: Sequence[Tensor]) -> Tensor:
    return _vector(v, len(terms))


def _move_running(
    means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[Tensor], met: Sequence[Tensor],
    factors: Sequence[float], unbiased: Sequence[float],
) -> None:  # fmt: skip
    pass


# ---- resident: blocks


def _alike(x: Tensor) -> Tensor:
    """A result that lies as x does."""
    return _map(x, x.shape, x.stride(1) == 1 and x.shape[1] > 1)


def _left(keep: int) -> list[Tensor]:
    """What is left to backward, where its shape is known."""
    return [torch.empty(1, dtype=torch.int64, device="cpu")] if keep == KEEP_TICKET else []


def _met(x: Tensor, units: Sequence[int], evaluations: int) -> Tensor:
    size, channels = 0, x.shape[1]
    for at in range(0, len(units), UNIT_INTEGERS):
        norm, _, _, out_channels, _, _, bits = units[at : at + UNIT_INTEGERS]
        size += 2 * channels if norm == NORM_CODE["batch"] else 0
        channels = out_channels if bits & CONV_WEIGHT else channels
    return x.new_empty(evaluations * size, dtype=_accumulator(x))


def _gradients(parameters: Sequence[Tensor], units: Sequence[int], wanted: bool) -> list[Tensor]:
    """Running statistics have an empty one."""
    if not wanted:
        return []
    sizes: list[bool] = []
    for bits in units[UNIT_INTEGERS - 1 :: UNIT_INTEGERS]:
        norm, running, conv = (WEIGHT, BIAS), (RUNNING, RUNNING), (CONV_WEIGHT, CONV_BIAS)
        sizes += [bit != RUNNING for bit in (*norm, *running, *conv) if bits & bit]
    return [_gradient(p) if full else p.new_empty(0) for p, full in zip(parameters, sizes, strict=True)]


def _gradient(p: Tensor) -> Tensor:
    """On the CPU that of a convolution's weight is in channels_last where the weight is."""
    last = p.dim() == 4 and p.shape[1] > 1 and p.stride() == _map(p, p.shape, True).stride()
    return _map(p, p.shape, last) if p.dim() == 4 and p.device.type == "cpu" else p.new_empty(p.shape)


def _ie_forward(
    x: Tensor, parameters: Sequence[Tensor], units: Sequence[int], numbers: Sequence[float], steps: int,
    step_size: float, theta: float, keep: int, keep_all: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x), _met(x, units, steps + 1), _left(keep)


def _ie_backward(
    x: Tensor, cotangent: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor], units: Sequence[int],
    numbers: Sequence[float], steps: int, step_size: float, theta: float, detach: bool, gradients: bool,
    kept_all: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x), _gradients(parameters, units, gradients)


def _rk_forward(
    x: Tensor, parameters: Sequence[Tensor], units: Sequence[int], numbers: Sequence[float], table: Tensor, keep: int,
    keep_all: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x), _met(x, units, table.shape[1]), _left(keep)


def _rk_backward(
    x: Tensor, cotangent: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor], units: Sequence[int],
    numbers: Sequence[float], table: Tensor, gradients: bool, table_gradient: bool, kept_all: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    table_bar = x.new_empty(table.numel() if table_gradient else 0, dtype=torch.float64)
    return _alike(x), _gradients(parameters, units, gradients), table_bar


# ---- resident: chains


def _chain_forward(
    x: Tensor, parameters: Sequence[Tensor], units: Sequence[int], numbers: Sequence[float], strides: Sequence[int],
    lengths: Sequence[int], step: float, act: int, p: float, q: float, shape: Sequence[int], keep: int, last: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    size, start = 0, x.shape[1]
    at = 0
    for part, length in enumerate(lengths):
        channels = start
        for _ in range(length):
            norm, _, _, out_channels = units[at : at + 4]
            size += 2 * channels if norm == NORM_CODE["batch"] else 0
            channels = out_channels or channels
            at += UNIT_INTEGERS
        start = channels if part == 0 else start
    return _map(x, (x.shape[0], *shape), last), x.new_empty(size, dtype=_accumulator(x)), _left(keep)


def _chain_backward(
    x: Tensor, y: Tensor, cotangent: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor],
    units: Sequence[int], numbers: Sequence[float], strides: Sequence[int], lengths: Sequence[int], step: float,
    act: int, p: float, q: float, point: bool, gradients: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x) if point else x.new_empty(0), _gradients(parameters, units, gradients)


# ---- resident: heads


def _head_forward(x: Tensor, weight: Tensor, bias: MaybeTensor, lowers: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if lowers else x.dtype
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _head_backward(
    x: Tensor, pooled: Tensor, cotangent: Tensor, weight: Tensor, point: bool, gradients: bool
) -> tuple[Tensor, list[Tensor]]:
    bars = [torch.empty_like(weight), weight.new_empty(weight.shape[:1])] if gradients else []
    return _alike(x) if point else x.new_empty(0), bars


# ---- resident: the skew pair and its solution


def _bars(parameters: Sequence[Tensor], integers: Sequence[int], weight: bool, norms: bool) -> list[Tensor]:
    if not (weight or norms):
        return []
    wanted = [weight]
    for bits in integers[4::3]:
        wanted += [norms] * (bool(bits & WEIGHT) + bool(bits & BIAS)) + [False] * (2 if bits & RUNNING else 0)
    pairs = zip(parameters, wanted, strict=True)
    return [_gradient(p) if want else p.new_empty(0) for p, want in pairs]


def _skew_forward(
    y: Tensor, z: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float], keep: int,
    results: bool, y_last: bool, z_last: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    return _map(y, y.shape, y_last), _map(z, z.shape, z_last), _left(keep), []


def _skew_backward(
    y: Tensor, z: Tensor, y_bar: MaybeTensor, z_bar: MaybeTensor, kept: Sequence[Tensor], signs: Sequence[Tensor],
    ends: Sequence[Tensor], parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float],
    need_y: bool, need_z: bool, weight: bool, norms: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return (
        _alike(y) if need_y else y.new_empty(0),
        _alike(z) if need_z else z.new_empty(0),
        _bars(parameters, integers, weight, norms),
    )


def _march_forward(
    x: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float], table: Sequence[float],
    steps: int, used: Sequence[int], keep: int, last: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    stride = integers[0]
    return _map(x, (x.shape[0], parameters[0].shape[0], x.shape[2] // stride, x.shape[3] // stride), last), _left(keep)


def _march_backward(
    x: Tensor, cotangent: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor], integers: Sequence[int],
    numbers: Sequence[float], table: Sequence[float], steps: int, used: Sequence[int], weight: bool, norms: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x), _bars(parameters, integers, weight, norms)


def _solve_forward(
    x: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float], table: Sequence[float],
    solver: Sequence[float], limits: Sequence[int], per_sample: bool, keep: int, through: int, raises: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    stride = integers[0]
    end = _map(x, (x.shape[0], parameters[0].shape[0], x.shape[2] // stride, x.shape[3] // stride), False)
    return end, _log(x, raises), _left(keep)


def _log(x: Tensor, raises: bool) -> Tensor:
    # How many steps a solve takes depends on the data.
    return x.new_empty(0 if raises else torch.library.get_ctx().new_dynamic_size(), dtype=torch.float64)


def _solve_backward(
    x: Tensor, cotangent: Tensor, log: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor],
    integers: Sequence[int], numbers: Sequence[float], table: Sequence[float], solver: Sequence[float],
    limits: Sequence[int], per_sample: bool, through: int, weight: bool, norms: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _alike(x), _bars(parameters, integers, weight, norms)


# ---- resident: the field of two matrix products and its solution


def _matrix(like: Tensor, columns: int) -> Tensor:
    return like.new_empty(like.shape[0], columns)


def _linear_bars(parameters: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    return [p.new_empty(p.shape) for p in parameters] if gradients else []


def _linear_forward(
    y: Tensor, z: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    return _matrix(y, y.shape[1]), _matrix(z, z.shape[1])


def _linear_backward(
    y: Tensor, z: Tensor, y_bar: MaybeTensor, z_bar: MaybeTensor, parameters: Sequence[Tensor],
    integers: Sequence[int], numbers: Sequence[float], need_y: bool, need_z: bool, gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return (
        _matrix(y, y.shape[1]) if need_y else y.new_empty(0),
        _matrix(z, z.shape[1]) if need_z else z.new_empty(0),
        _linear_bars(parameters, gradients),
    )


def _linear_solve_forward(
    x: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float], table: Sequence[float],
    solver: Sequence[float], limits: Sequence[int], per_sample: bool, keep: int, through: int, raises: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _matrix(x, parameters[0].shape[0]), _log(x, raises), _left(keep)


def _linear_solve_backward(
    x: Tensor, cotangent: Tensor, log: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor],
    integers: Sequence[int], numbers: Sequence[float], table: Sequence[float], solver: Sequence[float],
    limits: Sequence[int], per_sample: bool, through: int, gradients: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    return _matrix(x, x.shape[1]), _linear_bars(parameters, gradients)


_FAKES: dict[str, Callable[..., Any]] = {
    "combine": _combine,
    "combine_pair": _combine_pair,
    "norm_act": _norm_act,
    "norm_act_vjp": _norm_act_vjp,
    "norm_act_dual": _norm_act_dual,
    "norm_act_second": _norm_act_second,
    "dots": _dots,
    "move_running": _move_running,
    "resident_ie_forward": _ie_forward,
    "resident_ie_backward": _ie_backward,
    "resident_rk_forward": _rk_forward,
    "resident_rk_backward": _rk_backward,
    "resident_chain_forward": _chain_forward,
    "resident_chain_backward": _chain_backward,
    "resident_head_forward": _head_forward,
    "resident_head_backward": _head_backward,
    "resident_skew_forward": _skew_forward,
    "resident_skew_backward": _skew_backward,
    "resident_march_forward": _march_forward,
    "resident_march_backward": _march_backward,
    "resident_solve_forward": _solve_forward,
    "resident_solve_backward": _solve_backward,
    "resident_linear_forward": _linear_forward,
    "resident_linear_backward": _linear_backward,
    "resident_linear_solve_forward": _linear_solve_forward,
    "resident_linear_solve_backward": _linear_solve_backward,
}


def register() -> None:
    """Register them all for the operators that are defined."""
    for name, fake in _FAKES.items():
        if hasattr(torch.ops.fastode, name):
            torch.library.register_fake(f"fastode::{name}", fake)
