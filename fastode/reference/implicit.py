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
    first = sets.rows(b) / _above_zero(norm, b)[:, None]
    basis = first.new_empty(sets.count, COLUMNS + 1, first.shape[1])
    basis[:, 0] = first
    small = _SmallProblem(norm, wanted, 8 * torch.finfo(sets.dtype).eps)
    while small.columns < COLUMNS and bool(small.going.any()):
        k = small.columns
        spread = basis[:, : k + 1]
        new = sets.rows(apply(sets.maps(basis[:, k])))[:, None]  # a matrix of one row: bmm is fastest so
        parts = torch.zeros(sets.count, k + 1, dtype=torch.float64)
        for _ in range(2):  # the second time for what rounding has left
            found = torch.bmm(new, spread.mT)
            new = torch.baddbmm(new, found, spread, alpha=-1)
            parts += found[:, 0].double().cpu()
        length = torch.linalg.vector_norm(new[:, 0], dim=1).double().cpu()
        basis[:, k + 1] = new[:, 0] / _above_zero(length, b)[:, None]
        small.add(parts, length)
    weights = small.weights().to(b.device, sets.dtype)
    rows = torch.bmm(weights[:, None], basis[:, : small.columns])
    return sets.maps(rows[:, 0]), small.reached, small.columns


class _SmallProblem:
    """The least squares of GMRES, one for each set, on the CPU: a Hessenberg matrix, made triangular by rotations.

    Attributes:
        columns: that were added.
        reached: ‖b − A v‖ of each set with the columns that it takes.
        going: the sets that take another one.
    """

    def __init__(self, norm: Tensor, wanted: Tensor, rounding: float) -> None:
        count, self._rounding = len(norm), rounding  # below which part of a column an entry of it is nothing
        self.columns, self.reached, self.wanted = 0, norm.clone(), wanted
        self.going = norm > wanted
        self._taken = torch.zeros(count, dtype=torch.int64)  # by each set
        self._upper = torch.zeros(count, COLUMNS, COLUMNS, dtype=torch.float64)
        self._right = torch.zeros(count, COLUMNS, dtype=torch.float64)
        self._rest = norm.clone()  # the right-hand side's last entry
        self._rotations: list[tuple[Tensor, Tensor]] = []

    def add(self, parts: Tensor, length: Tensor) -> None:
        """Add a column, its entries [sets, columns + 1] and the one below the diagonal [sets]."""
        k, entries = self.columns, list(parts.unbind(1))
        nothing = self._rounding * torch.linalg.vector_norm(torch.cat([parts, length[:, None]], 1), dim=1)
        length = torch.where(length > nothing, length, 0.0)
        for i, (cosine, sine) in enumerate(self._rotations):
            entries[i], entries[i + 1] = (
                cosine * entries[i] + sine * entries[i + 1],
                cosine * entries[i + 1] - sine * entries[i],
            )
        radius = torch.hypot(entries[k], length)
        cosine, sine = (torch.where(radius > 0, value / radius, 0.0) for value in (entries[k], length))
        entries[k] = radius
        self._rotations.append((cosine, sine))
        self._upper[:, : k + 1, k] = torch.stack(entries, 1)
        self._right[:, k], self._rest = cosine * self._rest, -sine * self._rest
        self.columns += 1
        taking = self.going & (radius > nothing)  # a column that adds nothing shows that A is singular there
        self._taken = torch.where(taking, self.columns, self._taken)
        self.reached = torch.where(taking, self._rest.abs(), self.reached)
        self.going = taking & (self.reached > self.wanted) & (length > 0)

    def weights(self) -> Tensor:
        """The weights of the columns [sets, columns], zero of those that a set does not take."""
        count = self.columns
        used = torch.arange(count) < self._taken[:, None]
        upper = self._upper[:, :count, :count] * used[:, None] + torch.diag_embed((~used).double())
        return torch.linalg.solve_triangular(upper, (self._right[:, :count] * used)[:, :, None], upper=True)[:, :, 0]


def _above_zero(length: Tensor, like: Tensor) -> Tensor:
    """Lengths to divide by, on the device; those of zero are one."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.where(length > 0, length, 1.0).to(like.device, dtype)
