"""The staged engine on a device that is not the CPU: no PyTorch operation may meet tensors of two devices.

The meta device stands for the card: its tensors have no memory, and mixing them with the CPU's is refused as on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import FAMILIES, case_of, make_branch
from torch import Tensor, nn

import fastode
from fastode.dispatch import choice
from fastode.native import operators
from fastode.nn import SkewPair, SOBlock
from fastode.ops import engine


@pytest.fixture(autouse=True)
def _meta_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.load(announce=False) is None
    monkeypatch.setattr(engine, "cannot_take", lambda call: "")


def check_step(block: nn.Module, *shapes: tuple[int, ...]) -> None:
    """A training step of the block; everything it leaves is on the device."""
    block.to("meta").engine = "staged"
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    with choice.recording() as engines:
        outputs = block(*inputs)
    assert engines[block] == "staged"
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    left = [*outputs, *(x.grad for x in inputs), *(p.grad for p in block.parameters()), *block.buffers()]
    assert {t.device.type for t in left} == {"meta"}


@pytest.mark.parametrize("norm", ["batch", "batch_cumulative", "batch_eval", "instance_running", "group", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_stays_on_the_device(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, channels=8, dtype=torch.float32, theta=0.5, steps=2)
    block = FAMILIES[family](fastode.nn, make_branch(case), case).train(norm != "batch_eval")
    check_step(block, (4, 8, 5, 3))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_step_of_the_skew_blocks_stays_on_the_device(norm: str) -> None:
    check_step(SkewPair(4, 8, stride=2, norm=norm), (2, 8, 4, 4), (2, 4, 8, 8))
    check_step(SOBlock(SkewPair(4, 8, norm=norm), solver="rk4"), (2, 4, 8, 8))
