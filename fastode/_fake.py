"""What the operators return, in shapes and types only: for torch.compile and FakeTensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._constants import NORM_CODE

GROUP, FIXED = NORM_CODE["group"], NORM_CODE["fixed"]


def _feature_map(x: Tensor, samples: int | None = None) -> Tensor:
    shape = (x.shape[0] if samples is None else samples, *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vector(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_accumulator(x))


def _statistics(x: Tensor, norm: int, groups: int) -> Tensor:
    if norm == GROUP:
        return _vector(x, 2, x.shape[0], groups)
    return _vector(x, 2, x.shape[1] if norm else 0)


def _combine(terms: Sequence[Tensor], coefs: Tensor, act: int, p: float, q: float) -> Tensor:
    return _feature_map(terms[0])


def _combine_pair(first: Sequence[Tensor], second: Sequence[Tensor], coefs: Tensor) -> Tensor:
    return _feature_map(first[0], 2 * first[0].shape[0])


def _norm_act(terms, coefs, weight, bias, stats, norm, groups, eps, act, p, q):
    x = terms[0]
    made = _statistics(x, 0 if stats is not None else norm, groups)
    return _feature_map(x, None if coefs.numel() else 0), _feature_map(x), made


def _norm_act_vjp(h, cot, stats, weight, bias, addends, coefs, param_grads, norm, groups, eps, act, p, q):
    count = h.shape[1] if param_grads else 0
    return _feature_map(h), _vector(h, count), _vector(h, count)


def _norm_act_dual(h, t, weight, bias, stats, norm, groups, eps, act, p, q):
    made = _statistics(h, 0 if stats is not None else norm, groups)
    return _feature_map(h, 2 * h.shape[0]), made, _statistics(h, 0 if norm == FIXED else norm, groups)


def _norm_act_second(
    h, t, cot, stats, tstats, weight, bias, addends, coefs, param_grads, tangent, norm, groups, eps, act, p, q
):
    count = h.shape[1] if param_grads else 0
    return _feature_map(h, (2 if tangent else 1) * h.shape[0]), _vector(h, count), _vector(h, count)


def _dots(v: Tensor, terms: Sequence[Tensor]) -> Tensor:
    return _vector(v, len(terms))


def register() -> None:
    """Register them all; the operators must have been loaded."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"fastode::{name}", fake)


_FAKES = {
    "combine": _combine,
    "combine_pair": _combine_pair,
    "norm_act": _norm_act,
    "norm_act_vjp": _norm_act_vjp,
    "norm_act_dual": _norm_act_dual,
    "norm_act_second": _norm_act_second,
    "dots": _dots,
}
