"""The reference, run again inside a backward that is itself differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..reference.plain import plain_norms
from .plan import MaybeTensor, MaybeTensors


class Habit:
    """What the last backward of a block asked for, by which its next forward guesses what the next one will.

    Attributes:
        input_only: the gradient of the input and no other, though parameters are trainable: what an attack asks for.
    """

    __slots__ = ("input_only",)

    def __init__(self) -> None:
        self.input_only = False


class Rerun:
    """A reference block as a function of its input and of a flat list of tensors.

    Attributes:
        make: makes the reference block anew around its modules; it is called only when needed.
        inputs: how many tensors the block is called with.
        habit: of the block.
    """

    __slots__ = ("habit", "inputs", "make")

    def __init__(self, make: Callable[[], nn.Module], inputs: int = 1, habit: Habit | None = None) -> None:
        self.make, self.inputs = make, inputs
        self.habit = Habit() if habit is None else habit

    def needed(self, cotangents: Sequence[MaybeTensor]) -> bool:
        """Whether this backward is itself differentiated, or runs under torch.func.vmap, which batches cotangents."""
        if torch.is_grad_enabled():
            return True
        return any(bar is not None and is_batchedtensor(bar) for bar in cotangents)

    def gradients(
        self, given: MaybeTensors, wanted: Sequence[bool], cotangents: Sequence[MaybeTensor]
    ) -> list[MaybeTensor]:
        """The block's gradients with a graph of their own, for the wanted of `given`.

        Args:
            given: the block's inputs, then the modules' own parameters and buffers.
            wanted: which gradients are asked for.
            cotangents: one for each tensor that the block returns, None where it has none.
        """
        block = self.make()
        with torch.enable_grad(), plain_norms():
            # Aliases: where x depends on a parameter, its gradient counts this block's own use of it only.
            alias = [t.view_as(t) if want and t is not None else t for t, want in zip(given, wanted, strict=True)]
            names: dict[str, Tensor] = {name: buffer.clone() for name, buffer in block.named_buffers()}
            for name, tensor in _named_tensors(block):
                for original, stand_in in zip(given[self.inputs :], alias[self.inputs :], strict=True):
                    if original is tensor and stand_in is not None:
                        names[name] = stand_in
            # A transform applies to the cotangents, not to the inputs: the block runs outside of it.
            with temporarily_clear_interpreter_stack():
                result = torch.func.functional_call(block, names, tuple(alias[: self.inputs]))
            results = (result,) if isinstance(result, Tensor) else result
            pairs = [(y, bar) for y, bar in zip(results, cotangents, strict=True) if bar is not None]
            asked = [t for t, want in zip(alias, wanted, strict=True) if want and t is not None]
            outputs, bars = [y for y, _ in pairs], [bar for _, bar in pairs]
            found = iter(torch.autograd.grad(outputs, asked, bars, create_graph=True, allow_unused=True))
        return [next(found) if want and t is not None else None for t, want in zip(alias, wanted, strict=True)]


def _named_tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)
