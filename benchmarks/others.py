"""The same ODE blocks solved by other libraries: torchdiffeq's and torchode's own drivers on the reference's field."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastode import record_steps
from fastode.steps import SolveSteps

from . import inside
from .workloads import Inputs, Unavailable

Row = dict[str, Any]

TIGHT = 1e-7  # tolerances of the solution by which a contender with steps of its own is judged


class TorchdiffeqBlock(nn.Module):
    """A reference SOBlock whose steps torchdiffeq's odeint takes; its "rk4" is the 3/8 rule as well.

    Args:
        block: the reference.
        compiled: whether the field, which odeint calls, is compiled.
    """

    def __init__(self, block: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.field, self.settings = block.field, block.settings
        self._slope = torch.compile(block.field, dynamic=False) if compiled else block.field

    def forward(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        settings = self.settings
        times = torch.tensor([0.0, settings.t1], device=x.device)
        options: dict[str, Any] = {"step_size": settings.t1 / settings.steps}
        if settings.is_adaptive:
            options = {}
            if settings.gradient == "constant":  # torchdiffeq's own choice of the first step has a gradient
                with torch.no_grad():
                    options["first_step"] = inside.first_step(self.field, x, settings)
        y, _ = odeint(
            lambda _, state: self._slope(*state),
            self.field.initial_state(x),
            times,
            rtol=settings.rtol,
            atol=settings.atol,
            method=settings.name,
            options=options,
        )
        return y[-1]


class TorchodeBlock(nn.Module):
    """A reference SOBlock driven by torchode, which wants the state as [batch, features].

    By Euler's method in equal steps, or by dopri5 with steps of each sample.

    Attributes:
        counted: the steps of the last call.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.field, self.settings = block.field, block.settings
        self.counted: Row = {}

    def forward(self, x: Tensor) -> Tensor:
        import torchode

        y, z = self.field.initial_state(x)
        split = y[0].numel()

        def slope(_: Tensor, state: Tensor) -> Tensor:
            parts = self.field(state[:, :split].reshape(y.shape), state[:, split:].reshape(z.shape))
            return torch.cat([part.reshape(len(x), -1) for part in parts], 1)

        term = torchode.ODETerm(slope, with_stats=False)
        settings = self.settings
        start, end = (torch.full((len(x),), t, device=x.device) for t in (0.0, settings.t1))
        problem = torchode.InitialValueProblem(
            torch.cat([y.reshape(len(x), -1), z.reshape(len(x), -1)], 1), start, end, end[:, None]
        )
        if settings.is_adaptive:
            control = torchode.IntegralController(settings.atol, settings.rtol, term=term)
            through_sizes = settings.gradient == "exact"
            solver = torchode.AutoDiffAdjoint(
                torchode.Dopri5(term), control, backprop_through_step_size_control=through_sizes
            )
            found = solver.solve(problem)
        else:
            solver = torchode.AutoDiffAdjoint(torchode.Euler(term), torchode.FixedStepController())
            found = solver.solve(problem, dt0=torch.full_like(end, settings.t1 / settings.steps))
        accepted, attempts = (int(found.stats[name].sum()) for name in ("n_accepted", "n_steps"))
        self.counted = {"solves": len(x), "accepted": accepted, "rejected": attempts - accepted}
        return found.ys[:, -1, :split].reshape(y.shape)


def torchdiffeq_block(block: nn.Module, compiled: bool = False) -> nn.Module:
    """The block under torchdiffeq, its field compiled or not.

    Raises:
        Unavailable: torchdiffeq is not installed, or takes no such steps.
    """
    if block.per_sample:
        raise Unavailable("torchdiffeq has no steps of each sample")
    try:
        import torchdiffeq  # noqa: F401
    except ImportError as error:
        raise Unavailable("torchdiffeq is not installed") from error
    return TorchdiffeqBlock(block, compiled).train(block.training)


def torchode_block(block: nn.Module) -> nn.Module:
    """The block under torchode.

    Raises:
        Unavailable: torchode is not installed, or has no such solver: it has Euler but no 3/8 rule, and dopri5 with
            steps of each sample.
    """
    if block.solver != "euler" and not (block.solver == "dopri5" and block.per_sample):
        raise Unavailable(f"torchode has no {block.settings.name} with such steps")
    try:
        import torchode  # noqa: F401
    except ImportError as error:
        raise Unavailable("torchode is not installed") from error
    return TorchodeBlock(block).train(block.training)


BUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchdiffeq": torchdiffeq_block,
    "torchdiffeq-compile": partial(torchdiffeq_block, compiled=True),
    "torchode": torchode_block,
}


def steps_otherwise(name: str, block: nn.Module) -> bool:
    """Whether a contender chooses its steps by rules of its own, so that it cannot equal the reference.

    torchode steps up to t₁ itself, accepts ρ < 1 only, and takes one norm over the joined state.
    """
    return name == "torchode" and block.settings.is_adaptive


def within_tolerance(reference: nn.Module, module: nn.Module, inputs: Inputs) -> Row:
    """What takes the place of the equality check for such a contender: its error, in units of the tolerance.

    Args:
        reference: the reference block.
        module: the contender's.
        inputs: of both.

    Returns:
        ok where the largest error of a sample, a root mean square against a solution with tolerances TIGHT, is at most
        the tolerance, or twice that of the reference.
    """
    settings = reference.settings
    tight = copy.deepcopy(reference).double()
    tight.rtol = tight.atol = TIGHT
    with torch.no_grad():
        truth = tight(*(x.double() for x in inputs))
        with record_steps() as log:
            ends = reference(*inputs), module(*inputs)
    errors = []
    for end in ends:
        scaled = (end - truth) / (settings.atol + settings.rtol * truth.abs())
        errors.append(float(scaled.pow(2).flatten(1).mean(1).sqrt().max()))
    ours, theirs = errors
    accepted = (
        f"{getattr(module, 'counted', {}).get('accepted')} steps accepted, {counted(log)['accepted']} by the reference"
    )
    return {
        "ok": theirs <= max(1.0, 2 * ours),
        "worst": theirs / max(1.0, 2 * ours),
        "tensor": "output",
        "note": f"own steps: off by {theirs:.2g} tolerances, the reference by {ours:.2g}; {accepted}",
    }


def counted(log: Sequence[SolveSteps]) -> Row:
    """The steps of solves, added up."""
    return {
        "solves": len(log),
        "accepted": sum(len(solve.times) - 1 for solve in log),
        "rejected": sum(len(solve.rejected) for solve in log),
        "evaluations": sum(solve.evaluations for solve in log),
    }
