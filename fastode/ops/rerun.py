"""The reference, run again inside a backward that is itself differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..reference.plain import plain_norms


@dataclass(frozen=True)
class Rerun:
    """A reference block as a function of its input and of a flat list of tensors.

    Attributes:
        make: makes the reference block anew around its modules; it is called only when needed.
    """

    make: Callable[[], nn.Module]

    def needed(self, *cotangents: Tensor | None) -> bool:
        """Whether this backward is differentiated itself, or each cotangent is many at once, under torch.func.vmap.

        Raises:
            RuntimeError: they come from is_grads_batched, whose older vmap gives some plain sums wrong gradients.
        """
        bars = [bar for bar in cotangents if bar is not None]
        if any(torch._C._functorch.is_legacy_batchedtensor(bar) for bar in bars):
            raise RuntimeError(
                "is_grads_batched must be False for a fused block, got True: "
                "torch.func.vmap of a function that calls torch.autograd.grad takes many cotangents at once"
            )
        return torch.is_grad_enabled() or any(torch._C._functorch.is_batchedtensor(bar) for bar in bars)

    def gradients(
        self,
        inputs: Sequence[Tensor | None],
        originals: Sequence[Tensor | None],
        wanted: Sequence[bool],
        points: int,
        cotangents: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The block's gradients with a graph of their own, for the wanted of `inputs`.

        Args:
            inputs: the first `points` are the block's inputs, the rest stand in for `originals`.
            originals: the modules' own parameters and buffers, aligned with inputs[points:].
            wanted: which gradients are asked for.
            points: how many tensors the block is called with.
            cotangents: one for each tensor that the block returns.
        """
        block = self.make()
        with torch.enable_grad(), plain_norms():
            # Aliases, so that the gradient with respect to a parameter does not run on through x.
            alias = [t.view_as(t) if want and t is not None else t for t, want in zip(inputs, wanted, strict=True)]
            names: dict[str, Tensor] = {name: buffer.clone() for name, buffer in block.named_buffers()}
            for name, tensor in _named_tensors(block):
                for original, stand_in in zip(originals, alias[points:], strict=True):
                    if original is tensor and stand_in is not None:
                        names[name] = stand_in
            # No transform of the cotangents is one of the inputs.
            with temporarily_clear_interpreter_stack():
                result = torch.func.functional_call(block, names, tuple(alias[:points]))
            results = (result,) if isinstance(result, Tensor) else result
            asked = [t for t, want in zip(alias, wanted, strict=True) if want and t is not None]
            found = iter(torch.autograd.grad(results, asked, cotangents, create_graph=True, allow_unused=True))
        return [next(found) if want and t is not None else None for t, want in zip(alias, wanted, strict=True)]


def _named_tensors(block: nn.Module):
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)
