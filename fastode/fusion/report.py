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
        reason: why it was not swapped, or why other engines cannot run it; empty if there is nothing to say.
        meaning: the type of which a block of another's class is, over its own modules; None for others.
    """

    name: str
    reference: type[nn.Module]
    fused: type[nn.Module] | None
    engines: tuple[str, ...]
    reason: str
    meaning: type[nn.Module] | None = None

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
    """

    rows: tuple[FusionRow, ...]
    measured: bool = False

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
            return "no block that fastode knows"
        cells = [("block", "type", "twin", "engine" if self.measured else "engines", "why")]
        for row in self.rows:
            twin = "-" if row.fused is None else _public_name(row.fused)
            if row.fused is not None and row.meaning is not None:
                twin = f"as {_public_name(row.meaning)}"
            engines = ", ".join(row.engines) or "-"
            cells.append((row.name or "(model)", row.reference.__name__, twin, engines, row.reason))
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, f"{self.fused} fused, {self.unfused} as the reference"])


def _public_name(kind: type[nn.Module]) -> str:
    """By which a user imports a twin: this project's from fastode.nn, whichever file of it they stand in."""
    module = nn_package.__name__ if getattr(nn_package, kind.__qualname__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"
