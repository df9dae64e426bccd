"""How the skew field of two matrix products and its solution run: the field is read, and an engine called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..branch.layers import Activation
from ..ops import function
from ..ops.engine import Call, Engine, autocast_dtype
from ..ops.plan import MaybeTensor, MaybeTensors
from ..ops.rerun import StandIn
from ..ops.schemes.skew_pair.linear import Linear
from ..solver import Solver
from .skew import read_activation, rerun_of, solve_adaptive_from_x


@dataclass
class LinearField:
    """A SkewLinear as it was read: its constants but for autocast, its tensors, and why it cannot be fused, if so.

    `tensors` are W and the biases of ẏ and ż.
    """

    tensors: list[MaybeTensor]
    gamma: float
    activation: Activation | None
    released: bool
    initial: float
    reason: str = ""

    def call(
        self, family: str, variant: str = "", inputs: tuple[Tensor, ...] = (), stages: int = 1, exact: bool = False
    ) -> Call:
        """A call of a block around this field, as an engine is asked about it."""
        program = None if self.reason else self._linear(autocast_dtype(inputs[0]) if inputs else None)
        return Call(family, variant, program, self.tensors, inputs, self.reason, stages, exact=exact)

    def _linear(self, lower: torch.dtype | None) -> Linear:
        """The constants under autocast to `lower`."""
        return Linear(float(self.gamma), self.activation, self.released, self.initial, lower)

    def check_start(self, x: Tensor) -> None:
        """It has no norms that would refuse anything."""


def read_linear(
    tensors: list[MaybeTensor], gamma: float, activation: nn.Module, released: bool, initial: float
) -> LinearField:
    """Read a field with these tensors, σ = activation, and y(0) = initial everywhere."""
    kind, reason = read_activation(activation)
    return LinearField(tensors, gamma, kind, released, initial, reason)


def evaluate_linear(
    engine: Engine,
    linear: Linear,
    y: Tensor,
    z: Tensor,
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> tuple[Tensor, Tensor]:
    """The slopes at (y, z), by an engine that can run the field; `tensors` are the field's."""
    dy, dz = function.call(engine.skew_linear, (linear, rerun_of(make_reference, 2, tensors)), (y, z, *tensors))
    return dy, dz


def solve_linear(
    engine: Engine,
    linear: Linear,
    x: Tensor,
    solver: Solver,
    block: Callable[[], str],
    make_reference: Callable[[StandIn], nn.Module],
    tensors: MaybeTensors,
) -> Tensor:
    """y(t₁) from the state that x gives; `block` gives its name in words, and `make_reference` makes it.

    It makes the field where steps are by error, and the block itself where they are equal.
    """
    if solver.is_adaptive:
        return solve_adaptive_from_x(engine.linear_solution, linear, x, solver, block(), make_reference, tensors)
    rerun = rerun_of(make_reference, 1, tensors)
    (end,) = function.call(engine.linear_solution, (linear, solver, (), (), rerun), (x, *tensors))
    return end
