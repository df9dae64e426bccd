"""The skew pair with fused convolutions: the contracts of `PairSweeps`, a launch for both halves.

Equations are cited as (1) to (4) from the README.md of ops/schemes/skew_pair; the kernel's derivation is in the
README.md of ops/triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from ..maps import coefficients, combine, fixed_statistics, norm_tensors, promoted
from ..plan import NO_ACTIVATION, Gradients, MaybeTensor, MaybeTensors, activation_codes, norm_codes
from ..schemes.skew_pair.pair import POST_Y, POST_Z, PRE_Y, PRE_Z, Kept, Pair
from ..staged.pair import WEIGHT, norm_at, normalised_again, pull_point, pull_slope, tells_its_derivative, weight_of
from ..triton import conv_plan, launch, passes, plan
from ..triton.convolution import (
    DTYPES,
    Operand,
    norm_constants,
    on_tensor_cores,
    precision,
    sum_weight_gradients,
    value_of,
    weight_memory,
)
from ..triton.launch import Shape, Unit, vector
from ..triton.pair import pair_kernel
from .sweeps import pull_set


@dataclass(frozen=True)
class Half:
    """One half of a launch: of y, or of z.

    Attributes:
        x: what is multiplied for the other half: the state or, pulling back, a cotangent; None where nothing reads it.
        point: the state with its norm, its statistics and parameters.
        factor: of W's product in this half's sum.
        damping: of x, or of its norm, in this half's sum.
        out: where σ of the sum goes, None where it is not wanted.
        image: where the sum itself goes.
        sums: of the norm whose sums over each block are wanted: the result's or, pulling back, the point's.
    """

    x: MaybeTensor
    point: Operand | None
    factor: float
    damping: float
    out: MaybeTensor
    image: MaybeTensor = None
    sums: Unit | None = None

    @property
    def damped(self) -> bool:
        return self.out is not None and self.damping != 0 and self.x is not None

    @property
    def by_sample(self) -> bool:
        return any(unit is not None and unit.norm == launch.GROUP for unit in (self.unit, self.sums))

    @property
    def unit(self) -> Unit | None:
        return None if self.point is None else self.point.unit

    def constants(self, name: str) -> Shape:
        norm = norm_constants(self.unit)
        found = {key: norm[key] for key in ("G", "NORMED", "SAMPLED")}
        found |= {"DAMPED": self.damped, "SUMS": self.sums is not None}
        return {f"{key}_{name}": value for key, value in found.items()}

    def partial(self, blocks: conv_plan.PairProduct, parities: int) -> tuple[MaybeTensor, plan.Blocks]:
        """Room for the sums of each block, parity after parity of a span, and the blocks as a norm's chunks."""
        spans = 1 if self.sums is None else blocks.spans // self.sums.map.samples * parities
        rows, count = blocks.rows, spans * blocks.blocks
        chunks = plan.Blocks(rows, rows, rows, blocks.warps, blocks.programs, count, spans)
        if self.sums is None or self.out is None:
            return None, chunks
        return vector(self.out, self.sums.map.samples, count, 2, self.out.shape[1]), chunks


def launch_pair(
    pair: Pair, weight: Tensor, y: Half, z: Half, act: tuple[int, float, float] = NO_ACTIVATION, pull: bool = False
) -> list[tuple[MaybeTensor, plan.Blocks]]:
    """factor W z + damping y into y.out and factor Wᵀ y + damping z into z.out: the sums of each block that are wanted.

    Args:
        pair: its constants.
        weight: W, in the dtype in which it multiplies.
        y: the half of y.
        z: the half of z.
        act: σ's code, p and q.
        pull: whether what is read are cotangents.
    """
    halves, (channels_y, channels_z) = (y, z), weight.shape[:2]
    known, scale = (y.x, 1) if y.x is not None else (z.x, pair.stride)
    assert known is not None
    samples, height, width = known.shape[0], known.shape[2] // scale, known.shape[3] // scale
    wanted = (y.out is not None, z.out is not None)
    # Registers do not hold two products: both halves share a program where tensor cores read shared memory (sm_90).
    tensor_cores = on_tensor_cores(weight.dtype)
    sharing = tensor_cores and launch.architecture(known) >= 90
    blocks = conv_plan.pair_product(
        samples, height * width, (channels_y, channels_z), weight.shape[2] ** 2, weight.dtype.itemsize,
        any(half.by_sample for half in halves), wanted, sharing,
        tensor_cores,
    )  # fmt: skip
    free = blocks.shared or pull
    told = {} if free else {"maxnreg": conv_plan.registers(blocks.warps, conv_plan.PAIR_REGISTERS)}
    sums = [y.partial(blocks, 1), z.partial(blocks, pair.stride**2)]
    read = [known if half.x is None else half.x for half in halves]
    points = [half.point or Operand(known) for half in halves]
    launch.launch(
        pair_kernel, blocks.programs, *read, weight_memory(weight),
        *(each for point in points for each in (point.stats, point.weight, point.bias)),
        *(half.image for half in halves), *(half.out for half in halves),
        *(half.sums.x if pull and half.sums is not None else None for half in halves),
        *(partial for partial, _ in sums), blocks.spans, blocks.pixels, height, width,
        *(point.numbers[0] for point in points), y.factor, z.factor, y.damping, z.damping, *act[1:],
        CY=channels_y, CYP=blocks.padded[0], CZ=channels_z, CZP=blocks.padded[1], K=weight.shape[2], PAD=pair.padding,
        STRIDE=pair.stride, **y.constants("Y"), **z.constants("Z"), ACT=act[0], PULL=pull, SHARED=blocks.shared,
        BM=blocks.rows, BNY=blocks.columns[0], BNZ=blocks.columns[1], BKY=blocks.steps[0], BKZ=blocks.steps[1],
        ACC=tl.float32, DOT=DTYPES[weight.dtype], PRECISION=precision(weight.dtype), warps=blocks.warps,
        num_stages=blocks.stages, **told,
    )  # fmt: skip
    return sums


def evaluate(
    pair: Pair, tensors: MaybeTensors, y_terms: Sequence[Tensor], z_terms: Sequence[Tensor],
    y_coefs: MaybeTensor = None, z_coefs: MaybeTensor = None, want: tuple[bool, bool] = (True, True),
) -> tuple[MaybeTensor, MaybeTensor, Kept]:  # fmt: skip
    """(1)."""
    want_y, want_z = want
    y = z = None
    if want_z or (want_y and pair.gamma):
        y = _point(pair, PRE_Y, tensors, y_terms, y_coefs)
    if want_y or (want_z and pair.gamma):
        z = _point(pair, PRE_Z, tensors, z_terms, z_coefs)
    if not (want_y or want_z):
        return None, None, Kept(None, None, None, None, (None,) * 4)
    w = weight_of(pair, tensors)
    y_half = slope_half(pair, POST_Y, y, z, w, 1.0, want_y)
    z_half = slope_half(pair, POST_Z, z, y, w, -1.0, want_z)
    act = activation_codes(pair.activation)
    sums = launch_pair(pair, w, y_half, z_half, act)
    slopes: list[MaybeTensor] = []
    stats = [_stats(y), _stats(z), None, None]
    for which, half, (partial, chunks) in zip((POST_Y, POST_Z), (y_half, z_half), sums, strict=True):
        slope, norm = half.out, pair.norms[which]
        if slope is not None and norm is not None:
            if half.sums is not None and partial is not None:
                found = stats[which] = half.sums.statistics()
                launch.finish_moments(half.sums, chunks, partial, found)
            else:
                stats[which] = fixed_statistics(tensors, norm_at(which), slope.dtype)
            slope = normalised_again(pair, which, tensors, slope, stats[which])
        slopes.append(slope)
    h_y, h_z = (half.out if half.image is None else half.image for half in (y_half, z_half))
    at_y, at_z = (None if point is None else point.x for point in (y, z))
    return slopes[0], slopes[1], Kept(at_y, at_z, h_y, h_z, (stats[0], stats[1], stats[2], stats[3]))


def _point(pair: Pair, which: int, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: MaybeTensor) -> Operand:
    """The combination of terms, made if there are several, with its norm and the statistics of that."""
    norm = pair.norms[which]
    own = norm is not None and norm.mode != "fixed"
    if coefs is not None and not own:
        terms, coefs = [combine(terms, coefs)], None
    point = terms[0]
    if norm is None:
        return Operand(point)
    weight, bias = norm_tensors(tensors, norm_at(which), point.dtype)
    stats = fixed_statistics(tensors, norm_at(which), point.dtype)
    if own:
        code, groups, _ = norm_codes(norm)
        point, stats = passes.statistics(promoted(terms), coefs, code, groups)
    return value_of(_unit(pair, which, point), stats, weight, bias)


def slope_half(
    pair: Pair, which: int, own: Operand | None, other: Operand | None, weight: Tensor, factor: float, wanted: bool
) -> Half:
    """A half of the forward pass, its result not yet made."""
    x = None if own is None else own.x
    if not wanted:
        return Half(x, own, 0.0, 0.0, None)
    assert other is not None
    stride = pair.stride if which == POST_Z else 1
    height, width = other.x.shape[2:]
    if which == POST_Y:
        height, width = height // pair.stride, width // pair.stride
    dtype = weight.dtype if x is None or not pair.gamma else torch.promote_types(weight.dtype, x.dtype)
    channels = weight.shape[1 if which == POST_Z else 0]
    out = _new(other.x, (channels, height * stride, width * stride), dtype)
    apart = pair.activation is not None and not tells_its_derivative(pair.activation)
    norm, sums = pair.norms[which], None
    if norm is not None and norm.mode != "fixed":
        sums = _unit(pair, which, out)
    return Half(x, own, factor, -pair.gamma, out, torch.empty_like(out) if apart else None, sums)


def _unit(pair: Pair, which: int, x: Tensor) -> Unit:
    """A map and its norm."""
    return Unit(x, *norm_codes(pair.norms[which]), *NO_ACTIVATION)


def _new(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new channels_last map of x's samples."""
    shape = (x.shape[0], *shape)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _stats(point: Operand | None) -> MaybeTensor:
    return None if point is None else point.stats


def pull_back(
    pair: Pair, tensors: MaybeTensors, kept: Kept, bars: tuple[MaybeTensor, MaybeTensor], grads: Gradients,
    need: tuple[bool, bool] = (True, True), scale: float = 1.0,
) -> tuple[MaybeTensor, MaybeTensor]:  # fmt: skip
    """(2) by passes, then (3) in one launch, and (4)."""
    hy_bar = pull_slope(pair, POST_Y, tensors, kept.h_y, kept.stats[POST_Y], bars[0], grads, scale, scale)
    hz_bar_turned = pull_slope(pair, POST_Z, tensors, kept.h_z, kept.stats[POST_Z], bars[1], grads, -scale, scale)
    w = weight_of(pair, tensors)
    y, z = _kept_point(pair, PRE_Y, tensors, kept.y, kept), _kept_point(pair, PRE_Z, tensors, kept.z, kept)
    if grads.wants(WEIGHT):
        pairs = [(z, Operand(hy_bar))] if hy_bar is not None and z is not None else []
        pairs += [(Operand(hz_bar_turned), y)] if hz_bar_turned is not None and y is not None else []
        if pairs:
            kernel, padding = (w.shape[2], w.shape[3]), (pair.padding, pair.padding)
            grads.add(WEIGHT, sum_weight_gradients(pairs, kernel, padding, pair.stride, (1, 1), False, w.dtype)[0])
    needed = [need[i] or grads.wants_norm(norm_at(which)) for i, which in enumerate((PRE_Y, PRE_Z))]
    # A half without a cotangent for W is the damping times its own cotangent: no convolution.
    y_half = image_half(hy_bar, hz_bar_turned, y, needed[0], -pair.gamma, grads.wants_norm(norm_at(PRE_Y)))
    z_half = image_half(hz_bar_turned, hy_bar, z, needed[1], pair.gamma, grads.wants_norm(norm_at(PRE_Z)))
    if y_half.out is not None or z_half.out is not None:
        sums = launch_pair(pair, w, y_half, z_half, NO_ACTIVATION, True)
    made: list[MaybeTensor] = []
    for i, (which, half, point) in enumerate(((PRE_Y, y_half, kept.y), (PRE_Z, z_half, kept.z))):
        if half.out is not None:
            made.append(_through_norm(which, half, *sums[i], grads))
        elif needed[i]:
            damping = (-pair.gamma, pair.gamma)[i]
            made.append(pull_point(pair, which, tensors, point, kept.stats[which], None, half.x, damping, grads))
        else:
            made.append(None)
    return made[0], made[1]


def _kept_point(pair: Pair, which: int, tensors: MaybeTensors, point: MaybeTensor, kept: Kept) -> Operand | None:
    """A state as the forward pass read it."""
    norm = pair.norms[which]
    if point is None or norm is None:
        return None if point is None else Operand(point)
    weight, bias = norm_tensors(tensors, norm_at(which), point.dtype)
    return value_of(_unit(pair, which, point), kept.stats[which], weight, bias)


def image_half(
    x: MaybeTensor, other: MaybeTensor, point: Operand | None, needed: bool, damping: float, param_grads: bool
) -> Half:
    """A half of (3): the cotangent of a state's norm."""
    if not needed or other is None or point is None:
        return Half(x, point, 0.0, 0.0, None)
    summed = point.unit is not None and (point.unit.map.coupled or param_grads)
    out = torch.empty_like(point.x, memory_format=torch.channels_last)
    return Half(x, point, 1.0, damping, out, None, point.unit if summed else None)


def _through_norm(which: int, half: Half, partial: MaybeTensor, chunks: plan.Blocks, grads: Gradients) -> Tensor:
    """The cotangent of a state, from that of its norm and the sums of its blocks."""
    assert half.out is not None and half.point is not None
    point, unit = half.point, half.unit
    if unit is None:
        return half.out
    g = unit.map
    sets = vector(half.out, 2, g.samples, g.groups) if g.coupled else None
    if partial is not None:
        assert point.stats is not None
        wanted = grads.wants_norm(norm_at(which))
        bars = unit.parameter_bars() if wanted else None
        shares = unit.parameter_shares(bars)
        launch.finish_sums(unit, chunks, partial, point.stats, None, point.weight, sets, shares, 2)
        unit.add_shares(shares, bars)
        if bars is not None:
            grads.add_norm(norm_at(which), *bars)
    return pull_set(replace(point, x=half.out, sets=sets), (), coefficients(1.0))
