"""Fused convolutions: norm and activation on load, combination and the next norm's sums on store. See README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import conv_plan, gather, passes, plan, product
from . import launch as launching
from .launch import GROUP, MaybeTensor, Pair, Shape, Unit, coefficients, vector
from .weights import sum_chunks_kernel, weight_gradient_kernel

# Entries that a warp reads at a time where a convolution takes its input's statistics first.
ENTRIES = 256
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


_KIND = {"": "KIND", "_IN": "KIND_IN"}


@dataclass(slots=True)
class Operand:
    """A map as a convolution reads it.

    Attributes:
        x: the map in memory, channels_last.
        kind: PLAIN: x; VALUE: act(norm(x)); PULLED: the cotangent of h for that of norm(h), which is x.
        unit: the norm and the activation, and their map h.
        stats: of h; where they are None, `convolution` computes them.
        sets: of PULLED: the means over each normalised set, from `pull`.
        weight: of the norm.
        bias: of the norm.
    """

    x: Tensor
    kind: int = gather.PLAIN.value
    unit: Unit | None = None
    stats: MaybeTensor = None
    sets: MaybeTensor = None
    weight: MaybeTensor = None
    bias: MaybeTensor = None

    @property
    def by_sample(self) -> bool:
        return self.unit is not None and self.unit.norm == GROUP

    @property
    def pointers(self) -> tuple[MaybeTensor, ...]:
        h = self.x if self.unit is None else self.unit.x
        return self.x, h, self.stats, self.sets, self.weight, self.bias

    @property
    def numbers(self) -> tuple[float, float, float]:
        return (0.0, 0.0, 0.0) if self.unit is None else self.unit.numbers

    def constants(self, suffix: str) -> Shape:
        """The operand as a kernel's constants."""
        return {_KIND[suffix]: self.kind, **norm_constants(self.unit, suffix)}


def value_of(unit: Unit, stats: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor) -> Operand:
    """act(norm(h))."""
    if unit.norm == launching.NONE and unit.act == 0:
        return Operand(unit.x)
    return Operand(unit.x, gather.VALUE.value, unit, stats, None, weight, bias)


def norm_constants(unit: Unit | None, suffix: str = "") -> Shape:
    """The norm and the activation as a kernel's constants, which are not to be changed."""
    if unit is None:
        return _norm_constants(launching.NONE, 1, False, 0, suffix)
    return _norm_constants(unit.norm, unit.map.groups, unit.map.coupled, unit.act, suffix)


@cache
def _norm_constants(norm: int, groups: int, coupled: bool, act: int, suffix: str) -> Shape:
    normed = norm != launching.NONE
    found = {
        "G": groups if normed else 1, "NORMED": normed, "COUPLED": coupled, "ACT": act, "SAMPLED": norm == GROUP,
    }  # fmt: skip
    return {name + suffix: value for name, value in found.items()}


def precision(dtype: torch.dtype) -> str:
    """What a product of this dtype may round its factors to, as PyTorch is told for cuDNN's convolutions."""
    if dtype != torch.float32:
        return "ieee"
    cudnn = torch.backends.cudnn
    settings = getattr(cudnn, "conv", None)
    allowed = cudnn.allow_tf32 if settings is None else settings.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def on_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are for tensor cores."""
    return dtype != torch.float32 or precision(dtype) == "tf32"


def weight_memory(weight: Tensor) -> Tensor:
    """The weight as kernels read it, [out, kernel's rows, its columns, in]; a copy only where it lies otherwise."""
    return weight.contiguous(memory_format=torch.channels_last)


@dataclass(slots=True)
class Made:
    """What a convolution made: coefs[0] (conv + bias) + sum_i coefs[i + 1] terms[i]; conv + bias; its statistics."""

    out: Tensor
    image: MaybeTensor
    stats: MaybeTensor
    own: MaybeTensor  # the statistics of the input, given or made


def _map(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _chunks(blocks: conv_plan.Product, unit: Unit) -> plan.Blocks:
    """A convolution's blocks as the chunks of a norm's sums."""
    spans = blocks.spans // unit.map.samples
    return plan.Blocks(
        blocks.columns, blocks.rows, blocks.rows, blocks.warps, blocks.programs, spans * blocks.blocks, spans
    )


def convolution(
    left: Operand, weight: Tensor, bias: MaybeTensor = None, dilation: tuple[int, int] = (1, 1),
    terms: Sequence[Tensor] = (), coefs: MaybeTensor = None, image: bool = False, norm: tuple[int, int] | None = None,
    lower: torch.dtype | None = None, dtype: torch.dtype | None = None, transposed: bool = False,
) -> Made:  # fmt: skip
    """A convolution of stride 1 that keeps the size, or its transpose.

    Args:
        left: its input, [N, C_in, H, W].
        weight: [C_out, C_in, K_h, K_w], odd sides.
        bias: [C_out].
        dilation: of the kernel.
        terms: maps that are combined with the result.
        coefs: [1 + terms], float64 on the host or learned on the device; None is a one.
        image: whether the result is also wanted by itself, before the combination.
        norm: its code and groups, of the norm whose statistics of the result are wanted.
        lower: the dtype in which it multiplies, by default the input's.
        dtype: of the result, by default that of the products.
        transposed: multiply by the transpose: the weight is [C_in, C_out, K_h, K_w] then.
    """
    x, lower = left.x, lower or left.x.dtype
    channels = weight.shape[1] if transposed else weight.shape[0]
    out = _map(x, channels, dtype or lower)
    raw = _map(x, channels, lower) if image else None
    unit = Unit(out, *(norm or (launching.NONE, 1)), 0.0, 0, 0.0, 0.0)
    coupled = unit.map.coupled
    blocks = _blocks(left, weight, channels, unit.norm == GROUP, coupled, lower)
    alone = coupled and unit.norm == GROUP and blocks.alone
    left, own = _with_statistics(left, blocks)
    stats = unit.statistics() if coupled else None
    partial = None
    if coupled and not alone:
        partial = vector(out, unit.map.samples, blocks.spans // unit.map.samples * blocks.blocks, 2, channels)
    sums = (product.SET_SUMS if alone else product.BLOCK_SUMS).value if coupled else 0
    values, learned = coefficients(coefs, out)
    _launch(
        left, weight, dilation, transposed, blocks, lower, (bias, raw, out, tuple(terms) or None, values), Operand(out),
        partial, stats, norm_constants(unit) | {"PULL": False, "SUMS": sums, "LEARNED": learned, "OWN": own},
    )  # fmt: skip
    if partial is not None and stats is not None:
        launching.finish_moments(unit, _chunks(blocks, unit), partial, stats)
    return Made(out, raw, stats, left.stats)


def _with_statistics(left: Operand, blocks: conv_plan.Product) -> tuple[Operand, bool]:
    """The operand with statistics, and whether the convolution computes them, a whole sample to a program."""
    if left.kind != gather.VALUE.value or left.stats is not None or left.unit is None or not left.unit.map.coupled:
        return left, False
    unit = left.unit
    if unit.norm == GROUP and blocks.alone:
        return replace(left, stats=unit.statistics()), True
    return replace(left, stats=passes.statistics([unit.x], None, unit.norm, unit.groups)[1]), False


@dataclass(slots=True)
class Pulled:
    """What `pull` made.

    Attributes:
        operand: the cotangent of h or, if it waits for sums of other programs, that of norm(h).
        waits: whether it does.
        bars: the gradients of the norm's weight and bias, where they are wanted.
    """

    operand: Operand
    waits: bool
    bars: Pair | None


def pull(
    left: Operand, weight: Tensor, at: Operand, dilation: tuple[int, int] = (1, 1), terms: Sequence[Tensor] = (),
    coefs: MaybeTensor = None, param_grads: bool = False, lower: torch.dtype | None = None,
) -> Pulled:  # fmt: skip
    """The cotangent of h where a convolution's input was act(norm(h)): its transpose, pulled back through both.

    Args:
        left: the cotangent of the convolution's result.
        weight: of the convolution.
        at: h, as `value_of` it.
        dilation: of the convolution.
        terms: as of `convolution`, added if the result does not wait for other programs' sums.
        coefs: likewise.
        param_grads: whether the gradients of the norm's parameters are wanted.
        lower: the dtype in which it multiplies, by default that of `left`.
    """
    unit, lower = at.unit, lower or left.x.dtype
    assert unit is not None
    g, channels = unit.map, weight.shape[1]
    out = _map(left.x, channels, unit.x.dtype)
    bars = unit.parameter_bars() if param_grads else None
    shares = unit.parameter_shares(bars)
    blocks = _blocks(left, weight, channels, unit.norm == GROUP, g.coupled, lower)
    alone = g.coupled and unit.norm == GROUP and blocks.alone
    summed = g.coupled or shares is not None
    partial = sets = None
    if summed and not alone:
        partial = vector(out, g.samples, blocks.spans // g.samples * blocks.blocks, 2, channels)
        sets = vector(out, 2, g.samples, g.groups) if g.coupled else None
    sums = (product.SET_SUMS if alone else product.BLOCK_SUMS).value if summed else 0
    waits = g.coupled and not alone
    values, learned = coefficients(None if waits else coefs, out)
    added = None if waits else tuple(terms) or None
    _launch(
        left, weight, dilation, True, blocks, lower, (None, None, out, added, values), at, partial,
        shares if alone else None,
        norm_constants(unit) | {"PULL": True, "SUMS": sums, "LEARNED": learned, "OWN": False},
    )  # fmt: skip
    if partial is not None:
        assert at.stats is not None
        launching.finish_sums(unit, _chunks(blocks, unit), partial, at.stats, None, at.weight, sets, shares, 2)
    unit.add_shares(shares, bars)
    made = Operand(out, gather.PULLED.value, unit, at.stats, sets, at.weight, at.bias) if waits else Operand(out)
    return Pulled(made, waits, bars)


def _blocks(
    left: Operand, weight: Tensor, channels: int, by_sample: bool, coupled: bool, lower: torch.dtype
) -> conv_plan.Product:
    samples, inputs, height, width = left.x.shape
    return conv_plan.product(
        samples, height * width, inputs, channels, weight.shape[2] * weight.shape[3], lower.itemsize,
        by_sample or left.by_sample, coupled, on_tensor_cores(lower),
    )  # fmt: skip


def _registers(kind: int, blocks: conv_plan.Product, pull: bool, tensor_cores: bool) -> Shape:
    """A limit of registers, where ptxas without one spills a few bytes to fit one more program on a multiprocessor."""
    if tensor_cores and (blocks.warps > 8 or (pull and (blocks.warps < 8 or kind == gather.PLAIN.value))):
        return {}
    return {"maxnreg": conv_plan.registers(blocks.warps)}


def _launch(
    left: Operand, weight: Tensor, dilation: tuple[int, int], transposed: bool, blocks: conv_plan.Product,
    lower: torch.dtype, result: tuple[Any, ...], at: Operand, partial: MaybeTensor, made: Any, constants: Shape,
) -> None:  # fmt: skip
    _, inputs, height, width = left.x.shape
    channels, (_, _, *kernel) = result[2].shape[1], weight.shape
    _, h, stats, _, norm_weight, norm_bias = at.pointers
    x, x_h, *norm = left.pointers
    sizes = _sizes(
        blocks, left.kind, constants["PULL"], inputs, channels, *kernel, *dilation, transposed, lower, precision(lower)
    )
    launching.launch(
        product.convolution_kernel, blocks.programs, x, x_h, weight_memory(weight), *norm, *result, h, stats,
        norm_weight, norm_bias, partial, made, blocks.spans, blocks.pixels, height, width, *left.numbers, *at.numbers,
        **left.constants("_IN"), **sizes, **constants,
    )  # fmt: skip


@cache
def _sizes(
    blocks: conv_plan.Product, kind: int, pull: bool, inputs: int, channels: int, kernel_height: int, kernel_width: int,
    down: int, across: int, transposed: bool, lower: torch.dtype, rounding: str,
) -> Shape:  # fmt: skip
    """A convolution's own constants and options."""
    return {
        "CI": inputs, "CP": blocks.padded, "CO": channels, "KH": kernel_height, "KW": kernel_width, "DH": down,
        "DW": across, "TRANSPOSED": transposed, "BM": blocks.rows, "BN": blocks.columns, "BK": blocks.step,
        "ACC": tl.float32, "DOT": DTYPES[lower], "PRECISION": rounding,
        "PB": max(1, blocks.warps * ENTRIES // blocks.padded), "warps": blocks.warps, "num_stages": blocks.stages,
        **_registers(kind, blocks, pull, lower != torch.float32 or rounding == "tf32"),
    }  # fmt: skip


def weight_gradient(
    left: Operand, right: Operand, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1), bias: bool = False,
    lower: torch.dtype | None = None,
) -> tuple[Tensor, MaybeTensor]:  # fmt: skip
    """The gradients of a convolution's weight, [C_out, C_in, K_h, K_w] in channels_last memory, and bias; float32.

    Args:
        left: the convolution's input.
        right: the cotangent of its result.
        kernel: (K_h, K_w).
        dilation: of the kernel.
        bias: whether the bias's is wanted.
        lower: the dtype in which it multiplies, by default that of `right`.
    """
    padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
    return sum_weight_gradients([(left, right)], kernel, padding, 1, dilation, bias, lower or right.x.dtype)


def sum_weight_gradients(
    pairs: Sequence[tuple[Operand, Operand]], kernel: tuple[int, int], padding: tuple[int, int], stride: int,
    dilation: tuple[int, int], bias: bool, lower: torch.dtype,
) -> tuple[Tensor, MaybeTensor]:  # fmt: skip
    """The sum of `weight_gradient` over several inputs with the cotangents of their results, all of one shape.

    Args:
        pairs: inputs and cotangents.
        kernel: (K_h, K_w).
        padding: of the convolution.
        stride: of the convolution.
        dilation: of the kernel.
        bias: whether the bias's gradient is wanted.
        lower: the dtype in which it multiplies.
    """
    left, right = (operand.x for operand in pairs[0])
    samples, inputs, height, width = left.shape
    channels, out_height, out_width = right.shape[1:]
    taps = kernel[0] * kernel[1]
    cuts = [
        conv_plan.weight_product(
            samples,
            out_height * out_width,
            inputs,
            channels,
            taps,
            lower.itemsize,
            a.by_sample or b.by_sample,
            on_tensor_cores(lower),
        )
        for a, b in pairs
    ]
    weights = taps * inputs * channels
    entries = weights + (channels if bias else 0)
    chunks = sum(blocks.chunks for blocks in cuts)
    partial = right.new_empty(chunks, entries, dtype=torch.float32)
    done = 0
    for (a, b), blocks in zip(pairs, cuts, strict=True):
        launching.launch(
            weight_gradient_kernel, blocks.programs, *a.pointers, *b.pointers, partial[done:] if done else partial,
            blocks.spans, blocks.length, height, width, out_height, out_width, blocks.chunk_blocks, entries, *a.numbers,
            *b.numbers, **a.constants("_IN"), **b.constants(""),
            **_weight_sizes(blocks, inputs, channels, kernel, padding, stride, dilation, bias, lower, precision(lower)),
        )  # fmt: skip
        done += blocks.chunks
    total = partial[0]
    if chunks > 1:
        total = partial.new_empty(entries)
        rows = min(plan.power_of_two(chunks), conv_plan.SUM_TILE // conv_plan.SUM_COLUMNS)
        launching.launch(
            sum_chunks_kernel, -(-entries // conv_plan.SUM_COLUMNS), partial, total, chunks, entries,
            BLOCK=conv_plan.SUM_COLUMNS, RB=rows,
        )  # fmt: skip
    strides = (taps * inputs, 1, kernel[1] * inputs, inputs)
    weight_bar = total.as_strided((channels, inputs, *kernel), strides)
    return weight_bar, total[weights:] if bias else None


@cache
def _weight_sizes(
    blocks: conv_plan.WeightProduct, inputs: int, channels: int, kernel: tuple[int, int], padding: tuple[int, int],
    stride: int, dilation: tuple[int, int], bias: bool, lower: torch.dtype, rounding: str,
) -> Shape:  # fmt: skip
    """A weight gradient's own constants and options."""
    return {
        "CI": inputs, "CP": blocks.padded, "CO": channels, "KH": kernel[0], "KW": kernel[1], "STEP": stride,
        "DH": dilation[0], "DW": dilation[1], "PH": padding[0], "PW": padding[1], "BIAS": bias, "BP": blocks.pixels,
        "BK": blocks.rows, "BN": blocks.columns, "ACC": tl.float32, "DOT": DTYPES[lower], "PRECISION": rounding,
        "warps": blocks.warps, "num_stages": blocks.stages, "maxnreg": conv_plan.registers(blocks.warps),
    }  # fmt: skip
