"""The time as a channel of a convolution: what it adds to the image, and the gradients through it.

Derivation: README.md beside this file; equations are cited as (1) to (3) from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....branch.layers import TENSORS_PER_UNIT, Conv
from ...plan import CONV_WEIGHT, MaybeTensor, MaybeTensors, Plan


def timed(plan: Plan) -> list[tuple[int, Conv]]:
    """The units whose convolution sees the time, by their index."""
    found = [(index, unit.conv) for index, unit in enumerate(plan.units)]
    return [(index, conv) for index, conv in found if conv is not None and conv.sees_time]


class Times:
    """The weights of the time in a field's convolutions, for maps of one size.

    Attributes:
        tensors: the field's, each weight without its time's.
        planes: (1): for each timed unit in order E [1, C, H, W], in channels_last.
        bars: (3): of the time's weights [C, kh, kw], float64, summed as the pull-backs find them.
    """

    def __init__(self, plan: Plan, tensors: MaybeTensors, x: Tensor) -> None:
        self.tensors = list(tensors)
        self._device = x.device
        self.planes: list[Tensor] = []
        self.bars: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._units = timed(plan)
        for index, conv in self._units:
            at = index * TENSORS_PER_UNIT + CONV_WEIGHT
            weight = tensors[at]
            assert weight is not None
            last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
            layout = torch.channels_last if last else torch.contiguous_format
            self.tensors[at] = weight[:, 1:].contiguous(memory_format=layout)
            # float64: no card multiplies it in fewer digits, and it is small.
            own = weight[:, 0].double()
            sides = zip(x.shape[2:], conv.kernel, conv.padding, conv.dilation, strict=True)
            rows = _inside(x, *next(sides)), _inside(x, *next(sides))
            plane = torch.einsum("okl,ky,lx->oyx", own, *rows).to(x.dtype)
            self.planes.append(plane[None].contiguous(memory_format=torch.channels_last))
            self.bars.append(torch.zeros_like(own))
            self._weights.append(own)
            self._rows.append(rows)

    def at(self, time: float) -> list[Tensor]:
        """What a timed convolution adds at a time, for each of them."""
        return [plane * time for plane in self.planes]

    def pull(self, time: float, moments: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """The time's cotangent, from (2) of each timed convolution; their weights' are added to `bars`."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for bar, weight, moment in zip(self.bars, self._weights, moments, strict=True):
            bar.add_(moment, alpha=time * scale)
            total = total + scale * (weight * moment).sum()
        return total

    def moment(self, place: int, summed: Tensor) -> Tensor:
        """(2) of the timed convolution in that place: from its image's cotangent, summed over the samples [C, H, W]."""
        return torch.einsum("ky,oyx,lx->okl", self._rows[place][0], summed.double(), self._rows[place][1])

    def joined(self, found: Sequence[MaybeTensor]) -> list[MaybeTensor]:
        """The gradients of the field's own tensors, from those of `tensors`."""
        joined = list(found)
        for (index, _), bar in zip(self._units, self.bars, strict=True):
            at = index * TENSORS_PER_UNIT + CONV_WEIGHT
            rest = joined[at]
            if rest is not None:
                joined[at] = torch.cat([bar[:, None].to(rest.dtype), rest], 1)
        return joined


def _inside(x: Tensor, side: int, kernel: int, padding: int, dilation: int) -> Tensor:
    """[kernel, side]: whether a tap meets the image from a pixel, as ones and zeros."""
    met = torch.arange(side, device=x.device) + dilation * torch.arange(kernel, device=x.device)[:, None] - padding
    return ((met >= 0) & (met < side)).double()
