"""Running statistics of norms, moved as PyTorch's norms do it, after a call that has met its maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..branch.read import Reading
from ..native import nodes
from ..ops.met import Met
from ..tracing import is_exporting

Statistics = Sequence[Tensor | Met]


def update_running(reading: Reading, statistics: Statistics, x: Tensor) -> None:
    """Update the running statistics of a branch whose maps are as large as x, once for each evaluation, in order."""
    if not moved_again(statistics, x):
        norms = [norm for norm in reading.norms if norm is not None]
        move_running(norms, statistics, [(x.shape[0], x.shape[2] * x.shape[3])] * len(norms), x)


def moved_again(statistics: Statistics, x: Tensor) -> bool:
    """Update them as the last call for the same kind of x did, if it did so in C++; False if nothing is done."""
    met = statistics[0]
    if type(met) is not Met or met.places.movers is None or met.places.movers[0] != x.shape:
        return False
    return nodes.module is not None and nodes.module.move(met.places.movers[1], met.flat)


def move_running(
    norms: Sequence[Any], statistics: Statistics, sizes: Sequence[tuple[int, int]], x: Tensor | None = None
) -> None:
    """Update running statistics as PyTorch's norms do, once for each evaluation, in order.

    Args:
        norms: those that have running statistics.
        statistics: an entry of each norm for each evaluation, or one of all.
        sizes: of each norm's map, samples and pixels.
        x: the call's input, where its next call may be moved by `moved_again`.
    """
    if type(statistics[0]) is Met:
        if x is not None and _keep_movers(norms, statistics[0], sizes, x) and moved_again(statistics, x):
            return
        apart = statistics[0].apart()
    else:
        apart = [each for each in statistics if isinstance(each, Tensor)]
    _move_all(norms, apart, sizes)


def _keep_movers(norms: Sequence[Any], met: Met, sizes: Sequence[tuple[int, int]], x: Tensor) -> bool:
    """Leave to the next calls what moves these norms in C++; False where only PyTorch's operators can."""
    rows = []
    for index, (place, channels) in enumerate(met.places):
        norm, (samples, count) = norms[index % len(norms)], sizes[index % len(norms)]
        kept = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if not _moves_by_a_number(norm):
            return False
        rows.append((*kept, place, channels, norm.momentum, _unbiased(samples * count)))
    if any(type(tensor) is not Tensor for row in rows for tensor in row[:3]):
        return False
    met.places.movers = (x.shape, nodes.module.running(rows))
    return True


def _move_all(norms: Sequence[Any], statistics: Iterable[Tensor], sizes: Sequence[tuple[int, int]]) -> None:
    evaluations = list(zip(*[iter(statistics)] * len(norms), strict=True))
    factor = norms[0].momentum
    with torch.no_grad():
        if torch.compiler.is_compiling() and _are_moved_by_one(norms, evaluations):
            _move_by_one(norms, evaluations, sizes)
            return
        with _of_the_same_version(norms):
            if isinstance(factor, float) and all(norm.momentum == factor for norm in norms):
                _move_together(norms, evaluations, factor, sizes)
                return
            for met in evaluations:
                for norm, stats, size in zip(norms, met, sizes, strict=True):
                    _move(norm, *_met(norm, stats, size))


def _of_the_same_version(norms: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Leave the versions of batch norms' running statistics as they are, which PyTorch's own kernels do.

    The graph of an earlier call that was left to PyTorch has saved them, and would refuse its backward; a backward in
    training mode does not read them. A tracer has to see that they are written to.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    batch = [norm for norm in norms if not isinstance(norm, nn.InstanceNorm2d)]
    running = [each for norm in batch for each in (norm.running_mean, norm.running_var) if not each.is_inference()]
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(running))


def _are_moved_by_one(norms: Sequence[Any], evaluations: Sequence[Sequence[Tensor]]) -> bool:
    """Whether `_move_by_one` takes these: batch norms on the CPU with a factor, in the dtype of what they met."""
    if is_exporting():
        return False
    for norm, stats in zip(norms, evaluations[0], strict=True):
        if not _moves_by_a_number(norm) or stats.device.type != "cpu":
            return False
        if norm.num_batches_tracked is None or norm.num_batches_tracked.dtype != torch.int64:
            return False
        for running in (norm.running_mean, norm.running_var):
            if running.dtype != stats.dtype or not running.is_contiguous():
                return False
    return True


def _move_by_one(
    norms: Sequence[Any], evaluations: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]
) -> None:
    """`_move` of all norms by one operator, which a tracer need not look into."""
    torch.ops.fastode.move_running.default(
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
        [stats for met in evaluations for stats in met],
        [norm.momentum for norm in norms],
        [_unbiased(samples * pixels) for samples, pixels in sizes],
    )


def _met(norm: Any, stats: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """The mean and the variance that a norm met, and by what the variance is to be multiplied."""
    samples, count = size
    if isinstance(norm, nn.InstanceNorm2d):
        stats = stats.mean(1)
    else:
        count *= samples
    mean, variance = stats.unbind()
    return mean, variance, _unbiased(count)


def _moves_by_a_number(norm: Any) -> bool:
    """Whether it is a batch norm whose factor is the same at every call."""
    return not isinstance(norm, nn.InstanceNorm2d) and isinstance(norm.momentum, float)


def _counts(norm: Any) -> bool:
    """Whether it counts its batches; a batch norm without a counter moves all the same, or stays without a factor."""
    return not isinstance(norm, nn.InstanceNorm2d) and norm.num_batches_tracked is not None


def _unbiased(count: int) -> float:
    """By what the biased variance of so many values is to be multiplied."""
    return count / max(count - 1, 1)


def _move(norm: Any, mean: Tensor, variance: Tensor, unbiased: float) -> None:
    """running ← (1 − factor) running + factor now."""
    factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if _counts(norm):
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = (1.0 / norm.num_batches_tracked.double()).to(mean.dtype)
    for running, now in ((norm.running_mean, mean), (norm.running_var, variance * unbiased)):
        running.copy_(torch.lerp(running.to(now.dtype), now, factor))


def _move_together(
    norms: Sequence[Any], evaluations: Sequence[Sequence[Tensor]], factor: float, sizes: Sequence[tuple[int, int]]
) -> None:
    """`_move` of all norms at once, where their factor is the same number."""
    counters = [norm.num_batches_tracked for norm in norms if _counts(norm)]
    if counters:
        torch._foreach_add_(counters, len(evaluations))
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    moved: list[Tensor] = []
    for met in evaluations:
        rows = [_met(*each) for each in zip(norms, met, sizes, strict=True)]
        variances = torch._foreach_mul([row[1] for row in rows], [row[2] for row in rows])
        now = [*(row[0] for row in rows), *variances]
        if all(each.dtype == other.dtype for each, other in zip(running, now, strict=True)):
            torch._foreach_lerp_(running, now, factor)
        else:
            if moved:
                torch._foreach_copy_(moved, running)
            else:
                moved = [each.to(other.dtype) for each, other in zip(running, now, strict=True)]
            torch._foreach_lerp_(moved, now, factor)
            torch._foreach_copy_(running, moved)
