"""The fused blocks as functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _one_step, reference
from ._functional_skew import skew_pair
from .ops.implicit_euler.autograd import Descent, IESkipFunction
from .ops.rerun import Rerun
from .ops.resident import ResidentIESkipFunction, ResidentShuOsherFunction
from .ops.runge_kutta.autograd import Scheme, ShuOsherFunction
from .ops.sweeps import MaybeTensors, Plan
from .tableau import Tableau

Rows = tuple[tuple[tuple[float, ...], ...], ...]

__all__ = ["ie_skip", "shu_osher", "skew_pair"]


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
        step_size: γ > 0 of the descent, dimensionless.
        theta: θ in [0, 1] of the residual y − x − (1 − θ) f(x) − θ f(y); the paper has θ = 1.
        detach: take the inner gradient as a constant in backward, which then is the residual block's.

    Returns:
        y_K, with the shape and memory format of x.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Li et al. 2020, Algorithm 1 (paper 001).

    Example:
        >>> branch = nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        >>> ie_skip(torch.zeros(2, 4, 8, 8), branch, steps=2).shape
        torch.Size([2, 4, 8, 8])
    """
    _check.module("branch", branch)
    _check.steps(steps)
    _check.step_size(step_size)
    _check.theta(theta)
    _check.flag("detach", detach)
    make = partial(reference.IESkip, branch, steps, step_size, theta, detach)
    return run_ie_skip(x, branch, Descent(steps, step_size, theta, detach), make, lambda x: make()(x))


def shu_osher(x: Tensor, branch: nn.Module, tableau: Tableau) -> Tensor:
    """One step of an explicit scheme in Shu–Osher form: u₀ = x, u_i = Σ_{k<i} α_ik u_k + β_ik f(u_k); returns u_s.

    Args:
        x: [N, C, H, W], float32, float64 or bfloat16 (other dtypes run as the reference).
        branch: f, a module that keeps the shape of x.
        tableau: the scheme, with the (dimensionless) step in its β.

    Returns:
        u_s, with the shape and memory format of x.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Kim et al. 2020, eq. 4 (paper 004).

    Example:
        >>> from fastode.tableau import SSP3
        >>> branch = nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        >>> shu_osher(torch.zeros(2, 4, 8, 8), branch, SSP3).shape
        torch.Size([2, 4, 8, 8])
    """
    _check.module("branch", branch)
    _check.tableau(tableau)
    make = partial(reference.ShuOsher, branch, tableau)
    return run_shu_osher(x, branch, *scheme_of(tableau), make, lambda x: make()(x))


def run_ie_skip(
    x: Tensor,
    branch: nn.Module,
    descent: Descent,
    make: Callable[[], nn.Module],
    run_reference: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """`ie_skip` with its arguments checked; `options` as in `_one_step.run`."""

    def call_engine(
        engine: str, x: Tensor, plan: Plan, rerun: Rerun | None, tensors: MaybeTensors
    ) -> tuple[Tensor, ...]:
        function = ResidentIESkipFunction if engine == "resident" else IESkipFunction
        return function.apply(x, plan, descent, rerun, *tensors)

    return _one_step.run(x, branch, call_engine, make, run_reference, kind=ie_kind(descent), traceable=False, **options)


def ie_kind(descent: Descent) -> str:
    """The family, and what else the time of an IE-Skip depends on."""
    return f"ie of {descent.steps} {'detached ' if descent.detach else ''}steps"


def run_shu_osher(
    x: Tensor,
    branch: nn.Module,
    scheme: Scheme,
    rows: Rows,
    make: Callable[[], nn.Module],
    run_reference: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """`shu_osher` with its arguments checked; `options` as in `_one_step.run`."""

    def call_engine(
        engine: str, x: Tensor, plan: Plan, rerun: Rerun | None, tensors: MaybeTensors
    ) -> tuple[Tensor, ...]:
        table = torch.tensor(rows, dtype=torch.float64)
        return shu_osher_function(engine).apply(x, table, plan, scheme, rerun, *tensors)

    return _one_step.run(x, branch, call_engine, make, run_reference, kind=shu_osher_kind(scheme), **options)


def shu_osher_kind(scheme: Scheme) -> str:
    """The family, and what else the time of an explicit scheme depends on: where its tableau is not zero."""
    rows = zip(scheme.alpha, scheme.beta, strict=True)
    return "shu_osher " + " ".join(["".join(map(str, (*alpha, "/", *beta))) for alpha, beta in rows])


def shu_osher_function(engine: str) -> type[torch.autograd.Function]:
    """The autograd Function of an engine."""
    return ResidentShuOsherFunction if engine == "resident" else ShuOsherFunction


def scheme_of(tableau: Tableau) -> tuple[Scheme, Rows]:
    """Where a tableau is not zero, and its α and β as square rows."""
    used, padded = [], []
    for rows in (tableau.alpha, tableau.beta):
        used.append(tuple(tuple(k for k, entry in enumerate(row) if entry != 0) for row in rows))
        padded.append(tuple(tuple(row) + (0.0,) * (tableau.stages - len(row)) for row in rows))
    return Scheme(*used), tuple(padded)
