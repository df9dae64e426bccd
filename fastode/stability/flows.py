"""Stability of flows: Burgers' equation by two schemes, Lyapunov exponents, and the linear skew flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, reference
from ..reference.skew import PADDING, skew_field
from ..tableau import SSP3, Tableau, check_tableau
from .products import Products, check_samples, evaluated

__all__ = ["Burgers", "Orthogonality", "burgers", "lyapunov_exponent", "skew_orthogonality"]

TERMS = 20  # of the exponential's series: below 1e-18 for matrices of norm 1


@dataclass(frozen=True)
class Burgers:
    """A solution of Burgers' equation by one scheme.

    Attributes:
        x: the cells' centres [cells].
        start: u at time 0 [cells].
        end: u at the last time [cells].
        total_variation: Σ|u_{i+1} − u_i| after each step, the start first [steps + 1].
    """

    x: Tensor
    start: Tensor
    end: Tensor
    total_variation: Tensor


def burgers(
    scheme: Tableau = SSP3, *, cells: int = 200, time: float = 0.3, courant: float = 0.8, mean: float = 0.5
) -> Burgers:
    """The inviscid Burgers' equation u_t + (u²/2)_x = 0 from u = mean + sin 2πx on a periodic [0, 1).

    Space is discretised by the WENO scheme of order 5 with Lax–Friedrichs splitting, one and the same for every
    scheme. Euler's method (a residual block) is linearly unstable with it, SSP3 is not. The paper's text does not say
    which discretisation, resolution or time its figure has; these are ours.

    Args:
        scheme: `tableau.EULER`, `tableau.SSP3` or another one in Shu–Osher form, with a step of 1.
        cells: at least 8.
        time: > 0; the shock is there from 1 / 2π = 0.16 on.
        courant: Δt max|u| / Δx > 0, of the start.
        mean: the speed at which the wave moves.

    Returns:
        The solution, and its total variation over time.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: Kim et al. 2020 (paper 004), Figure 1 and eq. 5; Jiang & Shu 1996; Wang & Spiteri 2007 (Euler).

    Example:
        >>> found = burgers(SSP3, cells=40)
        >>> bool(found.total_variation.max() <= 1.01 * found.total_variation[0])
        True
    """
    check_tableau(scheme)
    checks.steps(cells, "cells")
    if cells < 8:
        raise ValueError(f"cells must be at least 8, got {cells}")
    checks.step_size(time, "time")
    checks.step_size(courant, "courant")
    checks.finite("mean", mean)
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    u = start = mean + torch.sin(2 * math.pi * x)
    steps = math.ceil(time * float(start.abs().max()) * cells / courant)
    variations = [_variation(u)]
    for _ in range(steps):
        u = _step(scheme, u, time / steps, cells)
        variations.append(_variation(u))
    return Burgers(x, start, u, torch.stack(variations))


def _variation(u: Tensor) -> Tensor:
    return (u - u.roll(1)).abs().sum()


def _step(scheme: Tableau, u: Tensor, step: float, cells: int) -> Tensor:
    stages, slopes = [u], [step * _weno_slope(u, cells)]
    for alpha, beta in zip(scheme.alpha, scheme.beta, strict=True):
        out = torch.zeros_like(u)
        for a, b, stage, slope in zip(alpha, beta, stages, slopes, strict=True):
            out = out + a * stage + b * slope
        stages.append(out)
        if len(stages) <= scheme.stages:
            slopes.append(step * _weno_slope(out, cells))
    return stages[-1]


def _weno_slope(u: Tensor, cells: int) -> Tensor:
    """−(u²/2)_x by WENO5 on the two halves of the flux (u²/2 ± max|u| u) / 2."""
    flux, speed = u**2 / 2, u.abs().max()
    right = _weno_face((flux + speed * u) / 2)  # at i + 1/2, from the left
    left = _weno_face(((flux - speed * u) / 2).flip(0)).flip(0).roll(-1)  # at i + 1/2, from the right
    face = right + left
    return -(face - face.roll(1)) * cells


def _weno_face(f: Tensor) -> Tensor:
    """The value at i + 1/2 from f_{i-2} … f_{i+2}; Jiang & Shu 1996, eqs. 2.9 to 2.16."""
    a, b, c, d, e = f.roll(2), f.roll(1), f, f.roll(-1), f.roll(-2)
    candidates = (
        (2 * a - 7 * b + 11 * c) / 6,
        (-b + 5 * c + 2 * d) / 6,
        (2 * c + 5 * d - e) / 6,
    )
    smoothness = (
        13 / 12 * (a - 2 * b + c) ** 2 + (a - 4 * b + 3 * c) ** 2 / 4,
        13 / 12 * (b - 2 * c + d) ** 2 + (b - d) ** 2 / 4,
        13 / 12 * (c - 2 * d + e) ** 2 + (3 * c - 4 * d + e) ** 2 / 4,
    )
    weights = [ideal / (1e-6 + beta) ** 2 for ideal, beta in zip((0.1, 0.6, 0.3), smoothness, strict=True)]
    top, total = torch.zeros_like(f), torch.zeros_like(f)
    for weight, candidate in zip(weights, candidates, strict=True):
        top, total = top + weight * candidate, total + weight
    return top / total


def lyapunov_exponent(
    field: nn.Module,
    *state: Tensor,
    time: float = 10.0,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest Lyapunov exponent of an autonomous ODE along a trajectory, estimated by one tangent vector.

    The state and a tangent vector go by RK4 together, the vector's length is kept at one, and the exponent is the mean
    of the logarithms it grew by. At most 0 is what Lyapunov stability asks for; an estimate over a finite time may be
    above it. The field runs in eval mode.

    Args:
        field: a module that maps the state's tensors to as many slopes (one tensor, or a tuple).
        state: one tensor or more, each [N, ...].
        time: > 0, over which is measured.
        steps: of RK4.
        generator: of the first tangent vector; None for a fixed seed.

    Returns:
        The exponent of each sample [N], per unit of time.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: Huang et al. (paper 003), Theorem 3.1; Benettin et al. 1980.

    Example:
        >>> decay = nn.Linear(2, 2, bias=False)
        >>> _ = decay.weight.data.copy_(-0.5 * torch.eye(2))
        >>> round(lyapunov_exponent(decay, torch.ones(1, 2), time=2.0, steps=20).item(), 4)
        -0.5
    """
    checks.module("field", field)
    if not state:
        raise TypeError("state must be one tensor or more, got none")
    for index, part in enumerate(state):
        check_samples(f"state[{index}]", part)
    checks.step_size(time, "time")
    checks.steps(steps)
    slope, flat = _flattened(field, state)
    step = time / steps

    def advance(x: Tensor) -> Tensor:
        k1 = slope(x)
        k2 = slope(x + step / 2 * k1)
        k3 = slope(x + step / 2 * k2)
        k4 = slope(x + step * k3)
        return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    random = torch.Generator().manual_seed(0) if generator is None else generator
    tangent = torch.randn(flat.shape, generator=random, dtype=torch.float64).to(flat)
    tangent = tangent / torch.linalg.vector_norm(tangent, dim=1, keepdim=True)
    total = flat.new_zeros(len(flat))
    with evaluated(field):
        for _ in range(steps):
            at = Products(advance, flat)
            tangent, flat = at.forward(tangent), at.value
            length = torch.linalg.vector_norm(tangent, dim=1)
            total = total + length.log()
            tangent = tangent / length[:, None]
    return total / time


def _flattened(field: nn.Module, state: tuple[Tensor, ...]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A field on one tensor [N, n] in place of several, and the state in that form."""
    shapes, sizes = [part.shape for part in state], [part[0].numel() for part in state]

    def slope(x: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(x.split(sizes, 1), shapes, strict=True)]
        out: Any = field(*parts)
        slopes = (out,) if isinstance(out, Tensor) else tuple(out)
        found = [part.shape for part in slopes]
        if found != shapes:
            wanted = [list(shape) for shape in shapes]
            raise ValueError(f"field must return slopes of shapes {wanted}, got {[list(shape) for shape in found]}")
        return torch.cat([part.flatten(1) for part in slopes], 1)

    return slope, torch.cat([part.detach().flatten(1) for part in state], 1)


@dataclass(frozen=True)
class Orthogonality:
    """How far Φ = exp(t A) is from orthogonal, on random directions.

    Attributes:
        norm: the largest distance of ‖Φ v‖ / ‖v‖ from one.
        angle: the largest distance of ⟨Φ u, Φ v⟩ from ⟨u, v⟩, of unit vectors.
        inverse: the largest ‖Φᵀ Φ v − v‖ / ‖v‖, with Φᵀ = exp(t Aᵀ).
    """

    norm: float
    angle: float
    inverse: float


def skew_orthogonality(
    field: nn.Module,
    y: Tensor,
    z: Tensor,
    *,
    time: float = 1.0,
    generator: torch.Generator | None = None,
) -> Orthogonality:
    """Whether the flow of a skew field without activation and damping keeps lengths, measured on products.

    Without σ and γ the field is linear and its matrix A skew-symmetric, so that Φ Φᵀ = I and Φ⁻¹ = exp(−t A). Aᵀ is
    taken from autograd, so that a field whose two halves do not belong together shows in `inverse`.

    Args:
        field: a `SkewPair` or `SkewLinear` (or a twin), whose norms are left out, too.
        y: a state [N, ...], of which shape and dtype count.
        z: likewise.
        time: t > 0.
        generator: of the directions; None for a fixed seed.

    Returns:
        Three distances, zero but for rounding.

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: Huang et al. (paper 003), eq. 4.

    Example:
        >>> pair = reference.SkewPair(1, 1, norm="none")
        >>> state = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
        >>> skew_orthogonality(pair.double(), state, state).norm < 1e-12
        True
    """
    check_samples("y", y)
    check_samples("z", z)
    checks.step_size(time, "time")
    linear = _linear_part(field)
    slope, flat = _flattened(linear, (y, z))
    at = Products(slope, torch.zeros_like(flat))
    random = torch.Generator().manual_seed(0) if generator is None else generator
    u, v = (torch.randn(flat.shape, generator=random, dtype=torch.float64).to(flat) for _ in range(2))
    u, v = (part / torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (u, v))
    moved_u, moved_v = _exponential(at.forward, u, time), _exponential(at.forward, v, time)
    back = _exponential(at.backward, moved_v, time)
    return Orthogonality(
        float((torch.linalg.vector_norm(moved_v, dim=1) - 1).abs().max()),
        float(((moved_u * moved_v).sum(1) - (u * v).sum(1)).abs().max()),
        float(torch.linalg.vector_norm(back - v, dim=1).max()),
    )


def _linear_part(field: nn.Module) -> nn.Module:
    if isinstance(field, reference.SkewPair):
        return _Linear(lambda y, z: skew_field(y, z, field.weight, field.stride, PADDING, 0.0, nn.Identity()))
    if isinstance(field, reference.SkewLinear):
        return _Linear(lambda y, z: (F.linear(z, field.weight), F.linear(y, -field.weight.t())))
    raise TypeError(f"field must be a SkewPair or a SkewLinear, got {checks.what(field)}")


class _Linear(nn.Module):
    def __init__(self, slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.slopes = slopes

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.slopes(y, z)


def _exponential(apply: Callable[[Tensor], Tensor], v: Tensor, time: float) -> Tensor:
    """exp(t A) v by its series, over parts of t so short that ‖t A‖ is about one at most."""
    probe = v
    for _ in range(10):  # power iteration; a normal matrix shows its norm
        probe = apply(probe)
        size = torch.linalg.vector_norm(probe, dim=1, keepdim=True)
        probe = probe / size.clamp_min(torch.finfo(v.dtype).tiny)
    parts = max(1, math.ceil(1.5 * time * float(size.max())))
    for _ in range(parts):
        term = total = v
        for k in range(1, TERMS + 1):
            term = apply(term) * (time / parts / k)
            total = total + term
        v = total
    return v
