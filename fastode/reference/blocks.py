"""The papers' one-step blocks around any branch module, in plain PyTorch: what every other version must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .. import checks, tableau
from ..tableau import LinearTable, check_tableau
from ..tracing import is_exporting
from .faults import call_repaired

__all__ = ["SSP2", "SSP3", "Ark", "IESkip", "Midpoint", "ResBlock", "ShuOsher"]

# Layers whose output never shares memory with their input.
_FRESH = (_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.Linear)


class _OneStep(nn.Module):
    """A block that maps x [N, C, H, W] to its own shape by evaluations of one branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        checks.module("branch", branch)
        self.branch = branch

    def evaluate(
        self, x: Tensor, shape: torch.Size | None = None, branch: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """branch(x), which leaves x as it is and must have the shape of x (or `shape`)."""
        return evaluate("branch", self.branch, x, shape, branch)


def evaluate(
    name: str,
    module: nn.Module,
    x: Tensor,
    shape: torch.Size | None = None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """module(x), or `call` of it, which leaves x as it is and must have the shape of x (or `shape`)."""
    checks.tensor("x", x)
    call = module if call is None else call
    out = call_repaired(call, (module,), unshared(x, module), keeps_shape=shape is None)
    shape = x.shape if shape is None else shape
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must be a map to the shape {list(shape)}, got {checks.what(out)} from it")
    if out.shape != shape:
        raise ValueError(f"{name} must be a map to the shape {list(shape)}, got an output of {list(out.shape)}")
    return out


class ResBlock(_OneStep):
    """The residual block y = x + h f(x): one explicit Euler step.

    Args:
        branch: f.
        step_size: h > 0, a dimensionless time.
        shortcut: a module that takes the place of the identity where f changes the shape: y = shortcut(x) + h f(x).
        post_activation: a module that is applied to y, as the original residual block has it.

    Raises:
        TypeError, ValueError: step_size is not a finite number above zero, branch, shortcut or post_activation is no
            module; at a call, f returns another shape than x (or the shortcut's output) has.

    Source: Li et al. 2020, eq. 1 (paper 001), with the step h of paper 002, section 3.2, and the expansive block of
        Kim et al. 2020 (paper 004); the activation after the sum is that of He et al. 2016a.

    Example:
        >>> import torch
        >>> ResBlock(nn.Tanh(), step_size=0.5)(torch.zeros(1, 2, 3, 3)).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        branch: nn.Module,
        step_size: float = 1.0,
        shortcut: nn.Module | None = None,
        post_activation: nn.Module | None = None,
    ) -> None:
        super().__init__(branch)
        checks.step_size(step_size)
        for name, module in (("shortcut", shortcut), ("post_activation", post_activation)):
            if module is not None:
                checks.module(name, module)
        self.step_size = step_size
        self.shortcut = shortcut
        self.post_activation = post_activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.sum(x)
        return y if self.post_activation is None else self.post_activation(y)

    def sum(self, x: Tensor) -> Tensor:
        """The block without the activation after the sum."""
        if self.shortcut is None:
            slope = self.evaluate(x)  # which refuses an x that is no tensor
            return torch.add(x, slope, alpha=self.step_size)
        checks.tensor("x", x)
        skip = call_repaired(self.shortcut, (self.shortcut,), unshared(x, self.shortcut), keeps_shape=False)
        return torch.add(skip, self.evaluate(x, skip.shape), alpha=self.step_size)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size}"


class IESkip(_OneStep):
    """The implicit Euler skip connection: `steps` steps of gradient descent on ‖y − x − f(y)‖² from y = x + f(x).

    Args:
        branch: f.
        steps: K ≥ 1.
        step_size: η > 0 of the descent (γ in the paper, which uses 0.05 and 0.1).
        theta: θ in [0, 1] of the residual y − x − (1 − θ) f(x) − θ f(y); the paper has θ = 1.
        detach: take the gradient as a constant in the block's backward, which then is the residual block's (released
            code); otherwise the block is differentiated exactly.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, f returns another shape than x has.

    Source: Li et al. 2020, Algorithm 1 (paper 001); θ and detach from its released code.

    Example:
        >>> block = IESkip(nn.Tanh(), steps=2, step_size=0.1)
        >>> block(torch.zeros(1, 2, 3, 3)).abs().max().item()
        0.0
    """

    def __init__(
        self, branch: nn.Module, steps: int = 1, step_size: float = 0.1, theta: float = 1.0, detach: bool = False
    ) -> None:
        super().__init__(branch)
        checks.steps(steps)
        checks.step_size(step_size)
        checks.theta(theta)
        checks.flag("detach", detach)
        self.steps = steps
        self.step_size = step_size
        self.theta = theta
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        s = self.evaluate(x)
        y = x + s
        goal = x if self.theta == 1 else torch.add(x, s, alpha=1 - self.theta)
        for _ in range(self.steps):
            y = torch.sub(y, self._gradient(goal, y), alpha=self.step_size)
        return y

    def extra_repr(self) -> str:
        return f"steps={self.steps}, step_size={self.step_size}, theta={self.theta}, detach={self.detach}"

    def _squared_norm(self, goal: Tensor, y: Tensor, branch: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """‖y − goal − θ f(y)‖², where goal = x + (1 − θ) f(x)."""
        return torch.sub(y - goal, self.evaluate(y, branch=branch), alpha=self.theta).square().sum()

    def _gradient(self, goal: Tensor, y: Tensor) -> Tensor:
        """∇_y of the squared norm at fixed goal; differentiable itself unless detached."""
        # A tracing compiler needs the y of the graph, and can answer neither question below.
        tracing = torch.compiler.is_compiling()
        if is_exporting():
            raise RuntimeError(
                "the reference IESkip cannot be exported, because its forward calls autograd: torch.export takes the "
                "fused one, after fastode.fuse(model), and ONNX neither"
            )
        if self.detach and not tracing:
            goal, y = goal.detach(), y.detach()
        in_graph = y.requires_grad and torch.is_grad_enabled()
        if not tracing and torch.is_inference_mode_enabled():
            return self._gradient_in_inference_mode(goal, y)
        if not tracing and _is_transformed(y, in_graph):
            gradient = torch.func.grad(lambda point: self._squared_norm(goal, point))(y)
        else:
            with torch.enable_grad():
                point = y if in_graph else y.detach().requires_grad_()
                norm = self._squared_norm(goal, point)
                gradient = torch.autograd.grad(norm, point, create_graph=in_graph and not self.detach)[0]
        return gradient.detach() if self.detach else gradient

    def _gradient_in_inference_mode(self, goal: Tensor, y: Tensor) -> Tensor:
        """The same from copies, as autograd saves no tensor that was made in inference mode."""
        tensors = dict(self.branch.named_parameters()) | dict(self.branch.named_buffers())
        with torch.inference_mode(False), torch.enable_grad():
            copies = {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_inference()}
            branch = partial(torch.func.functional_call, self.branch, copies)
            point = y.clone().requires_grad_()
            gradient = torch.autograd.grad(self._squared_norm(goal, point, branch), point)[0]
        for name, buffer in self.branch.named_buffers():
            if name in copies:
                buffer.copy_(copies[name])
        return gradient


class ShuOsher(_OneStep):
    """Any explicit scheme in Shu–Osher form: u₀ = x, u_i = Σ_{k<i} α_ik u_k + β_ik f(u_k), y = u_s.

    f(u_k) is evaluated once for each point u_k, in order, and not at all where no stage uses it.

    Args:
        branch: f.
        tableau: the scheme, a `Tableau` or any `LinearTable`.

    Raises:
        TypeError: branch is no module or tableau no LinearTable.
        ValueError: at a call, f returns another shape than x has.

    Source: Kim et al. 2020, eq. 4 (paper 004).

    Example:
        >>> from fastode.tableau import SSP3
        >>> block = ShuOsher(nn.Identity(), SSP3)
        >>> print(f"{block(torch.ones(1, 1, 1, 1)).item():.4f}")  # 1 + 1 + 1/2 + 1/6
        2.6667
    """

    def __init__(self, branch: nn.Module, tableau: LinearTable) -> None:
        super().__init__(branch)
        check_tableau(tableau)
        self.tableau = tableau

    def forward(self, x: Tensor) -> Tensor:
        return by_stages(x, self.tableau.alpha, self.tableau.beta, self.evaluate)

    def extra_repr(self) -> str:
        return f"tableau={self.tableau.name}"


class SSP2(ShuOsher):
    """The second-order strong-stability-preserving block: u₁ = x + f(x), y = ½ x + ½ (u₁ + f(u₁)).

    Args:
        branch: f.

    Raises:
        TypeError: branch is no module.
        ValueError: at a call, f returns another shape than x has.

    Source: Kim et al. 2020, eq. 9 (paper 004).

    Example:
        >>> SSP2(nn.Identity())(torch.ones(1, 1, 1, 1)).item()
        2.5
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__(branch, tableau.SSP2)


class SSP3(ShuOsher):
    """The third-order block: u₁ = x + f(x), u₂ = ¾ x + ¼ (u₁ + f(u₁)), y = ⅓ x + ⅔ (u₂ + f(u₂)).

    Args:
        branch: f.

    Raises:
        TypeError: branch is no module.
        ValueError: at a call, f returns another shape than x has.

    Source: Kim et al. 2020, eq. 10 (paper 004).

    Example:
        >>> print(f"{SSP3(nn.Identity())(torch.ones(1, 1, 1, 1)).item():.4f}")
        2.6667
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__(branch, tableau.SSP3)


class Midpoint(ShuOsher):
    """The midpoint block: u₁ = x + ½ f(x), y = x + f(u₁) (the released code has u₁ + f(u₁)).

    Args:
        branch: f.

    Raises:
        TypeError: branch is no module.
        ValueError: at a call, f returns another shape than x has.

    Source: Kim et al. 2020, eq. 11 (paper 004).

    Example:
        >>> Midpoint(nn.Identity())(torch.ones(1, 1, 1, 1)).item()
        2.5
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__(branch, tableau.MIDPOINT)


class Ark(_OneStep):
    """The adaptive block: u₁ = x + β₁₀ f(x), y = α₂₀ x + β₂₀ f(x) + α₂₁ u₁ + β₂₁ f(u₁).

    α₂₁ = σ(a21) and β₁₀ = σ(b10) fix the others, so that the scheme is of order 2: α₂₀ = 1 − α₂₁, β₂₁ = 1 / (2 β₁₀),
    β₂₀ = 1 − β₂₁ − α₂₁ β₁₀. f(x) is evaluated once for both stages.

    Args:
        branch: f.
        a21: raw α₂₁, before the sigmoid.
        b10: raw β₁₀, before the sigmoid.
        learn_a21: whether a21 is a parameter; a buffer otherwise.
        learn_b10: whether b10 is one.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, f returns another shape than x has.

    Source: Kim et al. 2020, eqs. 13 and 15 (paper 004).

    Example:
        >>> block = Ark(nn.Identity())
        >>> print(f"{block(torch.ones(1, 1, 1, 1)).item():.4f}", list(block.state_dict()))
        2.5000 ['b10', 'a21']
    """

    a21: Tensor
    b10: Tensor

    def __init__(
        self,
        branch: nn.Module,
        a21: float = 0.25,
        b10: float = 1.0,
        learn_a21: bool = False,
        learn_b10: bool = True,
    ) -> None:
        super().__init__(branch)
        for name, value, learn in (("a21", a21, learn_a21), ("b10", b10, learn_b10)):
            checks.finite(name, value)
            checks.flag(f"learn_{name}", learn)
            if learn:
                self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
            else:
                self.register_buffer(name, torch.tensor(float(value)))

    def coefficients(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """α and β as differentiable [2, 2] tensors: entry [i - 1, k] belongs to stage i and point k.

        Args:
            dtype: in which to compute them, that of a21 and b10 by default.
        """
        alpha_21, beta_10 = self.a21.to(dtype).sigmoid(), self.b10.to(dtype).sigmoid()
        beta_21 = 1 / (2 * beta_10)
        one, zero = torch.ones_like(alpha_21), torch.zeros_like(alpha_21)
        alpha = torch.stack((one, zero, 1 - alpha_21, alpha_21)).view(2, 2)
        beta = torch.stack((beta_10, zero, 1 - beta_21 - alpha_21 * beta_10, beta_21)).view(2, 2)
        return alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        (_, (alpha_20, alpha_21)), ((beta_10, _), (beta_20, beta_21)) = self.coefficients()
        slope = self.evaluate(x)
        u = x + beta_10 * slope
        return alpha_20 * x + beta_20 * slope + alpha_21 * u + beta_21 * self.evaluate(u)

    def extra_repr(self) -> str:
        learned = [name for name in ("a21", "b10") if name in self._parameters]
        return f"a21={self.a21.item():g}, b10={self.b10.item():g}, learned={learned}"


def by_stages(
    x: Tensor,
    alpha: Sequence[Sequence[float]],
    beta: Sequence[Sequence[float]],
    evaluate: Callable[[Tensor], Tensor],
) -> Tensor:
    """u_s of the explicit scheme whose stage i has the rows alpha[i] and beta[i], from u₀ = x; `evaluate` is f."""
    points, slopes = [x], []
    for i in range(len(beta)):
        used = any(row[i] != 0 for row in beta[i:])
        slopes.append(evaluate(points[i]) if used else None)
        points.append(_combine([*zip(alpha[i], points, strict=False), *zip(beta[i], slopes, strict=False)]))
    return points[-1]


def _combine(terms: Iterable[tuple[float, Tensor | None]]) -> Tensor:
    """The sum of coefficient · tensor, without the terms whose coefficient is zero."""
    (first, total), *rest = [(c, term) for c, term in terms if c != 0 and term is not None]
    total = total if first == 1 else first * total
    for c, term in rest:
        total = torch.add(total, term, alpha=c)
    return total


def unshared(x: Tensor, *modules: nn.Module) -> Tensor:
    """x, or a copy where the modules may change it in place, as an in-place activation does that comes first."""
    for part in _parts(modules):
        if isinstance(part, _FRESH):
            break
        # What is not PyTorch's own is opaque: it may begin with anything.
        if getattr(part, "inplace", False) or not type(part).__module__.startswith("torch.nn.modules."):
            return x.clone()
    return x


def _parts(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _parts(module)
        else:
            yield module


def _is_transformed(y: Tensor, in_graph: bool) -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work that does not see through autograd.grad."""
    return torch._C._are_functorch_transforms_active() or (not in_graph and unpack_dual(y).tangent is not None)
