"""The table of engines, best first. An engine's name stands in its own folder and here, nowhere else."""

from __future__ import annotations

from ..ops.engine import Engine
from ..ops.fused.engine import FusedConvolution
from ..ops.resident.engine import Resident
from ..ops.staged.engine import Staged


class Reference(Engine):
    """Plain PyTorch with autograd: able to run everything, on any device."""

    name = "reference"


REFERENCE = Reference()
ENGINES: tuple[Engine, ...] = (Resident(), FusedConvolution(), Staged(), REFERENCE)
BY_NAME = {engine.name: engine for engine in ENGINES}
AUTO = "auto"
NAMES = (AUTO, *BY_NAME)


def is_reference(name: str) -> bool:
    """Whether a name is that of the engine which fuses nothing."""
    return name == REFERENCE.name
