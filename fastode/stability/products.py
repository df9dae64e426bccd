"""Products with a Jacobian that is never formed, and singular values from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks

__all__ = ["Products", "Singular", "evaluated", "singular_value"]

MATRICES = ("J", "I + J", "I - J")
ENDS = ("largest", "smallest")

Product = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode, where a sample's output does not depend on its neighbours.

    Args:
        model: whose mode, and that of each of its modules, is put back at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Products:
    """J v and Jᵀ u with the Jacobian J of a map at x, of all samples at once.

    Both go through reverse-mode autograd, which fused blocks have: Jᵀ u is a backward, and J v the derivative of Jᵀ u
    in u. A sample's output must depend on no other sample.

    Args:
        function: maps [N, ...] to [N, ...].
        x: the point [N, ...].

    Raises:
        TypeError, ValueError: x is no floating-point tensor with samples, or the map returns none.

    Source: the "double backward trick", Jv = ∂(Jᵀu)ᵀv / ∂u, as Jᵀu is linear in u.

    Example:
        >>> at = Products(lambda x: x**2, torch.tensor([[1.0, 2.0]]))
        >>> at.forward(torch.ones(1, 2)), at.backward(torch.ones(1, 2))
        (tensor([[2., 4.]]), tensor([[2., 4.]]))
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        check_samples("x", x)
        with torch.enable_grad():
            self._x = x.detach().clone().requires_grad_()
            self._y = function(self._x)
            if not isinstance(self._y, Tensor) or self._y.dim() < 1 or len(self._y) != len(x):
                raise TypeError(f"function must return a tensor [{len(x)}, ...], got {checks.what(self._y)}")
            if not self._y.requires_grad:
                raise ValueError("function must depend on x in a way that autograd sees, got an output without a graph")
            self._u = torch.zeros_like(self._y).requires_grad_()
            (self._g,) = torch.autograd.grad(self._y, self._x, self._u, create_graph=True)

    @property
    def value(self) -> Tensor:
        """The map's output at x."""
        return self._y.detach()

    def forward(self, v: Tensor) -> Tensor:
        """J v.

        Args:
            v: of x's shape.
        """
        if not self._g.requires_grad:  # the gradient does not depend on u: J is zero
            return torch.zeros_like(self._y)
        (found,) = torch.autograd.grad(self._g, self._u, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self._y) if found is None else found

    def backward(self, u: Tensor) -> Tensor:
        """Jᵀ u.

        Args:
            u: of the output's shape.
        """
        (found,) = torch.autograd.grad(self._y, self._x, u, retain_graph=True)
        return found


@dataclass(frozen=True)
class Singular:
    """A singular value of each sample's matrix.

    Attributes:
        value: [N].
        residual: [N]; the matrix has a singular value at most this far from `value`.
        steps: steps of Lanczos that it took.
    """

    value: Tensor
    residual: Tensor
    steps: int


def singular_value(
    function: nn.Module,
    x: Tensor,
    *,
    matrix: str = "J",
    end: str = "largest",
    scale: float = 1.0,
    tolerance: float = 1e-3,
    steps: int = 200,
    generator: torch.Generator | None = None,
) -> Singular:
    """A singular value at one end of the spectrum of J, I + J or I − J, by Golub–Kahan–Lanczos on products.

    The module runs in eval mode. Of a matrix with few singular values near the wanted end this takes few steps;
    `residual` says how good the value is where `steps` were not enough. Lanczos approaches the largest value from
    below and the smallest from above.

    Args:
        function: a module that maps [N, ...] to [N, ...]; with I also to its own shape.
        x: the point [N, ...].
        matrix: "J", "I + J" (an Euler step's Jacobian) or "I - J" (whose inverse is that of an implicit Euler step).
        end: "largest" or "smallest"; "smallest" needs a map that keeps its shape.
        scale: a factor of J, a block's step size h.
        tolerance: stop where each residual is at most this part of its value.
        steps: at most so many, and never more than x has numbers.
        generator: of the start; None for a fixed seed.

    Returns:
        The values, their residuals and the steps taken.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the map does not keep the shape where it must.

    Source: Li, He & Lin 2020 (paper 001), eqs. of Propositions 2 and 3; Golub & Kahan 1965.

    Example:
        >>> halve = nn.Linear(2, 2, bias=False)
        >>> _ = halve.weight.data.copy_(torch.diag(torch.tensor([0.5, -0.25])))
        >>> round(singular_value(halve, torch.ones(1, 2), matrix="I + J").value.item(), 4)
        1.5
        >>> round(singular_value(halve, torch.ones(1, 2), matrix="I - J", end="smallest").value.item(), 4)
        0.5
    """
    checks.module("function", function)
    check_samples("x", x)
    checks.one_of("matrix", matrix, MATRICES)
    checks.one_of("end", end, ENDS)
    checks.step_size(scale, "scale")
    checks.step_size(tolerance, "tolerance")
    checks.steps(steps)
    with evaluated(function):
        at = Products(function, x)
        if (matrix != "J" or end == "smallest") and at.value.shape != x.shape:
            raise ValueError(f"function must keep the shape {list(x.shape)}, got an output of {list(at.value.shape)}")
        identity = 0.0 if matrix == "J" else 1.0
        factor = -scale if matrix == "I - J" else scale

        def apply(v: Tensor) -> Tensor:
            product = factor * at.forward(v.view_as(x)).flatten(1)
            return product + v if identity else product

        def transpose(u: Tensor) -> Tensor:
            product = factor * at.backward(u.view_as(at.value)).flatten(1)
            return product + u if identity else product

        random = torch.Generator().manual_seed(0) if generator is None else generator
        return _lanczos(apply, transpose, x, at.value, end, tolerance, steps, random)


def _lanczos(
    apply: Product,
    transpose: Product,
    x: Tensor,
    y: Tensor,
    end: str,
    tolerance: float,
    steps: int,
    generator: torch.Generator,
) -> Singular:
    """A V = U B and Aᵀ U = V Bᵀ + β v eᵀ with B upper bidiagonal, one for each sample; bases kept orthogonal."""
    rows, columns = y[0].numel(), x[0].numel()
    most = min(steps, rows, columns)
    left, right = x.new_zeros(len(x), most, rows), x.new_zeros(len(x), most + 1, columns)
    band = x.new_zeros(len(x), most, most)
    right[:, 0] = _fresh(right[:, :0], generator)
    largest = x.new_zeros(len(x))
    for k in range(most):
        u, alpha = _next(apply(right[:, k]), left[:, :k], largest, generator)
        largest = torch.maximum(largest, alpha)
        left[:, k], band[:, k, k] = u, alpha
        beta = x.new_zeros(len(x))
        w = transpose(u)
        if k + 1 < columns:
            v, beta = _next(w, right[:, : k + 1], largest, generator)
            largest = torch.maximum(largest, beta)
            right[:, k + 1] = v
        lefts, values, _ = torch.linalg.svd(band[:, : k + 1, : k + 1])
        index = 0 if end == "largest" else k
        residual = beta * lefts[:, k, index].abs()
        if k + 1 == most or bool((residual <= tolerance * values[:, index]).all()):
            break
        band[:, k, k + 1] = beta
    return Singular(values[:, index], residual, k + 1)


def _next(w: Tensor, basis: Tensor, scale: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The part of w [N, n] that is orthogonal to a basis [N, k, n], of length one, and its length [N].

    Where nothing is left of it a random direction takes its place, with the length 0: the matrix has an invariant
    subspace, and what is outside of it counts too.
    """
    for _ in range(2):  # once leaves rounding of the size of w
        w = w - torch.einsum("nk,nki->ni", torch.einsum("nki,ni->nk", basis, w), basis)
    length = torch.linalg.vector_norm(w, dim=1)
    nothing = length <= 100 * torch.finfo(w.dtype).eps * torch.maximum(scale, torch.ones_like(scale))
    if bool(nothing.any()):
        w = torch.where(nothing[:, None], _fresh(basis, generator), w)
        length = torch.where(nothing, 1.0, length)
        return w / length[:, None], torch.where(nothing, 0.0, length)
    return w / length[:, None], length


def _fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions [N, n] orthogonal to a basis [N, k, n]."""
    drawn = torch.randn(len(basis), basis.shape[2], generator=generator, dtype=torch.float64)
    w = drawn.to(basis)
    for _ in range(2):
        w = w - torch.einsum("nk,nki->ni", torch.einsum("nki,ni->nk", basis, w), basis)
    return w / torch.linalg.vector_norm(w, dim=1, keepdim=True)


def check_samples(name: str, x: Tensor) -> None:
    """Refuse anything but a finite float32 or float64 tensor [N, ...] with samples."""
    checks.tensor(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be of dtype float32 or float64, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} must be a tensor [N, ...] with at least one sample, got shape {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got infinite or NaN values")
