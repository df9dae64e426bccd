"""One tensor against the rule of fastode.testing, and the table of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Row:
    """One compared tensor: its error, what the rule allows, and the ratio of the two in the largest entry."""

    name: str
    err: float
    allowed: float
    pointwise: float | None = None  # None where a kink is within rounding
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the tensor passes. A NaN error does not."""
        return not self.note and self.err <= self.allowed and (self.pointwise is None or self.pointwise <= 1.0)

    @property
    def ratio(self) -> float:
        """The error in units of what is allowed, the worse of the two norms."""
        if self.note:
            return math.inf
        ratio = self.err / self.allowed if self.allowed > 0.0 else (0.0 if self.err == 0.0 else math.inf)
        return max(ratio, self.pointwise or 0.0)


@dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison, a row per tensor."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every tensor passes."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row nearest to, or furthest over, what the rule allows."""
        return max(self.rows, key=lambda row: row.ratio)

    def describe(self) -> str:
        """The rows as a table, the failing ones first."""
        lines = []
        for row in sorted(self.rows, key=lambda row: (row.ok, -row.ratio)):
            pointwise = "" if row.pointwise is None else f"  pointwise {row.pointwise:.2f} of allowed"
            verdict = "ok  " if row.ok else "FAIL"
            lines.append(
                f"{verdict} {row.name}: err {row.err:.3e}, allowed {row.allowed:.3e}{pointwise}  {row.note}".rstrip()
            )
        return "\n".join(lines)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype: torch.dtype, longest: int) -> float:
    """What the rule allows beside R: 2 units of the dtype and 8 of the accumulator by the root of the reduction."""
    return 2.0 * torch.finfo(dtype).eps + 8.0 * torch.finfo(_accumulator(dtype)).eps * math.sqrt(longest)


def _classes(t: Tensor) -> Tensor:
    """0 where finite, else which kind of not finite."""
    return torch.isnan(t) * 1 + torch.isposinf(t) * 2 + torch.isneginf(t) * 3


def _two_norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) if t.numel() else 0.0


def _max_norm(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _relative(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else math.inf


def _kind(name: str) -> str:
    return name.split(" ", 1)[0].split("[", 1)[0]


class Rule:
    """The rule for one set of tensors: what they are compared with and how much they may differ.

    `again` makes a second float64 run, which tells a truth that is zero in exact arithmetic from a small one.
    """

    def __init__(
        self,
        truths: Tensors,
        references: Sequence[Tensors],
        longest: int,
        dtype: torch.dtype | None,
        pointwise: bool,
        again: Callable[[], Tensors],
    ) -> None:
        self.truths, self.references, self.longest, self.dtype = truths, references, longest, dtype
        self.pointwise, self.again = pointwise, again
        parts = {name: _finite(t) for name, t in truths.items() if t is not None}
        self._sizes = {name: (_two_norm(t), _max_norm(t)) for name, t in parts.items()}
        self._largest: dict[str, tuple[float, float]] = {}  # of each kind of tensor
        for name, (two, most) in self._sizes.items():
            others = self._largest.get(_kind(name), (0.0, 0.0))
            self._largest[_kind(name)] = (max(two, others[0]), max(most, others[1]))

    def _scales(self, name: str) -> list[float]:
        """The truth's own two norms or, where it is zero in exact arithmetic, the largest of its kind of tensor."""
        sizes = zip(self._sizes[name], self._largest[_kind(name)], strict=True)
        return [own if own > 0.0 and not self.is_rounding(name) else largest for own, largest in sizes]

    def is_rounding(self, name: str) -> bool:
        """Whether the truth is zero in exact arithmetic, so that its digits mean nothing.

        It is, if it is within float64's own rounding of the largest tensor of its kind, or if it is tiny beside that
        one and a second float64 run has other digits.
        """
        truth = self.truths[name]
        if truth is None or not truth.is_floating_point():
            return False
        digits = math.sqrt(torch.finfo(torch.float64).eps)
        own, largest = self._sizes[name][0], self._largest[_kind(name)][0]
        if own > digits * largest:
            return False
        if own <= rounding(torch.float64, self.longest) * largest:
            return True
        second = self.again()[name]
        return second is None or _two_norm(_finite(second) - _finite(truth)) > digits * own

    def row(self, name: str, found: Tensor | None, excused: Tensor | None = None) -> Row:
        """The verdict on what was found for one of the truths, less a difference that it is excused for."""
        truth, runs = self.truths[name], [t for t in (run[name] for run in self.references) if t is not None]
        if found is None or truth is None:
            note = "" if found is None and truth is None else f"found {_what(found)}, the reference has {_what(truth)}"
            return Row(name, 0.0, 0.0, None, note)
        expected = runs[0] if runs else truth
        if found.shape != truth.shape or (runs and found.dtype != expected.dtype):
            return Row(name, math.inf, 0.0, None, f"found {_what(found)}, the reference has {_what(expected)}")
        if not found.is_floating_point():
            return Row(name, float(torch.ne(found, expected).sum()), 0.0)
        finite = torch.isfinite(found) & torch.isfinite(truth)
        for run in runs:
            finite &= torch.isfinite(run)
        everywhere = bool(finite.all())
        if not everywhere and not any(torch.equal(_classes(found), _classes(run)) for run in (*runs, truth)):
            return Row(name, math.inf, 0.0, None, "NaN or inf where the reference has none, or the other way round")
        exact, *values = (t.double() if everywhere else t.double()[finite] for t in (truth, found, *runs))
        differences = [t - exact for t in values]
        if excused is not None:
            differences[0] = differences[0] - (excused if everywhere else excused[finite])
        slack = rounding(self.dtype or found.dtype, self.longest)
        ratios = []
        for norm, scale in zip((_two_norm, _max_norm), self._scales(name), strict=True):
            error, *errors = (_relative(norm(difference), scale) for difference in differences)
            ratios.append((error, 2.0 * max(errors, default=0.0) + slack))
        (err, allowed), (largest, largest_allowed) = ratios
        return Row(name, err, allowed, largest / largest_allowed if self.pointwise else None)


def _finite(t: Tensor | None) -> Tensor:
    assert t is not None
    return torch.where(torch.isfinite(t), t, 0).double() if t.is_floating_point() else t.double()


def _what(t: Tensor | None) -> str:
    return "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
