"""The skew pair as constants, and what an evaluation of it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ....branch.layers import Activation, Norm
from ...plan import Gradients, MaybeTensor, MaybeTensors

PRE_Y, PRE_Z, POST_Y, POST_Z = range(4)


@dataclass(frozen=True)
class Pair:
    """A skew pair as constants.

    Attributes:
        stride: of W.
        padding: of W.
        gamma: γ.
        activation: σ.
        norms: before W on y and on z, after σ on each.
        tracked: which of the norms update running statistics.
        lower: the dtype that autocast lowers W to, None where it is off.
        memo: what an engine has made of it, for the tensors that it always comes with; a tracer leaves it alone.
    """

    stride: int
    padding: int
    gamma: float
    activation: Activation | None
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    tracked: tuple[bool, bool, bool, bool]
    lower: torch.dtype | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def has_slow_norms(pair: Pair, x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's norms take several times as long as the convolutions of a pair on the CPU.

    Of several groups of few channels they do, on bfloat16 maps in channels_last.
    """
    several = any(norm is not None and norm.has_narrow_groups(min(weight.shape[:2])) for norm in pair.norms)
    return several and x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


class Kept(NamedTuple):
    """What an evaluation leaves for its pull-back.

    Attributes:
        y: of the point; None where no wanted slope reads it.
        z: likewise.
        h_y: σ's argument for ẏ, or σ of it where that tells σ′.
        h_z: likewise for ż.
        stats: the statistics of each norm.
    """

    y: MaybeTensor
    z: MaybeTensor
    h_y: MaybeTensor
    h_z: MaybeTensor
    stats: tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]


class PairSweeps(Protocol):
    """What the mathematics of the pair asks of an engine, over channels_last maps; a module with these is one.

    `tensors` are W's weight and then four of each norm, in the order of `Pair.norms`.
    """

    def evaluate(
        self,
        pair: Pair,
        tensors: MaybeTensors,
        y_terms: Sequence[Tensor],
        z_terms: Sequence[Tensor],
        y_coefs: MaybeTensor = None,
        z_coefs: MaybeTensor = None,
        want: tuple[bool, bool] = (True, True),
    ) -> tuple[MaybeTensor, MaybeTensor, Kept]:
        """(1) at the combinations of y_terms and of z_terms: the wanted slopes, and what the pull-back needs.

        Without coefs a combination is its one term.
        """

    def pull_back(
        self,
        pair: Pair,
        tensors: MaybeTensors,
        kept: Kept,
        bars: tuple[MaybeTensor, MaybeTensor],
        grads: Gradients,
        need: tuple[bool, bool] = (True, True),
        scale: float = 1.0,
    ) -> tuple[MaybeTensor, MaybeTensor]:
        """The cotangents of y and z for the slopes' cotangents `scale` × bars, of which an absent one is zero."""
