"""The skew pair as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..dispatch import choice
from ..dispatch.engines import AUTO, REFERENCE
from ..dispatch.skew import evaluate, read_field
from ..ops.rerun import StandIn
from ..ops.schemes.skew_pair.pair import Pair
from ..reference.branches import make_activation
from ..reference.skew import check_gamma, skew_field


class _PlainPair(nn.Module):
    """The pair without norms, its weight a tensor of any origin: what the function's reference is."""

    weight: Tensor

    def __init__(self, weight: Tensor, stride: int, padding: int, gamma: float, activation: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.stride, self.padding, self.gamma, self.activation = stride, padding, gamma, activation

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return skew_field(y, z, self.weight, self.stride, self.padding, self.gamma, self.activation)


class _TriedPair(_PlainPair):
    """What a trial of the function starts from: its weight is a parameter where a gradient is asked for."""

    fused_twin: type[nn.Module]

    def __init__(self, weight: Tensor, *constants: Any) -> None:
        super().__init__(weight, *constants)
        del self.weight
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)


class _FusedPair(_TriedPair):
    engine: str

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        activation = None if type(self.activation) is nn.Identity else self.activation
        return _pair(y, z, self.weight, self.stride, self.padding, self.gamma, activation, self.engine)


_TriedPair.fused_twin = _FusedPair


def skew_pair(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    gamma: float = 0.0,
    activation: str | Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The skew-symmetric field (σ(W z − γ y), σ(−Wᵀ y − γ z)), with a convolution W and its transpose.

    Args:
        y: [N, C_out, H', W'], the shape of W's output.
        z: [N, C_in, H, W], which must be (H' − 1) stride + k − 2 padding high, and as wide accordingly.
        weight: W's kernel [C_out, C_in, k, k].
        stride: of W.
        padding: of W, on every side.
        gamma: γ ≥ 0, the damping.
        activation: σ: "leaky_relu" (slope 0.01), "tanh", "softplus", "elu", "relu", "silu", "gelu", "gelu_tanh",
            "sigmoid", a module such as nn.ELU(0.5), any function of a tensor (which runs as the reference), or None for
            the linear pair.

    Returns:
        (ẏ, ż), of the shapes of y and z.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3
        (paper 003).

    Example:
        >>> import torch
        >>> y, z = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 8, 8)
        >>> dy, dz = skew_pair(y, z, torch.ones(2, 1, 4, 4), stride=2)
        >>> dy[0, 0, 1, 1].item(), dz[0, 0, 1, 1].item()
        (16.0, -8.0)
    """
    check_gamma(gamma)
    checks.skew_pair(y, z, weight, stride, padding)
    if isinstance(activation, str):
        activation = make_activation(activation)
    if not (activation is None or callable(activation)):
        raise TypeError(f"activation must be a name, a module, a function or None, got {checks.what(activation)}")
    return _pair(y, z, weight, stride, padding, gamma, activation)


def _pair(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    gamma: float,
    activation: Callable[[Tensor], Tensor] | None,
    engine: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`skew_pair` with its arguments checked."""
    module = activation if isinstance(activation, nn.Module) else None
    field = read_field(weight, stride, padding, gamma, module)
    if activation is not None and module is None:
        field.reason = "its activation is a function, which the reader does not know."
    constants = (stride, padding, gamma, nn.Identity() if activation is None else activation)
    call = field.call("skew_pair", inputs=(y, z))
    chosen = choice.choose(engine, call, lambda: _TriedPair(weight, *constants))
    if chosen is REFERENCE or not isinstance(call.program, Pair):
        return skew_field(y, z, weight, *constants)
    field.check(y, z)

    def plain(stand_in: StandIn) -> nn.Module:
        return _PlainPair(stand_in(weight), *constants)

    return evaluate(chosen, field, call.program, y, z, plain, call.tensors)
