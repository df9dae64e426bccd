"""Whole blocks on the staged engine with the Triton operators, interpreted: test_triton.py runs this in a process.

The C++ library stays out of it: the operators are defined from csrc/ops.cpp as on a machine that cannot build it.
"""

from __future__ import annotations

import copy
from typing import Any

import interpreting  # before any kernel is made
import pytest
import torch
from block_cases import ACTIVATIONS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastode
from benchmarks import kernels
from fastode import reference
from fastode.dispatch.engines import BY_NAME
from fastode.ops.triton import launch, passes
from fastode.testing import assert_blocks_equal, sample_input

NORMS = {"group": lambda c: nn.GroupNorm(2, c), "batch": nn.BatchNorm2d}
BLOCKS = {
    "ie": lambda m, f: m.IESkip(f, 2, 0.1, theta=0.5),
    "ssp3": lambda m, f: m.SSP3(f),
    "ark": lambda m, f: m.Ark(f, learn_a21=True),
    "poly": lambda m, f: m.PolyBlock(f, step_size=0.75),
}


@pytest.fixture(scope="module", autouse=True)
def _triton_operators() -> None:
    interpreting.use_operators()


def branch(norm: str, activation: str, channels: int = 4) -> nn.Sequential:
    units = [
        [NORMS[norm](channels), ACTIVATIONS[activation](), nn.Conv2d(channels, channels, 3, padding=1)]
        for _ in range(2)
    ]
    return nn.Sequential(*(layer for unit in units for layer in unit))


def engine_of(monkeypatch: pytest.MonkeyPatch, fused: bool) -> str:
    """The staged engine, or that of fused convolutions: it is for CUDA tensors, and here there are none."""
    monkeypatch.setattr(BY_NAME["fused_convolution"], "devices", ("cpu", "cuda"))
    return "fused_convolution" if fused else "staged"


# A bfloat16 pre-activation on the other side of a kink would be no fault of a kernel: smooth activations.
UNITS = [("group", "tanh"), ("batch", "silu")]
DTYPES = [torch.float32, torch.bfloat16]
# The operators have tests of their own in every dtype: here every block is in one with them, and in two where its
# convolutions are fused.
CASES = [(False, block, *UNITS[i % 2], DTYPES[i % 2]) for i, block in enumerate(BLOCKS)]
CASES += [(True, block, *UNITS[j], DTYPES[(i + j) % 2]) for i, block in enumerate(BLOCKS) for j in range(2)]


@pytest.mark.parametrize(("fused_convolutions", "block", "norm", "activation", "dtype"), CASES)
def test_equal(
    monkeypatch: pytest.MonkeyPatch,
    fused_convolutions: bool,
    block: str,
    norm: str,
    activation: str,
    dtype: torch.dtype,
) -> None:
    f = branch(norm, activation)
    plain, fused = (BLOCKS[block](m, copy.deepcopy(f)).to(dtype) for m in (reference, fastode.nn))
    fused.engine = engine_of(monkeypatch, fused_convolutions)
    assert_blocks_equal(plain, fused, sample_input(2, 4, 3, 5, dtype=dtype))


@pytest.mark.parametrize(("norm", "solver"), [("group", "bosh3"), ("batch", "midpoint")])
def test_a_single_maps_solution_equals_the_reference(monkeypatch: pytest.MonkeyPatch, norm: str, solver: str) -> None:
    unit = [NORMS[norm](4), nn.Tanh(), reference.TimeConv2d(4, 4, padding=1), NORMS[norm](4)]
    plain = reference.ODEBlock(nn.Sequential(*unit), solver)
    fused = fastode.nn.ODEBlock(copy.deepcopy(plain.field), solver)
    fused.engine = engine_of(monkeypatch, False)
    assert_blocks_equal(plain, fused, sample_input(2, 4, 3, 5))


class Convolutions(TorchDispatchMode):
    """Counts the maps that ATen's convolutions read and write, in maps like `like`."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like, self.moved = like, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten.convolution.default:
            self.moved += (arguments[0].numel() + result.numel()) / self.like.numel()
        if function is torch.ops.aten.convolution_backward.default:
            cot, a = arguments[:2]
            self.moved += sum(arguments[-1][:2]) * (cot.numel() + a.numel()) / self.like.numel()
        return result


# README.md of the Triton operators has these, K = 1 and two units with GroupNorm: launches and the maps that they move,
# and the maps that convolutions of cuDNN's move; each forward and backward.
TRAFFIC = {
    ("ie", False): ([7, 15], [21, 45], [12, 34]),
    ("ssp3", False): ([7, 24], [21, 47], [12, 30]),
    ("ie", True): ([6, 17], [18, 45], [0, 24]),
    ("ssp3", True): ([6, 30], [17, 47], [0, 0]),
}


@pytest.mark.parametrize(("block", "fused_convolutions"), TRAFFIC)
def test_traffic(monkeypatch: pytest.MonkeyPatch, block: str, fused_convolutions: bool) -> None:
    engine = engine_of(monkeypatch, fused_convolutions)
    launches, moved, by_aten = [0, 0], [0.0, 0.0], [0.0, 0.0]
    backward = 0
    x = sample_input(2, 8, 3, 2).requires_grad_()

    def counted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launches[backward] += 1
        moved[backward] += kernels.maps_moved(arguments, x)

    for module in (passes, launch):
        monkeypatch.setattr(module, "launch", counted)
    make = {"ie": lambda f: fastode.nn.IESkip(f, 1, 0.1), "ssp3": fastode.nn.SSP3}[block]
    fused = make(branch("group", "relu", 8))
    fused.engine = engine
    with Convolutions(x) as aten:
        y = fused(x)
        by_aten[0] = aten.moved
        backward = 1
        y.sum().backward()
        by_aten[1] = aten.moved - by_aten[0]
    assert (launches, moved, by_aten) == TRAFFIC[block, fused_convolutions]
