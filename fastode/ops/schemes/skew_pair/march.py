"""The skew pair, and its solution by equal steps of an explicit Runge–Kutta scheme, over an engine's pair sweeps.

Derivation: README.md beside this file; equations are cited as (1) to (5) from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...function import gradients
from ...maps import Converted, cast, channels_last, coefficients, combine, is_channels_last, like_reference, summed
from ...plan import TENSORS_PER_NORM, Gradients, MaybeTensor, MaybeTensors
from ...rerun import Rerun
from .pair import Kept, Pair, PairSweeps

PER_EVALUATION = 8  # tensors in a Kept


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
        used: list[list[tuple[bool, bool]]] = []
        live_y, live_z = True, False
        while len(used) < self.steps:
            before = live_y, live_z
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
            if (live_y, live_z) == before:  # as it will be for all earlier steps
                used += [used[-1]] * (self.steps - len(used))
        return used[::-1]


def make_pair_function(sweeps: PairSweeps) -> type[torch.autograd.Function]:
    """The pair on an engine with these sweeps, as an autograd Function."""

    class SkewPairFunction(torch.autograd.Function):
        """(ẏ, ż, *statistics) at (y, z); the statistics are those of each tracked norm."""

        @staticmethod
        def forward(ctx: Any, pair: Pair, rerun: Rerun | None, y: Tensor, z: Tensor, *tensors: MaybeTensor) -> Any:
            dy, dz, kept = sweeps.evaluate(pair, converted(pair, tensors, y), [channels_last(y)], [channels_last(z)])
            assert dy is not None and dz is not None
            statistics = tracked(pair, kept)
            # The points are the inputs in channels_last, made again in backward where they are copies.
            ctx.save_for_backward(y, z, *tensors, *flat([kept._replace(y=None, z=None)]))
            ctx.pair, ctx.rerun = pair, rerun
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*statistics)
            assert tensors[0] is not None
            return (*like_convolution(dy, dz, y, z, tensors[0]), *statistics)

        @staticmethod
        def backward(ctx: Any, dy_bar: MaybeTensor, dz_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, (kept,) = saved[:-PER_EVALUATION], unflat(saved[-PER_EVALUATION:])

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                y, z, *tensors = given
                sums = Gradients(tensors, wanted[2:])
                dense = [None if bar is None else channels_last(bar) for bar in bars]
                point = kept._replace(y=channels_last(y), z=channels_last(z))
                read = converted(ctx.pair, tensors, y)
                ends = sweeps.pull_back(ctx.pair, read, point, (dense[0], dense[1]), sums, (wanted[0], wanted[1]))
                return [*ends, *sums.result()]

            return gradients(ctx, given, [dy_bar, dz_bar], pull)

    return SkewPairFunction


def make_march_function(sweeps: PairSweeps) -> type[torch.autograd.Function]:
    """The pair's solution by equal steps on an engine with these sweeps, as an autograd Function."""

    class MarchFunction(torch.autograd.Function):
        """y(t₁) from (y, z) at time 0, and the statistics of every evaluation of each tracked norm."""

        @staticmethod
        def forward(
            ctx: Any, pair: Pair, march: March, rerun: Rerun | None, y: Tensor, z: Tensor, *tensors: MaybeTensor
        ) -> Any:
            read = converted(pair, tensors, y)
            end, evaluations = _march(sweeps, pair, march, read, channels_last(y), channels_last(z))
            statistics = [stats for kept in evaluations for stats in tracked(pair, kept)]
            ctx.save_for_backward(y, z, *tensors, *flat(evaluations))
            ctx.pair, ctx.march, ctx.rerun, ctx.count = pair, march, rerun, 2 + len(tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*statistics)
            return (like_reference(end, y), *statistics)

        @staticmethod
        def backward(ctx: Any, end_bar: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
            saved = ctx.saved_tensors
            given, kept = saved[: ctx.count], saved[ctx.count :]

            def pull(bars: Sequence[MaybeTensor], wanted: Sequence[bool]) -> list[MaybeTensor]:
                (bar,), tensors = bars, given[2:]
                assert bar is not None
                sums = Gradients(tensors, wanted[2:])
                read = converted(ctx.pair, tensors, given[0])
                ends = _march_back(sweeps, ctx.pair, ctx.march, read, unflat(kept), channels_last(bar), sums, wanted)
                return [*ends, *sums.result()]

            return gradients(ctx, given, [end_bar], pull)

    return MarchFunction


def converted(pair: Pair, tensors: MaybeTensors, y: Tensor) -> MaybeTensors:
    """The tensors as the sweeps read them."""
    if torch.compiler.is_compiling():
        return tensors
    return Converted(tensors, range(1, len(tensors), TENSORS_PER_NORM), (0,), pair.lower, y.dtype)


def like_convolution(dy: Tensor, dz: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes in the memory formats that PyTorch's convolution and its transpose give them."""
    formats = [is_channels_last(x) or is_channels_last(weight) for x in (z, y)]
    slopes = [
        slope if wanted else slope.contiguous(memory_format=torch.contiguous_format)
        for slope, wanted in zip((dy, dz), formats, strict=True)
    ]
    return slopes[0], slopes[1]


def _march(
    sweeps: PairSweeps, pair: Pair, march: March, tensors: MaybeTensors, y: Tensor, z: Tensor
) -> tuple[Tensor, list[Kept]]:
    used = march.used(pair.gamma != 0)
    evaluations: list[Kept] = []
    end_y: Tensor | None = y
    end_z: Tensor | None = z
    for step in range(march.steps):
        slopes: list[tuple[MaybeTensor, MaybeTensor]] = []
        for row, want in zip(march.a, used[step], strict=True):
            y_terms, y_coefs = terms_of(end_y, [slope[0] for slope in slopes], row, march.step)
            z_terms, z_coefs = terms_of(end_z, [slope[1] for slope in slopes], row, march.step)
            want = (True, True) if any(pair.tracked) else want
            dy, dz, kept = sweeps.evaluate(pair, tensors, y_terms, z_terms, y_coefs, z_coefs, want)
            slopes.append((dy, dz))
            evaluations.append(kept)
        end_y = advanced(end_y, [slope[0] for slope in slopes], march.b, march.step)
        end_z = None if step + 1 == march.steps else advanced(end_z, [s[1] for s in slopes], march.b, march.step)
    assert end_y is not None
    return end_y, evaluations


def terms_of(
    state: MaybeTensor, slopes: Sequence[MaybeTensor], row: Sequence[float], step: float
) -> tuple[list[Tensor], MaybeTensor]:
    """The state and the slopes that a row names, and their coefficients; none for the state alone."""
    pairs = [(1.0, state), *((step * c, slope) for c, slope in zip(row, slopes, strict=True) if c)]
    present = [(c, term) for c, term in pairs if term is not None]
    terms = [term for _, term in present]
    return terms, None if [c for c, _ in present] == [1.0] else coefficients(*(c for c, _ in present))


def advanced(state: MaybeTensor, slopes: Sequence[MaybeTensor], row: Sequence[float], step: float) -> MaybeTensor:
    terms, coefs = terms_of(state, slopes, row, step)
    if coefs is None:
        return terms[0] if terms else None
    return combine(terms, coefs) if terms else None


def _march_back(
    sweeps: PairSweeps,
    pair: Pair,
    march: March,
    tensors: MaybeTensors,
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
            # The first point may be the input itself, and its gradient may not be wanted.
            need = (wanted[0], wanted[1]) if step == 0 and i == 0 else (True, True)
            points[i] = sweeps.pull_back(pair, tensors, kept, slope_bars, grads, need, scale)
        for half in (0, 1):
            terms = [bar for bar in (bars[half], *(point[half] for point in points)) if bar is not None]
            if terms:
                bars[half] = summed(terms)
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
    return scaled_bars(sums, kept)


def scaled_bars(
    sums: Sequence[Sequence[tuple[float, Tensor]]], kept: Kept
) -> tuple[tuple[MaybeTensor, MaybeTensor], float]:
    """The sums of factor × cotangent for each half of an evaluation's slopes, up to a common factor, and the factor."""
    scales = {pairs[0][0] for pairs in sums if len(pairs) == 1}
    # A sum of one term needs no pass: a factor that both halves share goes into the pull-back, which is linear.
    common = scales.pop() if len(scales) == 1 and all(len(pairs) <= 1 for pairs in sums) else 1.0
    found: list[MaybeTensor] = []
    for pairs, h in zip(sums, (kept.h_y, kept.h_z), strict=True):
        if not pairs or h is None:
            found.append(None)
            continue
        factors, terms = [c / common for c, _ in pairs], [bar for _, bar in pairs]
        bar = terms[0] if factors == [1.0] else combine(terms, coefficients(*factors))
        found.append(cast(bar, h.dtype))
    return (found[0], found[1]), common


def tracked(pair: Pair, kept: Kept) -> list[Tensor]:
    """The statistics with which an evaluation updates running statistics, in the norms' order."""
    pairs = zip(pair.tracked, kept.stats, strict=True)
    return [stats for tracked, stats in pairs if tracked and stats is not None]


def flat(evaluations: Sequence[Kept]) -> list[MaybeTensor]:
    return [tensor for kept in evaluations for tensor in (*kept[:4], *kept.stats)]


def unflat(flat: Sequence[MaybeTensor]) -> list[Kept]:
    rows = (flat[at : at + PER_EVALUATION] for at in range(0, len(flat), PER_EVALUATION))
    return [Kept(row[0], row[1], row[2], row[3], (row[4], row[5], row[6], row[7])) for row in rows]
