"""The skew pair with fused convolutions in Triton's interpreter: what test_triton.py runs in a process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import interpreting  # before any kernel is made
import pytest
import torch
from test_skew import field_of, fused, pair_of_maps
from torch import nn

from benchmarks import kernels
from fastode import reference
from fastode.dispatch.engines import BY_NAME
from fastode.ops.fused import pair as fused_pair
from fastode.ops.triton import conv_plan, launch, passes
from fastode.testing import assert_blocks_equal


@pytest.fixture(scope="module", autouse=True)
def _triton_operators() -> None:
    interpreting.use_operators()


def engine_of(monkeypatch: pytest.MonkeyPatch, fused_convolutions: bool = True) -> str:
    """The staged engine, or that of fused convolutions: it is for CUDA tensors, and here there are none."""
    monkeypatch.setattr(BY_NAME["fused_convolution"], "devices", ("cpu", "cuda"))
    return "fused_convolution" if fused_convolutions else "staged"


def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks to a sample, several samples to a block, and programs of both halves."""
    monkeypatch.setattr(conv_plan, "PIXELS", 16)
    monkeypatch.setattr(conv_plan, "PAIR_PIXELS", 16)
    monkeypatch.setattr(fused_pair, "on_tensor_cores", lambda dtype: True)


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves in programs of their own, with several column blocks and steps: as wide pairs have."""
    together(monkeypatch)
    monkeypatch.setattr(launch, "ASSUMED", 80)
    monkeypatch.setattr(conv_plan, "CHANNELS", 16)
    monkeypatch.setattr(conv_plan, "STEP_BYTES", 32)


def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves in programs of their own, with the shorter steps of float32 that is not to be rounded."""
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    monkeypatch.setattr(conv_plan, "PAIR_PIXELS", 16)


CASES = [
    # in, out, stride, height, width, gamma, activation, norm, batch
    (3, 16, 1, 5, 3, 0.0, "leaky_relu", "group", 2),
    (16, 3, 1, 3, 5, 0.3, "tanh", "batch", 2),
    (5, 18, 2, 4, 10, 0.1, "softplus", "none", 2),
]
DTYPES = (torch.float32, torch.bfloat16)
PLANS = (together, apart)
PAIRS = [(PLANS[(i + j) % 2], case, dtype) for i, case in enumerate(CASES) for j, dtype in enumerate(DTYPES)]
PAIRS.append((ieee, CASES[2], torch.float32))


@pytest.mark.parametrize(("change", "case", "dtype"), PAIRS)
def test_pair_equals_reference(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], case: tuple[Any, ...], dtype: torch.dtype
) -> None:
    engine = engine_of(monkeypatch)
    change(monkeypatch)
    caches = (conv_plan.pair_product, conv_plan.weight_product)
    for cached in caches:
        cached.cache_clear()
    field, maps = field_of(case, dtype)
    assert_blocks_equal(field, fused(field, engine), maps)
    if case[-2] == "batch":  # whose statistics are fixed then
        assert_blocks_equal(field.eval(), fused(field, engine), maps)
    for cached in caches:
        cached.cache_clear()


def test_solution_equals_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of whose slopes some are not wanted, and whose points are combinations.
    engine = engine_of(monkeypatch)
    field, (_, x) = field_of((2, 3, 2, 4, 2, 0.1, "tanh", "layer", 1), torch.bfloat16)
    block = reference.SOBlock(field, solver="midpoint", t1=0.8, steps=1)
    assert_blocks_equal(block, fused(block, engine), x)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(monkeypatch)
    field, maps = field_of((3, 8, 1, 2, 3, 0.3, nn.Tanh, "group", 2), torch.float32)
    assert_blocks_equal(field, fused(field, engine), maps, autocast=torch.bfloat16)


# README.md of the Triton operators has these, forward and backward: launches, and the maps that they move.
TRAFFIC = {
    ("none", False): ([2, 2], [4, 6]),
    ("none", True): ([1, 6], [4, 14]),
    ("layer", False): ([6, 12], [12, 22]),
    ("layer", True): ([7, 16], [10, 28]),
}


@pytest.mark.parametrize(("norm", "fused_convolutions"), TRAFFIC)
def test_traffic(monkeypatch: pytest.MonkeyPatch, norm: str, fused_convolutions: bool) -> None:
    engine = engine_of(monkeypatch, fused_convolutions)
    launches, moved, backward = [0, 0], [0.0, 0.0], 0
    field = fused(reference.SkewPair(8, 8, norm=norm), engine)
    y, z = (x.requires_grad_() for x in pair_of_maps(field, 2, 3, 2))

    def counted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launches[backward] += 1
        moved[backward] += kernels.maps_moved(arguments, y)

    for module in (passes, launch):
        monkeypatch.setattr(module, "launch", counted)
    dy, dz = field(y, z)
    backward = 1
    (dy.sum() + dz.sum()).backward()
    assert (launches, moved) == TRAFFIC[norm, fused_convolutions]
