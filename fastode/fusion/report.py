"""What `fuse` did, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import nn as nn_package
from ..dispatch.engines import is_reference


@dataclass(frozen=True)
class FusionRow:
    """One block of a model.

    Attributes:
        name: its dotted name in the model, empty for the model itself; a block used in several places has its first.
        reference: the reference type it is, or derives from, or its own where an adapter or a reading says what it is.
        fused: the type it has been given, or None where it stays the reference.
        engines: the engine it really used, where an example was run; else those that could run it, best first.
        reason: why it was not swapped, or why engines that come first cannot run it; empty if there is nothing to say.
        meaning: the type of which a block of another's class is, over its own modules; None for others.
        share: of the forward's time, that of the calls of this block, where an example was run; None where another
            block has run it, or nothing has.
        gain: the time of the reference block over that of the fused one, measured once on the inputs that the example
            gives it; None where it is not fused or has no share.
    """

    name: str
    reference: type[nn.Module]
    fused: type[nn.Module] | None
    engines: tuple[str, ...]
    reason: str
    meaning: type[nn.Module] | None = None
    share: float | None = None
    gain: float | None = None

    @property
    def is_fused(self) -> bool:
        """Whether a fused engine runs the block."""
        return self.fused is not None and not all(map(is_reference, self.engines))


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` or `unfuse` did.

    Attributes:
        rows: one for each block, in the order of `model.named_modules()`.
        measured: whether an example was run, so that each row holds the engine that was used.
        share: of the forward's time on the example, that of fused calls, measured once; None without an example.
        gain: the time of a forward with the reference blocks over that with the fused ones, measured once.
        advice: what one change would help most, in a sentence; empty without an example.
    """

    rows: tuple[FusionRow, ...]
    measured: bool = False
    share: float | None = None
    gain: float | None = None
    advice: str = ""

    @property
    def fused(self) -> int:
        """How many blocks a fused engine runs."""
        return sum(row.is_fused for row in self.rows)

    @property
    def unfused(self) -> int:
        """How many blocks run as the reference."""
        return len(self.rows) - self.fused

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(["no block that fastode knows", *self._of_the_whole()])
        measures = ("share", "gain") if self.share is not None else ()
        cells = [("block", "type", "twin", "engine" if self.measured else "engines", *measures, "why")]
        for row in self.rows:
            twin = "-" if row.fused is None else _public_name(row.fused)
            if row.fused is not None and row.meaning is not None:
                twin = f"as {_public_name(row.meaning)}"
            engines = ", ".join(row.engines) or "-"
            numbers = (
                "" if row.share is None else percent(row.share),
                "" if row.gain is None else times_as_fast(row.gain),
            )
            first = (row.name or "(model)", row.reference.__name__, twin, engines)
            cells.append((*first, *(numbers if measures else ()), row.reason))
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, f"{self.fused} fused, {self.unfused} as the reference", *self._of_the_whole()])

    def _of_the_whole(self) -> list[str]:
        """The last lines: what an example has shown of the model."""
        if self.share is None:
            return []
        gain = (
            "" if self.gain is None else f"; the model is {times_as_fast(self.gain)} as fast as with reference blocks"
        )
        whole = f"of one forward, {percent(self.share)} of the time is in fused calls{gain}"
        return [whole, f"what would help most: {self.advice}"]


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.0f} %"


def times_as_fast(gain: float) -> str:
    """What was measured once, in no more digits than that is worth."""
    return f"about {gain:.{0 if gain >= 9.95 else 1}f}x"


def _public_name(kind: type[nn.Module]) -> str:
    """By which a user imports a twin: this project's from fastode.nn, whichever file of it they stand in."""
    module = nn_package.__name__ if getattr(nn_package, kind.__qualname__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"
