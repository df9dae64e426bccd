"""Between an operator's arguments and its kernels': geometry, scratch, coefficients, block sizes, and the launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...native.constants import NORM_CODE
from . import compiled, conv_plan, plan
from .finish import finish_moments_kernel, finish_sums_kernel, sum_samples_kernel

NONE, GROUP, BATCH, FIXED = 0, *(NORM_CODE[mode] for mode in ("group", "batch", "fixed"))
MaybeTensor = Tensor | None
Pair = tuple[Tensor, Tensor]
Shape = dict[str, Any]


# The architecture that kernels are compiled for on a machine without a card: 90 as in sm_90.
ASSUMED = 90


def architecture(x: Tensor) -> int:
    """The architecture of x's card: 90 as in sm_90."""
    if x.device.type != "cuda":
        return ASSUMED
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Every launch of this package: the one place to count them, and to compile them where there is no card."""
    compiled.run(kernel, programs, arguments, constants, warps)


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense map lies channels_last; if not, it lies NCHW."""
    return x.is_contiguous(memory_format=torch.channels_last)


def feature_map(x: Tensor, samples: int | None = None) -> Tensor:
    """A new map that lies as x does, with another batch if `samples` is given."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if samples is None:
        return torch.empty_like(x, memory_format=layout)
    shape = (samples, *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def vector(x: Tensor, *shape: int) -> Tensor:
    """A new tensor in the accumulator's dtype of x."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def of_float(x: Tensor) -> Shape:
    """The accumulator as a kernel's constant."""
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}


def coefficients(coefs: MaybeTensor, x: Tensor) -> tuple[Any, bool]:
    """Coefficients as a kernel takes them, and whether it has to load them: constants on the host are arguments.

    An argument is a float32. For float64 maps, which no training step has, they are copied to the device instead.
    """
    if coefs is None:
        return None, False
    if coefs.is_cpu and (x.dtype != torch.float64 or x.is_cpu):
        return tuple(coefs.tolist()), False
    if coefs.is_cpu and torch.cuda.is_current_stream_capturing():  # which refuses a copy from the host, but no fills
        return torch.cat([x.new_full((1,), value, dtype=torch.float64) for value in coefs.tolist()]), True
    return coefs.to(x.device), True


class Layout:
    """What the launches on maps of one shape, layout and norm have in common, each made when it is first asked for."""

    def __init__(self, shape: tuple[int, ...], dense_rows: bool, itemsize: int, norm: int, groups: int) -> None:
        (samples, channels, height, width), total = shape, math.prod(shape)
        pixels = height * width
        plane = 0 if dense_rows else pixels
        if norm == NONE:
            self.map = plan.Geometry(1, -(-total // plan.FLAT), plan.FLAT, plan.FLAT, total, False, False)
        elif norm == GROUP:
            self.map = plan.Geometry(samples, pixels, channels, groups, total, True, True, plane)
        else:
            self.map = plan.Geometry(1, samples * pixels, channels, channels, total, True, norm == BATCH, plane)
        self.itemsize = itemsize
        self.acc = {"ACC": tl.float64 if itemsize == 8 else tl.float32}
        self._kept: dict[Any, Any] = {}

    @cached_property
    def one_program_per_set(self) -> bool:
        """Whether a normalised set is one program's."""
        return plan.one_program_per_set(self.map, self.itemsize)

    def set_shape(self, kind: str) -> tuple[int, Shape]:
        """Programs and constants for one program per normalised set."""
        return self._keep(("set", kind), self._set_shape, kind)

    def _set_shape(self, kind: str) -> tuple[int, Shape]:
        blocks = plan.set_blocks(self.map, kind, self.itemsize)
        shape = self._shape(blocks)
        if kind == "tangent" and self.map.plane:  # without this limit ptxas spills registers to fit a second program
            shape["maxnreg"] = conv_plan.registers(blocks.warps)
        return blocks.programs, shape

    @cached_property
    def apply_shape(self) -> tuple[int, Sequence[int], Shape]:
        """Programs, sizes and constants for an element-wise sweep."""
        g = self.map
        blocks = plan.apply_blocks(g)
        return blocks.programs, (g.samples, g.pixels, g.total, blocks.chunk_rows), self._shape(blocks)

    def partial_sums(self, kind: str) -> tuple[plan.Blocks, Shape]:
        """The chunks of a sum, and constants."""
        return self._keep(("sums", kind), self._partial_sums, kind)

    def _partial_sums(self, kind: str) -> tuple[plan.Blocks, Shape]:
        blocks = plan.reduce_blocks(self.map, kind)
        shape = self._shape(blocks)
        if kind == "moments":
            del shape["G"]
        return blocks, shape

    def finish(self, chunks: int) -> tuple[int, Shape]:
        """Programs and constants for adding up chunks."""
        return self._keep(("finish", chunks), self._finish, chunks)

    def _finish(self, chunks: int) -> tuple[int, Shape]:
        g = self.map
        groups, width, rows, programs = plan.finish_blocks(g, chunks)
        return programs, {"C": g.channels, "G": g.groups, "GB": groups, "CPGB": width, "RB": rows, **self.acc}

    def _shape(self, blocks: plan.Blocks) -> Shape:
        g = self.map
        sizes = {"C": g.channels, "G": g.groups, "CB": blocks.columns, "PB": blocks.rows, "PLANE": g.plane}
        return sizes | {"warps": blocks.warps} | self.acc

    def _keep(self, name: Any, make: Callable[[Any], Any], argument: Any) -> Any:
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = make(argument)
        return found


# The maps of a network have a few dozen shapes; of ever new ones the oldest are forgotten.
layout = lru_cache(maxsize=1024)(Layout)


class Unit:
    """A norm and an activation on a map.

    Attributes:
        x: the map.
        norm: its mode.
        groups: of it.
        eps: of it.
        act: the activation's code.
        p: its first parameter.
        q: its second.
        layout: of such maps.
        map: as the kernels see it (tiles.py).
    """

    __slots__ = ("act", "eps", "groups", "layout", "map", "norm", "p", "q", "x")

    def __init__(self, x: Tensor, norm: int, groups: int, eps: float, act: int, p: float, q: float) -> None:
        self.x, self.norm, self.groups, self.eps, self.act, self.p, self.q = x, norm, groups, eps, act, p, q
        self.layout = layout(x.shape, is_channels_last(x), x.element_size(), norm, groups)
        self.map = self.layout.map

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.eps, self.p, self.q

    def statistics(self) -> Tensor:
        """An array for them: [2, N, G] or [2, C]."""
        if self.norm == GROUP:
            return vector(self.x, 2, self.x.shape[0], self.groups)
        return vector(self.x, 2, self.x.shape[1] if self.norm else 0)

    def parameter_bars(self) -> Pair:
        """[C] each for the gradients of the norm's weight and bias; zero where no kernel writes them."""
        size = self.x.shape[1]
        bars = vector(self.x, size), vector(self.x, size)
        if self.norm == NONE or not self.x.numel():
            for bar in bars:
                bar.zero_()
        return bars

    def parameter_shares(self, bars: Pair | None) -> Pair | None:
        """[S, C] each for the samples' shares of these gradients: `bars` itself where there is one sample."""
        samples = self.map.samples
        if bars is None or self.norm == NONE or samples == 1:
            return None if self.norm == NONE else bars
        size = samples, self.map.channels
        return vector(self.x, *size), vector(self.x, *size)

    def add_shares(self, shares: Pair | None, bars: Pair | None) -> None:
        """Add up the samples' shares."""
        if shares is None or shares is bars:
            return
        samples, channels = self.map.samples, self.map.channels
        columns = min(plan.power_of_two(channels), 16)
        rows = min(plan.power_of_two(samples), plan.FINISH_TILE // columns)
        launch(sum_samples_kernel, -(-channels // columns), shares, bars, samples, C=channels, CB=columns, RB=rows)


def partial_sums(unit: Unit, kind: str, count: int) -> tuple[Tensor, plan.Blocks, Shape]:
    """[S, chunks, count, C] for the chunks' sums, the chunks, and constants."""
    g = unit.map
    blocks, shape = unit.layout.partial_sums(kind)
    return vector(unit.x, g.samples, blocks.chunks, count, g.channels), blocks, shape


def finish_moments(unit: Unit, chunked: plan.Blocks, partial: Tensor, stats: Tensor) -> None:
    """The statistics of each set from the chunks' moments."""
    programs, shape = unit.layout.finish(chunked.chunks)
    g = unit.map
    launch(
        finish_moments_kernel, programs, partial, stats, g.samples, g.pixels, chunked.chunk_rows, chunked.spans, **shape
    )


def finish_sums(
    unit: Unit, chunked: plan.Blocks, partial: Tensor, stats: Tensor, tstats: MaybeTensor, weight: MaybeTensor,
    sets: MaybeTensor, shares: Pair | None, count: int, tangent: bool = False,
) -> None:  # fmt: skip
    """The means over each set from the chunks' sums, and the samples' shares of the parameters' gradients."""
    programs, shape = unit.layout.finish(chunked.chunks)
    launch(
        finish_sums_kernel, programs, partial, stats, tstats, weight, sets, shares, unit.map.samples, unit.map.pixels,
        chunked.chunk_rows, chunked.spans, unit.eps, **shape, K=count, TANGENT=tangent,
    )  # fmt: skip
