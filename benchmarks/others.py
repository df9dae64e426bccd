"""The same ODE blocks solved by other libraries: torchdiffeq's and torchode's own drivers on the reference's field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .workloads import Unavailable


class TorchdiffeqBlock(nn.Module):
    """A reference SOBlock whose steps torchdiffeq's odeint takes; its "rk4" is the 3/8 rule as well."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.field, self.solver, self.steps, self.t1 = block.field, block.solver, block.steps, block.t1

    def forward(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        times = torch.tensor([0.0, self.t1], device=x.device)
        options = {"step_size": self.t1 / self.steps}
        y, _ = odeint(
            lambda _, state: self.field(*state),
            self.field.initial_state(x),
            times,
            method=self.solver,
            options=options,
        )
        return y[-1]


class TorchodeBlock(nn.Module):
    """A reference SOBlock with Euler's method, driven by torchode, which wants the state as [batch, features]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.field, self.steps, self.t1 = block.field, block.steps, block.t1

    def forward(self, x: Tensor) -> Tensor:
        import torchode

        y, z = self.field.initial_state(x)
        split = y[0].numel()

        def slope(_: Tensor, state: Tensor) -> Tensor:
            parts = self.field(state[:, :split].reshape(y.shape), state[:, split:].reshape(z.shape))
            return torch.cat([part.reshape(len(x), -1) for part in parts], 1)

        term = torchode.ODETerm(slope, with_stats=False)
        solver = torchode.AutoDiffAdjoint(torchode.Euler(term), torchode.FixedStepController())
        start, end = (torch.full((len(x),), t, device=x.device) for t in (0.0, self.t1))
        problem = torchode.InitialValueProblem(
            torch.cat([y.reshape(len(x), -1), z.reshape(len(x), -1)], 1), start, end, end[:, None]
        )
        found = solver.solve(problem, dt0=torch.full_like(end, self.t1 / self.steps))
        return found.ys[:, -1, :split].reshape(y.shape)


def torchdiffeq_block(block: nn.Module) -> nn.Module:
    """The block under torchdiffeq.

    Raises:
        Unavailable: torchdiffeq is not installed.
    """
    try:
        import torchdiffeq  # noqa: F401
    except ImportError as error:
        raise Unavailable("torchdiffeq is not installed") from error
    return TorchdiffeqBlock(block).train(block.training)


def torchode_block(block: nn.Module) -> nn.Module:
    """The block under torchode.

    Raises:
        Unavailable: torchode is not installed, or has no such solver (it has Euler but no 3/8 rule).
    """
    if block.solver != "euler":
        raise Unavailable(f"torchode has no {block.solver} (3/8 rule)")
    try:
        import torchode  # noqa: F401
    except ImportError as error:
        raise Unavailable("torchode is not installed") from error
    return TorchodeBlock(block).train(block.training)


BUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchdiffeq": torchdiffeq_block,
    "torchode": torchode_block,
}
