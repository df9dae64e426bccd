"""The skew pair, and its solution by equal steps from x, on the resident engine: one operator forwards, one backwards.

Derivation: README.md of ops/skew_pair; equations are cited as (1) to (5) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._constants import ACTIVATION_CODE, BIAS, MOST_PAIR_CHANNELS, NORM_CODE, RUNNING, WEIGHT
from ..rerun import Rerun
from ..skew_pair.autograd import March, is_channels_last
from ..skew_pair.engine import TENSORS_PER_NORM, MaybeTensor, Pair
from ..sweeps import MaybeTensors
from .autograd import keeps, keeps_beside

# The bit of each of a norm's tensors; running mean and variance come together.
_PRESENT = (WEIGHT, BIAS, RUNNING, 0)

PairCode = tuple[list[Tensor], list[int], list[float]]


def why_not(pair: Pair, weight: Tensor, tensors: MaybeTensors, states: Sequence[Tensor]) -> str:
    """Why the resident engine cannot run a pair on these states (or, without any, on some); empty if it can.

    Args:
        pair: the pair's constants.
        weight: of W.
        tensors: four for each norm.
        states: y and z, or the z that a block starts from.
    """
    stride, padding, (height, width) = pair.stride, pair.padding, weight.shape[2:]
    odd = stride == 1 and height % 2 == 1 and padding == height // 2
    halving = stride == 2 and height == 4 and padding == 1
    if height != width or not (odd or halving):
        return "it has kernels for odd sides at stride 1 that keep the size, and for 4×4 at stride 2 with padding 1"
    if any(norm is not None and norm.mode == "batch" for norm in pair.norms):
        return "a batch norm of the skew pair couples the samples, which it takes one by one"
    if any(pair.tracked):
        return "it has no running statistics of an instance norm"
    if pair.lower is not None:
        return "it does not lower convolutions as autocast asks"
    if max(weight.shape[:2]) > MOST_PAIR_CHANNELS:
        return f"it has the skew pair for at most {MOST_PAIR_CHANNELS} channels"
    if not states:
        return ""
    if any(tensor is not None and tensor.dtype != states[-1].dtype for tensor in (weight, *tensors)):
        return "its parameters are not of the input's dtype"
    return ""


def encode(pair: Pair, weight: Tensor, tensors: MaybeTensors) -> PairCode:
    """A pair as the operators take it (csrc/cpu/resident/skew_engine.h): present tensors, integers, numbers."""
    activation = pair.activation
    present = [weight]
    integers = [pair.stride, 0 if activation is None else ACTIVATION_CODE[activation.kind]]
    numbers = [pair.gamma, *((0.0, 0.0) if activation is None else (activation.p, activation.q))]
    for which, norm in enumerate(pair.norms):
        row = tensors[which * TENSORS_PER_NORM : (which + 1) * TENSORS_PER_NORM]
        bits = sum(bit for bit, tensor in zip(_PRESENT, row, strict=True) if tensor is not None)
        integers += [0, 1, bits] if norm is None else [NORM_CODE[norm.mode], norm.groups, bits]
        numbers.append(0.0 if norm is None else norm.eps)
        present += [tensor for tensor in row if tensor is not None]
    return present, integers, numbers


def _norms_used(pair: Pair, slope_y: bool, slope_z: bool) -> list[bool]:
    """Which of the four norms (before W on y and z, after the activation on each) those slopes depend on, and so which
    halves of the point.
    """
    damped = pair.gamma != 0
    return [slope_z or (damped and slope_y), slope_y or (damped and slope_z), slope_y, slope_z]


def _of_tensors(norms_used: Sequence[bool], wanted: Sequence[bool]) -> list[bool]:
    """Which of the norms' tensors have a gradient: as in the reference, not one that nothing depends on."""
    return [want and norms_used[index // TENSORS_PER_NORM] for index, want in enumerate(wanted)]


def _align(tensors: MaybeTensors, bars: Sequence[Tensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
    """The operator's gradients, one for each present tensor, beside all tensors; None where none is wanted."""
    if not bars:
        return [None] * len(tensors)
    found = iter(bars)
    beside = [None if tensor is None else next(found) for tensor in tensors]
    return [bar if want else None for bar, want in zip(beside, wanted, strict=True)]


def _slopes_of(ctx: Any) -> list[Tensor]:
    """What forward has left beside the saved tensors; it goes when these go."""
    slopes: list[Tensor] = ctx.slopes
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.slopes = []
    return slopes


class ResidentSkewFunction(torch.autograd.Function):
    """(ẏ, ż) at (y, z)."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, pair: Pair, rerun: Rerun | None, *tensors: MaybeTensor
    ) -> tuple[Tensor, Tensor]:
        # The memory formats that PyTorch's convolution and its transpose give the slopes.
        last = [is_channels_last(x) or is_channels_last(weight) for x in (z, y)]
        beside = keeps_beside(ctx)
        dy, dz, kept, signs = torch.ops.fastode.resident_skew_forward(
            y, z, *encode(pair, weight, tensors), keeps(ctx), beside, last[0], last[1]
        )
        # Signs are read beside the slopes. These are the user's, who may write to them, and so no saved tensors.
        ctx.slopes = [dy.detach(), dz.detach()] if signs else []
        ctx.save_for_backward(y, z, weight, *tensors, *signs, *kept)
        ctx.pair, ctx.rerun, ctx.count, ctx.signs = pair, rerun, len(tensors), len(signs)
        ctx.set_materialize_grads(False)
        return dy, dz

    @staticmethod
    def backward(ctx: Any, dy_bar: MaybeTensor, dz_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        y, z, weight, *rest = ctx.saved_tensors
        tensors, found, slopes = rest[: ctx.count], rest[ctx.count :], _slopes_of(ctx)
        signs, kept = found[: ctx.signs], found[ctx.signs :]
        if any(slope._version for slope in slopes):  # written over since: everything is evaluated again
            kept, signs, slopes = [], [], []
        wanted = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])
        given = dz_bar if dy_bar is None else dy_bar
        if given is None:
            return (None,) * (5 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(dy_bar, dz_bar):
            bars = [torch.zeros_like(x) if bar is None else bar for bar, x in ((dy_bar, y), (dz_bar, z))]
            y_bar, z_bar, *grads = ctx.rerun.gradients([y, z, weight, *tensors], [weight, *tensors], wanted, 2, bars)
        else:
            used = _norms_used(ctx.pair, dy_bar is not None, dz_bar is not None)
            wanted = (wanted[0] and used[0], wanted[1] and used[1], wanted[2], *_of_tensors(used, wanted[3:]))
            y_bar, z_bar, bars = torch.ops.fastode.resident_skew_backward(
                y, z, dy_bar, dz_bar, kept, signs, slopes, *encode(ctx.pair, weight, tensors), wanted[0], wanted[1],
                wanted[2], any(wanted[3:]),
            )  # fmt: skip
            grads = _align([weight, *tensors], bars, wanted[2:])
        return (y_bar if wanted[0] else None, z_bar if wanted[1] else None, grads[0], None, None, *grads[1:])


class ResidentMarchFunction(torch.autograd.Function):
    """y(t₁) from x, which is z(0) and, repeated along the channels, y(0)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, pair: Pair, march: March, rerun: Rerun | None, *tensors: MaybeTensor
    ) -> Tensor:
        end, kept = torch.ops.fastode.resident_march_forward(
            x, *encode(pair, weight, tensors), *_march_code(march, pair), keeps(ctx), is_channels_last(x)
        )
        ctx.save_for_backward(x, weight, *tensors, *kept)
        ctx.pair, ctx.march, ctx.rerun, ctx.count = pair, march, rerun, len(tensors)
        ctx.set_materialize_grads(False)
        return end

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        x, weight, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.count], rest[ctx.count :]
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        if end_bar is None:
            return (None,) * (5 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(end_bar):
            x_bar, *grads = ctx.rerun.gradients([x, weight, *tensors], [weight, *tensors], wanted, 1, [end_bar])
        else:
            slopes = [both for step in ctx.march.used(ctx.pair.gamma != 0) for both in step]
            used = _norms_used(ctx.pair, any(y for y, _ in slopes), any(z for _, z in slopes))
            wanted = (*wanted[:2], *_of_tensors(used, wanted[2:]))
            x_bar, bars = torch.ops.fastode.resident_march_backward(
                x, end_bar, kept, *encode(ctx.pair, weight, tensors), *_march_code(ctx.march, ctx.pair), wanted[1],
                any(wanted[2:]),
            )  # fmt: skip
            grads = _align([weight, *tensors], bars, wanted[1:])
        return (x_bar if wanted[0] else None, grads[0], None, None, None, *grads[1:])


def _march_code(march: March, pair: Pair) -> tuple[list[float], int, list[int]]:
    """The tableau times the step, the number of steps, and which slopes the result depends on."""
    stages = len(march.b)
    rows = [(*row, *(0.0,) * (stages - len(row))) for row in (*march.a, march.b)]
    used = [int(half) for stage in march.used(pair.gamma != 0) for both in stage for half in both]
    return [march.step * value for row in rows for value in row], march.steps, used
