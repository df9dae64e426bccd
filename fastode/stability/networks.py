"""What the papers measure of a network's blocks: C-stability, Theorem 1's probabilities, growth, and variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks, reference
from ..tableau import Tableau, check_tableau
from .products import Singular, check_samples, evaluated, singular_value

__all__ = [
    "BlockStability",
    "Comparison",
    "Variance",
    "c_stability",
    "growth_ratio",
    "predicted_variance",
    "theorem1",
    "variance",
]

BLOCKS = (
    reference.ResBlock,
    reference.IESkip,
    reference.ExactIE,
    reference.ShuOsher,
    reference.Ark,
    reference.SOBlock,
    reference.ODEBlock,
)
EXPLICIT, IMPLICIT = (reference.ResBlock,), (reference.IESkip, reference.ExactIE)


@dataclass(frozen=True)
class BlockStability:
    """The constant of one block at given inputs.

    Attributes:
        name: the block's name in the model.
        constant: C = ‖∇s(x)‖₂ of each sample [N].
        residual: how far off each may be [N].
    """

    name: str
    constant: Tensor
    residual: Tensor

    @property
    def is_stable(self) -> Tensor:
        """Whether C ≤ 1, of each sample [N]."""
        return self.constant <= 1


def c_stability(
    model: nn.Module,
    x: Tensor,
    *,
    blocks: Sequence[str] | None = None,
    tolerance: float = 1e-3,
    steps: int = 200,
    generator: torch.Generator | None = None,
) -> list[BlockStability]:
    """The constant C of each block s: ‖s(x') − s(x)‖₂ ≤ C δ for all x' within a small δ of the block's input x.

    To first order in δ the least such C is the largest singular value of the block's Jacobian. A network is C-stable
    at an input if no block has C > 1. The model runs in eval mode.

    Args:
        model: a network.
        x: its inputs [N, ...].
        blocks: names of modules that map one tensor to one; None for every block of the papers in the model.
        tolerance: of the singular values, relative.
        steps: of Lanczos, at most.
        generator: of its starts.

    Returns:
        One result for each block, in the order in which the model runs them.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model has no such blocks.

    Source: Li, He & Lin 2020 (paper 001), Definition 1.

    Example:
        >>> block = reference.ResBlock(nn.Conv2d(1, 1, 1, bias=False))
        >>> _ = block.branch.weight.data.fill_(-0.5)
        >>> (found,) = c_stability(nn.Sequential(block), torch.ones(2, 1, 3, 3))
        >>> found.name, found.constant, found.is_stable
        ('0', tensor([0.5000, 0.5000]), tensor([True, True]))
    """
    passed = _passed(model, x, _names(model, blocks, BLOCKS))
    found = []
    for name, (given, _) in passed.items():
        value = singular_value(model.get_submodule(name), given, tolerance=tolerance, steps=steps, generator=generator)
        found.append(BlockStability(name, value.value, value.residual))
    return found


@dataclass(frozen=True)
class Comparison:
    """The two sides of Theorem 1, measured.

    Attributes:
        explicit: ‖I + ∇g(x)‖₂ of each block that keeps its shape and each sample [blocks, N].
        implicit: σ_min(I − ∇f(y)) likewise.
        explicit_residual: how far off each may be.
        implicit_residual: likewise.
    """

    explicit: Tensor
    implicit: Tensor
    explicit_residual: Tensor
    implicit_residual: Tensor

    @property
    def explicit_probability(self) -> float:
        """The part of the samples where every ‖I + ∇g‖₂ ≤ 1."""
        return float((self.explicit <= 1).all(0).double().mean())

    @property
    def implicit_probability(self) -> float:
        """The part of the samples where every σ_min(I − ∇f) ≥ 1."""
        return float((self.implicit >= 1).all(0).double().mean())


def theorem1(
    resnet: nn.Module,
    ie_resnet: nn.Module,
    x: Tensor,
    *,
    tolerance: float = 1e-3,
    steps: int = 200,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Both sides of P[all ‖I + ∇g(x)‖₂ ≤ 1] ≤ P[all σ_min(I − ∇f(y)) ≥ 1], over the given samples.

    ∇g is taken at the input of each `ResBlock` without a shortcut (times its step size), ∇f at the output of each
    `IESkip` or `ExactIE`. The theorem supposes that both have one distribution; nothing here does.

    Args:
        resnet: a network of residual blocks.
        ie_resnet: its implicit counterpart.
        x: inputs of both [N, ...].
        tolerance: of the singular values, relative.
        steps: of Lanczos, at most.
        generator: of its starts.

    Returns:
        All values, and the two probabilities.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or a network has no such blocks.

    Source: Li, He & Lin 2020 (paper 001), Theorem 1.

    Example:
        >>> def make():
        ...     return nn.Conv2d(1, 1, 1, bias=False)
        >>> found = theorem1(reference.ResBlock(make()), reference.IESkip(make()), torch.ones(2, 1, 2, 2))
        >>> found.explicit.shape, found.implicit.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    def values(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> list[Singular]:
        checks.module(name, model)
        chosen = [
            found
            for found in _names(model, None, kinds, name)
            if getattr(model.get_submodule(found), "shortcut", None) is None
        ]
        found = []
        for block, (given, out) in _passed(model, x, chosen, name).items():
            module = model.get_submodule(block)
            explicit = kinds is EXPLICIT
            branch: nn.Module = module.branch  # type: ignore[assignment]
            scale = float(module.step_size) if explicit else 1.0  # type: ignore[arg-type]
            matrix, end = ("I + J", "largest") if explicit else ("I - J", "smallest")
            found.append(
                singular_value(branch, given if explicit else out, matrix=matrix, end=end, scale=scale,
                               tolerance=tolerance, steps=steps, generator=generator)
            )  # fmt: skip
        return found

    explicit, implicit = values(resnet, "resnet", EXPLICIT), values(ie_resnet, "ie_resnet", IMPLICIT)
    return Comparison(
        torch.stack([found.value for found in explicit]),
        torch.stack([found.value for found in implicit]),
        torch.stack([found.residual for found in explicit]),
        torch.stack([found.residual for found in implicit]),
    )


def growth_ratio(
    model: nn.Module,
    x: Tensor,
    perturbed: Tensor,
    *,
    norm: int = 2,
    layers: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """‖f(x) − f(x')‖_p / ‖x − x'‖_p between the input and the output of each layer f.

    The mean over samples is the perturbation growth ratio. The model runs in eval mode.

    Args:
        model: a network.
        x: clean inputs [N, ...].
        perturbed: x', of the same shape: adversarial images, or images with noise.
        norm: p, 1 or 2.
        layers: names of modules that map one tensor to one; None for the model's children.

    Returns:
        The ratios of each sample [N] by the layer's name, in the order in which the model runs them. Where x = x'
        before a layer the ratio is NaN.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, perturbed is x in all samples, or the model has no
            such layers.

    Source: Kim et al. 2020 (paper 004), eq. 17 and Figure 4.

    Example:
        >>> double = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Flatten())
        >>> _ = double[0].weight.data.copy_(2 * torch.eye(2))
        >>> growth_ratio(double, torch.zeros(1, 2), torch.ones(1, 2), norm=1)
        {'0': tensor([2.]), '1': tensor([1.])}
    """
    check_samples("perturbed", perturbed)
    if isinstance(norm, bool) or norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")
    checks.module("model", model)
    names = [name for name, _ in model.named_children()] if layers is None else _names(model, layers, ())
    clean = _passed(model, x, names)
    if perturbed.shape != x.shape or perturbed.dtype != x.dtype:
        raise ValueError(f"perturbed must be of the shape and dtype of x, {list(x.shape)}, got {list(perturbed.shape)}")
    if torch.equal(perturbed, x):
        raise ValueError("perturbed must differ from x in some sample, got the same values")
    moved = _passed(model, perturbed, names)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm((a - b).flatten(1), ord=norm, dim=1)

    found = {}
    for name, (given, out) in clean.items():
        if name not in moved:
            continue
        other, other_out = moved[name]
        found[name] = distance(out, other_out) / distance(given, other)
    return found


@dataclass(frozen=True)
class Variance:
    """How a block changes the variance of its input, and how far Lemma 3's premises hold.

    Attributes:
        ratio: Var[block(x)] / Var[x].
        branch_ratio: Var[F(x)] / Var[x], which the lemma has as 1.
        correlation: the correlation of x and F(x), which the lemma has as 0.
    """

    ratio: float
    branch_ratio: float
    correlation: float


def variance(block: nn.Module, x: Tensor) -> Variance:
    """Lemma 3 as a measurement: the variance of a block's output over that of its input, over all numbers of both.

    Args:
        block: a block with a `branch` F that keeps its shape; it runs in eval mode.
        x: [N, ...].

    Returns:
        The ratio, and the two premises' numbers.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or x has no variance.

    Source: Kim et al. 2020 (paper 004), Lemma 3.

    Example:
        >>> found = variance(reference.ResBlock(nn.Identity()), torch.tensor([[[[-1.0, 1.0]]]]))
        >>> found.ratio, found.branch_ratio, found.correlation
        (4.0, 1.0, 1.0)
    """
    checks.module("block", block)
    check_samples("x", x)
    branch = getattr(block, "branch", None)
    checks.module("block.branch", branch)
    assert isinstance(branch, nn.Module)
    with evaluated(block), torch.no_grad():
        out, slope = block(x).double(), branch(x).double()
    given = x.double()
    before = given.var(correction=0)
    if not bool(before > 0):
        raise ValueError("x must have a variance above zero, got one number everywhere")
    together = ((given - given.mean()) * (slope - slope.mean())).mean()
    correlation = together / (before * slope.var(correction=0)).sqrt()
    return Variance(float(out.var(correction=0) / before), float(slope.var(correction=0) / before), float(correlation))


def predicted_variance(tableau: Tableau) -> float:
    """Lemma 3's Var[block(x)] / Var[x] for any explicit scheme in Shu–Osher form.

    Every F(y) has the variance of y and no covariance with x or with any other F: each stage is x + Σ c_j F(y_j), so
    its variance is 1 + Σ c_j² Var[y_j].

    Args:
        tableau: with α and β as in eq. 3 of the paper.

    Returns:
        The ratio.

    Raises:
        TypeError: it is no tableau.

    Source: Kim et al. 2020 (paper 004), Lemma 3 and eq. 12.

    Example:
        >>> from fastode.tableau import SSP2
        >>> predicted_variance(SSP2)
        1.75
    """
    check_tableau(tableau)
    weights: list[list[float]] = [[]]  # of F(y_0), F(y_1), … in each stage
    variances = [1.0]
    for stage, (alpha, beta) in enumerate(zip(tableau.alpha, tableau.beta, strict=True), start=1):
        row = [0.0] * stage
        for j in range(stage):
            row[j] += beta[j]
            for i, weight in enumerate(weights[j]):
                row[i] += alpha[j] * weight
        weights.append(row)
        variances.append(1.0 + sum(weight**2 * variances[j] for j, weight in enumerate(row)))
    return variances[-1]


def _names(
    model: nn.Module, names: Sequence[str] | None, kinds: tuple[type[nn.Module], ...], argument: str = "model"
) -> list[str]:
    """The names of the wanted modules, checked."""
    checks.module(argument, model)
    if names is None:
        found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        if not found:
            wanted = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{argument} must have a block of type {wanted}, got none in {type(model).__name__}")
        return found
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"blocks must be names of modules of {argument}, got {name!r}")
    return list(names)


def _passed(
    model: nn.Module, x: Tensor, names: Sequence[str], argument: str = "model"
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each of the named modules was given and returned when the model ran on x, in the order they ran."""
    check_samples("x", x)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in found:
                raise ValueError(f"{argument} must run each block once, got another call of {name!r}")
            found[name] = (inputs[0].detach().clone(), output.detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with evaluated(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"{argument} must run one of {', '.join(map(repr, names)) or 'its layers'}, got a call of none"
        )
    return found
