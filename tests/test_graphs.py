"""`fastode.graphed`: what it refuses, and what a replay does; on the CPU with a stand-in that calls instead."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import nets, reference
from fastode.fusion import graphs
from fastode.native import operators
from fastode.testing import compare_tensors, sample_input

HERE = Path(__file__).resolve().parent


def network(norm: str = "batch", **options: Any) -> nn.Sequential:
    torch.manual_seed(2)
    make = reference.PreActBranch
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4, **options),
        reference.IESkip(make(4, norm=norm)),
        reference.SSP3(make(4, norm=norm)),
    )
    fastode.fuse(model)
    return model


class Calls:
    """A capture on the CPU: a replay calls again and writes into the same memory. Capturing itself moves nothing."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, run: Callable[[], Sequence[Any]], pool: Any) -> tuple[list[Any], Callable[[], object]]:
        self.captured += 1
        model = run.__self__.model  # type: ignore[attr-defined]
        before = [buffer.clone() for buffer in model.buffers()]
        results = [None if each is None else each.detach().clone() for each in run()]
        with torch.no_grad():
            for buffer, was in zip(model.buffers(), before, strict=True):
                buffer.data.copy_(was)

        grad, lower = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

        def replay() -> None:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=lower):
                again = run()
            for static, made in zip(results, again, strict=True):
                if static is not None:
                    static.copy_(made.detach())

        return results, replay


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    assert operators.load(announce=False) is None
    found = Calls()
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "capture", found.capture)
    monkeypatch.setattr(graphs, "pool_handle", lambda: None)
    return found


def refused(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def image(batch: int = 4, seed: int = 0) -> Tensor:
    return sample_input(batch, 3, 6, 5, seed=seed)


def test_what_cannot_be_captured_is_refused(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(TypeError, "model must be an nn.Module, got an object of type function"):
        fastode.graphed(lambda x: x, image())  # type: ignore[arg-type]
    for example in (None, (), (image(), 3), [image()]):
        with pytest.raises(TypeError, match=r"^example must be a tensor or a tuple of tensors, got .+$"):
            fastode.graphed(network(), example)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model must not be compiled: .+$"):
        fastode.graphed(torch.compile(network(), backend="eager"), image())  # type: ignore[arg-type]
    hooked = network()
    hooked[2].branch[0].register_forward_hook(lambda *_: None)
    with refused(ValueError, "model must not have hooks, which a replay does not call, got some on 2.branch.0"):
        fastode.graphed(hooked, image())
    apart = network()
    apart[3].to("meta")
    name = next(name for name, p in apart.named_parameters() if p.device.type == "meta")
    with refused(ValueError, f"model and example must be on one device, got parameter {name} on meta"):
        fastode.graphed(apart, image())
    assert calls.captured == 0
    monkeypatch.undo()
    with refused(ValueError, "example must be on a CUDA device, got cpu"):
        fastode.graphed(network(), image())


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"sum": x.sum()}


def test_a_model_that_returns_something_else_is_refused(calls: Calls) -> None:
    with refused(TypeError, "model must return a tensor or a tuple of tensors, got an object of type dict"):
        fastode.graphed(Sum(), image())


def test_norms_with_a_cumulative_average_are_for_fused_blocks(calls: Calls) -> None:
    message = "model must not have norms with momentum=None in training, whose next factor a replay does not know, got "
    model = network(momentum=None)
    before = copy.deepcopy(model.state_dict())
    with refused(ValueError, f"{message}1"):
        fastode.graphed(model, image())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    fastode.graphed(model.eval(), image())
    inner = network()
    for norm in inner[3].modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    fastode.graphed(inner, image())
    inner[3].engine = "reference"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}3\\."):
        fastode.graphed(inner, image())


def test_a_capture_that_the_card_refuses_has_its_reason(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any, pool: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "capture", fails)
    message = "the model cannot be captured: CUDA error: operation not permitted when stream is capturing"
    with refused(RuntimeError, message):
        fastode.graphed(network(), image())


def test_a_call_that_was_not_captured_is_refused(calls: Calls) -> None:
    model = network()
    run = fastode.graphed(model, image())
    with refused(TypeError, "inputs must be 1 tensors, got 2"):
        run(image(), image())
    with refused(TypeError, "input 0 must be a tensor, got 3"):
        run(3)
    was = "input 0 must be torch.float32 of shape (4, 3, 6, 5) on cpu, as it was captured, got torch."
    # A batch of one would be broadcast by a copy.
    with refused(ValueError, f"{was}float32 of shape (1, 3, 6, 5) on cpu"):
        run(image(1))
    with refused(ValueError, f"{was}float64 of shape (4, 3, 6, 5) on cpu"):
        run(image().double())
    with refused(ValueError, f"{was}float32 of shape (4, 3, 6, 5) on meta"):
        run(image().to("meta"))
    with refused(ValueError, "input 0 must not require a gradient, because the example did not"):
        run(image().requires_grad_())
    model[3].eval()
    with refused(ValueError, "model must be in the mode (train or eval) in which it was captured"):
        run(image())
    model.train()
    model[0].weight.data = model[0].weight.data.clone()
    with refused(ValueError, "model must have its parameters and buffers where they were when it was captured"):
        run(image())


def test_gradients_that_were_not_captured_are_refused(calls: Calls) -> None:
    model = network().eval()
    with torch.no_grad():
        run = fastode.graphed(model, image())
    assert calls.captured == 1
    count = len(list(model.parameters()))
    with refused(ValueError, f"model must not require gradients that were not captured, got {count} that it does"):
        run(image())
    with torch.no_grad():
        assert torch.equal(run(image()), model(image()))
    model.requires_grad_(False)
    run(image())
    model[0].bias.requires_grad_()
    with refused(ValueError, "model must not require gradients that were not captured, got 1 that it does"):
        run(image())


def test_backward_after_another_call_is_refused(calls: Calls) -> None:
    run = fastode.graphed(network(), image())
    first, second = run(image()), run(image(seed=1))
    with refused(RuntimeError, "backward must come before the graphed model is called again, got it after"):
        first.sum().backward()
    second.sum().backward()
    y = run(image()).sum()
    with refused(RuntimeError, "create_graph must be False: a graphed model has no gradients of gradients"):
        torch.autograd.grad(y, next(run.model.parameters()), create_graph=True)


def step(call: Callable[..., Any], x: Tensor) -> Tensor:
    y = call(x)
    y.square().sum().backward()
    return y.detach()


@pytest.mark.parametrize("wants_input", [False, True])
def test_replays_are_calls(calls: Calls, wants_input: bool) -> None:
    model = network()
    plain = copy.deepcopy(model)
    random = torch.get_rng_state()
    run = fastode.graphed(model, image().requires_grad_(wants_input))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, u) for t, u in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, plain)]
    kept = []
    for seed in range(4):
        x = image(seed=seed).requires_grad_(wants_input)
        twin = x.detach().clone().requires_grad_(wants_input)
        kept.append((step(run, x), step(plain, twin)))
        assert not wants_input or torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]
        if seed % 2:  # gradients of two batches add up
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert calls.captured == 2
    assert all(torch.equal(a, b) for a, b in kept)
    for (name, t), u in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(t, u), name


def test_only_what_is_wanted_is_captured(calls: Calls) -> None:
    model = network().eval().requires_grad_(False)
    run = fastode.graphed(model, image().requires_grad_())
    x = image(seed=3).requires_grad_()
    run(x).sum().backward()
    twin = image(seed=3).requires_grad_()
    model(twin).sum().backward()
    assert calls.captured == 2 and torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())


def test_several_inputs_and_outputs(calls: Calls) -> None:
    pair = fastode.nn.SkewPair(4, 4)
    y, z = sample_input(2, 4, 4, 4), sample_input(2, 4, 4, 4, seed=1)
    run = fastode.graphed(pair, (y, z))
    for a, b in zip(run(z, y), pair(z, y), strict=True):
        assert torch.equal(a, b)
    run(y, z)[1].sum().backward()  # the other output has no cotangent
    found = pair.weight.grad.clone()
    pair.weight.grad = None
    pair(y, z)[1].sum().backward()
    assert torch.equal(found, pair.weight.grad)


def test_autocast_is_captured(calls: Calls) -> None:
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        run = fastode.graphed(model, image())
        expected = copy.deepcopy(model)(image())
    assert torch.equal(run(image()), expected)


def test_nothing_waits_for_the_card() -> None:
    """In a process of its own, where Triton's operators take meta tensors, which nothing can read."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "unread_blocks.py")]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["reference", "staged", "fused_convolution"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_replays_on_the_card_are_calls(norm: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = network(norm).cuda()
    for block in (model[2], model[3]):
        block.engine = engine
    plain = copy.deepcopy(model)
    run = fastode.graphed(model, image().cuda().requires_grad_())
    for seed in range(3):
        x = image(seed=seed).cuda().requires_grad_()
        twin = x.detach().clone().requires_grad_()
        assert torch.equal(step(run, x), step(plain, twin))
        assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    for (name, t), u in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(t, u), name


def named(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """The logits, the gradients, and the buffers after a step."""
    found = {"logits": logits} | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


@pytest.mark.gpu
@pytest.mark.parametrize("make", [nets.ie_resnet18, nets.sspnet], ids=["ie_resnet18", "sspnet"])
def test_replays_of_whole_networks_are_calls(make: Callable[[], nn.Module]) -> None:
    model = make().cuda()
    exact = copy.deepcopy(model).double()
    fastode.fuse(model)
    plain = copy.deepcopy(model)
    run = fastode.graphed(model, torch.randn(8, 3, 32, 32, device="cuda"))
    for _ in range(2):  # the second replay finds other images than the capture did
        x = torch.randn(8, 3, 32, 32, device="cuda")
        for each in (model, plain, exact):
            each.zero_grad(set_to_none=True)
        found, expected = named(model, step(run, x)), named(plain, step(plain, x))
        comparison = compare_tensors(found, named(exact, step(exact, x.double())), [expected], 8 * 32 * 32)
        assert comparison.ok, comparison.describe()
