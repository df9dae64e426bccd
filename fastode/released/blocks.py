"""What the released codes compute and the papers do not have."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import checks
from ..reference import Ark, Chain, ResBlock, SOClassifier
from ..reference.solvers import solve
from ..tableau import LinearTable

# u₁ = x + ½ f(x), y = u₁ + f(u₁); the paper's eq. 11 ends in x + f(u₁).
MIDPOINT = LinearTable("midpoint as released", alpha=((1.0,), (0.0, 1.0)), beta=((0.5,), (0.0, 1.0)))


class ReleasedIESkip(nn.Module):
    """The IE-Skip of the released code where it is not Algorithm 1, in two ways that come alone or together.

    From y = x + f(x) it takes `steps` steps of gradient descent on ‖y − x − (1 − θ) f(x) − θ f_k(y)‖², with + θ f_k(y)
    where `flipped`. f_k is f; with `own` layers its first layers are f's and its last ones, in each step k, are copies
    that are trained by nothing. The gradient is a constant in the backward, which is the residual block's. The blocks
    `euler` and `inner` are y + f(y) and y + f_k(y), of which the descent needs the values and the vector-Jacobian
    products, so that `fuse` finds them there.

    Args:
        branch: f.
        steps: K, at least 1.
        step_size: of the descent.
        theta: θ in [0, 1].
        flipped: whether θ f_k(y) is added.
        own: how many of the last layers of f, an nn.Sequential, each step has of its own.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, f returns another shape than x has.

    Source: the released code of Li et al. 2020 (paper 001); Algorithm 1 has neither.

    Example:
        >>> block = ReleasedIESkip(nn.Identity(), steps=1, step_size=0.1, flipped=True)
        >>> print(f"{block(torch.ones(1, 1, 1, 1)).item():.2f}")  # 2 − 0.1 · 2 (1 + 1) (2 − 1 + 2)
        0.80
    """

    def __init__(
        self,
        branch: nn.Module,
        steps: int = 1,
        step_size: float = 0.1,
        theta: float = 1.0,
        flipped: bool = False,
        own: int = 0,
    ) -> None:
        super().__init__()
        checks.steps(steps)
        checks.step_size(step_size)
        checks.theta(theta)
        checks.flag("flipped", flipped)
        checks.count(own, "own")
        self.euler = ResBlock(branch)
        if own:
            self.inner = nn.ModuleList(ResBlock(_with_own_end(branch, own)) for _ in range(steps))
        self.steps = steps
        self.step_size = step_size
        self.theta = theta
        self.flipped = flipped
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        y = self.euler(x)
        goal = torch.lerp(y, x, self.theta).detach()  # x + (1 − θ) f(x)
        for k in range(self.steps):
            image = self.inner[k] if self.own else self.euler
            y = torch.sub(y, self._gradient(goal, y, image), alpha=self.step_size)
        return y

    def _gradient(self, goal: Tensor, y: Tensor, euler: nn.Module) -> Tensor:
        """∇_y ‖y − goal + c f(y)‖², a constant, with c = ± θ: 2 (r + c Jᵀr) for the residual r."""
        c = self.theta if self.flipped else -self.theta
        # Autograd saves no tensor that was made in inference mode, so it gets a copy made outside.
        with torch.inference_mode(False), torch.enable_grad():
            point = y.detach().clone().requires_grad_()
            image = euler(point)
            residual = (torch.lerp(point, image, c) - goal).detach()
            (pulled,) = torch.autograd.grad(image, point, residual)
        return 2 * torch.lerp(residual, pulled, c)

    def extra_repr(self) -> str:
        names = ("steps", "step_size", "theta", "flipped", "own")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _with_own_end(branch: nn.Module, own: int) -> nn.Sequential:
    """The branch's own first layers, and frozen copies of its last ones."""
    if not isinstance(branch, nn.Sequential) or len(branch) < own:
        raise TypeError(f"branch must be an nn.Sequential of at least {own} layers, got {checks.what(branch)}")
    layers = list(branch)
    end = [copy.deepcopy(layer).requires_grad_(False) for layer in layers[len(layers) - own :]]
    return nn.Sequential(*layers[: len(layers) - own], *end)


class JoinedClassifier(SOClassifier):
    """The classification block with y and z in one tensor, whose error an adaptive solver judges as a whole.

    `SOClassifier` holds them as two tensors, of which the one with the larger error decides. In equal steps both are
    the same.

    Source: the released code of Huang et al. (paper 003).

    Example:
        >>> JoinedClassifier(8, 3, released=True)(torch.zeros(2, 8)).shape
        torch.Size([2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        field = cast(Any, self.field)
        y, z = field.initial_state(x)
        classes = y.shape[1]

        def slope(_: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            joined = state[0]
            return (torch.cat(field(joined[:, :classes], joined[:, classes:]), 1),)

        return solve(slope, (torch.cat((y, z), 1),), self.settings, self)[0][:, :classes]


def evaluate_branch_twice(block: Ark, inputs: tuple[Any, ...]) -> None:
    """Move the running statistics of f's norms once more by f(x), which the released code evaluates twice.

    A hook before an `Ark`'s forward: the second evaluation differs in nothing else.
    """
    if _moves(block.branch):
        with torch.no_grad():
            block.branch(inputs[0].detach())


def evaluate_norm_twice(block: Chain, inputs: tuple[Any, ...]) -> None:
    """Move the running statistics of an expansive block's first norm once more, as the released code does.

    A hook before the forward of a `Chain` that begins with what branch and shortcut share.
    """
    shared = block[0]
    if _moves(shared):
        with torch.no_grad():
            shared(inputs[0].detach().clone())


def _moves(module: nn.Module) -> bool:
    """Whether a call moves running statistics."""
    return any(isinstance(m, _NormBase) and m.training and m.running_mean is not None for m in module.modules())
