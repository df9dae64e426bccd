"""A chain, and a block that may change the shape, on the resident engine: one operator forwards, one backwards.

The mathematics is that of ops/schemes/chain, in C++. Under autocast to bfloat16 every map behind a convolution is
bfloat16, so that the operators get x in that dtype where nothing but convolutions reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...branch.layers import Conv
from ...native import nodes
from ...native.constants import KEEP_NOTHING
from ..function import NodeFunction, gradients
from ..maps import cast, last_of, lowered
from ..plan import MaybeTensor, MaybeTensors, Plan, activation_codes
from ..rerun import Rerun
from ..schemes.chain.chain import Chain
from . import bfloat16, one_evaluation, rule
from .call import beside, encode_again, encode_units, met_by
from .functions import keeps_beside, packed, save, take_kept
from .one_evaluation import FEWEST, convolutions
from .rule import SLOWER

# In a chain's memo.
_CODE, _RESULT, _PROGRAM = "resident chain", "resident chain's result", "resident chain's node"

# One convolution of an image in contiguous memory, with more entries behind it than this, two threads of an AMD EPYC,
# 2026-11-29, 250 random stems from 7x7 to 32x32, 2 to 64 samples, in the slowest mode (forward, attack's and training
# step): of 8 channels 0.69 to 1.4 of eager's speed; with GELU and no norm 0.80 to 1.1; others 0.98 to 2.5, median 1.5.
MOST_ALONE = 1 << 17

Code = tuple[list[int], list[float], list[int], list[int], float, int, float, float]


def refuses(chain: Chain, x: Tensor | None) -> str:
    """Why the engine cannot run a chain; empty if it can."""
    if x is not None and x.dtype == torch.float32 and chain.lower is not None:
        # Behind a norm, or added to something, the maps of the reference are float32.
        readers = chain.plans[:1] if chain.lead.units else chain.plans[1:]
        if not all(map(_begins_with_convolution, readers)):
            return "under autocast it takes float32 maps that convolutions alone read"
    for plan in chain.plans:
        for unit, tracks in zip(plan.units, plan.tracked, strict=True):
            conv, norm = unit.conv, unit.norm
            if norm is not None and norm.mode == "group" and tracks:
                return "it has no running statistics of an instance norm"
            if conv is None or conv.mean:
                continue
            if conv.groups != 1 or conv.dilation != (1, 1):
                return "it has kernels for convolutions without groups and dilation only"
            keeps = all(
                side % 2 == 1 and padding == side // 2 for side, padding in zip(conv.kernel, conv.padding, strict=True)
            )
            if not keeps:
                return "it has convolutions with odd sides, padded by half of them, only"
            if conv.stride not in ((1, 1), (2, 2)) or (conv.stride != (1, 1) and not {*conv.kernel} <= {1, 3}):
                return "it has convolutions of stride 1, and of stride 2 with sides of 1 and 3, only"
    return _refuses_means(chain)


def _begins_with_convolution(plan: Plan) -> bool:
    first = plan.units[0] if plan.units else None
    if first is None or first.conv is None or first.conv.mean:
        return False
    return first.norm is None and first.activation is None


def _refuses_means(chain: Chain) -> str:
    for unit in chain.units:
        conv = unit.conv
        if conv is not None and conv.mean and conv.stride[0] != conv.stride[1]:
            return "it has means over windows with one stride for both sides only"
    return ""


def slower(x: Tensor, chain: Chain) -> str:
    """Why the engine is taken to be slower than plain PyTorch; empty where it is not."""
    if not any(unit.conv is not None and not unit.conv.mean for unit in chain.units):
        return f"without a convolution {SLOWER}"
    normed = any(unit.norm is not None for unit in chain.units)
    coupled = any(unit.norm is not None and unit.norm.mode == "batch" for unit in chain.units)
    found = convolutions(chain.plans, x)
    entries, largest, widest, uneven, untiled = 0, 0, 0, False, 0
    for channels, height, width in [(x.shape[1], x.shape[2], x.shape[3]), *[after for _, _, after in found]]:
        if channels * height * width > entries:
            entries, largest = channels * height * width, channels
        widest = max(widest, channels)
        uneven = uneven or rule.is_uneven(channels, height, width)
        untiled = untiled if bfloat16.fills_tiles(width) else max(untiled, channels)
    pixels = -(-entries // widest)
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and chain.lower is not None):
        if bfloat16.is_filtered_whole(x, [(conv, before[1], before[2]) for conv, before, _ in found]):
            return ""
        convs = [unit.conv for unit in chain.units if unit.conv is not None and not unit.conv.mean]
        fewest, count = of_few_channels(convs)
        known = bfloat16.OneEvaluation(fewest, widest, pixels, untiled, count, normed, coupled)
        return bfloat16.slower_chain(x, known, casts=chain.lower is not None)
    # Every sample's maps are read at each batch norm, and those of few channels are kept as wide as a vector.
    if coupled and largest < FEWEST:
        return f"with batch norms of fewer than {FEWEST} channels {SLOWER}"
    if x.dtype == torch.float32 and uneven:
        wide, even = rule.UNEVEN
        beyond = (
            f"with an uneven map of {wide} channels and more whose pixels are more than {even} and no multiple of it"
        )
        return f"{beyond} {SLOWER}"
    # The bound on channels is of the widest map, that on memory of the largest.
    return one_evaluation.slower(x, found, normed, coupled, widest, pixels)


def slower_alone(x: Tensor, chain: Chain) -> str:
    """Why one convolution, and what is around it, is taken to be slower than plain PyTorch; empty where it is not.

    In contiguous memory, between which and the engine's own order maps are moved one more time.
    """
    convs = [unit.conv for unit in chain.units if unit.conv is not None and not unit.conv.mean]
    samples, last = rule.samples(x), x.is_contiguous(memory_format=torch.channels_last)
    if len(convs) != 1 or chain.branch is not None or samples is None or last or not rule.multiplies_pairs():
        return ""
    ((channels, height, width),) = [after for conv, _, after in convolutions(chain.plans, x) if not conv.mean]
    if samples * channels * height * width <= MOST_ALONE:
        return ""
    normed = any(unit.norm is not None for unit in chain.units)
    gelu = any(unit.activation is not None and unit.activation.kind == "gelu" for unit in chain.units)
    if channels >= FEWEST and (normed or not gelu):
        return ""
    what = f"of fewer than {FEWEST} channels" if channels < FEWEST else "with GELU and no norm"
    return f"for one convolution {what} and more than {MOST_ALONE} entries not in channels_last, {SLOWER}"


def of_few_channels(convs: Sequence[Conv]) -> tuple[int, int]:
    """The channels of the narrowest map that a convolution reads, and `OneEvaluation.convolutions`."""
    narrow = [conv for conv in convs if conv.in_channels < FEWEST]
    simple = all(max(conv.kernel) <= 3 and conv.stride == (1, 1) for conv in narrow)
    fewest = min([conv.in_channels for conv in convs]) if convs else FEWEST  # a tracer knows no `default`
    return fewest, len(convs) if simple else 0


def _result(chain: Chain, x: Tensor) -> list[int]:
    """Channels, height and width of the result."""
    if torch.compiler.is_compiling():
        return _find_result(chain, x)
    last = chain.memo.get(_RESULT)
    if last is None or last[0] != x.shape:
        last = chain.memo[_RESULT] = (x.shape, _find_result(chain, x))
    return last[1]


def _find_result(chain: Chain, x: Tensor) -> list[int]:
    count, height, width = x.shape[1], x.shape[2], x.shape[3]
    for plan in chain.plans[:2]:
        for unit in plan.units:
            if unit.conv is not None:
                count = unit.conv.channels_after(count) or 0
                height, width = unit.conv.size_after(height, width)
    return [count, height, width]


def _encode(chain: Chain, tensors: MaybeTensors, channels: int) -> tuple[Any, ...]:
    """The tensors that are present, and the constants as the operators take them (csrc/cpu/resident/chain.h)."""
    present = [tensor for tensor in tensors if tensor is not None]
    code: Code | None = None if torch.compiler.is_compiling() else chain.memo.get(_CODE)
    if code is None:
        integers, numbers = encode_units(chain.units, tensors)
        strides: list[int] = []
        count = start = channels
        at = 0
        for index, plan in enumerate(chain.plans):
            count = start
            for unit in plan.units:
                conv = unit.conv
                after = count if conv is None else conv.channels_after(count) or 0
                strides.append(1 if conv is None else -conv.stride[0] if conv.mean else conv.stride[0])
                if conv is not None and conv.mean:
                    integers[at + 3] = after
                count = after
                at += len(integers) // len(chain.units)
            start = count if index == 0 else start
        lengths = [len(plan.units) for plan in chain.plans]
        lengths += [0] * (3 - len(lengths))
        code = (integers, numbers, strides, lengths, chain.step_size, *activation_codes(chain.activation))
        if not torch.compiler.is_compiling():
            chain.memo[_CODE] = code
    return present, *code


class ResidentChainFunction(NodeFunction):
    """y and the statistics of each batch norm; keeps x and the inputs of all units."""

    constants = ("chain", "rerun")

    @classmethod
    def through_node(cls, chain: Chain, rerun: Rerun | None, given: MaybeTensors) -> Any:
        x, memo = given[0], chain.memo
        assert x is not None
        if x.dtype == torch.float32 and chain.lower is not None:
            x = lowered(chain.lower, x)  # in the graph, as convolutions under autocast have it
            given = (x, *given[1:])
        program = memo.get(_PROGRAM)
        if program is None:
            code = _encode(chain, given[1:], x.shape[1])[1:]
            program = memo[_PROGRAM] = nodes.module.chain_program(*code, _reads_result(chain))
        found = nodes.module.chain(program, (cls, chain, rerun), given, _result(chain, x))
        if type(found) is not tuple:
            return found if found is NotImplemented else (found,)
        return (found[0], *met_by(chain.plans, memo, found[1]))

    @staticmethod
    def forward(ctx: Any, chain: Chain, rerun: Rerun | None, x: Tensor, *tensors: MaybeTensor) -> Any:
        encoded = _encode(chain, tensors, x.shape[1])
        y, flat, kept = _forward(chain, x, tensors, encoded, keeps_beside(ctx, x))
        save(ctx, (x, *tensors), kept, [y] if _reads_result(chain) else [])
        ctx.chain, ctx.rerun, ctx.code = chain, rerun, encoded[1:]
        ctx.set_materialize_grads(False)
        return packed(ctx, y, flat, chain.plans)

    @staticmethod
    def backward(ctx: Any, y_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        saved, chain = ctx.saved_tensors, ctx.chain
        given, after = saved[: ctx.count], saved[ctx.count :]

        def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
            (bar,), (x, *tensors) = bars, given
            encoded = encode_again(ctx, tensors, lambda: _encode(chain, tensors, x.shape[1]))
            y = x
            if _reads_result(chain):  # which a node in C++ does not hand over
                y = after[0] if after else _forward(chain, x, tensors, encoded, KEEP_NOTHING)[0]
            x_bar, found = torch.ops.fastode.resident_chain_backward.default(
                lowered(chain.lower, x), y, bar, take_kept(ctx, wanted), *encoded, wanted[0], any(wanted[1:])
            )
            return [cast(x_bar, x.dtype) if wanted[0] else None, *beside(tensors, found)]

        return gradients(ctx, given, [y_bar], pull)


def _reads_result(chain: Chain) -> bool:
    """Whether backward tells the last activation's slope from the result."""
    return chain.activation is not None and chain.activation.kind == "relu"


def _forward(
    chain: Chain, x: Tensor, tensors: MaybeTensors, encoded: Sequence[Any], keep: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    made: tuple[Tensor, Tensor, list[Tensor]] = torch.ops.fastode.resident_chain_forward.default(
        lowered(chain.lower, x), *encoded, _result(chain, x), keep, last_of(x, tensors)
    )
    return made
