"""Blocks on the meta device with Triton's operators, whose kernels are not launched: test_graphs.py runs this.

A meta tensor has no memory: whatever would wait for a card's result, or copy between host and card, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastode
from fastode.dispatch import choice
from fastode.dispatch.engines import ENGINES
from fastode.native import cuda, fake, operators
from fastode.ops import engine as engines_face
from fastode.ops.schemes.runge_kutta import stages

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "ops.cpp"
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
}


class OnOneDevice(TorchDispatchMode):
    """Refuses what CUDA does not capture: reading a result, and copies between the host and the card."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        given = [t for t in torch.utils._pytree.tree_leaves((arguments, keywords)) if isinstance(t, Tensor)]
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        onto = {t.device.type for t in given} == {"cpu"} and any(t.device.type == "meta" for t in made)
        back = any(t.device.type == "meta" for t in given) and any(t.device.type == "cpu" for t in made)
        # A number of the host may meet a map of the card: it becomes a kernel's argument.
        mixed = function is aten.copy_.default and len({t.device.type for t in given}) > 1
        on_card = any(t.device.type == "meta" for t in given)
        if onto or back or mixed or (on_card and function in WAITS):
            raise AssertionError(f"{function} waits for the card")
        return result


@pytest.fixture(scope="module", autouse=True)
def _triton_operators() -> None:
    fake.register = lambda: None  # these would answer for meta tensors, and Triton's operators shall
    cuda.define(SOURCE)
    cuda.implement("Meta")
    operators._state.path = SOURCE  # what says that the operators are there
    from fastode.ops.triton import launch

    launched.clear()
    launch.launch.__code__ = _launch.__code__  # in every module that has it by name
    launch.launch.__globals__["launched"] = launched


launched: list[Any] = []


def _launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    launched.append(kernel)


@pytest.fixture(autouse=True)
def _meta_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_face, "cannot_take", lambda call: "")
    for engine in ENGINES:
        monkeypatch.setattr(engine, "devices", ("meta", *engine.devices))
    launched.clear()


def branch(norm: str) -> nn.Sequential:
    units = []
    for _ in range(2):
        norms = {
            "batch": nn.BatchNorm2d(8),
            "cumulative": nn.BatchNorm2d(8, momentum=None),
            "group": nn.GroupNorm(2, 8),
            "instance": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        }
        units += [norms[norm], nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*units)


BLOCKS = {
    "ie": lambda f: fastode.nn.IESkip(f, 2, 0.1, theta=0.5),
    "detached": lambda f: fastode.nn.IESkip(f, 1, 0.1, detach=True),
    "ssp3": fastode.nn.SSP3,
    "ark": lambda f: fastode.nn.Ark(f, learn_a21=True),
    "residual": fastode.nn.ResBlock,
}


def step(block: nn.Module, engine: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """A training step."""
    block.to("meta", dtype).engine = engine
    inputs = [torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for shape in shapes]
    with OnOneDevice(), choice.recording() as engines:
        outputs = block(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert engines[block] == engine
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "cumulative", "group", "instance"])
@pytest.mark.parametrize("engine", ["staged", "fused_convolution"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_waits_for_nothing(kind: str, engine: str, norm: str, dtype: torch.dtype) -> None:
    block = BLOCKS[kind](branch(norm))
    step(block, engine, (4, 8, 5, 3), dtype=dtype)
    assert len(launched) > 5


@pytest.mark.parametrize("engine", ["staged", "fused_convolution"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_skew_block_waits_for_nothing(norm: str, engine: str) -> None:
    step(fastode.nn.SkewPair(4, 8, stride=2, norm=norm), engine, (2, 8, 4, 4), (2, 4, 8, 8))
    alone = len(launched)
    step(fastode.nn.SOBlock(fastode.nn.SkewPair(4, 8, norm=norm), solver="rk4"), engine, (2, 4, 8, 8))
    assert len(launched) > alone > 0


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(3).to(x.device),
    "copied from the host": lambda x: x.copy_(torch.zeros(x.shape)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    real = stages.tracked_statistics

    def reads(plan: Any, statistics: Any) -> Any:
        read(statistics[0])
        return real(plan, statistics)

    monkeypatch.setattr(stages, "tracked_statistics", reads)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        step(fastode.nn.SSP3(branch("batch")), "staged", (4, 8, 5, 3))
