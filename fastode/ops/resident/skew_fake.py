"""What the skew pair's resident operators return, in shapes and types only: for torch.compile and FakeTensor.

Nothing is kept for backward under a tracer: what would be depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._constants import BIAS, RUNNING, WEIGHT


def _map(like: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    return _map(x, x.shape, x.stride(1) == 1 and x.shape[1] > 1) if wanted else x.new_empty(0)


def _bars(parameters: Sequence[Tensor], integers: Sequence[int], weight: bool, norms: bool) -> list[Tensor]:
    if not (weight or norms):
        return []
    wanted = [weight]
    for bits in integers[4::3]:
        wanted += [norms] * (bool(bits & WEIGHT) + bool(bits & BIAS)) + [False] * (2 if bits & RUNNING else 0)
    pairs = zip(parameters, wanted, strict=True)
    return [p.new_empty(p.shape if want else (0,)) for p, want in pairs]


def _skew_forward(y, z, parameters, integers, numbers, keep, results, y_last, z_last):
    return _map(y, y.shape, y_last), _map(z, z.shape, z_last), [], []


def _skew_backward(y, z, y_bar, z_bar, kept, signs, ends, parameters, integers, numbers, need_y, need_z, weight, norms):
    return _like(y, need_y), _like(z, need_z), _bars(parameters, integers, weight, norms)


def _march_forward(x, parameters, integers, numbers, table, steps, used, keep, last):
    stride = integers[0]
    return _map(x, (x.shape[0], parameters[0].shape[0], x.shape[2] // stride, x.shape[3] // stride), last), []


def _march_backward(x, cotangent, kept, parameters, integers, numbers, table, steps, used, weight, norms):
    return _like(x), _bars(parameters, integers, weight, norms)


FAKES = {
    "skew_forward": _skew_forward,
    "skew_backward": _skew_backward,
    "march_forward": _march_forward,
    "march_backward": _march_backward,
}
