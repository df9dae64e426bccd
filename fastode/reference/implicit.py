"""Solving y = x + f(y) by Newton's method, with products of f's Jacobian alone: the exact implicit Euler step.

Each sample is a problem of its own where nothing couples the batch: its steps, and where they end, are then the same in
any batch. Sums are taken in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

COLUMNS = 20  # of the Krylov space in which a linear system is solved, before it is begun anew
FORCING = 0.1  # to what part of the residual a Newton step's linear system is solved
HALVINGS = 6  # of a Newton step along which the residual does not fall
_DECREASE = 1e-4  # by which part of what the linear model promises it has to

Product = Callable[[Tensor], Tensor]


class Point(Protocol):
    """f at a point.

    Attributes:
        value: f(y).
        push: v ↦ J(y) v.
    """

    @property
    def value(self) -> Tensor: ...

    @property
    def push(self) -> Product: ...


class Sets:
    """Tensors of x's shape as rows, one for each set of entries that is solved together: a sample, or the batch."""

    def __init__(self, x: Tensor, coupled: bool) -> None:
        self.x, self.count = x, 1 if coupled or x.dim() < 2 else x.shape[0]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        self.order = (0, 2, 3, 1) if last else tuple(range(x.dim()))  # in which the entries lie
        self.back = tuple(self.order.index(i) for i in range(x.dim()))

    def rows(self, value: Tensor) -> Tensor:
        """[sets, entries]."""
        return value.to(self.dtype).permute(self.order).reshape(self.count, -1)

    def maps(self, rows: Tensor) -> Tensor:
        """The tensor of x's shape and dtype."""
        shape = [self.x.shape[i] for i in self.order]
        return rows.reshape(shape).permute(self.back).to(self.x.dtype)

    def norms(self, value: Tensor) -> Tensor:
        """The Euclidean norm of each set, float64, on the CPU."""
        return torch.linalg.vector_norm(self.rows(value), dim=1).double().cpu()

    def times(self, factors: Tensor, value: Tensor) -> Tensor:
        """Each set times its factor."""
        return self.maps(self.rows(value) * factors.to(self.x.device, self.dtype)[:, None])


@dataclass
class Root:
    """Where Newton's method ended: y, f there, ‖y − x − f(y)‖ / ‖x‖ of each set, its steps and its products."""

    y: Tensor
    point: Point
    residuals: tuple[float, ...]
    iterations: int
    products: int


def find_root(
    evaluate: Callable[[Tensor], Point], x: Tensor, first: Tensor, coupled: bool, tol: float, most: int
) -> Root:
    """y with ‖y − x − f(y)‖ ≤ tol ‖x‖, from y = first, or as near as Newton's method comes.

    Args:
        evaluate: f at a point.
        x: the input.
        first: x + f(x), where it begins.
        coupled: whether f lets samples see each other.
        tol: > 0.
        most: Newton steps at most.

    Returns:
        Where it ended. A set stays where it is once it has converged, or where no part of its step makes it better.

    Source: Li et al. 2020, Section 4.2 (paper 001), which asks for the minimum of ‖y − x − f(y)‖²; Dembo, Eisenstat and
        Steihaug, "Inexact Newton methods", 1982.
    """
    sets = Sets(x, coupled)
    size = sets.norms(x)
    target = tol * size
    y, point = first, evaluate(first)
    residual = y - x - point.value
    norm = sets.norms(residual)
    moving = norm > target  # false of NaN as well
    steps = products = 0
    while steps < most and bool(moving.any()):
        steps += 1
        rest = torch.where(moving, torch.clamp(0.5 * target / norm, min=FORCING), 1.0)
        step, _, _, taken = gmres(partial(_newton, point), -residual, sets, rest, 1)
        products += taken
        moved, part = torch.zeros_like(moving), torch.where(moving, 1.0, 0.0).double()
        for _ in range(HALVINGS + 1):
            there = y + sets.times(part, step)
            point = evaluate(there)
            found = there - x - point.value
            reached = sets.norms(found)
            moved = moving & (reached <= (1 - _DECREASE * part) * norm)
            if bool((moved == moving).all()):
                break
            part = torch.where(moving & ~moved, 0.5 * part, part)
        if not bool((moved == moving).all()):
            # A set along whose step nothing falls stays where it was.
            there = y + sets.times(torch.where(moved, part, 0.0), step)
            point = evaluate(there)
            found = there - x - point.value
            reached = sets.norms(found)
        y, residual, norm = there, found, reached
        moving = moved & (norm > target)
    residuals = tuple((norm / size).tolist())
    return Root(y, point, residuals, steps, products)


def _newton(point: Point, v: Tensor) -> Tensor:
    """(I − J) v."""
    return v - point.push(v)


def gmres(
    apply: Product, b: Tensor, sets: Sets, rest: Tensor, spaces: int
) -> tuple[Tensor, tuple[float, ...], int, int]:
    """v with ‖b − A v‖ ≤ rest ‖b‖ of each set, or as near as the Krylov spaces come.

    Args:
        apply: v ↦ A v.
        b: the right-hand side.
        sets: what is solved together.
        rest: for each set, to what part of ‖b‖ it is to be solved; 1 leaves it at zero.
        spaces: how many spaces of COLUMNS columns, each from where the last one ended.

    Returns:
        v, ‖b − A v‖ / ‖b‖ of each set, the number of spaces begun, and that of products.

    Source: Saad and Schultz, "GMRES", 1986.
    """
    total, begun, products = torch.zeros_like(b), 0, 0
    size = sets.norms(b)
    left, norm = b, size
    with torch.autocast(b.device.type, enabled=False):
        for space in range(spaces):
            if not bool((norm > rest * size).any()):
                break
            if space:
                left = b - apply(total)
                norm = sets.norms(left)
                products += 1
            change, norm, taken = _one_space(apply, left, sets, norm, rest * size)
            total = total + change
            begun, products = begun + 1, products + taken
    shares = torch.where(size > 0, norm / size, 0.0)
    return total, tuple(shares.tolist()), begun, products


def _one_space(apply: Product, b: Tensor, sets: Sets, norm: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, int]:
    """The best v of a Krylov space, in which each set takes no more columns than it wants; ‖b − A v‖; the products."""
    count = sets.count
    basis = [sets.rows(b) / _above_zero(norm, b)[:, None]]
    upper = torch.zeros(count, COLUMNS, COLUMNS, dtype=torch.float64)  # R of the Hessenberg matrix
    turned = torch.zeros(count, COLUMNS + 1, dtype=torch.float64)  # what the rotations make of ‖b‖ e₁
    turned[:, 0] = norm
    cosines, sines = torch.zeros(2, COLUMNS, count, dtype=torch.float64)
    columns = torch.zeros(count, dtype=torch.int64)
    going = norm > wanted
    taken = 0
    while taken < COLUMNS and bool(going.any()):
        k = taken
        spread = torch.stack(basis, 1)  # [sets, k + 1, entries]
        new = sets.rows(apply(sets.maps(basis[k])))
        parts = torch.zeros(count, k + 1, dtype=torch.float64)
        for _ in range(2):  # the second time for what rounding has left
            found = torch.bmm(spread, new[:, :, None])
            new = new - torch.bmm(spread.mT, found)[:, :, 0]
            parts += found[:, :, 0].double().cpu()
        length = torch.linalg.vector_norm(new, dim=1).double().cpu()
        basis.append(new / _above_zero(length, b)[:, None])
        for i in range(k):
            upper_part = cosines[i] * parts[:, i] + sines[i] * parts[:, i + 1]
            parts[:, i + 1] = cosines[i] * parts[:, i + 1] - sines[i] * parts[:, i]
            parts[:, i] = upper_part
        radius = torch.hypot(parts[:, k], length)
        cosines[k], sines[k] = (torch.where(radius > 0, value / radius, 0.0) for value in (parts[:, k], length))
        parts[:, k] = radius
        upper[:, : k + 1, k] = parts
        turned[:, k + 1], turned[:, k] = -sines[k] * turned[:, k], cosines[k] * turned[:, k].clone()
        columns = torch.where(going, k + 1, columns)
        taken += 1
        going = going & (turned[:, k + 1].abs() > wanted) & (length > 0)
    weights = torch.zeros(count, taken, dtype=torch.float64)
    # Each set's own columns; the unit diagonal of the others gives them the weight zero.
    used = torch.arange(taken) < columns[:, None]
    kept = upper[:, :taken, :taken] * used[:, None, :] + torch.diag_embed((~used).double())
    singular = torch.diagonal(kept, dim1=1, dim2=2) == 0
    kept = kept + torch.diag_embed(singular.double())
    if taken:
        sides = turned[:, :taken] * (used & ~singular)
        weights = torch.linalg.solve_triangular(kept, sides[:, :, None], upper=True)[:, :, 0]
    rows = torch.bmm(weights.to(b.device, sets.dtype)[:, None], torch.stack(basis[:taken] or basis, 1)[:, :taken])
    reached = turned.gather(1, columns[:, None])[:, 0].abs()
    return sets.maps(rows[:, 0]), reached, taken


def _above_zero(length: Tensor, like: Tensor) -> Tensor:
    """Lengths to divide by, on the device; those of zero are one."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.where(length > 0, length, 1.0).to(like.device, dtype)
