"""The skew pair, and its solution by equal steps of an explicit Runge–Kutta scheme, as autograd Functions.

Derivation: README.md beside this file; equations are cited as (1) to (5) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rerun import Rerun
from ..sweeps import channels_last, coefficients, combine, like_reference
from .engine import Gradients, Kept, MaybeTensor, Pair, evaluate, pull_back

_PER_EVALUATION = 8  # tensors in a Kept


class SkewFunction(torch.autograd.Function):
    """(ẏ, ż, *statistics) at (y, z); the statistics are those of each tracked norm."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, pair: Pair, rerun: Rerun | None, *tensors: MaybeTensor
    ) -> tuple[Tensor, ...]:
        one = coefficients(1.0)
        dy, dz, kept = evaluate(pair, weight, tensors, [channels_last(y)], [channels_last(z)], one, one)
        assert dy is not None and dz is not None
        statistics = _tracked(pair, kept)
        # The points are the inputs in channels_last, made again in backward where they are copies.
        ctx.save_for_backward(y, z, weight, *tensors, *_flat([kept._replace(y=None, z=None)]))
        ctx.pair, ctx.rerun = pair, rerun
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (*like_convolution(dy, dz, y, z, weight), *statistics)

    @staticmethod
    def backward(ctx: Any, dy_bar: MaybeTensor, dz_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        pair = ctx.pair
        y, z, weight, *rest = ctx.saved_tensors
        tensors, (kept,) = rest[:-_PER_EVALUATION], _kept(rest[-_PER_EVALUATION:])
        wanted = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])
        given = dz_bar if dy_bar is None else dy_bar
        if given is None:
            return (None,) * (5 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(dy_bar, dz_bar):
            cotangents = [
                torch.zeros_like(x, dtype=given.dtype) if bar is None else bar for bar, x in ((dy_bar, y), (dz_bar, z))
            ]
            y_bar, z_bar, *grads = ctx.rerun.gradients(
                [y, z, weight, *tensors], [weight, *tensors], wanted, 2, cotangents
            )
        else:
            sums = Gradients(weight, tensors, wanted[2:])
            kept = kept._replace(y=channels_last(y), z=channels_last(z))
            bars = (_channels_last(dy_bar), _channels_last(dz_bar))
            y_bar, z_bar = pull_back(pair, weight, tensors, kept, bars, sums, wanted[:2])
            grads = sums.result()
        return (y_bar, z_bar, grads[0], None, None, *grads[1:])


@dataclass(frozen=True)
class March:
    """Equal steps of an explicit Runge–Kutta scheme of which only y(t₁) is wanted.

    Attributes:
        a: the scheme's rows.
        b: its weights.
        step: Δt, dimensionless.
        steps: how many.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    step: float
    steps: int

    def used(self, damped: bool) -> list[list[tuple[bool, bool]]]:
        """For each step and stage, whether y(t₁) depends on the slope of y and on that of z."""
        stages = len(self.b)
        used = []
        live_y, live_z = True, False
        for _ in range(self.steps):
            slopes_y = [live_y and weight != 0 for weight in self.b]
            slopes_z = [live_z and weight != 0 for weight in self.b]
            for i in range(stages - 1, -1, -1):
                # ẏ reads z, and ż reads y; the damping makes each read itself too.
                reads_z = slopes_y[i] or (damped and slopes_z[i])
                reads_y = slopes_z[i] or (damped and slopes_y[i])
                live_y, live_z = live_y or reads_y, live_z or reads_z
                for j, coefficient in enumerate(self.a[i]):
                    slopes_y[j] = slopes_y[j] or (reads_y and coefficient != 0)
                    slopes_z[j] = slopes_z[j] or (reads_z and coefficient != 0)
            used.append(list(zip(slopes_y, slopes_z, strict=True)))
        return used[::-1]


class MarchFunction(torch.autograd.Function):
    """y(t₁) from (y, z) at time 0, and the statistics of every evaluation of each tracked norm."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        weight: Tensor,
        pair: Pair,
        march: March,
        rerun: Rerun | None,
        *tensors: MaybeTensor,
    ) -> tuple[Tensor, ...]:
        end, evaluations = _march(pair, march, weight, tensors, channels_last(y), channels_last(z))
        statistics = [stats for kept in evaluations for stats in _tracked(pair, kept)]
        ctx.save_for_backward(y, z, weight, *tensors, *_flat(evaluations))
        ctx.pair, ctx.march, ctx.rerun = pair, march, rerun
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return (like_reference(end, y), *statistics)

    @staticmethod
    def backward(ctx: Any, end_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        pair, march = ctx.pair, ctx.march
        y, z, weight, *rest = ctx.saved_tensors
        count = len(rest) - _PER_EVALUATION * march.steps * len(march.b)
        tensors, evaluations = rest[:count], _kept(rest[count:])
        wanted = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:])
        if end_bar is None:
            return (None,) * (6 + len(tensors))
        if ctx.rerun is not None and ctx.rerun.needed(end_bar):
            given = [y, z, weight, *tensors]
            y_bar, z_bar, *grads = ctx.rerun.gradients(given, [weight, *tensors], wanted, 2, [end_bar])
        else:
            sums = Gradients(weight, tensors, wanted[2:])
            y_bar, z_bar = _march_back(pair, march, weight, tensors, evaluations, channels_last(end_bar), sums, wanted)
            grads = sums.result()
        return (y_bar, z_bar, grads[0], None, None, None, *grads[1:])


def like_convolution(dy: Tensor, dz: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes in the memory formats that PyTorch's convolution and its transpose give them."""
    formats = [is_channels_last(x) or is_channels_last(weight) for x in (z, y)]
    slopes = [
        slope if wanted else slope.contiguous(memory_format=torch.contiguous_format)
        for slope, wanted in zip((dy, dz), formats, strict=True)
    ]
    return slopes[0], slopes[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes x as channels_last, as it does a slice of such a tensor."""
    dense = torch.empty_like(x)
    return dense.is_contiguous(memory_format=torch.channels_last) and not dense.is_contiguous()


def _march(
    pair: Pair, march: March, weight: Tensor, tensors: Sequence[MaybeTensor], y: Tensor, z: Tensor
) -> tuple[Tensor, list[Kept]]:
    used = march.used(pair.gamma != 0)
    evaluations: list[Kept] = []
    end_y: Tensor | None = y
    end_z: Tensor | None = z
    for step in range(march.steps):
        slopes: list[tuple[MaybeTensor, MaybeTensor]] = []
        for row, want in zip(march.a, used[step], strict=True):
            y_terms, y_coefs = _terms(end_y, [slope[0] for slope in slopes], row, march.step)
            z_terms, z_coefs = _terms(end_z, [slope[1] for slope in slopes], row, march.step)
            want = (True, True) if any(pair.tracked) else want
            dy, dz, kept = evaluate(pair, weight, tensors, y_terms, z_terms, y_coefs, z_coefs, want)
            slopes.append((dy, dz))
            evaluations.append(kept)
        end_y = _advance(end_y, [slope[0] for slope in slopes], march.b, march.step)
        end_z = None if step + 1 == march.steps else _advance(end_z, [s[1] for s in slopes], march.b, march.step)
    assert end_y is not None
    return end_y, evaluations


def _terms(
    state: MaybeTensor, slopes: Sequence[MaybeTensor], row: Sequence[float], step: float
) -> tuple[list[Tensor], Tensor]:
    """The state and the slopes that a row names, and their coefficients."""
    pairs = [(1.0, state), *((step * c, slope) for c, slope in zip(row, slopes, strict=True) if c)]
    present = [(c, term) for c, term in pairs if term is not None]
    return [term for _, term in present], coefficients(*(c for c, _ in present))


def _advance(state: MaybeTensor, slopes: Sequence[MaybeTensor], row: Sequence[float], step: float) -> MaybeTensor:
    terms, coefs = _terms(state, slopes, row, step)
    return combine(terms, coefs) if terms else None


def _march_back(
    pair: Pair,
    march: March,
    weight: Tensor,
    tensors: Sequence[MaybeTensor],
    evaluations: list[Kept],
    end_bar: Tensor,
    grads: Gradients,
    wanted: Sequence[bool],
) -> tuple[MaybeTensor, MaybeTensor]:
    """(5), step by step from the last."""
    bars: list[MaybeTensor] = [end_bar, None]  # of (y, z) at the end of the step
    stages = len(march.b)
    for step in range(march.steps - 1, -1, -1):
        points: list[tuple[MaybeTensor, MaybeTensor]] = [(None, None)] * stages
        for i in range(stages - 1, -1, -1):
            kept = evaluations.pop()
            slope_bars, scale = _slope_bars(march, i, bars, points, kept)
            # The very first evaluation may stand at the input itself, of which no gradient may be asked for.
            need = (wanted[0], wanted[1]) if step == 0 and i == 0 else (True, True)
            points[i] = pull_back(pair, weight, tensors, kept, slope_bars, grads, need, scale)
        for half in (0, 1):
            terms = [bar for bar in (bars[half], *(point[half] for point in points)) if bar is not None]
            if len(terms) > 1:
                bars[half] = combine(terms, coefficients(*[1.0] * len(terms)))
            elif terms:
                bars[half] = terms[0]
    return bars[0], bars[1]


def _slope_bars(
    march: March,
    stage: int,
    bars: Sequence[MaybeTensor],
    points: Sequence[tuple[MaybeTensor, MaybeTensor]],
    kept: Kept,
) -> tuple[tuple[MaybeTensor, MaybeTensor], float]:
    """The cotangents of a stage's slopes up to a common factor, and the factor."""
    weights = [march.b[stage], *(row[stage] for row in march.a[stage + 1 :])]
    sums = []
    for half in (0, 1):
        above = [bars[half], *(point[half] for point in points[stage + 1 :])]
        sums.append([(march.step * w, bar) for w, bar in zip(weights, above, strict=True) if w and bar is not None])
    scales = {pairs[0][0] for pairs in sums if len(pairs) == 1}
    # With one term on each side their factor goes into the pull-back, which is linear, and saves a pass.
    common = scales.pop() if len(scales) == 1 and all(len(pairs) <= 1 for pairs in sums) else 1.0
    found: list[MaybeTensor] = []
    for pairs, h in zip(sums, (kept.h_y, kept.h_z), strict=True):
        if not pairs or h is None:
            found.append(None)
            continue
        factors, terms = [c / common for c, _ in pairs], [bar for _, bar in pairs]
        bar = terms[0] if factors == [1.0] else combine(terms, coefficients(*factors))
        found.append(bar.to(h.dtype))
    return (found[0], found[1]), common


def _tracked(pair: Pair, kept: Kept) -> list[Tensor]:
    """The statistics with which an evaluation updates running statistics, in the norms' order."""
    pairs = zip(pair.tracked, kept.stats, strict=True)
    return [stats for tracked, stats in pairs if tracked and stats is not None]


def _flat(evaluations: Sequence[Kept]) -> list[MaybeTensor]:
    return [tensor for kept in evaluations for tensor in (*kept[:4], *kept.stats)]


def _kept(flat: Sequence[MaybeTensor]) -> list[Kept]:
    rows = (flat[at : at + _PER_EVALUATION] for at in range(0, len(flat), _PER_EVALUATION))
    return [Kept(row[0], row[1], row[2], row[3], (row[4], row[5], row[6], row[7])) for row in rows]


def _channels_last(x: MaybeTensor) -> MaybeTensor:
    return None if x is None else channels_last(x)
