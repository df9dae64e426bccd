"""The skew pair, and its solution by equal steps from x, on the resident engine: one operator forwards, one backwards.

Derivation: README.md of ops/schemes/skew_pair; equations are cited as (1) to (5) from there. `tensors` are W's weight
and then four of each norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...native import nodes
from ...native.constants import KEEP_PIECES
from ..function import NodeFunction, gradients
from ..maps import is_channels_last
from ..plan import TENSORS_PER_NORM, MaybeTensor, MaybeTensors, activation_codes, norm_codes
from ..rerun import Rerun
from ..schemes.skew_pair.march import March
from ..schemes.skew_pair.pair import Pair
from .call import beside, encode_again, present_bits
from .functions import keeps, keeps_beside, with_leaves

_PROGRAM = "resident node"  # in a pair's memo

PairCode = tuple[list[Tensor], list[int], list[float]]


def encode(pair: Pair, tensors: MaybeTensors) -> PairCode:
    """A pair as the operators take it (csrc/cpu/resident/skew_engine.h): present tensors, integers, numbers."""
    kind, p, q = activation_codes(pair.activation)
    integers, numbers = [pair.stride, kind], [pair.gamma, p, q]
    for which, norm in enumerate(pair.norms):
        bits = present_bits(tensors, 1 + which * TENSORS_PER_NORM, TENSORS_PER_NORM)
        mode, groups, eps = norm_codes(norm)
        integers += [mode, groups, bits]
        numbers.append(eps)
    return [tensor for tensor in tensors if tensor is not None], integers, numbers


def _norms_used(pair: Pair, slope_y: bool, slope_z: bool) -> list[bool]:
    """Which of the four norms (before W on y and z, after the activation on each) those slopes depend on, and so which
    halves of the point.
    """
    damped = pair.gamma != 0
    return [slope_z or (damped and slope_y), slope_y or (damped and slope_z), slope_y, slope_z]


def of_tensors(norms_used: Sequence[bool], wanted: Sequence[bool]) -> list[bool]:
    """Of W's weight and the norms' tensors, those that have a gradient: not one that nothing depends on."""
    rest = [want and norms_used[index // TENSORS_PER_NORM] for index, want in enumerate(wanted[1:])]
    return [wanted[0], *rest]


def only(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
    return [bar if want else None for bar, want in zip(bars, wanted, strict=True)]


def _slopes_of(ctx: Any) -> list[Tensor]:
    """The slopes kept beside the saved tensors, dropped when the graph drops those."""
    slopes: list[Tensor] = ctx.slopes
    if not slopes:
        return []
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.slopes = []
    return slopes


def _program(pair: Pair, tensors: MaybeTensors, march: March | None = None) -> Any:
    """The pair, or its solution by a march, as the nodes take it; kept beside the pair."""
    kept = pair.memo.get(_PROGRAM)
    if kept is None or kept[0] is not march:
        code = encode(pair, tensors)[1:]
        made = nodes.module.program(*code, *(() if march is None else _march_code(march, pair)))
        kept = pair.memo[_PROGRAM] = march, made
    return kept[1]


class ResidentSkewFunction(NodeFunction):
    """(ẏ, ż) at (y, z)."""

    constants = ("pair", "rerun")

    @classmethod
    def through_node(cls, pair: Pair, rerun: Rerun | None, given: MaybeTensors) -> Any:
        return nodes.module.pair(_program(pair, given[2:]), (cls, pair, rerun), given)

    @staticmethod
    def forward(ctx: Any, pair: Pair, rerun: Rerun | None, y: Tensor, z: Tensor, *tensors: MaybeTensor) -> Any:
        weight = tensors[0]
        assert weight is not None
        # The memory formats that PyTorch's convolution and its transpose give the slopes.
        last = [is_channels_last(x) or is_channels_last(weight) for x in (z, y)]
        present, *code = encode(pair, tensors)
        dy, dz, kept, signs = torch.ops.fastode.resident_skew_forward.default(
            y, z, present, *code, keeps(ctx, y), keeps_beside(ctx, y) == KEEP_PIECES, last[0], last[1]
        )
        # Signs are read beside the slopes. These are the user's, who may write to them, and so no saved tensors.
        ctx.slopes = [dy.detach(), dz.detach()] if signs else []
        ctx.save_for_backward(y, z, *tensors, *signs, *kept)
        ctx.pair, ctx.rerun, ctx.count, ctx.signs, ctx.code = pair, rerun, 2 + len(tensors), len(signs), code
        ctx.set_materialize_grads(False)
        return dy, dz

    @staticmethod
    def backward(ctx: Any, dy_bar: MaybeTensor, dz_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        saved = ctx.saved_tensors
        given, left, slopes = saved[: ctx.count], saved[ctx.count :], _slopes_of(ctx)
        signs, kept = left[: ctx.signs], left[ctx.signs :]
        if any(slope._version for slope in slopes):  # written over since: everything is evaluated again
            kept, signs, slopes = (), (), []

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            y, z, *tensors = given
            used = _norms_used(ctx.pair, bars[0] is not None, bars[1] is not None)
            ends = (wanted[0] and used[0], wanted[1] and used[1])
            asked = of_tensors(used, wanted[2:])
            y_bar, z_bar, found = torch.ops.fastode.resident_skew_backward.default(
                y,
                z,
                *bars,
                with_leaves(kept, tensors, asked),
                list(signs),
                slopes,
                *encode_again(ctx, tensors, lambda: encode(ctx.pair, tensors)),
                *ends,
                asked[0],
                any(asked[1:]),
            )
            return [*only((y_bar, z_bar), ends), *only(beside(tensors, found), asked)]

        return gradients(ctx, given, [dy_bar, dz_bar], pull)


class ResidentMarchFunction(NodeFunction):
    """y(t₁) from x, which is z(0) and, repeated along the channels, y(0)."""

    constants = ("pair", "march", "rerun")

    @classmethod
    def through_node(cls, pair: Pair, march: March, rerun: Rerun | None, given: MaybeTensors) -> Any:
        found = nodes.module.march(_program(pair, given[1:], march), (cls, pair, march, rerun), given)
        return found if found is NotImplemented else (found,)

    @staticmethod
    def forward(
        ctx: Any, pair: Pair, march: March, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor
    ) -> tuple[Tensor]:
        present, *code = _encode_march(pair, march, tensors)
        end, kept = torch.ops.fastode.resident_march_forward.default(
            x, present, *code, keeps(ctx, x), is_channels_last(x)
        )
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.pair, ctx.march, ctx.rerun, ctx.count, ctx.code = pair, march, rerun, 1 + len(tensors), code
        ctx.set_materialize_grads(False)
        return (end,)

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        saved = ctx.saved_tensors
        given, kept = saved[: ctx.count], saved[ctx.count :]

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            x, *tensors = given
            code = encode_again(ctx, tensors, lambda: _encode_march(ctx.pair, ctx.march, tensors))
            slopes = code[-1]
            used = _norms_used(ctx.pair, 1 in slopes[::2], 1 in slopes[1::2])
            asked = of_tensors(used, wanted[1:])
            x_bar, found = torch.ops.fastode.resident_march_backward.default(
                x, bars[0], with_leaves(kept, tensors, asked), *code, asked[0], any(asked[1:])
            )
            return [x_bar, *only(beside(tensors, found), asked)]

        return gradients(ctx, given, [end_bar], pull)


def _encode_march(pair: Pair, march: March, tensors: MaybeTensors) -> tuple[Any, ...]:
    """A solution by a march as its operators take it."""
    return *encode(pair, tensors), *_march_code(march, pair)


def _march_code(march: March, pair: Pair) -> tuple[list[float], int, list[int]]:
    """The tableau times the step, the number of steps, and which slopes the result depends on."""
    stages = len(march.b)
    rows = [(*row, *(0.0,) * (stages - len(row))) for row in (*march.a, march.b)]
    used = [int(half) for stage in march.used(pair.gamma != 0) for both in stage for half in both]
    return [march.step * value for row in rows for value in row], march.steps, used
