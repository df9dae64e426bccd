"""The one-step blocks as functions."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .. import checks, reference
from ..dispatch.one_step import descent_step, run, tableau_step
from ..tableau import LinearTable, check_tableau


def ie_skip(
    x: Tensor,
    branch: nn.Module,
    *,
    steps: int = 1,
    step_size: float = 0.1,
    theta: float = 1.0,
    detach: bool = False,
) -> Tensor:
    """The implicit Euler skip connection: `steps` steps of gradient descent on ‖y − x − f(y)‖² from y = x + f(x).

    Args:
        x: [N, C, H, W], float32, float64 or bfloat16 (other dtypes run as the reference).
        branch: f, a module that keeps the shape of x.
        steps: K ≥ 1.
        step_size: η > 0 of the descent (the paper's γ), dimensionless.
        theta: θ in [0, 1] of the residual y − x − (1 − θ) f(x) − θ f(y); the paper has θ = 1.
        detach: take the inner gradient as a constant in backward, which then is the residual block's.

    Returns:
        y_K, with the shape and memory format of x.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Li et al. 2020, Algorithm 1 (paper 001).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> branch = nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        >>> ie_skip(torch.zeros(2, 4, 8, 8), branch, steps=2).shape
        torch.Size([2, 4, 8, 8])
    """
    checks.module("branch", branch)
    checks.steps(steps)
    checks.step_size(step_size)
    checks.theta(theta)
    checks.flag("detach", detach)
    make = partial(reference.IESkip, branch, steps, step_size, theta, detach)
    return run(x, branch, descent_step(steps, step_size, theta, detach), make, lambda x: make()(x))


def shu_osher(x: Tensor, branch: nn.Module, tableau: LinearTable) -> Tensor:
    """One step of an explicit scheme in Shu–Osher form: u₀ = x, u_i = Σ_{k<i} α_ik u_k + β_ik f(u_k); returns u_s.

    Args:
        x: [N, C, H, W], float32, float64 or bfloat16 (other dtypes run as the reference).
        branch: f, a module that keeps the shape of x.
        tableau: the scheme, a `Tableau` or any `LinearTable`, with the (dimensionless) step in its β.

    Returns:
        u_s, with the shape and memory format of x.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Kim et al. 2020, eq. 4 (paper 004).

    Example:
        >>> from fastode.tableau import SSP3
        >>> import torch
        >>> from torch import nn
        >>> branch = nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        >>> shu_osher(torch.zeros(2, 4, 8, 8), branch, SSP3).shape
        torch.Size([2, 4, 8, 8])
    """
    checks.module("branch", branch)
    check_tableau(tableau)
    make = partial(reference.ShuOsher, branch, tableau)
    return run(x, branch, tableau_step(tableau), make, lambda x: make()(x))
