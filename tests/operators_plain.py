"""The operators of csrc in a few lines of plain PyTorch each: the truth of test_operators.py, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": 0,
    "relu": 1,
    "leaky_relu": 2,
    "tanh": 3,
    "softplus": 4,
    "elu": 5,
    "silu": 6,
    "gelu": 7,
    "gelu_tanh": 7,
    "sigmoid": 8,
}
PARAMETERS = {"leaky_relu": (0.01, 0.0), "softplus": (1.5, 12.0), "elu": (0.7, 0.0), "gelu_tanh": (1.0, 0.0)}
NORMS = {"none": 0, "group": 1, "batch": 2, "fixed": 3}


@dataclass(frozen=True)
class Pointwise:
    """The arguments that every operator of a unit shares."""

    norm: str
    groups: int
    activation: str
    eps: float = 1e-5

    @property
    def codes(self) -> tuple[int, int, float, int, float, float]:
        """In the order of the schemas: norm, groups, eps, act, p, q."""
        p, q = PARAMETERS.get(self.activation, (0.0, 0.0))
        return NORMS[self.norm], self.groups, self.eps, ACTIVATIONS[self.activation], p, q

    def activate(self, h: Tensor) -> Tensor:
        p, q = PARAMETERS.get(self.activation, (0.0, 0.0))
        match self.activation:
            case "relu":
                return F.relu(h)
            case "leaky_relu":
                return F.leaky_relu(h, p)
            case "tanh":
                return torch.tanh(h)
            case "softplus":
                return F.softplus(h, p, q)
            case "elu":
                return F.elu(h, p)
            case "silu":
                return F.silu(h)
            case "gelu":
                return F.gelu(h)
            case "gelu_tanh":
                return F.gelu(h, approximate="tanh")
            case "sigmoid":
                return torch.sigmoid(h)
        return h

    def statistics(self, h: Tensor) -> Tensor:
        """[2, N, G] or [2, C]: mean and biased variance."""
        if self.norm == "group":
            length = h[0:1].numel() // self.groups
            sets, dims = h.reshape(h.shape[0], self.groups, length), [2]
        else:
            sets, dims = h, [0, 2, 3]
        mean = sets.mean(dims, keepdim=True)
        variance = (sets - mean).square().mean(dims)
        return torch.stack([mean.reshape(variance.shape), variance])

    def _spread(self, statistic: Tensor, h: Tensor) -> Tensor:
        """One statistic, broadcast over the map."""
        if self.norm == "group":
            return statistic.repeat_interleave(h.shape[1] // self.groups, 1)[:, :, None, None]
        return statistic[:, None, None]

    def normalised(self, h: Tensor, stats: Tensor | None) -> Tensor:
        """x-hat; `stats` only for fixed statistics."""
        mean, var = stats if self.norm == "fixed" else self.statistics(h)
        return (h - self._spread(mean, h)) * torch.rsqrt(self._spread(var, h) + self.eps)

    def __call__(self, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None = None) -> Tensor:
        if self.norm != "none":
            h = self.normalised(h, stats)
            h = h if weight is None else h * weight[:, None, None]
            h = h if bias is None else h + bias[:, None, None]
        return self.activate(h)

    def tangent_statistics(self, h: Tensor, t: Tensor) -> Tensor:
        """The means of t and of x-hat t over each normalised set."""
        first, second = self.statistics(t), self.statistics(self.normalised(h, None) * t)
        return torch.stack([first[0], second[0]])


def combination(terms: list[Tensor], coefs: list[float]) -> Tensor:
    """sum_i coefs[i] terms[i]."""
    return sum((c * term for c, term in zip(coefs, terms, strict=True)), torch.zeros_like(terms[0]))


def value_and_tangent(unit: Pointwise, h: Tensor, t: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The unit's value and its derivative along t, both differentiable, by the double-backward trick."""
    value = unit(h, *rest)
    probe = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(value, h, probe, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, probe, t, create_graph=True)
    return value, tangent


def gradients(scalar: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Gradients, with None for the inputs that are None and zeros where nothing flows."""
    given = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(scalar, given, allow_unused=True, materialize_grads=True))
    return [None if t is None else next(found) for t in inputs]


__all__ = ["Pointwise", "combination", "gradients", "value_and_tangent"]
