"""The exact implicit Euler block in plain PyTorch: the limit of IE-Skip's inner descent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..steps import ImplicitSolve, note_implicit
from ..tracing import is_exporting
from .blocks import _OneStep
from .implicit import Product, Sets, find_root, gmres

__all__ = ["ExactIE"]

TOLERANCE = 1e-4
MOST_ITERATIONS = 20


class ExactIE(_OneStep):
    """The exact implicit Euler block: y with y = x + f(y), which `IESkip` approaches by gradient descent.

    It is solved by Newton's method, its linear systems by GMRES with products of f's Jacobian J. The gradient is that
    of y as a function of x and f's parameters: x̄ = λ and w̄ = (∂f/∂w)ᵀ λ at y with (I − Jᵀ) λ = ȳ, so that no step is
    kept. Where y was not reached it is not the derivative of what is returned: `fastode.record_steps` says so. A branch
    in training mode normalises by the batch at y, and updates running statistics once.

    Args:
        branch: f.
        tol: > 0; y is taken where ‖y − x − f(y)‖ ≤ tol ‖x‖, for each sample unless the batch couples them. The
            gradient's linear system is solved to the same part of ȳ. float32 reaches about 1e-6.
        max_iterations: Newton steps at most, at least 1.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, f returns another shape than x has.

    Source: Li et al. 2020, Section 4.2 (paper 001), whose "exact IE-ResNet" it is.

    Example:
        >>> half = nn.Conv2d(1, 1, 1, bias=False)
        >>> nn.init.constant_(half.weight, 0.5).requires_grad
        True
        >>> ExactIE(half)(torch.ones(1, 1, 1, 1)).item()  # y = 1 + y / 2
        2.0
    """

    def __init__(self, branch: nn.Module, tol: float = TOLERANCE, max_iterations: int = MOST_ITERATIONS) -> None:
        super().__init__(branch)
        checks.step_size(tol, "tol")
        checks.steps(max_iterations, "max_iterations")
        self.tol = tol
        self.max_iterations = max_iterations

    def extra_repr(self) -> str:
        return f"tol={self.tol:g}, max_iterations={self.max_iterations}"

    def in_words(self) -> str:
        """The block, as a log names it."""
        return f"{type(self).__name__} on {type(self.branch).__name__}"

    def forward(self, x: Tensor) -> Tensor:
        if is_exporting():
            raise RuntimeError("ExactIE cannot be exported, because its forward takes as many steps as the data needs")
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._solve)(x)
        return self._solve(x)

    def _solve(self, x: Tensor) -> Tensor:
        checks.tensor("x", x)
        if x.numel() == 0:
            return x + self.evaluate(x)
        if torch.is_inference_mode_enabled():
            return self._in_inference_mode(x)
        coupled = couples(self.branch)
        with _kept_buffers(self.branch):
            start = x.detach()
            with torch.no_grad():
                first = start + self.evaluate(start)
            found = find_root(self._at, start, first, coupled, self.tol, self.max_iterations)
        tell(self.in_words(), "solution", found.residuals, self.tol, found.iterations, found.products)
        # The one evaluation that counts: it updates running statistics, and the gradient goes through it.
        point = found.y.detach().requires_grad_(torch.is_grad_enabled())
        value = self.evaluate(point)
        if not (torch.is_grad_enabled() and (x.requires_grad or value.requires_grad)):
            return found.y
        parameters = [parameter for parameter in self.branch.parameters() if parameter.requires_grad]
        out: Tensor = _Implicit.apply(x + value, x, found.y, _Pull(self, coupled, point, value), *parameters)
        return out

    def _at(self, y: Tensor) -> _Linear:
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            return _Linear(point, self.evaluate(point))

    def _in_inference_mode(self, x: Tensor) -> Tensor:
        """The same from copies, as autograd saves no tensor that was made in inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            twin = copy.deepcopy(self)
            y = twin._solve(x.clone())
        for buffer, new in zip(self.branch.buffers(), twin.branch.buffers(), strict=True):
            buffer.copy_(new)
        return y


class _Linear:
    """f at a point, with its graph, and J as a product: the derivative of u ↦ Jᵀu along v is J v."""

    def __init__(self, point: Tensor, value: Tensor) -> None:
        self.point, self.graph, self.value = point, value, value.detach()
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, v: Tensor) -> Tensor:
        """Jᵀv."""
        found = torch.autograd.grad(self.graph, self.point, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if found is None else found

    def push(self, v: Tensor) -> Tensor:
        """J v."""
        if self._pulled is None:
            with torch.enable_grad():
                u = torch.zeros_like(self.graph, requires_grad=True)
                pulled = torch.autograd.grad(self.graph, self.point, u, create_graph=True, allow_unused=True)[0]
                self._pulled = u, torch.zeros_like(u) * u if pulled is None else pulled
        u, pulled = self._pulled
        found = torch.autograd.grad(pulled, u, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if found is None else found


class _Implicit(torch.autograd.Function):
    """The solution y of y = plain, where plain = x + f(y), with the gradient of y as a function of what f is made of.

    A backward gives plain the cotangent λ, from where autograd goes on to x and to f's parameters at fixed y. One that
    is differentiated itself needs their gradients as functions of y, and gives them to x and the parameters directly.
    """

    @staticmethod
    def forward(ctx: Any, plain: Tensor, x: Tensor, y: Tensor, pull: _Pull, *parameters: Tensor) -> Tensor:
        out = y.detach().clone()
        ctx.save_for_backward(out, *parameters)
        ctx.pull = pull
        return out

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        y, *parameters = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return ctx.pull(bar), *[None] * (3 + len(parameters))
        x_bar, bars = ctx.pull.differentiable(bar, y, parameters)
        return None, x_bar, None, None, *bars


class _Pull:
    """λ with (I − Jᵀ) λ = ȳ."""

    def __init__(self, block: ExactIE, coupled: bool, point: Tensor, value: Tensor) -> None:
        self.block, self.linear = block, _Linear(point, value)
        self.names = [name for name, parameter in block.branch.named_parameters() if parameter.requires_grad]
        self.inverted = partial(
            inverted, coupled=coupled, tol=block.tol, most=block.max_iterations, block=block.in_words()
        )

    def __call__(self, bar: Tensor) -> Tensor:
        return self.inverted(self.linear.pull, bar)

    def differentiable(self, bar: Tensor, y: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """λ, and with it the gradients of f's parameters, with graphs: λ solves λ = ȳ + J(y)ᵀ λ, and is one as y is."""
        branch = self.block.branch
        # Aliases: y depends on the parameters too, and a gradient at fixed y counts f's own use of them only.
        parameters = [parameter.view_as(parameter) for parameter in parameters]
        call = partial(torch.func.functional_call, branch, dict(zip(self.names, parameters, strict=True)))
        with _kept_buffers(branch):
            value = self.block.evaluate(y, branch=call)
        at_y = _Linear(y, value)
        found = self.inverted(at_y.pull, bar.detach())
        plain = bar + torch.autograd.grad(value, y, found, create_graph=True)[0]
        x_bar: Tensor = _Adjoint.apply(plain, found, partial(self.inverted, at_y.push))
        bars = torch.autograd.grad(value, parameters, x_bar, create_graph=True, allow_unused=True) if parameters else ()
        return x_bar, list(bars)


class _Adjoint(torch.autograd.Function):
    """The solution of λ = plain, where plain = ȳ + Jᵀ λ, with the cotangent for plain that `push` makes of its own."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, solution: Tensor, push: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.push = push
        return solution.detach().clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("ExactIE has second derivatives, and no third ones")
        return ctx.push(bar), None, None


def inverted(product: Product, bar: Tensor, coupled: bool, tol: float, most: int, block: str) -> Tensor:
    """λ with λ − product(λ) = bar."""
    sets = Sets(bar, coupled)
    rest = torch.full((sets.count,), tol, dtype=torch.float64)
    found, residuals, begun, products = gmres(lambda v: v - product(v), bar, sets, rest, most)
    tell(block, "gradient", residuals, tol, begun, products)
    return found


def tell(block: str, what: str, residuals: tuple[float, ...], tol: float, iterations: int, products: int) -> None:
    """Give what a solve came to, to who records."""
    note_implicit(ImplicitSolve(block, what, residuals, tol, iterations, products))


def couples(branch: nn.Module) -> bool:
    """Whether a branch may let samples see each other: a batch norm does, and a type that is not PyTorch's may."""
    for module in branch.modules():
        if isinstance(module, _BatchNorm):
            if module.training or module.running_mean is None:
                return True
        elif not (type(module).__module__.startswith("torch.nn.modules.") or _is_sequential(module)):
            return True
    return False


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _kept_buffers:
    """A context after which a branch's buffers are as they were."""

    def __init__(self, branch: nn.Module) -> None:
        self.branch = branch

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self.branch.buffers()]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, before in self.before:
                buffer.copy_(before)
