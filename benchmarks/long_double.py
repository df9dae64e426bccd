"""Tensors of numpy's long double beneath PyTorch's autograd, which takes them for float64.

On x86 a long double has 64 bits of mantissa, eleven more than float64. The operators here are those that the
references' blocks call, forwards and backwards; norms are none of them (wide.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

aten = torch.ops.aten
Array = np.ndarray[Any, Any]
Pair = Sequence[int]

WIDER = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant  # not on every machine

_HANDLERS: dict[Any, Callable[..., Any]] = {}


class Wide(Tensor):
    """A tensor that autograd takes for float64 and whose values are long doubles, always contiguous in name."""

    values: Array

    @staticmethod
    def __new__(cls, values: Array) -> Wide:
        shape = tuple(values.shape)
        made: Wide = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float64)
        made.values = values
        return made

    @classmethod
    def of(cls, t: Tensor) -> Wide:
        """The same values."""
        return cls(t.detach().double().contiguous().numpy().astype(np.longdouble))

    def __deepcopy__(self, memo: dict[int, Any]) -> Wide:
        made = memo[id(self)] = Wide(self.values.copy()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made._is_param = True
        return made

    def rounded(self) -> Tensor:
        """The values as float64."""
        return torch.from_numpy(self.values.astype(np.float64))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func.overloadpacket)
        if handler is None:
            raise NotImplementedError(f"{func} in long double")
        return handler(*args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _values(t: Any) -> Any:
    if isinstance(t, Wide):
        return t.values
    return t.detach().numpy() if isinstance(t, Tensor) else t


def handles(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what `operators` do."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(operators, function))
        return function

    return register


def _long(t: Any) -> Any:
    """Values, or a number, as long doubles."""
    return np.asarray(_values(t)).astype(np.longdouble)


def elementwise(operator: Any, function: Callable[..., Array]) -> None:
    """An operator, and its form in place where it has one, as a function of arrays and numbers."""

    def call(first: Any, *rest: Any, **options: Any) -> Any:
        return Wide(np.asarray(function(_long(first), *map(_values, rest), **options)))

    def in_place(first: Any, *rest: Any, **options: Any) -> Any:
        first.values[...] = function(first.values, *map(_values, rest), **options)
        return first

    _HANDLERS[operator] = call
    name = operator._qualified_op_name.split("::")[1]
    if hasattr(aten, name + "_"):
        _HANDLERS[getattr(aten, name + "_")] = in_place


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    return np.where(x * beta > threshold, x, np.log1p(np.exp(np.minimum(x * beta, threshold))) / beta)


def _softplus_slope(g: Array, x: Array, beta: float = 1, threshold: float = 20) -> Array:
    return np.where(x * beta > threshold, g, g * _sigmoid(x * beta))


def _elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    return np.where(x > 0, x * scale, np.expm1(np.minimum(x, 0) * input_scale) * np.longdouble(alpha) * scale)


def _elu_slope(g: Array, alpha: float, scale: float, input_scale: float, is_result: bool, x: Array) -> Array:
    factor = np.longdouble(alpha) * scale
    below = (x + factor if is_result else factor * np.exp(np.minimum(x, 0) * input_scale)) * input_scale
    return np.where(x > 0, g * scale, g * below)


def _silu_slope(g: Array, x: Array) -> Array:
    s = _sigmoid(x)
    return g * s * (1 + x * (1 - s))


elementwise(aten.add, lambda a, b, alpha=1: a + alpha * b)
elementwise(aten.sub, lambda a, b, alpha=1: a - alpha * b)
elementwise(aten.rsub, lambda a, b, alpha=1: b - alpha * a)
elementwise(aten.mul, lambda a, b: a * b)
elementwise(aten.div, lambda a, b: a / b)
elementwise(aten.neg, lambda a: -a)
elementwise(aten.reciprocal, lambda a: 1 / a)
elementwise(aten.pow, lambda a, b: a * a if b == 2 else a**b)
elementwise(aten.sqrt, np.sqrt)
elementwise(aten.rsqrt, lambda a: 1 / np.sqrt(a))
elementwise(aten.exp, np.exp)
elementwise(aten.tanh, np.tanh)
elementwise(aten.tanh_backward, lambda g, y: g * (1 - y * y))
elementwise(aten.sigmoid, _sigmoid)
elementwise(aten.sigmoid_backward, lambda g, y: g * y * (1 - y))
elementwise(aten.relu, lambda a: np.where(a <= 0, 0, a))
elementwise(aten.threshold_backward, lambda g, x, threshold: np.where(x <= threshold, 0, g))
elementwise(aten.leaky_relu, lambda a, slope=0.01: np.where(a > 0, a, a * slope))
elementwise(aten.leaky_relu_backward, lambda g, x, slope, is_result: np.where(x > 0, g, g * slope))
elementwise(aten.elu, _elu)
elementwise(aten.elu_backward, _elu_slope)
elementwise(aten.softplus, _softplus)
elementwise(aten.softplus_backward, _softplus_slope)
elementwise(aten.silu, lambda a: a * _sigmoid(a))
elementwise(aten.silu_backward, _silu_slope)
elementwise(aten.copy, lambda a, b: np.broadcast_to(b, a.shape) + np.longdouble(0))
elementwise(aten.zero, np.zeros_like)
elementwise(aten.fill, lambda a, value: np.full_like(a, value))


def compared(operator: Any, function: Callable[..., Any]) -> None:
    """An operator that gives booleans, which are plain tensors."""
    _HANDLERS[operator] = lambda a, b: torch.from_numpy(np.asarray(function(_values(a), _values(b))))


compared(aten.eq, np.equal)
compared(aten.ne, np.not_equal)
compared(aten.lt, np.less)
compared(aten.le, np.less_equal)
compared(aten.gt, np.greater)
compared(aten.ge, np.greater_equal)


@handles(aten.where)
def _where(condition: Tensor, a: Any, b: Any) -> Wide:
    return Wide(np.where(condition.numpy(), _long(a), _long(b)))


@handles(aten.clone, aten.contiguous)
def _clone(t: Any, **_: Any) -> Wide:
    return Wide(_long(t).copy())


@handles(aten._to_copy)
def _to_copy(t: Any, dtype: torch.dtype | None = None, **_: Any) -> Wide:
    if dtype not in (None, torch.float64):
        raise NotImplementedError(f"a long double as {dtype}")
    return _clone(t)


@handles(aten.detach, aten.alias, aten.lift_fresh)
def _alias(t: Wide) -> Wide:
    return Wide(t.values[...])


@handles(aten.zeros_like, aten.empty_like)
def _zeros_like(t: Wide, **_: Any) -> Wide:
    return Wide(np.zeros_like(t.values))


@handles(aten.ones_like)
def _ones_like(t: Wide, **_: Any) -> Wide:
    return Wide(np.ones_like(t.values))


@handles(aten.new_zeros)
def _new_zeros(t: Wide, size: Pair, **_: Any) -> Wide:
    return Wide(np.zeros(tuple(size), np.longdouble))


@handles(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def _view(t: Wide, size: Pair, *_: Any) -> Wide:
    return Wide(t.values.reshape(tuple(size)))


@handles(aten.expand)
def _expand(t: Wide, size: Pair, **_: Any) -> Wide:
    lead = len(size) - t.dim()
    wanted = [t.shape[i - lead] if s == -1 else s for i, s in enumerate(size)]
    return Wide(np.broadcast_to(t.values, wanted))


@handles(aten.permute)
def _permute(t: Wide, dims: Pair) -> Wide:
    return Wide(t.values.transpose(dims))


@handles(aten.transpose)
def _transpose(t: Wide, first: int, second: int) -> Wide:
    return Wide(t.values.swapaxes(first, second))


@handles(aten.new_empty_strided)
def _new_empty_strided(t: Wide, size: Pair, stride: Pair, **_: Any) -> Wide:
    return Wide(np.zeros(tuple(size), np.longdouble))


@handles(aten.as_strided)
def _as_strided(t: Wide, size: Pair, stride: Pair, offset: int | None = 0) -> Wide:
    if t.numel() != math.prod(size) or offset or tuple(stride) != torch.empty(tuple(size), device="meta").stride():
        raise NotImplementedError("a part of a long double's memory")
    return Wide(t.values.reshape(tuple(size)))


@handles(aten.unsqueeze)
def _unsqueeze(t: Wide, dim: int) -> Wide:
    return Wide(np.expand_dims(t.values, dim))


@handles(aten.squeeze)
def _squeeze(t: Wide, dim: Any = None) -> Wide:
    dims = range(t.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return Wide(np.squeeze(t.values, tuple(d for d in dims if t.shape[d] == 1)))


@handles(aten.select)
def _select(t: Wide, dim: int, index: int) -> Wide:
    return Wide(np.moveaxis(t.values, dim, 0)[index])


@handles(aten.slice)
def _slice(t: Wide, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Wide:
    return Wide(t.values[(slice(None),) * (dim % t.dim()) + (slice(start, end, step),)])


@handles(aten.unbind)
def _unbind(t: Wide, dim: int = 0) -> list[Wide]:
    return [Wide(part) for part in np.moveaxis(t.values, dim, 0)]


@handles(aten.slice_backward)
def _slice_backward(g: Wide, size: Pair, dim: int, start: int, end: int, step: int) -> Wide:
    made = np.zeros(tuple(size), np.longdouble)
    made[(slice(None),) * dim + (slice(start, end, step),)] = g.values
    return Wide(made)


@handles(aten.cat)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Wide:
    return Wide(np.concatenate([_long(t) for t in tensors], dim))


@handles(aten.stack)
def _stack(tensors: Sequence[Any], dim: int = 0) -> Wide:
    return Wide(np.stack([_long(t) for t in tensors], dim))


@handles(aten.repeat)
def _repeat(t: Wide, repeats: Pair) -> Wide:
    return Wide(np.tile(t.values, tuple(repeats)))


@handles(aten.select_backward)
def _select_backward(g: Wide, size: Pair, dim: int, index: int) -> Wide:
    made = np.zeros(tuple(size), np.longdouble)
    np.moveaxis(made, dim, 0)[index] = g.values
    return Wide(made)


def _axes(dim: Any) -> tuple[int, ...] | None:
    return None if dim is None or dim == [] else tuple([dim] if isinstance(dim, int) else dim)


@handles(aten.sum)
def _sum(t: Wide, dim: Any = None, keepdim: bool = False, **_: Any) -> Wide:
    return Wide(np.asarray(t.values.sum(_axes(dim), keepdims=keepdim)))


@handles(aten.mean)
def _mean(t: Wide, dim: Any = None, keepdim: bool = False, **_: Any) -> Wide:
    return Wide(np.asarray(t.values.mean(_axes(dim), keepdims=keepdim)))


def _windows(x: Array, kernel: Pair, made: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Any:
    """Of each place in a kernel: the place, and what it reads of the padded map as a view [N, C, *made]."""
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    for place in product(*map(range, kernel)):
        starts = [k * d for k, d in zip(place, dilation, strict=True)]
        ends = [a + s * (m - 1) + 1 for a, s, m in zip(starts, stride, made, strict=True)]
        cut = tuple(slice(a, e, s) for a, e, s in zip(starts, ends, stride, strict=True))
        yield place, padded, (slice(None), slice(None), *cut)


def _grouped(t: Array, groups: int, axis: int) -> Array:
    return t.reshape(*t.shape[:axis], groups, t.shape[axis] // groups, *t.shape[axis + 1 :])


def _forward(x: Array, w: Array, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Array:
    kernel = w.shape[2:]
    spans = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    made = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]
    out = np.zeros((x.shape[0], w.shape[0], *made), np.longdouble)
    for place, padded, cut in _windows(x, kernel, made, stride, padding, dilation):
        taps = _grouped(w[(slice(None), slice(None), *place)], groups, 0)  # [g, O, C]
        out += np.einsum("ngchw,goc->ngohw", _grouped(padded[cut], groups, 1), taps).reshape(out.shape)
    return out


def _input_bar(g: Array, w: Array, size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Array:
    zeros = np.zeros(tuple(size), np.longdouble)
    padded_size = [n + 2 * p for n, p in zip(size[2:], padding, strict=True)]
    bar = np.zeros((*size[:2], *padded_size), np.longdouble)
    for place, _, cut in _windows(zeros, w.shape[2:], g.shape[2:], stride, padding, dilation):
        taps = _grouped(w[(slice(None), slice(None), *place)], groups, 0)
        part = np.einsum("ngohw,goc->ngchw", _grouped(g, groups, 1), taps)
        bar[cut] += part.reshape(part.shape[0], -1, *part.shape[3:])
    return bar[(..., *(slice(p, p + n) for p, n in zip(padding, size[2:], strict=True)))]


def _weight_bar(g: Array, x: Array, w: Array, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Array:
    bar = np.zeros(w.shape, np.longdouble)
    for place, padded, cut in _windows(x, w.shape[2:], g.shape[2:], stride, padding, dilation):
        part = np.einsum("ngohw,ngchw->goc", _grouped(g, groups, 1), _grouped(padded[cut], groups, 1))
        bar[(slice(None), slice(None), *place)] = part.reshape(w.shape[:2])
    return bar


@handles(aten.convolution)
def _convolution(
    x: Any, w: Any, bias: Any, stride: Pair, padding: Pair, dilation: Pair, transposed: bool, more: Pair, groups: int
) -> Wide:
    x, w = _long(x), _long(w)
    if transposed:
        spans = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, more, strict=True)
        made = [(n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, k, s, p, d, m in spans]
        out = _input_bar(x, w, (x.shape[0], w.shape[1] * groups, *made), stride, padding, dilation, groups)
    else:
        out = _forward(x, w, stride, padding, dilation, groups)
    return Wide(out if bias is None else out + _long(bias)[:, None, None])


@handles(aten.convolution_backward)
def _convolution_backward(
    g: Any, x: Any, w: Any, bias: Any, stride: Pair, padding: Pair, dilation: Pair, transposed: bool, more: Pair,
    groups: int, wanted: Sequence[bool],
) -> tuple[Any, ...]:  # fmt: skip
    g, x, w = _long(g), _long(x), _long(w)
    rest = (stride, padding, dilation, groups)
    if transposed:
        x_bar = _forward(g, w, *rest) if wanted[0] else None
        w_bar = _weight_bar(x, g, w, *rest) if wanted[1] else None
    else:
        x_bar = _input_bar(g, w, x.shape, *rest) if wanted[0] else None
        w_bar = _weight_bar(g, x, w, *rest) if wanted[1] else None
    b_bar = g.sum((0, 2, 3)) if wanted[2] else None
    return tuple(None if t is None else Wide(t) for t in (x_bar, w_bar, b_bar))
