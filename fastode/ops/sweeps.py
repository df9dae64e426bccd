"""The face that the mathematics of the schemes asks of an engine: sweeps through a branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .plan import Gradients, MaybeTensor, MaybeTensors, Plan, Record


class Sweeps(Protocol):
    """What the adjoints of the schemes run, over dense channels_last maps; a module with these functions is one."""

    def revisit(
        self, plan: Plan, tensors: MaybeTensors, point: Tensor, statistics: Sequence[Tensor], image: bool = False
    ) -> tuple[list[Record], MaybeTensor]:
        """What `pull` needs of f's evaluation at `point`; and f(point), if `image`."""

    def pull(
        self,
        plan: Plan,
        tensors: MaybeTensors,
        records: list[Record],
        cot: Tensor,
        addends: Sequence[Tensor],
        coefs: Tensor,
        grads: Gradients | None,
        scale: float = 1.0,
        need_point: bool = True,
    ) -> MaybeTensor:
        """coefs[0] J(y)ᵀ cot + sum_i coefs[i + 1] addends[i]; parameter gradients, times `scale`, go to `grads`.

        It empties `records`, so that each map is freed as soon as it is used.
        """

    def dual(
        self, plan: Plan, tensors: MaybeTensors, point: Tensor, tangent: Tensor, statistics: Sequence[Tensor]
    ) -> tuple[Tensor, list[Record]]:
        """The value f(point) and the tangent J(point) tangent, stacked along the batch, and the records."""

    def pull_dual(
        self,
        plan: Plan,
        tensors: MaybeTensors,
        records: list[Record],
        cot: Tensor,
        addends: Sequence[Tensor],
        coefs: Tensor,
        grads: Gradients | None,
        scale: float,
    ) -> Tensor:
        """∇_y of ⟨cot[:N], f(y)⟩ + ⟨cot[N:], J(y) t⟩ at fixed t: coefs[0] times it + sum_i coefs[i + 1] addends[i].

        It empties `records`, so that each map is freed as soon as it is used.
        """


class ForwardSweeps(Sweeps, Protocol):
    """The same with what a forward pass runs, where it goes a sweep at a time."""

    def value(
        self, plan: Plan, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: MaybeTensor = None
    ) -> tuple[Tensor, Tensor, list[Record]]:
        """f at the combination of `terms`: that combination, f of it, and the records (without convolution inputs).

        Without coefs f is taken at the one term itself.
        """


class ProductSweeps(ForwardSweeps, Protocol):
    """The same with products of J alone."""

    def push(self, plan: Plan, tensors: MaybeTensors, records: Sequence[Record], tangent: Tensor) -> Tensor:
        """J(y) tangent, at the point whose evaluation `records` are of; they stay as they are."""
