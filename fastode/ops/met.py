"""What the batch norms of a call have met, as the operators of a CPU give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Places(list[tuple[int, int]]):
    """Where an operator's vector has what each tracked batch norm has met, and its channels, in the calls' order.

    Attributes:
        movers: for inputs of one shape, what moves the norms' running statistics in C++, once it is made.
    """

    movers: tuple[torch.Size, Any] | None = None


class Met:
    """What all batch norms of a call have met, in one vector: of each its mean, and its biased variance behind it."""

    __slots__ = ("flat", "places")

    def __init__(self, flat: Tensor, places: Places) -> None:
        self.flat, self.places = flat, places

    def apart(self) -> list[Tensor]:
        """Mean and variance [2, C] of every tracked one."""
        return [self.flat[place : place + 2 * channels].view(2, -1) for place, channels in self.places]
