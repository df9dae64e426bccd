"""The fused convolutions in Triton's interpreter: what test_triton.py runs in a process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import interpreting  # noqa: F401  (before any kernel is made)
import pytest
import torch
from block_cases import name_of
from convolution_cases import CASES, CHECKS
from pairwise import Case

from fastode.ops.triton import conv_plan, convolution


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_pair(case: Case, check: str) -> None:
    CHECKS[check](case)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and column blocks to a sample, several steps of one tap, several chunks: as real maps have."""
    monkeypatch.setattr(conv_plan, "PIXELS", 16)
    monkeypatch.setattr(conv_plan, "CHANNELS", 16)
    monkeypatch.setattr(conv_plan, "STEP_BYTES", 64)
    monkeypatch.setattr(conv_plan, "SET_ACCUMULATORS", 1)
    monkeypatch.setattr(conv_plan, "WEIGHT_ROWS", 32)
    monkeypatch.setattr(conv_plan, "WEIGHT_PIXELS", 16)


def few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of several blocks, the last of them shorter, and blocks that do not divide a sample."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(conv_plan, "WEIGHT_PROGRAMS", 6)
    monkeypatch.setattr(conv_plan, "PIXELS", 32)


def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 that is not to be rounded: shorter steps, of which several make one tap, and shorter chunks."""
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    assert not convolution.on_tensor_cores(torch.float32)


# An interpreted program takes as long as it takes steps.
SEVERAL = [c for c in CASES if c["size"] == (7, 9) and c["inputs"] * c["outputs"] * c["kernel"][0] < 200]
OTHERS = [(change, case) for i, case in enumerate(SEVERAL) for change in ((small_blocks, few_chunks)[i % 2],)]
OTHERS += [(ieee, case) for case in CASES if case["dtype"] == torch.float32 and case["inputs"] == 21]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("change", "case"), OTHERS, ids=[f"{change.__name__}-{name_of(c)}" for change, c in OTHERS])
def test_other_plans(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], case: Case, check: str) -> None:
    change(monkeypatch)
    conv_plan.product.cache_clear()
    conv_plan.weight_product.cache_clear()
    CHECKS[check](case)
    conv_plan.product.cache_clear()
    conv_plan.weight_product.cache_clear()
