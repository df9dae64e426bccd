"""What all fused twins share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import choice, opaque
from ..dispatch.engines import AUTO, BY_NAME
from ..native import operators
from ..ops.engine import Call, Engine, is_transformed
from ..tracing import constant, is_exporting


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


class Opaque(Fused):
    """A twin that a tracer may take as one operator (dispatch/opaque.py). All of it must have been read by then."""

    def _takes_operators(self) -> bool:
        """Whether a tracer takes such operators: not for an export, nor while a transform of torch.func is at work."""
        return torch.compiler.is_compiling() and not is_exporting() and not is_transformed(())

    def _as_operator(self, x: Tensor, shape: Sequence[int], moves: bool) -> Tensor:
        block = cast(nn.Module, self)
        for path, numbers in self._numbers():
            module = block.get_submodule(path)
            for name, value in numbers:
                # A tracer makes a number that has changed once a variable; what the operator's copy has is none.
                if getattr(module, name) != value:
                    raise RuntimeError(f"{name} must not change while the block is traced")
        return opaque.run(block, self._key(), x, shape, moves)

    @constant
    def _key(self) -> int:
        return opaque.key_of(cast(nn.Module, self))

    @constant
    def _numbers(self) -> opaque.Numbers:
        return opaque.numbers_of(cast(nn.Module, self))


def note(block: nn.Module, engine: Engine) -> None:
    """Tell the recorders which engine a block uses, unless a tracer is at work."""
    if not torch.compiler.is_compiling():
        choice.note(block, engine)
