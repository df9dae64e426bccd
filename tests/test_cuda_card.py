"""The CUDA programs on a card: on torch's stream, on each of several cards, in CUDA graphs; equal by the one rule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastode
from benchmarks import programs, workloads
from fastode import reference
from fastode.dispatch import choice
from fastode.native import cuda_library, operators
from fastode.ops.resident.engine import Resident
from fastode.testing import assert_blocks_equal, sample_input
from fastode.testing.compare import Mode

pytestmark = [pytest.mark.gpu, pytest.mark.nvcc]
CHANNELS, SIDE, BATCH = 16, 16, 5


def block(device: str, norm: str = "layer") -> nn.Module:
    """SSP2 over two units with a smooth activation: no kink decides whether it is equal."""
    branch = reference.PreActBranch(CHANNELS, norm=norm, activation="tanh")
    return reference.SSP2(branch).to(device, torch.bfloat16)


def fused(plain: nn.Module) -> nn.Module:
    """A fused copy, which runs on the programs or not at all."""
    twin = copy.deepcopy(plain)
    fastode.fuse(twin, engine=Resident.name)
    return twin


def image(device: str, seed: int = 0, batch: int = BATCH) -> Tensor:
    return sample_input(batch, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16, device=device, seed=seed)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the input's gradient of its sum of squares."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    y.float().square().sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert operators.load() is None
    assert cuda_library.why_not(0) == ""


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("mode", ["forward", "input_grad", "train"])
def test_a_block_equals_its_reference(mode: Mode, norm: str) -> None:
    plain, x = block("cuda", norm), image("cuda")
    with choice.recording() as engines:
        (other := fused(plain))(x)  # a copy of its own, for it changes running statistics
    assert engines[other] == Resident.name
    assert_blocks_equal(plain, fused(plain), x, mode=mode)


@pytest.mark.parametrize("mode", ["forward", "input_grad"])
def test_a_block_equals_its_reference_under_a_side_stream(mode: Mode) -> None:
    plain = block("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_blocks_equal(plain, fused(plain), image("cuda"), mode=mode)


def test_programs_run_on_torchs_stream_and_wait_for_what_is_there() -> None:
    """What the stream still computes when a block is called is its input; the default stream would not wait for it."""
    model, source = fused(block("cuda")).requires_grad_(False), image("cuda", seed=1)
    expected = gradient(model, source)
    late, busy = image("cuda", seed=2), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = (busy @ busy).tanh()
        late.copy_(source)
        found = gradient(model, late)
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_programs_run_on_the_card_of_their_tensors() -> None:
    """The last card, while the first one is the current one: another where there are several."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    plain = block(last)
    with torch.cuda.device(0):
        assert_blocks_equal(plain, fused(plain), image(last), mode="input_grad")
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("learning", [False, True])
def test_programs_are_captured_in_graphs(learning: bool, norm: str) -> None:
    """With batch norm in training a launch is a cooperative one."""
    model = fused(block("cuda", norm)).requires_grad_(learning)
    plain = copy.deepcopy(model)
    run = fastode.graphed(model, image("cuda").requires_grad_())
    for seed in range(3):
        found, expected = gradient(run, image("cuda", seed)), gradient(plain, image("cuda", seed))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if learning:
            assert p.grad is not None and q[1].grad is not None and torch.equal(p.grad, q[1].grad), name


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("mode", programs.MODES)
def test_a_call_is_as_many_launches_as_are_promised(mode: str, norm: str) -> None:
    run = workloads.work(fused(block("cuda", norm)), (image("cuda"),), mode).run
    run()  # what is made once is made
    assert not programs.count_is_wrong(programs.launched(run), mode)
