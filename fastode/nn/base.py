"""What all fused twins share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import choice
from ..dispatch.engines import AUTO, BY_NAME
from ..native import operators
from ..ops.engine import Call, Engine


class Fused:
    """The engine's name, the operators' build, and the questions which engine can run a block and why not another.

    Attributes:
        engine: the name of the engine that is asked for, or "auto".
        describe_call: gives a call of the block on a tuple of inputs (or on any), as an engine is asked about it.
    """

    engine: str = AUTO
    describe_call: Callable[..., Call]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        operators.load()

    def why_not(self, engine: str, *inputs: Tensor) -> str:
        """Why an engine cannot run this block on these inputs (or, without any, on some); empty if it can."""
        checks.engine(engine, tuple(BY_NAME))
        return BY_NAME[engine].why_not(self.describe_call(inputs))

    def against(self, engine: str, *inputs: Tensor) -> str:
        """Why "auto" does not take an engine that can run this block on these inputs; empty if it does."""
        checks.engine(engine, tuple(BY_NAME))
        return choice.against(BY_NAME[engine], self.describe_call(inputs))


def note(block: nn.Module, engine: Engine) -> None:
    """Tell the recorders which engine a block uses, unless a tracer is at work."""
    if not torch.compiler.is_compiling():
        choice.note(block, engine)
