"""torch.jit.trace of fused blocks records what the reference's trace has, gradients too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import functional, nets, reference
from fastode.dispatch import choice
from fastode.dispatch.known import kept
from fastode.testing import sample_input

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def branch(channels: int = 8) -> nn.Module:
    return reference.PreActBranch(channels, norm="batch")


def field() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 8), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1))


def chain() -> nn.Module:
    layers = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), reference.ResBlock(branch())
    return reference.Chain(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "SSP3": lambda: reference.SSP3(branch()),
    "Ark": lambda: reference.Ark(branch()),
    "ResBlock": lambda: reference.ResBlock(branch()),
    "shortcut": lambda: reference.ResBlock(branch(), shortcut=nn.Conv2d(8, 8, 1), post_activation=nn.ReLU()),
    "Chain": chain,
    "ODEBlock": lambda: reference.ODEBlock(field(), solver="rk4", steps=2),
    "adaptive ODEBlock": lambda: reference.ODEBlock(field(), solver="dopri5"),
    "RevSequence": lambda: reference.RevSequence(reference.RevBlock(branch(4), branch(4))),
}


def gradients(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    block.zero_grad()
    given = x.clone().requires_grad_()
    call(given).square().sum().backward()
    return [given.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("engine", ["auto", "staged"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_trace_of_a_fused_block_has_its_gradients(name: str, training: bool, engine: str) -> None:
    if engine != "auto" and name in ("Chain", "shortcut", "RevSequence", "ODEBlock", "adaptive ODEBlock"):
        engine = "reference" if name == "RevSequence" else "resident"
    torch.manual_seed(0)
    plain = BLOCKS[name]().train(training)
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    x = sample_input(2, 8, 6, 6)
    for _ in range(2):  # so that the fused one knows the call
        plain(x), fused(x)
    traces = [torch.jit.trace(block, x, check_trace=False) for block in (plain, fused)]
    assert "PythonOp" not in str(traces[1].inlined_graph) and "fastode::" not in str(traces[1].inlined_graph)
    other = sample_input(2, 8, 6, 6, seed=1)
    wanted, found = (gradients(b, t, other) for b, t in zip((plain, fused), traces, strict=True))
    assert all(grad is not None for grad in wanted)
    torch.testing.assert_close(found, wanted)


def test_calls_after_a_trace_run_fused_by_what_was_known() -> None:
    torch.manual_seed(0)
    block = fastode.nn.IESkip(branch())
    block.engine = "staged"
    fused = nn.Sequential(block, fastode.nn.SSP2(branch())).eval()
    x = sample_input(2, 8, 6, 6)
    fused(x)
    before = [kept(part.branch) for part in fused]
    answers = [dict(found._answers) for found in before if found is not None]
    torch.jit.trace(fused[1], x, check_trace=False)
    assert [kept(part.branch) for part in fused] == before
    assert [dict(found._answers) for found in before if found is not None] == answers
    with choice.recording() as used:
        fused(x)
    assert used[block] == "staged"


def test_functions_are_traced_as_the_reference() -> None:
    f, x = branch().eval().requires_grad_(False), sample_input(2, 8, 6, 6)
    functional.shu_osher(x, f, fastode.tableau.SSP2)
    trace = torch.jit.trace(lambda x: functional.shu_osher(x, f, fastode.tableau.SSP2), x, check_trace=False)
    assert trace(x.requires_grad_()).requires_grad and "fastode::" not in str(trace.inlined_graph)


def test_a_traced_network_has_all_gradients() -> None:
    torch.manual_seed(0)
    network = nets.sspnet("ssp3", n=1, width=8).eval()
    x = torch.randn(2, 3, 32, 32)
    fastode.fuse(network)
    network(x)
    torch.jit.trace(network, x, check_trace=False)(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
