"""How often a solve by error waits for its device: every number that it reads back, counted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastode
from fastode import Solver, reference
from fastode.dispatch.engines import BY_NAME, REFERENCE
from fastode.solver import GRADIENTS
from fastode.testing import sample_input

READS = {"item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero", "equal"}


class Reads(TorchFunctionMode):
    """Counts the calls that bring numbers of some tensors, and of all that is made of them, to the host.

    Args:
        tensors: those that would be on a card; what Python makes of its own numbers is on the host anyway.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.count = 0
        self.kept: dict[int, Tensor] = {}  # by storage: an autograd Function's saved tensors are other objects
        self.add(tensors)

    def add(self, made: Any) -> None:
        """Take all tensors in here for ones on a card."""
        self.kept |= {t.untyped_storage()._cdata: t for t in tree_leaves(made) if isinstance(t, Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        if any(t.untyped_storage()._cdata in self.kept for t in given):
            name = getattr(func, "__name__", "")
            self.count += name in READS or (name == "to" and "cpu" in (*args[1:], *kwargs.values()))
            self.add(result)
        return result


def attempts_and_reads(block: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """The attempts of one solve, and the reads of its forward and of its backward."""
    leaf = x.clone().requires_grad_()
    with fastode.record_steps() as log:
        block(leaf)
    # Not recorded, which reads what it writes down.
    with Reads(leaf, *block.parameters(), *block.buffers()) as reads:
        y = block(leaf)
        forward = reads.count
        loss = y.square().sum()
        bar = torch.ones_like(loss)
        reads.add((loss, bar))
        # As torch.autograd.grad does, in which no mode like this one is at work.
        run = torch.autograd.Variable._execution_engine.run_backward
        run((loss,), (bar,), False, False, (leaf, *block.parameters()), allow_unreachable=True, accumulate_grad=False)
    return len(log[0].times) - 1 + len(log[0].rejected), forward, reads.count - forward


def test_reads_are_counted() -> None:
    x = torch.ones(2, 2)
    with Reads(x) as reads:
        made = (x * 2).sum()
        assert made > 3 and float(made) == 8 and made.item() == 8 and x.reshape(4).tolist() == [1.0] * 4
        (x[0].cpu(), x.to("cpu"), made.to(torch.float64))
        assert float(torch.tensor(3.0)) == 3  # the host's own
    assert reads.count == 6


FIELDS: dict[str, Any] = {
    "skew": lambda solver: reference.SOBlock(reference.SkewPair(4, 8, 1, 0.1, "tanh", "group"), solver),
    "map": lambda solver: reference.ODEBlock(
        nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), reference.TimeConv2d(4, 4, padding=1)), solver
    ),
}
FAMILIES = {"skew": "skew_adaptive", "map": "ode_solution"}
# How many reads stand before the first attempt, with a first step that is chosen and with a given one.
START = {"skew": (9, 0), "map": (2, 1)}
# Of each kind the engines that run on a card, too, and whose steps the host chooses, with the gradients they have.
CASES = [
    (kind, name, gradient)
    for kind, family in FAMILIES.items()
    for name, engine in BY_NAME.items()
    for gradient in (GRADIENTS if kind == "map" else GRADIENTS[:2])
    if engine is not REFERENCE and family in vars(type(engine)) and not engine.steps_inside
]


@pytest.mark.parametrize(("kind", "engine", "gradient"), CASES)
def test_an_attempt_reads_once(kind: str, engine: str, gradient: str) -> None:
    torch.manual_seed(0)
    x = sample_input(2, 4, 6, 6, dtype=torch.float64)
    for tolerance, first_step in ((1e-2, None), (1e-7, None), (1e-8, 2.0)):
        block = FIELDS[kind](Solver(rtol=tolerance, atol=tolerance, gradient=gradient, first_step=first_step)).double()
        fastode.fuse(block, engine=engine)
        attempts, forward, backward = attempts_and_reads(block, x)
        assert forward <= attempts + START[kind][first_step is not None]
        # Backwards all sizes are known; an attempt reads its own cotangent, the first step's choice three numbers.
        assert backward <= (attempts if gradient == "exact" else 0) + 3
        assert backward > 0 or gradient != "exact"


@pytest.mark.parametrize("kind", FIELDS)
def test_the_reference_reads_more(kind: str) -> None:
    torch.manual_seed(0)
    attempts, forward, _ = attempts_and_reads(FIELDS[kind](Solver(rtol=1e-4, atol=1e-4)), sample_input(2, 4, 6, 6))
    assert forward > 3 * attempts
