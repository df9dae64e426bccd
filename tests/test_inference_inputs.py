"""Blocks whose references train on inputs that were made in inference mode do so fused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastode
from fastode import reference


def field() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(1, 4), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))


def pair() -> nn.Module:
    return reference.SkewPair(4, 4)


def linear() -> nn.Module:
    return reference.SOClassifier(4, 3, solver="dopri5")


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "ExactIE": (lambda: reference.ExactIE(field()), ("staged",)),
    "ODEBlock": (lambda: reference.ODEBlock(field(), solver="dopri5"), ("resident",)),
    "ODEBlock, each": (lambda: reference.ODEBlock(field(), solver="dopri5", per_sample=True), ("resident",)),
    "SOBlock": (lambda: reference.SOBlock(pair(), solver="dopri5"), ("resident", "staged")),
    "SOBlock, each": (lambda: reference.SOBlock(pair(), solver="dopri5", per_sample=True), ("resident", "staged")),
    "SOClassifier": (linear, ("resident",)),
}


CASES = [(name, engine) for name, (_, names) in BLOCKS.items() for engine in names]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_inputs_made_in_inference_mode_train_a_fused_block(name: str, engine: str) -> None:
    torch.manual_seed(0)
    plain = BLOCKS[name][0]().double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    with torch.inference_mode():
        x = torch.randn(2, 4, dtype=torch.float64) if name == "SOClassifier" else torch.randn(2, 4, 5, 6).double()
    for block in (plain, fused):
        block(x).square().sum().backward()
    for wanted, found in zip(plain.parameters(), fused.parameters(), strict=True):
        assert wanted.grad is not None and found.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4)
