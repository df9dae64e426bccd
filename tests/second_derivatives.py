"""Gradients of gradients: a fused block's beside those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compare_second_derivatives(
    block: nn.Module,
    plain: Callable[[Tensor], Tensor],
    twin: nn.Module,
    x: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda twin, x: twin(x),
) -> None:
    """Compare, in float64, those of the input and of every parameter.

    Args:
        block: whose parameters `plain` uses.
        plain: the block in plain PyTorch.
        twin: the fused block.
        x: the input.
        call: calls the twin.
    """
    found = []
    for solve, parameters in ((plain, block.parameters()), (lambda x: call(twin, x), twin.parameters())):
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(solve(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [leaf, *parameters], allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and one.norm() > 1e-8:
            assert (one - other).norm() <= 1e-8 * one.norm()
