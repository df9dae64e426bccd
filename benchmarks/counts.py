"""The least work a block can be done with: FLOPs of its convolutions and bytes of its inputs and outputs, by formula.

FLOPs: a multiply and an add count two; only convolutions and matrix products count (norms and activations are below 2 %
at the papers' shapes). A convolution counts once for each of its value, tangent, data-gradient and weight-gradient
passes that the algorithm cannot do without (README.md, Counts).
Bytes: each pass reads its inputs once and writes its outputs once; nothing between them touches memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastode import record_steps, reference


@dataclass(frozen=True)
class Passes:
    """How often a block passes each convolution of its branch: in the forward, for x's gradient, for the weights'."""

    forward: int
    data: int
    weight: int

    def total(self, mode: str) -> int:
        """Passes of one call in a mode: "forward", "input_grad" or "train"."""
        parts = {"forward": (1, 0, 0), "input_grad": (1, 1, 0), "train": (1, 1, 1)}[mode]
        return parts[0] * self.forward + parts[1] * self.data + parts[2] * self.weight


ONCE = Passes(1, 1, 1)


def ie_skip(steps: int, detach: bool = False) -> Passes:
    """Passes of IE-Skip with K inner steps.

    Forward: f(x), and f(y) and Jᵀe in every step. Exact backward: in every step one tangent push, one data gradient of
    the value stream (the tangent stream's is the forward's Jᵀe, kept) and two weight gradients; then f's own at x.
    Detached backward: f's own at x.

    Example:
        >>> ie_skip(1).total("train")
        9
    """
    inner = 0 if detach else 2 * steps
    return Passes(1 + 2 * steps, inner + 1, inner + 1)


def shu_osher(beta: tuple[tuple[float, ...], ...]) -> Passes:
    """Passes of an explicit scheme: one evaluation for every u_k that some stage takes F of.

    Example:
        >>> shu_osher(((1.0,), (0.0, 0.5))).total("train")
        6
    """
    evaluations = sum(any(row[k] != 0 for row in beta if k < len(row)) for k in range(len(beta)))
    return Passes(evaluations, evaluations, evaluations)


def skew_solve(evaluations: int) -> Passes:
    """Passes of a solve of a skew pair by equal steps: two convolutions per evaluation, but the last ż is never used.

    Example:
        >>> skew_solve(4).forward
        7
    """
    convolutions = 2 * evaluations - 1
    return Passes(convolutions, convolutions, convolutions)


def convolution(layer: nn.Module, output: Tensor) -> int:
    """FLOPs of one value pass of a Conv2d or Linear, from its weight and its output."""
    if isinstance(layer, nn.Conv2d):
        return 2 * output.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return 2 * output.numel() * layer.in_features
    raise TypeError(f"layer must be Conv2d or Linear, got {type(layer).__name__}")


def flops(module: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> int:
    """Least FLOPs of one call of a block or a network.

    Args:
        module: a reference block, or a network made of them and of ordinary layers.
        inputs: its inputs; the module runs once on them, in the forward direction, to learn the shapes.
        mode: "forward", "input_grad" (forward and the input's gradient) or "train" (and every parameter's).

    Returns:
        FLOPs. A network's training step is counted with the gradient of its image, which is below 1 % of it.

    Example:
        >>> flops(nn.Conv2d(3, 8, 3, padding=1), (torch.zeros(2, 3, 4, 4),), "train")
        41472
    """
    module = copy.deepcopy(module)
    weights: list[Passes] = []
    with _blocks(module, weights) as found:
        total = _layers(module, inputs, mode, weights)
    for block, arguments in found:
        total += _block_flops(block, arguments, mode)
    return total


def _layers(module: nn.Module, inputs: tuple[Tensor, ...], mode: str, inside: Sequence[Passes] = ()) -> int:
    """FLOPs of the layers that run while `inside` is empty."""
    total = 0

    def leave(layer: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal total
        if not inside:
            total += convolution(layer, output) * ONCE.total(mode)

    handles = [m.register_forward_hook(leave) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return total


@contextmanager
def _blocks(module: nn.Module, inside: list[Passes]) -> Iterator[list[tuple[nn.Module, tuple[Tensor, ...]]]]:
    """Note the blocks that run and their inputs; `inside` is not empty while one of them runs."""
    found: list[tuple[nn.Module, tuple[Tensor, ...]]] = []

    def enter(block: nn.Module, arguments: Any) -> None:
        if not inside:
            found.append((block, tuple(arguments)))
        inside.append(ONCE)

    def leave(block: nn.Module, arguments: Any, output: Any) -> None:
        inside.pop()

    handles = []
    for block in module.modules():
        if isinstance(block, _BLOCKS):
            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    yield found
    for handle in handles:
        handle.remove()


def _block_flops(block: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> int:
    if isinstance(block, reference.SkewPair | reference.SkewLinear):
        return Passes(2, 2, 2).total(mode) * _skew_unit(block, inputs[0].shape[0], inputs[0])
    if isinstance(block, reference.SOBlock | reference.SOClassifier):
        return _skew_solution(block, inputs, mode)
    if isinstance(block, reference.ODEBlock):
        return _solution(block, inputs, mode)
    if isinstance(block, reference.IESkip):
        return ie_skip(block.steps, block.detach).total(mode) * _value_pass(block.branch, inputs)
    if isinstance(block, reference.Ark):
        return Passes(2, 2, 2).total(mode) * _value_pass(block.branch, inputs)
    if isinstance(block, reference.ShuOsher):
        return shu_osher(block.tableau.beta).total(mode) * _value_pass(block.branch, inputs)
    shortcut = _value_pass(block.shortcut, inputs) if block.shortcut is not None else 0
    return ONCE.total(mode) * (_value_pass(block.branch, inputs) + shortcut)


_BLOCKS = (
    reference.SkewPair,
    reference.SkewLinear,
    reference.SOBlock,
    reference.SOClassifier,
    reference.ODEBlock,
    reference.IESkip,
    reference.Ark,
    reference.ShuOsher,
    reference.ResBlock,
)


def _value_pass(branch: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """FLOPs of one forward evaluation of a branch of ordinary layers."""
    return flops(branch, inputs, "forward")


def _skew_unit(field: nn.Module, batch: int, y: Tensor | None, z: Tensor | None = None) -> int:
    """FLOPs of one application of W: each weight meets every pixel of y once."""
    weight = next(p for p in field.parameters() if p.dim() in (2, 4))
    if weight.dim() == 2:
        return 2 * batch * weight.numel()
    if y is not None:
        pixels = y.shape[2] * y.shape[3]
    else:
        assert z is not None
        pixels = (z.shape[2] // field.stride) * (z.shape[3] // field.stride)
    return 2 * batch * weight.numel() * pixels


def _skew_solution(block: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> int:
    unit = _skew_unit(block.field, 1, None, inputs[0])  # of one sample
    samples = len(inputs[0])
    if not block.settings.is_adaptive:
        return samples * skew_solve(block.settings.tableau.stages * block.steps).total(mode) * unit
    total = 0
    for count, forward, backward in _evaluations(block, inputs):
        # Forwards the last ż is part of the error's estimate; backwards its cotangent is zero.
        total += count * Passes(2 * forward, 2 * backward - 1, 2 * backward - 1).total(mode) * unit
    return total


def _solution(block: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> int:
    """FLOPs of an ODEBlock, of whose field one evaluation costs what a step of Euler does."""
    once = copy.deepcopy(block)
    once.solver, once.steps = "euler", 1
    unit = _layers(once, tuple(x[:1] for x in inputs), "forward")
    if not block.settings.is_adaptive:
        evaluations = block.settings.tableau.stages * block.steps
        return len(inputs[0]) * Passes(evaluations, evaluations, evaluations).total(mode) * unit
    found = _evaluations(block, inputs)
    return sum(count * Passes(forward, back, back).total(mode) * unit for count, forward, back in found)


def _evaluations(block: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[int, int, int]]:
    """Of each adaptive solve the samples, the evaluations, and how many of them its derivative goes through."""
    settings = block.settings
    with torch.no_grad(), record_steps() as log:
        block(*inputs)
    found = []
    for solve in log:
        idle = 0
        if settings.gradient != "exact":
            idle = len(solve.rejected) * (settings.tableau.stages - 1)
        if settings.gradient == "constant" and settings.first_step is None:
            idle += 1  # the second evaluation by which the first step is chosen
        count = len(inputs[0]) if solve.sample is None else 1
        found.append((count, solve.evaluations, solve.evaluations - idle))
    return found


def least_bytes(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], mode: str) -> int:
    """Least bytes of one call: the forward reads x and w and writes y; the backward reads x, w, ȳ and writes x̄ (and w̄).

    Example:
        >>> layer, x = nn.Conv2d(3, 3, 1, bias=False), torch.zeros(1, 3, 2, 2)
        >>> least_bytes(layer, (x,), (x,), "forward")
        132
    """

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    x, y, w = size(inputs), size(outputs), size(module.parameters())
    forward = x + w + y
    if mode == "forward":
        return forward
    return forward + x + w + y + x + (w if mode == "train" else 0)
