"""The field of two matrix products as constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ....branch.layers import Activation


@dataclass(frozen=True)
class Linear:
    """The skew field with a matrix W [classes, features].

    Its tensors are W and the biases of ẏ and ż, which only the released code's field has.

    Attributes:
        gamma: γ.
        activation: σ.
        released: whether σ is inside, as in the released code, and not outside.
        initial: y(0), everywhere.
        lower: the dtype that autocast lowers W to, None where it is off.
        memo: what an engine has made of it, for the tensors that it always comes with; a tracer leaves it alone.
    """

    gamma: float
    activation: Activation | None
    released: bool
    initial: float
    lower: torch.dtype | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
