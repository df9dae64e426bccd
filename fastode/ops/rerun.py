"""The reference, run again inside a backward that is itself differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from ..reference.plain import plain_norms
from .plan import MaybeTensor, MaybeTensors

# What takes the place of a tensor that the block was called with: itself, or an alias with a gradient of its own.
StandIn = Callable[[Tensor], Tensor]


def lowering() -> dict[str, torch.dtype]:
    """The dtype to which autocast lowers, of each device type where it is on."""
    return {device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)}


class Rerun:
    """A reference block as a function of its input and of a flat list of tensors.

    Attributes:
        make: makes the reference block as it was at the call, around the tensors' stand-ins; called only when needed.
        inputs: how many tensors the block is called with.
        tensors: those of its modules; hooks on saved tensors may give a backward others in their place.
        lower: the dtype to which autocast lowered at the call, of each device type where it was on.
    """

    __slots__ = ("inputs", "lower", "make", "tensors")

    def __init__(self, make: Callable[[StandIn], nn.Module], inputs: int, tensors: MaybeTensors) -> None:
        self.make, self.inputs, self.tensors = make, inputs, tensors
        self.lower = lowering() if torch._C._is_any_autocast_enabled() else {}

    def needed(self, cotangents: Sequence[MaybeTensor]) -> bool:
        """Whether this backward is itself differentiated, forwards too, or under torch.func.vmap."""
        if torch.is_grad_enabled():
            return True
        forwards = forward_ad._current_level >= 0
        for bar in cotangents:
            if bar is not None and (
                is_batchedtensor(bar) or (forwards and forward_ad.unpack_dual(bar).tangent is not None)
            ):
                return True
        return False

    def _autocast(self, given: MaybeTensors) -> AbstractContextManager[object]:
        """Autocast as it was at the call, wherever the backward is called."""
        if not self.lower and not torch._C._is_any_autocast_enabled():
            return nullcontext()
        device = next(t.device.type for t in given if t is not None)
        return torch.autocast(device, self.lower.get(device), enabled=device in self.lower)

    def gradients(
        self, given: MaybeTensors, wanted: Sequence[bool], cotangents: Sequence[MaybeTensor]
    ) -> list[MaybeTensor]:
        """The block's gradients with a graph of their own, for the wanted of `given`.

        Args:
            given: the block's inputs, then the modules' own parameters and buffers.
            wanted: which gradients are asked for.
            cotangents: one for each tensor that the block returns, None where it has none.
        """
        with torch.enable_grad(), plain_norms():
            # Aliases: where x depends on a parameter, its gradient counts this block's own use of it only.
            alias = [t.view_as(t) if want and t is not None else t for t, want in zip(given, wanted, strict=True)]
            held = zip(self.tensors, alias[len(alias) - len(self.tensors) :], strict=True)
            stand_ins = {id(tensor): t for tensor, t in held if t is not None}
            block = self.make(lambda tensor: stand_ins.get(id(tensor), tensor))
            # A transform applies to the cotangents, not to the inputs: the block runs outside of it.
            with temporarily_clear_interpreter_stack(), self._autocast(given):
                result = block(*alias[: self.inputs])
            results = (result,) if isinstance(result, Tensor) else result
            pairs = [(y, bar) for y, bar in zip(results, cotangents, strict=True) if bar is not None]
            asked = [t for t, want in zip(alias, wanted, strict=True) if want and t is not None]
            outputs, bars = [y for y, _ in pairs], [bar for _, bar in pairs]
            found = iter(torch.autograd.grad(outputs, asked, bars, create_graph=True, allow_unused=True))
        return [next(found) if want and t is not None else None for t, want in zip(alias, wanted, strict=True)]
