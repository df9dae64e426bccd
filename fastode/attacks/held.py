"""A model as it is while it is attacked: nothing of it has changed afterwards, also where the attack fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..solver import Solver

MODES = ("eval", "train", "keep")


@contextmanager
def attacked(model: nn.Module, mode: str, solver_gradient: str | None) -> Iterator[None]:
    """A context in which a model is attacked: frozen, in a mode, and with a derivative of its adaptive solvers.

    Its mode, requires_grad, gradients, buffers and solvers are put back at the end. Gradients can be taken inside,
    whatever is set outside.

    Args:
        model: what is attacked.
        mode: "eval", "train", or "keep" for the mode that each module is in.
        solver_gradient: "solver", "constant" or "exact", as in `fastode.Solver`; None for what each block has.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    blocks = adaptive_blocks(model) if solver_gradient is not None else []
    gradients = [block.gradient for block in blocks]
    with torch.inference_mode(False):
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            if mode != "keep":
                model.train(mode == "train")
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None  # what a library's zero_grad would clear
            for block in blocks:
                block.gradient = solver_gradient  # type: ignore[assignment]
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for block, was in zip(blocks, gradients, strict=True):
                block.gradient = was
            _put_back(buffers)


def adaptive_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model whose solver chooses its steps."""
    found = []
    for module in model.modules():
        settings = getattr(module, "settings", None)
        if isinstance(settings, Solver) and settings.is_adaptive:
            found.append(module)
    return found


def _put_back(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, _ in buffers:
        module._buffers[name] = buffer  # a module may have put another tensor in its place
    if not buffers:
        return
    # One wait for all of them on a card.
    flags = [(buffer != before).any().to("cpu", non_blocking=True) for _, _, buffer, before in buffers]
    for device in {buffer.device for _, _, buffer, _ in buffers if buffer.is_cuda}:
        torch.cuda.synchronize(device)
    for (_, _, buffer, before), changed in zip(buffers, flags, strict=True):
        if changed:
            # By .data: a graph from before the attack holds the buffer, and it has the same values again.
            buffer.data.copy_(before)
