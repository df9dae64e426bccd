"""Schemes that are linear in their points and in f at them, as rows of coefficients that check themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import checks

Rows = tuple[tuple[float, ...], ...]
Places = tuple[tuple[int, ...], ...]


class Parts(NamedTuple):
    """A table as blocks run it, made once: a tracer would make it again for every block.

    Attributes:
        rows: α and β as square matrices.
        alpha: for each stage the k at which α is not zero.
        beta: likewise of β.
        words: where they are not zero, in words.
    """

    rows: tuple[Rows, Rows]
    alpha: Places
    beta: Places
    words: str


def parts_of(alpha: Rows, beta: Rows) -> Parts:
    """The parts of a table with these rows."""
    stages = len(alpha)
    square_a, square_b = (tuple([(*row, *(0.0,) * (stages - len(row))) for row in rows]) for rows in (alpha, beta))
    places_a, places_b = (
        tuple([tuple([k for k, entry in enumerate(row) if entry != 0]) for row in rows]) for rows in (alpha, beta)
    )
    return Parts((square_a, square_b), places_a, places_b, in_words(places_a, places_b))


def in_words(alpha: Places, beta: Places) -> str:
    """Where the coefficients of a scheme are not zero."""
    pairs = zip(alpha, beta, strict=True)
    return " ".join(["".join([f"{k}" for k in (*alphas, "/", *betas)]) for alphas, betas in pairs])


@dataclass(frozen=True)
class LinearTable:
    """A scheme u₀ = x, u_i = Σ_{k<i} α_ik u_k + β_ik f(u_k), y = u_s without order: rows of α need not sum to one.

    Args:
        name: what the scheme is called.
        alpha: row i-1 holds α_i0 … α_i,i-1.
        beta: rows of the same lengths; of each row of alpha and beta together, some entry is not zero.

    Attributes:
        parts: the table as blocks run it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: rows of the wrong length, coefficients that are not finite, or a stage without any.

    Source: Kim et al. 2020, eq. 4 (paper 004), without its conditions; PolyNet is one (eq. 15 of paper 002).

    Example:
        >>> LinearTable("f of f", alpha=((0.0,), (0.0, 0.0)), beta=((1.0,), (0.0, 1.0))).stages
        2
    """

    name: str
    alpha: Rows
    beta: Rows
    parts: Parts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        alpha, beta = rows_of_numbers("alpha", self.alpha), rows_of_numbers("beta", self.beta)
        check_lengths("alpha", alpha, list(range(1, max(len(alpha), 1) + 1)))
        check_lengths("beta", beta, [len(row) for row in alpha])
        for i, (alphas, betas) in enumerate(zip(alpha, beta, strict=True), start=1):
            if not any(alphas) and not any(betas):
                raise ValueError(f"alpha and beta must have a coefficient in every row, got only zeros in row {i}")
        # Lists are taken too, but what is kept must be hashable: it travels through torch.compile as a constant.
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "parts", parts_of(alpha, beta))

    @property
    def stages(self) -> int:
        """The number of stages s."""
        return len(self.alpha)


def check_name(name: Any) -> None:
    """Refuse a name that is no string."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got an object of type {type(name).__name__}")


def rows_of_numbers(argument: str, rows: Any) -> Rows:
    """The rows as tuples of floats; refuses what is not rows of finite numbers."""
    if not _is_sequence(rows) or not all(map(_is_sequence, rows)):
        raise TypeError(f"{argument} must be rows of numbers, got {rows!r}")
    for row in rows:
        for value in row:
            checks.finite(f"every entry of {argument}", value)
    return tuple(tuple(map(float, row)) for row in rows)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_lengths(argument: str, rows: Rows, wanted: list[int]) -> None:
    """Refuse rows of other lengths than these."""
    lengths = [len(row) for row in rows]
    if lengths != wanted:
        raise ValueError(f"{argument} must be rows of lengths {wanted}, got rows of lengths {lengths}")
