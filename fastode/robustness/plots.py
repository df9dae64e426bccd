"""Accuracy against the radius, by matplotlib, which is imported when the figure is drawn."""

from __future__ import annotations

from typing import Any

from ..stability.plots import axes_or_new
from .evaluation import Evaluation

__all__ = ["plot_accuracy"]


def plot_accuracy(found: Evaluation, axes: Any = None) -> Any:
    """The accuracy that each attack leaves, and all of them, against the radius, with 95 % intervals.

    Args:
        found: from `evaluate`, with radii.
        axes: matplotlib's, to draw on; None for new ones of a figure of their own.

    Returns:
        The axes; `axes.figure.savefig(path)` writes the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the evaluation has no curves.
    """
    if not found.curves:
        raise ValueError("found must be an evaluation with radii, got one without")
    axes = axes_or_new(axes)
    for name, rows in found.curves.items():
        ends = [row.interval for row in rows]
        radii, part = [row.eps for row in rows], [row.accuracy for row in rows]
        (line,) = axes.plot(radii, part, marker="o", label=name)
        axes.fill_between(radii, *zip(*ends, strict=True), alpha=0.15, color=line.get_color())
    axes.set_xlabel(f"radius ({'maximum' if found.norm == 'linf' else 'Euclidean'} norm)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.legend()
    return axes
