"""`python -m benchmarks.exact_ie`: how fast IE-Skip's inner descent approaches the exact implicit Euler block.

Paper 001, Section 6.1, says that more inner iterations come nearer to it. Writes the record, docs/exact-ie.md and its
plot; two minutes on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastode
from fastode.reference import ExactIE, IESkip, PreActBranch

from . import data, experiments, header
from .printing import markdown_table

NAME = "exact-ie"
SHAPES = ((16, 32), (128, 4))  # the first and the last stage of IE-ResNet-18 with 16 channels
STEP_SIZES = (0.02, 0.05, 0.1, 0.2)
MOST_STEPS = 512
SAMPLES = 8
TOLERANCE = 1e-10
TABLE_STEPS = (1, 4, 16, 64, 256)


def sizes(tensor: Tensor) -> Tensor:
    """The Euclidean norm of each sample."""
    return tensor.flatten(1).norm(dim=1)


def approach(channels: int, size: int, most: int = MOST_STEPS, samples: int = SAMPLES) -> dict[str, Any]:
    """How far IE-Skip is from the exact block on one branch, in the median sample.

    Args:
        channels: of the branch, as it is made.
        size: of the map.
        most: inner steps at most; they are doubled up to it.
        samples: of the photographs.

    Returns:
        The steps, for each step size ‖y_K − y‖ / ‖y‖ and ‖y_K − x − f(y_K)‖ / ‖x‖, the latter of the exact y, and what
        its solve took.
    """
    torch.manual_seed(0)
    exact = ExactIE(PreActBranch(channels, norm="layer", bias=False), tol=TOLERANCE, max_iterations=50).double()
    x = data.feature_maps(samples, channels, size).double()
    steps = [2**i for i in range(most.bit_length()) if 2**i <= most]

    def residual(y: Tensor) -> float:
        return float((sizes(y - x - exact.branch(y)) / sizes(x)).median())

    found: dict[str, Any] = {"steps": steps, "distance": {}, "residual": {}}
    with torch.no_grad(), fastode.record_steps() as log:
        y = exact(x)
        for step_size in STEP_SIZES:
            skip = IESkip(exact.branch, step_size=step_size)
            fastode.fuse(skip)
            distances, residuals = [], []
            for skip.steps in steps:
                near = skip(x)
                distances.append(float((sizes(near - y) / sizes(y)).median()))
                residuals.append(residual(near))
            found["distance"][f"{step_size:g}"], found["residual"][f"{step_size:g}"] = distances, residuals
        found["exact"] = residual(y)
    (solve,) = log.implicit
    found["iterations"], found["products"] = solve.iterations, solve.products
    return found


def run(path: Path, most: int = MOST_STEPS, shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
    """Make the experiment and its record."""
    rows = {f"{channels}@{size}": approach(channels, size, most) for channels, size in shapes}
    experiments.save(path, {"header": header.header(torch.device("cpu"), NAME), "shapes": rows})


def markdown(record: experiments.Record) -> str:
    """The page."""
    head = record["header"]
    lines = []
    for shape, found in record["shapes"].items():
        at = {steps: i for i, steps in enumerate(found["steps"])}
        for size, distances in found["distance"].items():
            cells = [f"{distances[at[steps]]:.1e}" if steps in at else "–" for steps in TABLE_STEPS]
            lines.append([shape, size, *cells])
    solves = [
        f"{found['iterations']} Newton steps and {found['products']} products at {shape}"
        for shape, found in record["shapes"].items()
    ]
    return "\n".join(
        [
            "# How fast IE-Skip approaches the exact implicit Euler block",
            "",
            "`IESkip` takes K steps of gradient descent of size γ on ‖y − x − f(y)‖², from y = x + f(x); `ExactIE`",
            "solves y = x + f(y). Li et al. 2020, Section 6.1, say that more inner iterations bring a network",
            "nearer to the exact one.",
            "",
            f"![the distance to the exact block by inner steps]({NAME}.png)",
            "",
            "‖y_K − y‖ / ‖y‖, the median over the samples:",
            "",
            *markdown_table(("map", "γ", *(f"K = {steps}" for steps in TABLE_STEPS)), lines, left=1),
            "",
            f"New branches of IE-ResNet-18 (two convolutions, layer norm, as they are made, seed 0), float64, "
            f"{SAMPLES} samples ({head['data']}).",
            f"To ‖y − x − f(y)‖ ≤ {TOLERANCE:g} ‖x‖ the exact block took {', '.join(solves)}.",
            f"Made by `python -m benchmarks.exact_ie`: {experiments.made_on(head)}.",
            "",
        ]
    )


def fill(axes: Sequence[Any], records: Sequence[experiments.Record]) -> None:
    """The plot: a panel for each map."""
    (record,) = records
    for axis, (shape, found) in zip(axes, record["shapes"].items(), strict=True):
        for size, distances in found["distance"].items():
            axis.loglog(found["steps"], distances, marker="o", markersize=3, label=f"γ = {size}")
        axis.set_title(shape)
        axis.set_xlabel("inner steps K")
        axis.set_ylabel("‖y_K − y‖ / ‖y‖")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()


def report(path: Path, pages: Path = experiments.PAGES) -> None:
    """The page and the plot, from the record."""
    record = experiments.load(path)
    experiments.write_page(NAME, markdown(record), pages)
    experiments.draw([path], pages / f"{NAME}.png", len(record["shapes"]), fill)


if __name__ == "__main__":
    experiments.command(NAME, __doc__, run, report)
