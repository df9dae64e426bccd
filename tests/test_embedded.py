"""The adaptive solvers' tableaus: orders by rooted trees, and each method's last stage and interpolant."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastode.embedded import ADAPTIVE_HEUN, BOSH3, DOPRI5, DOPRI8, EMBEDDED, FEHLBERG2
from fastode.reference.adaptive import interpolated
from fastode.tableau import Embedded

Tree = tuple[Any, ...]
HEUN = {
    **{"name": "heun", "a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2},
    **{"c": (0.0, 1.0), "b_error": (-0.5, 0.5), "b_mid": (0.5, 0.0), "embedded_order": 1},
}


def partitions(total: int, most: int) -> Iterator[list[int]]:
    if total == 0:
        yield []
    for first in range(min(total, most), 0, -1):
        yield from ([first, *rest] for rest in partitions(total - first, first))


@functools.cache
def trees(nodes: int) -> list[Tree]:
    """The rooted trees of so many nodes, each the sorted tuple of its root's subtrees."""
    below = (itertools.product(*map(trees, sizes)) for sizes in partitions(nodes - 1, nodes - 1))
    return sorted({tuple(sorted(forest)) for forests in below for forest in forests})


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    return size(tree) * math.prod(map(density, tree))


def elementary(a: Sequence[Sequence[float]], tree: Tree) -> list[float]:
    """The elementary weight of a tree at each stage."""
    weights = [1.0] * len(a)
    for child in tree:
        inner = elementary(a, child)
        weights = [w * math.fsum(map(float.__mul__, row, inner)) for w, row in zip(weights, a, strict=True)]
    return weights


def order_of(a: Sequence[Sequence[float]], b: Sequence[float], time: float = 1.0) -> int:
    """The highest p for which Σ b k agrees with the solution at `time` steps up to hᵖ (Butcher's conditions)."""
    for p in range(1, 10):
        for tree in trees(p):
            if abs(math.fsum(map(float.__mul__, b, elementary(a, tree))) - time**p / density(tree)) > 1e-10:
                return p - 1
    raise AssertionError("no method here has order 9")


def test_the_trees_are_all_of_them() -> None:
    assert [len(trees(nodes)) for nodes in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


# Of the solution, of the second one, and of the value in the middle.
ORDERS = {
    "dopri5": (5, 4, 4),
    "dopri8": (8, 7, 5),
    "bosh3": (3, 2, 1),
    "adaptive_heun": (2, 1, 1),
    "fehlberg2": (2, 1, 1),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str) -> None:
    tableau = EMBEDDED[name]
    found = (
        order_of(tableau.a, tableau.b),
        order_of(tableau.a, tableau.b_embedded),
        order_of(tableau.a, tableau.b_mid, 0.5),
    )
    assert found == ORDERS[name]
    assert (tableau.order, tableau.embedded_order) == found[:2]


@pytest.mark.parametrize("name", ORDERS)
def test_they_are_torchdiffeqs(name: str) -> None:
    theirs = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS[name]
    ours = EMBEDDED[name]
    assert [list(row) for row in ours.a[1:]] == [row.tolist() for row in theirs.tableau.beta]
    assert list(ours.c[1:]) == theirs.tableau.alpha.tolist()
    assert (list(ours.b), list(ours.b_error)) == (theirs.tableau.c_sol.tolist(), theirs.tableau.c_error.tolist())
    assert (list(ours.b_mid), ours.order) == (theirs.mid.tolist(), theirs.order)


def test_which_last_stage_is_the_next_steps_first() -> None:
    assert {name for name, tableau in EMBEDDED.items() if tableau.ends_in_solution} == {"dopri5", "dopri8", "bosh3"}


def slope(u: Tensor) -> Tensor:
    """A soft spring with friction: nonlinear, smooth, coupled."""
    return torch.stack((u[1], u[0] ** 3 / 6 - u[0] - 0.3 * u[1]))


START = torch.tensor([1.0, 0.5], dtype=torch.float64)


def stepped(tableau: Embedded, u: Tensor, h: float) -> tuple[Tensor, list[Tensor]]:
    slopes: list[Tensor] = []
    for row in tableau.a:
        slopes.append(slope(u + h * sum(a * k for a, k in zip(row, slopes, strict=True))))
    return u + h * sum(b * k for b, k in zip(tableau.b, slopes, strict=True)), slopes


def local_order(error: Callable[[float], float], h: float) -> float:
    """The power of h with which an error falls."""
    return math.log2(error(h) / error(h / 2))


def exact(time: float) -> Tensor:
    u = START
    for _ in range(4):
        u, _ = stepped(DOPRI8, u, time / 4)
    return u


@pytest.mark.parametrize(
    ("tableau", "power"),
    [(DOPRI5, 5), (DOPRI8, 5), (BOSH3, 2), (ADAPTIVE_HEUN, 2), (FEHLBERG2, 2)],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("at", [0.3, 0.8])
def test_local_error_of_the_interpolant(tableau: Embedded, power: int, at: float) -> None:
    def error(h: float) -> float:
        end, slopes = stepped(tableau, START, h)
        (value,) = interpolated(
            tableau, (START,), (end,), [(k,) for k in slopes], *torch.tensor([h, at], dtype=torch.float64)
        )
        return torch.linalg.vector_norm(value - exact(at * h)).item()

    assert abs(local_order(error, 0.1) - power) < 0.4


@pytest.mark.parametrize("tableau", [ADAPTIVE_HEUN, FEHLBERG2], ids=lambda tableau: tableau.name)
def test_the_last_slope_of_a_method_that_is_not_fsal_is_no_slope_of_the_solution(tableau: Embedded) -> None:
    def error(h: float) -> float:
        end, slopes = stepped(tableau, START, h)
        return torch.linalg.vector_norm(slopes[-1] - slope(end)).item()

    assert abs(local_order(error, 0.1) - 2) < 0.3


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"c": (0.0,)}, "c must be 2 numbers, one for each row of a, got 1"),
    ({"c": (0.0, 0.5)}, "c must be the sums of the rows of a, got 0.5 for the row (1.0,)"),
    ({"b_error": (0.5, 0.5)}, "b_error must be weights that sum to 0, got (0.5, 0.5)"),
    ({"b_mid": (0.5, 0.5)}, "b_mid must be weights that sum to 0.5, got (0.5, 0.5)"),
    ({"b_mid": (math.nan, 0.5)}, "every entry of b_mid must be a finite number, got nan"),
    ({"embedded_order": 2}, "embedded_order must be at most 1 with these coefficients, got 2"),
    ({"embedded_order": 0}, "embedded_order must be an int >= 1, got 0"),
    ({"order": 3}, "order must be at most 2 with these coefficients, got 3"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Embedded(**{**HEUN, **change})
    assert str(refused.value) == message


def test_lists_are_taken_and_kept_as_tuples() -> None:
    scheme = Embedded(**{**HEUN, "c": [0, 1], "b_error": [-0.5, 0.5], "b_mid": [0.5, 0]})
    assert hash(scheme) == hash(Embedded(**HEUN))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.c = (0.0, 2.0)  # type: ignore[misc]
