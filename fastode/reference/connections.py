"""The blocks of the other networks with skip connections that paper 002 reads as ODE schemes, in plain PyTorch.

PolyNet's, a part of the series of an implicit Euler step; FractalNet's, like Heun's method without its identities; and
RevNet's, Euler's method for two states, whose inputs follow from its outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, tableau
from .blocks import ShuOsher, evaluate, unshared
from .branches import PlainSlices
from .faults import call_repaired

__all__ = ["FractalBlock", "PolyBlock", "RevBlock", "RevSequence"]


class PolyBlock(ShuOsher):
    """PolyNet's block y = x + h f(x) + h f(h f(x)), both evaluations with the same f.

    Args:
        branch: f.
        step_size: h > 0, a dimensionless time; PolyNet has 1.

    Raises:
        TypeError, ValueError: branch is no module or step_size no finite number above zero; at a call, f returns
            another shape than x has.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 15, with the step of eq. 18 (paper 002);
        Zhang et al., "PolyNet: A pursuit of structural diversity in very deep networks", CVPR 2017 (poly-2).

    Example:
        >>> PolyBlock(nn.Identity(), step_size=0.5)(torch.ones(1, 1, 1, 1)).item()
        1.75
    """

    def __init__(self, branch: nn.Module, step_size: float = 1.0) -> None:
        super().__init__(branch, tableau.polynet(step_size))

    @property
    def step_size(self) -> float:
        """h."""
        return self.tableau.beta[0][0]

    def extra_repr(self) -> str:
        return f"step_size={self.step_size}"


class FractalBlock(nn.Module):
    """FractalNet's block of C columns: f₁ a unit, f_c+1(x) = ½ f_c(f_c(x)) + ½ f₁(x), every unit with its own weights.

    Args:
        make_unit: gives a new unit, from in_channels to channels where it is told True, which is where it reads the
            block's input, and from channels to channels where False. A unit keeps the map's size.
        columns: C ≥ 1; the block has 2^C − 1 units, and its longest path 2^(C − 1).

    Raises:
        TypeError, ValueError: an argument is none of what it may be.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 19 (paper 002); Larsson et al., "FractalNet:
        Ultra-deep neural networks without residuals", 2016.

    Example:
        >>> block = FractalBlock(lambda first: nn.Tanh(), columns=3)
        >>> sum(isinstance(module, nn.Tanh) for module in block.modules())
        7
    """

    def __init__(self, make_unit: Callable[[bool], nn.Module], columns: int) -> None:
        super().__init__()
        checks.steps(columns, "columns")
        if not callable(make_unit) or isinstance(make_unit, nn.Module):
            raise TypeError(f"make_unit must be a function from a bool to a module, got {checks.what(make_unit)}")
        self.columns = columns
        self.unit = make_unit(True)
        checks.module("what make_unit gives", self.unit)
        if columns > 1:
            self.first = FractalBlock(make_unit, columns - 1)
            self.second = FractalBlock(lambda first: make_unit(False), columns - 1)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x)
        short = call_repaired(self.unit, (self.unit,), unshared(x, self.unit), keeps_shape=False)
        return short if self.columns == 1 else 0.5 * self.second(self.first(x)) + 0.5 * short

    def extra_repr(self) -> str:
        return f"columns={self.columns}"


class RevBlock(nn.Module):
    """RevNet's block: of the halves x₁, x₂ of x's channels, y₁ = x₁ + f(x₂) and y₂ = x₂ + g(y₁).

    Its input follows from its output: x₂ = y₂ − g(y₁), x₁ = y₁ − f(x₂).

    Args:
        f: a map of half the channels that keeps the shape.
        g: another one.

    Raises:
        TypeError: f or g is no module.
        ValueError: at a call, x has an odd number of channels, or f or g returns another shape.

    Source: "Towards Natural Robustness Against Adversarial Examples", eq. 21 (paper 002); Gomez et al., "The reversible
        residual network: Backpropagation without storing activations", NeurIPS 2017, eq. 6.

    Example:
        >>> RevBlock(nn.Tanh(), nn.Tanh())(torch.zeros(1, 4, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        checks.module("f", f)
        checks.module("g", g)
        self.f = f
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        first, second = halves(x)
        first = first + evaluate("f", self.f, second)
        second = second + evaluate("g", self.g, first)
        return torch.cat([first, second], 1)


class RevSequence(PlainSlices):
    """Blocks of RevNet one after the other, of which the fused twin keeps one map, however many they are.

    Args:
        blocks: at least one `RevBlock`.

    Raises:
        TypeError, ValueError: a block is none, or there are none.

    Source: as of `RevBlock`.

    Example:
        >>> chain = RevSequence(*(RevBlock(nn.Tanh(), nn.Tanh()) for _ in range(3)))
        >>> chain(torch.zeros(1, 4, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(self, *blocks: RevBlock) -> None:
        if not blocks:
            raise ValueError("blocks must be at least one RevBlock, got none")
        for block in blocks:
            if not isinstance(block, RevBlock):
                raise TypeError(f"blocks must be RevBlocks, got {checks.what(block)}")
        super().__init__(*blocks)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of x's channels, as views."""
    checks.tensor("x", x)
    if x.dim() < 2 or x.shape[1] % 2:
        raise ValueError(f"x must have an even number of channels at dim 1, got a tensor of shape {list(x.shape)}")
    first, second = x.chunk(2, 1)
    return first, second
