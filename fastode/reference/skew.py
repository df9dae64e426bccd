"""Skew-symmetric vector fields on a pair (y, z) in plain PyTorch: the right-hand sides of paper 003's ODE blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .branches import make_activation, make_norm
from .faults import call_repaired

__all__ = ["SkewLinear", "SkewPair"]

PADDING = 1
KERNELS = {1: 3, 2: 4}  # side of the kernel for each stride: the transpose then gives back the size of z
MOST_GROUPS = 8  # of the norm "group", of which a residual branch has up to 32
INITIAL = 1.0  # y(0) of the classification block
INITIAL_RELEASED = 0.1


def skew_field(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    gamma: float,
    activation: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(σ(W z − γ y), σ(−Wᵀ y − γ z)) with a convolution W, its arguments unchecked.

    Args:
        y: [N, C_out, H', W'].
        z: [N, C_in, H, W].
        weight: W's kernel [C_out, C_in, k, k].
        stride: of W.
        padding: of W.
        gamma: γ.
        activation: σ; it is given new tensors, so it may work in place.

    Returns:
        (ẏ, ż), of the shapes of y and z.

    Source: paper 003, eq. 3.

    Example:
        >>> y, z = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> skew_field(y, z, torch.ones(1, 1, 1, 1), 1, 0, 0.5, torch.relu)[0].mean().item()
        0.5
    """
    dy = F.conv2d(z, weight, stride=stride, padding=padding)
    dz = -F.conv_transpose2d(y, weight, stride=stride, padding=padding)
    return activation(_damped(dy, y, gamma)), activation(_damped(dz, z, gamma))


class SkewPair(nn.Module):
    """The field ẏ = σ(W z − γ y), ż = σ(−Wᵀ y − γ z) with a convolution W, between norms where asked for.

    With norms the field is ẏ = n₃(σ(W n₂(z) − γ n₁(y))), ż = n₄(σ(−Wᵀ n₁(y) − γ n₂(z))): `pre_norm_y`, `pre_norm_z`,
    `post_norm_y` and `post_norm_z`. It does not depend on time.

    Args:
        in_channels: channels of z, the block's input [N, in_channels, H, W].
        channels: channels of y, the block's output [N, channels, H / stride, W / stride].
        stride: 1 (a 3×3 kernel) or 2 (a 4×4 kernel, for even H and W); the padding is 1.
        gamma: γ ≥ 0, the damping.
        activation: "leaky_relu" (slope 0.01), "tanh", "softplus", "elu", "relu", "silu", "gelu", "gelu_tanh",
            "sigmoid", or a function that makes a module. Theorem 3.1 of the paper needs a strictly increasing one,
            which ReLU, SiLU and GELU are not.
        norm: "group" (min(8, C) groups), "batch", "layer" (1 group), "instance" (C groups), "none", or a function from
            the number of channels to a module.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, y or z does not fit the convolution.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3
        (paper 003); the norms are its released code's.

    Example:
        >>> field = SkewPair(3, 8, stride=2)
        >>> y, z = field.initial_state(torch.ones(2, 3, 4, 4))
        >>> [tuple(slope.shape) for slope in field(y, z)]
        [(2, 8, 2, 2), (2, 3, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        gamma: float = 0.0,
        activation: str | Callable[[], nn.Module] = "leaky_relu",
        norm: str | Callable[[int], nn.Module] = "group",
    ) -> None:
        super().__init__()
        checks.steps(in_channels, "in_channels")
        checks.steps(channels, "channels")
        checks.steps(stride, "stride")
        if stride not in KERNELS:
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        check_gamma(gamma)
        self.stride = stride
        self.gamma = gamma
        kernel = KERNELS[stride]
        self.weight = nn.Parameter(torch.empty(channels, in_channels, kernel, kernel))
        self.activation = make_activation(activation)
        self.pre_norm_y = _make_norm(norm, channels, "channels")
        self.pre_norm_z = _make_norm(norm, in_channels, "in_channels")
        self.post_norm_y = _make_norm(norm, channels, "channels")
        self.post_norm_z = _make_norm(norm, in_channels, "in_channels")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W as nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state the block starts from.

        Args:
            x: the block's input [N, in_channels, H, W].

        Returns:
            (y, z): z is x; y [N, channels, H / stride, W / stride] is x, every second pixel of it for stride 2,
            repeated along the channels, whole as often as it fits and then its first channels.

        Raises:
            TypeError, ValueError: x is no feature map of these channels, or of odd size with stride 2.
        """
        self.check_input(x)
        channels, in_channels = self.weight.shape[:2]
        small = x[:, :, :: self.stride, :: self.stride]
        whole, rest = divmod(channels, in_channels)
        return torch.cat([small] * whole + [small[:, :rest]] * (rest > 0), dim=1), x

    def check_input(self, x: Tensor) -> None:
        """Refuse an x that `initial_state` cannot take."""
        in_channels = self.weight.shape[1]
        checks.feature_map("x", x, in_channels)
        checks.same_kind(x, (self.weight,))
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            shape = list(x.shape)
            raise ValueError(f"x must be a tensor [N, {in_channels}, H, W] with even H and W, got shape {shape}")

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        checks.skew_pair(y, z, self.weight, self.stride, PADDING)
        return call_repaired(self._slopes, self.children(), y, z)

    def _slopes(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.pre_norm_y(y), self.pre_norm_z(z)
        dy, dz = skew_field(y, z, self.weight, self.stride, PADDING, self.gamma, self.activation)
        return self.post_norm_y(dy), self.post_norm_z(dz)

    def extra_repr(self) -> str:
        channels, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {channels}, stride={self.stride}, gamma={self.gamma}"


class SkewLinear(nn.Module):
    """The field of the classification block, with a matrix W [classes, features].

    The paper's is ẏ = σ(W z − γ y), ż = σ(−Wᵀ y − γ z). Its released code takes another one, with the activation inside
    and biases: ẏ = W σ(z) + b_y − γ y, ż = −Wᵀ σ(y) + b_z − γ z.

    Args:
        in_features: features of z.
        num_classes: entries of y.
        gamma: γ ≥ 0, the damping.
        activation: as in SkewPair.
        released: True takes the released code's field, with parameters `bias_y` and `bias_z`.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; at a call, y or z does not fit the matrix.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3
        and Section 4 (paper 003).

    Example:
        >>> field = SkewLinear(8, 3)
        >>> y, z = field.initial_state(torch.zeros(2, 8))
        >>> y
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    bias_y: nn.Parameter | None
    bias_z: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        gamma: float = 0.0,
        activation: str | Callable[[], nn.Module] = "leaky_relu",
        released: bool = False,
    ) -> None:
        super().__init__()
        checks.steps(in_features, "in_features")
        checks.steps(num_classes, "num_classes")
        check_gamma(gamma)
        checks.flag("released", released)
        self.gamma = gamma
        self.released = released
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.register_parameter("bias_y", nn.Parameter(torch.empty(num_classes)) if released else None)
        self.register_parameter("bias_z", nn.Parameter(torch.empty(in_features)) if released else None)
        self.activation = make_activation(activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and the biases as nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight.shape[1])
        for bias in (self.bias_y, self.bias_z):
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state the block starts from.

        Args:
            x: features [N, in_features].

        Returns:
            (y, z): z is x, and y [N, num_classes] is 1 everywhere (0.1 in the released code's variation).

        Raises:
            TypeError, ValueError: x is no such matrix.
        """
        self.check_input(x)
        return x.new_full((x.shape[0], self.weight.shape[0]), self.initial), x

    @property
    def initial(self) -> float:
        """y(0)."""
        return INITIAL_RELEASED if self.released else INITIAL

    def check_input(self, x: Tensor) -> None:
        """Refuse an x that `initial_state` cannot take."""
        _check_matrix("x", x, None, self.weight.shape[1])
        checks.same_kind(x, (self.weight,))

    def check_state(self, y: Tensor, z: Tensor) -> None:
        """Refuse a state that `forward` cannot take."""
        classes, features = self.weight.shape
        _check_matrix("y", y, None, classes)
        _check_matrix("z", z, y.shape[0], features)
        checks.same_kind(y, (self.weight,), "y")
        checks.same_kind(z, (self.weight,), "z")

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        self.check_state(y, z)
        if self.released:
            # The activation reads the state itself here, so one that works in place gets copies.
            inner_y, inner_z = self.activation(y.clone()), self.activation(z.clone())
            dy = F.linear(inner_z, self.weight, self.bias_y)
            dz = F.linear(inner_y, -self.weight.t(), self.bias_z)
            return _damped(dy, y, self.gamma), _damped(dz, z, self.gamma)
        dy = F.linear(z, self.weight)
        dz = -F.linear(y, self.weight.t())
        return self.activation(_damped(dy, y, self.gamma)), self.activation(_damped(dz, z, self.gamma))

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return f"{features}, {classes}, gamma={self.gamma}, released={self.released}"


def _damped(slope: Tensor, state: Tensor, gamma: float) -> Tensor:
    """slope − γ state, which without damping is the slope."""
    return torch.sub(slope, state, alpha=gamma) if gamma else slope


def check_gamma(gamma: Any) -> None:
    """Refuse anything but a finite number of at least zero."""
    checks.finite("gamma", gamma)
    if gamma < 0:
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")


def _check_matrix(name: str, x: Any, rows: int | None, columns: int) -> None:
    wanted = f"[{'N' if rows is None else rows}, {columns}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}, got an object of type {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != columns or (rows is not None and x.shape[0] != rows):
        raise ValueError(f"{name} must be a tensor {wanted}, got shape {list(x.shape)}")


def _make_norm(norm: str | Callable[[int], nn.Module], channels: int, name: str) -> nn.Module:
    return next(iter(make_norm(norm, channels, name, MOST_GROUPS)), nn.Identity())
