"""Whole blocks with fused convolutions: the forward passes, whose combinations are the convolutions' own last step.

Their contracts are the `Forward` of each scheme.
"""

from __future__ import annotations

from torch import Tensor

from ..maps import cast, coefficients, combine, rows_of
from ..plan import MaybeTensor, MaybeTensors, Plan, statistics_of
from ..schemes.implicit_euler.descent import Descent, residual_terms, update
from ..schemes.runge_kutta.stages import Scheme, present
from .sweeps import evaluate, pull


def shu_osher(
    branch: Plan, scheme: Scheme, table: Tensor, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """u_s, the points u_0 … u_{s−1}, and the statistics of f's evaluations at those of them where it is evaluated."""
    points: list[Tensor] = [x]
    images: list[MaybeTensor] = []
    statistics: list[Tensor] = []
    row = rows_of(table)
    stats: Tensor | None = None  # of the last point, where the convolution that made it took them
    for k in range(scheme.stages):
        alphas, betas = scheme.alpha[k], [j for j in scheme.beta[k] if j != k]
        along = [*((0, k, j) for j in alphas), *((1, k, j) for j in betas)]
        image, made = None, None
        if scheme.uses(k):
            point = points[k]
            # The convolution adds up the next point itself if that point contains this image.
            ends = k in scheme.beta[k]
            keep = any(k in row for row in scheme.beta[k + 1 :])
            terms = [*present(points, alphas), *present(images, betas)] if ends else []
            coefs = row([(1, k, k), *along]) if ends else None
            onward = ends and k + 1 < scheme.stages and scheme.uses(k + 1)
            made = evaluate(branch, tensors, point, stats, terms, coefs, keep and ends, onward)
            statistics += statistics_of(made.records)
            image = made.image if ends else made.out
            made = made if ends else None
        images.append(image)
        if made is None:
            terms = [*present(points, alphas), *present(images, betas)]
            points.append(combine(terms, row(along)))
            stats = None
        else:
            points.append(made.out)
            stats = made.stats
        images = [each if any(j in row for row in scheme.beta[k + 1 :]) else None for j, each in enumerate(images)]
    return points.pop(), points, statistics


def ie_skip(
    branch: Plan, descent: Descent, x: Tensor, tensors: MaybeTensors
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y_K, the points y_0 … y_{K−1}, and the statistics of f's evaluations at x and at these points."""
    made = evaluate(branch, tensors, x, None, [x], coefficients(1.0, 1.0), next_stats=descent.steps > 0)
    statistics = statistics_of(made.records)
    y, stats = made.out, made.stats
    points: list[Tensor] = []
    for _ in range(descent.steps):
        points.append(y)
        terms, values = residual_terms(descent, 1.0, x, points)
        made = evaluate(branch, tensors, y, stats, terms, coefficients(values[-1], *values[:-1]))
        statistics += statistics_of(made.records)
        e = made.out
        pulled = pull(branch, tensors, made.records, cast(e, y.dtype), [y, e], update(descent), None)
        assert pulled is not None
        y, stats = pulled, None
    return y, points, statistics
