"""A figure of each measurement, by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flows import Burgers, Orthogonality
from .networks import BlockStability, Comparison, Variance

__all__ = [
    "plot_burgers",
    "plot_c_stability",
    "plot_growth",
    "plot_lyapunov",
    "plot_orthogonality",
    "plot_theorem1",
    "plot_variance",
]


def axes_or_new(axes: Any, columns: int = 1) -> Any:
    """The given axes, or new ones."""
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "fastode[plots]"') from None
    return Figure(figsize=(5 * columns, 4), layout="constrained").subplots(1, columns)


def plot_c_stability(found: Sequence[BlockStability], axes: Any = None) -> Any:
    """C of each block: a box over the samples, and the line C = 1.

    Args:
        found: from `c_stability`.
        axes: matplotlib's, to draw on; None for new ones of a figure of their own.

    Returns:
        The axes; `axes.figure.savefig(path)` writes the figure.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Li, He & Lin 2020 (paper 001), Definition 1.
    """
    axes = axes_or_new(axes)
    axes.boxplot([block.constant.cpu().numpy() for block in found])
    axes.set_xticks(range(1, len(found) + 1), [block.name for block in found], rotation=90)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("C")
    return axes


def plot_theorem1(found: Comparison, axes: Any = None) -> Any:
    """Histograms of ‖I + ∇g‖₂ and σ_min(I − ∇f) over blocks and samples, with the line at 1.

    Args:
        found: from `theorem1`.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Li, He & Lin 2020 (paper 001), Theorem 1.
    """
    axes = axes_or_new(axes)
    values = (found.explicit.flatten().cpu(), found.implicit.flatten().cpu())
    low, high = float(min(map(torch.min, values))), float(max(map(torch.max, values)))
    for value, probability, name in zip(
        values,
        (found.explicit_probability, found.implicit_probability),
        ("‖I + ∇g‖₂, all ≤ 1", "σ_min(I − ∇f), all ≥ 1"),
        strict=True,
    ):
        axes.hist(value.numpy(), bins=30, range=(low, high), alpha=0.6, label=f"{name}: {probability:.0%} of samples")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.legend()
    return axes


def plot_growth(found: Mapping[str, Mapping[str, Tensor]], axes: Any = None) -> Any:
    """The perturbation growth ratio by layer, one line for each network.

    Args:
        found: by the network's name, what `growth_ratio` returned.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Kim et al. 2020 (paper 004), Figure 4.
    """
    axes = axes_or_new(axes)
    for name, layers in found.items():
        axes.plot(list(layers), [float(ratio.nanmean()) for ratio in layers.values()], marker="o", label=name)
    axes.set_ylabel("perturbation growth ratio")
    axes.legend()
    return axes


def plot_variance(measured: Mapping[str, Variance], predicted: Mapping[str, float], axes: Any = None) -> Any:
    """Var[block(x)] / Var[x] of each scheme, beside Lemma 3's.

    Args:
        measured: by the scheme's name, what `variance` returned.
        predicted: by the same names, what `predicted_variance` returned.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Kim et al. 2020 (paper 004), Lemma 3.
    """
    axes = axes_or_new(axes)
    places = torch.arange(len(measured)).numpy()
    axes.bar(places - 0.2, [found.ratio for found in measured.values()], 0.4, label="measured")
    axes.bar(places + 0.2, [predicted[name] for name in measured], 0.4, label="Lemma 3")
    axes.set_xticks(places, list(measured))
    axes.set_ylabel("Var[block(x)] / Var[x]")
    axes.legend()
    return axes


def plot_burgers(found: Mapping[str, Burgers], axes: Any = None) -> Any:
    """The sigmoid of each scheme's last u, as in the paper's figure.

    Args:
        found: by the scheme's name, what `burgers` returned.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Kim et al. 2020 (paper 004), Figure 1.
    """
    axes = axes_or_new(axes)
    for name, solution in found.items():
        axes.plot(solution.x.numpy(), solution.end.sigmoid().numpy(), label=name)
    axes.set_xlabel("x")
    axes.set_ylabel("sigmoid(u)")
    axes.legend()
    return axes


def plot_lyapunov(found: Mapping[str, Tensor], axes: Any = None) -> Any:
    """The largest Lyapunov exponents, a box over the samples for each field, and the line at 0.

    Args:
        found: by the field's name, what `lyapunov_exponent` returned.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Huang et al. (paper 003), Theorem 3.1.
    """
    axes = axes_or_new(axes)
    axes.boxplot([value.detach().cpu().numpy() for value in found.values()])
    axes.set_xticks(range(1, len(found) + 1), list(found))
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_ylabel("largest Lyapunov exponent")
    return axes


def plot_orthogonality(found: Mapping[float, Orthogonality], axes: Any = None) -> Any:
    """How far the linear skew flow is from orthogonal, over time.

    Args:
        found: by the time, what `skew_orthogonality` returned.
        axes: as in `plot_c_stability`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Source: Huang et al. (paper 003), eq. 4.
    """
    axes = axes_or_new(axes)
    for name in ("norm", "angle", "inverse"):
        axes.plot(list(found), [getattr(at, name) for at in found.values()], marker="o", label=name)
    axes.set_xlabel("t")
    axes.set_ylabel("distance from orthogonal")
    axes.legend()
    return axes
