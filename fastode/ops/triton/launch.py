"""Between an operator's arguments and its kernels': geometry, scratch, coefficients, block sizes, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    shape = (x.shape[0] if samples is None else samples, *x.shape[1:])
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
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
    if coefs.device.type == "cpu" and (x.device.type == "cpu" or x.dtype != torch.float64):
        return tuple(coefs.tolist()), False
    return coefs.to(x.device), True


@dataclass(frozen=True)
class Unit:
    """A norm and an activation on a map."""

    x: Tensor
    norm: int
    groups: int
    eps: float
    act: int
    p: float
    q: float

    @cached_property
    def map(self) -> plan.Geometry:
        """The map as the kernels see it (tiles.py)."""
        samples, channels = self.x.shape[:2]
        pixels, total = self.x.shape[2] * self.x.shape[3], self.x.numel()
        if self.norm == NONE:
            return plan.Geometry(1, -(-total // plan.FLAT), plan.FLAT, plan.FLAT, total, False, False)
        plane = 0 if is_channels_last(self.x) else pixels
        if self.norm == GROUP:
            return plan.Geometry(samples, pixels, channels, self.groups, total, True, True, plane)
        return plan.Geometry(1, samples * pixels, channels, channels, total, True, self.norm == BATCH, plane)

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.eps, self.p, self.q

    def statistics(self) -> Tensor:
        """An array for them: [2, N, G] or [2, C]."""
        if self.norm == GROUP:
            return vector(self.x, 2, self.x.shape[0], self.groups)
        return vector(self.x, 2, self.x.shape[1] if self.norm else 0)

    def parameter_bars(self, wanted: bool) -> Pair:
        """[C] each for the gradients of the norm's weight and bias; zero where no kernel writes them."""
        size = self.x.shape[1] if wanted else 0
        bars = vector(self.x, size), vector(self.x, size)
        if self.norm == NONE or not self.x.numel():
            for bar in bars:
                bar.zero_()
        return bars

    def parameter_shares(self, bars: Pair, wanted: bool) -> Pair | None:
        """[S, C] each for the samples' shares of these gradients: `bars` itself where there is one sample."""
        samples = self.map.samples
        if not wanted or self.norm == NONE:
            return None
        size = samples, self.map.channels
        return bars if samples == 1 else (vector(self.x, *size), vector(self.x, *size))

    def add_shares(self, shares: Pair | None, bars: Pair) -> None:
        if shares is None or shares is bars:
            return
        samples, channels = self.map.samples, self.map.channels
        columns = min(plan.power_of_two(channels), 16)
        rows = min(plan.power_of_two(samples), plan.FINISH_TILE // columns)
        launch(sum_samples_kernel, -(-channels // columns), shares, bars, samples, C=channels, CB=columns, RB=rows)


def set_shape(unit: Unit, kind: str) -> tuple[int, Shape]:
    """Programs and constants for one program per normalised set."""
    blocks = plan.set_blocks(unit.map, kind, unit.x.element_size())
    programs, shape = _shape(unit, blocks)
    if kind == "tangent" and unit.map.plane:  # without this limit ptxas spills registers to fit a second program
        shape["maxnreg"] = conv_plan.registers(blocks.warps)
    return programs, shape


def apply_shape(unit: Unit) -> tuple[int, Sequence[int], Shape]:
    """Programs, sizes and constants for an element-wise sweep."""
    g = unit.map
    blocks = plan.apply_blocks(g)
    programs, shape = _shape(unit, blocks)
    return programs, (g.samples, g.pixels, g.total, blocks.chunk_rows), shape


def partial_sums(unit: Unit, kind: str, count: int) -> tuple[Tensor, plan.Blocks, int, Shape]:
    """[S, chunks, count, C] for the chunks' sums, the chunks, programs and constants."""
    g = unit.map
    blocks = plan.reduce_blocks(g, kind)
    programs, shape = _shape(unit, blocks)
    if kind == "moments":
        del shape["G"]
    return vector(unit.x, g.samples, blocks.chunks, count, g.channels), blocks, programs, shape


def finish_moments(unit: Unit, chunked: plan.Blocks, partial: Tensor, stats: Tensor) -> None:
    """The statistics of each set from the chunks' moments."""
    programs, shape = _finish(unit, chunked)
    g = unit.map
    launch(
        finish_moments_kernel, programs, partial, stats, g.samples, g.pixels, chunked.chunk_rows, chunked.spans, **shape
    )


def finish_sums(
    unit: Unit, chunked: plan.Blocks, partial: Tensor, stats: Tensor, tstats: MaybeTensor, weight: MaybeTensor,
    sets: MaybeTensor, shares: Pair | None, count: int, tangent: bool = False,
) -> None:  # fmt: skip
    """The means over each set from the chunks' sums, and the samples' shares of the parameters' gradients."""
    programs, shape = _finish(unit, chunked)
    launch(
        finish_sums_kernel, programs, partial, stats, tstats, weight, sets, shares, unit.map.samples, unit.map.pixels,
        chunked.chunk_rows, chunked.spans, unit.eps, **shape, K=count, TANGENT=tangent,
    )  # fmt: skip


def _finish(unit: Unit, chunked: plan.Blocks) -> tuple[int, Shape]:
    """Programs and constants for adding up chunks."""
    g = unit.map
    groups, width, rows, programs = plan.finish_blocks(g, chunked.chunks)
    return programs, {"C": g.channels, "G": g.groups, "GB": groups, "CPGB": width, "RB": rows, **of_float(unit.x)}


def _shape(unit: Unit, blocks: plan.Blocks) -> tuple[int, Shape]:
    g = unit.map
    constants = {
        "C": g.channels,
        "G": g.groups,
        "CB": blocks.columns,
        "PB": blocks.rows,
        "PLANE": g.plane,
        "warps": blocks.warps,
    }
    return blocks.programs, constants | of_float(unit.x)
