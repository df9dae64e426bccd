"""The reference is right, and alive, where PyTorch's norms on a CPU are not: docs/pytorch-faults.md."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import nets, reference
from fastode.reference import faults
from fastode.testing import compare_tensors, sample_input

C = 6
BLOCKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "res": reference.ResBlock,
    "ie": lambda branch: reference.IESkip(branch, steps=2, theta=0.5),
    "ie-detached": lambda branch: reference.IESkip(branch, detach=True),
    "ssp3": reference.SSP3,
    "ark": reference.Ark,
}


class Opaque(nn.Module):
    """A branch of the user's own, which calls norms in its forward."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def branch(norm: Callable[[int], nn.Module], opaque: bool = False) -> nn.Module:
    """Two units and a norm at the end, which is given the cotangent as it comes."""
    layers = reference.PreActBranch(C, norm=norm, activation="tanh", bias=False)
    module = nn.Sequential(*layers, norm(C)).double()
    for layer in module:
        if getattr(layer, "weight", None) is not None and not isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight)
    return Opaque(module) if opaque else module


def gradients(block: nn.Module, inputs: tuple[Tensor, ...], cotangent: Tensor) -> dict[str, Tensor]:
    """The output and every gradient that is asked for, by name."""
    outputs = block(*inputs)
    y = outputs if isinstance(outputs, Tensor) else torch.cat([t.flatten() for t in outputs])
    named = {f"input {i}": x for i, x in enumerate(inputs)} | dict(block.named_parameters())
    asked = {name: t for name, t in named.items() if t.requires_grad}
    found = torch.autograd.grad(y, list(asked.values()), cotangent, materialize_grads=True)
    # Names of one kind: what is zero in exact arithmetic is judged by the size of the others.
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(asked, found, strict=True)}


def assert_right(block: nn.Module, inputs: tuple[Tensor, ...], cotangent: Tensor) -> None:
    """Hold the block to itself on contiguous float64 maps that all need a gradient, where PyTorch is right."""
    plain = copy.deepcopy(block).double().to(memory_format=torch.contiguous_format).requires_grad_()
    fastode.unfuse(plain)
    maps = tuple(x.detach().double().contiguous().requires_grad_() for x in inputs)
    found, truth = gradients(block, inputs, cotangent), gradients(plain, maps, cotangent.double().contiguous())
    comparison = compare_tensors(found, {name: truth[name] for name in found}, [], 9 * C * 30)
    assert comparison.ok, comparison.describe()


def in_process(*cases: str) -> tuple[list[str], str]:
    """Run cases of `CRASHES` in a process, so that a crash is a failed test: those that end well, and what it says."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, __file__, *cases], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout.split(), f"{done.returncode}: {done.stderr[-2000:]}"


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance_bare": nn.InstanceNorm2d,
    "instance_running": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "batch": nn.BatchNorm2d,
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    # What the backward of a view makes of channels_last in a batch of one: its strides fit both formats.
    "viewed": lambda t: t.contiguous(memory_format=torch.channels_last).view(t.shape),
    # A sequence of pixels first, as an attention layer wants it.
    "pixels_first": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 5, 4), (2, 5, 4), (2, 1, 4), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["res", "ie", "ark"])
def test_blocks_around_instance_and_batch_norm(name: str, norm: str, size: tuple[int, int, int], layout: str) -> None:
    batch, height, width = size
    block = BLOCKS[name](branch(NORMS[norm], opaque=size == (2, 1, 4))).double()
    x, cotangent = (sample_input(batch, C, height, width, dtype=torch.float64, seed=i) for i in (0, 1))
    for change in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        other = block.to(memory_format=torch.channels_last) if change is LAYOUTS["channels_last"] else block
        given = LAYOUTS["viewed"](x) if batch == 1 and change is LAYOUTS["channels_last"] else change(x)
        assert_right(other, (given.detach().requires_grad_(),), LAYOUTS[layout](cotangent))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_skew_pair_around_instance_and_batch_norm(norm: str, stride: int) -> None:
    field = reference.SkewPair(C, 4, stride=stride, activation="tanh", norm=NORMS[norm]).double()
    z = sample_input(1, C, 4, 6, dtype=torch.float64)
    y = sample_input(1, 4, 4 // stride, 6 // stride, dtype=torch.float64, seed=1)
    state = tuple(t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (y, z))
    assert_right(field, state, torch.randn(y.numel() + z.numel(), dtype=torch.float64))
    block = reference.SOBlock(field, solver="midpoint")
    assert_right(block, (state[1],), LAYOUTS["channels_last"](torch.randn_like(y)))


def test_a_shortcut_around_instance_norm() -> None:
    norm = NORMS["instance"]
    shortcut = nn.Sequential(nn.Conv2d(C, 4, 1, stride=2), norm(4))
    body = nn.Sequential(norm(C), nn.Conv2d(C, 4, 3, stride=2, padding=1), norm(4))
    block = reference.ResBlock(body, shortcut=shortcut).double().to(memory_format=torch.channels_last)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None  # a norm follows, so its gradient is rounding
    x, cotangent = sample_input(1, C, 4, 6, dtype=torch.float64), sample_input(1, 4, 2, 3, dtype=torch.float64, seed=1)
    change = LAYOUTS["channels_last"]
    assert_right(block, (change(x).requires_grad_(),), change(cotangent))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_twin_that_runs_as_the_reference(name: str) -> None:
    block = BLOCKS[name](branch(NORMS["instance"])).double().to(memory_format=torch.channels_last)
    fastode.fuse(block, engine="reference")
    change = LAYOUTS["channels_last"]
    x, cotangent = (change(sample_input(1, C, 5, 4, dtype=torch.float64, seed=i)) for i in (0, 1))
    assert_right(block, (x.requires_grad_(),), cotangent)


def test_gradients_of_gradients_and_transforms() -> None:
    block = BLOCKS["ie"](branch(NORMS["instance"])).double().to(memory_format=torch.channels_last)
    change = LAYOUTS["channels_last"]
    x, t = (change(sample_input(1, C, 3, 2, dtype=torch.float64, seed=i)) for i in (0, 1))
    residual = BLOCKS["res"](block.branch)
    assert torch.autograd.gradgradcheck(residual, x.requires_grad_(), fast_mode=True)
    with torch.no_grad():
        many = torch.func.vmap(block)(torch.stack([x, t]))
        for found, point in zip(many, (x, t), strict=True):
            torch.testing.assert_close(found, block(point))


def contiguous_norms() -> list[tuple[str, Tensor, Tensor]]:
    """The output and gradients of F.group_norm where PyTorch crashes, beside those of a contiguous input."""
    rows = []
    pixel = torch.empty_strided((2, C, 1, 1), (C, 1, C, C), dtype=torch.float64)  # in channels_last, by its strides
    inputs = {layout: LAYOUTS[layout](sample_input(2, C, 5, 4, dtype=torch.float64)) for layout in LAYOUTS}
    inputs["pixel"] = pixel.copy_(sample_input(2, C, 1, 1, dtype=torch.float64))
    for layout in ("channels_last", "contiguous", "pixel"):
        x = inputs[layout]
        weight, bias = (torch.randn(C, dtype=torch.float64).requires_grad_() for _ in range(2))
        with faults.repaired_norms():
            y = F.group_norm(x, 2, weight, bias)
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout != "contiguous")
        bars = torch.autograd.grad(y, [weight, bias], x)
        with torch.enable_grad():
            leaf = x.detach().contiguous().flatten(2).requires_grad_()
            z = F.group_norm(leaf, 2, weight, bias).view(x.shape)
            rows += [
                ("y", y, z),
                *zip(("weight", "bias"), bars, torch.autograd.grad(z, [weight, bias], x), strict=True),
            ]
    return rows


def group_norm_itself() -> None:
    for name, found, expected in contiguous_norms():
        torch.testing.assert_close(found, expected, msg=name)


def blocks_around_group_norm() -> None:
    for make in BLOCKS.values():
        for opaque in (False, True):
            for frozen in (False, True):
                block = make(branch(lambda c: nn.GroupNorm(2, c), opaque)).double()
                block.to(memory_format=torch.channels_last)
                for module in block.modules():
                    if isinstance(module, nn.Conv2d):
                        module.requires_grad_(not frozen)
                x, cotangent = (sample_input(2, C, 5, 4, dtype=torch.float64, seed=i) for i in (0, 1))
                # With frozen convolutions in channels_last even contiguous maps get there.
                for change in (LAYOUTS["channels_last"], LAYOUTS["contiguous"]):
                    assert_right(block, (change(x),), LAYOUTS["channels_last"](cotangent))


def skew_pair_on_images() -> None:
    for stride in (1, 2):
        for frozen in (False, True):
            field = reference.SkewPair(C, 8, stride=stride, activation="tanh").double()
            field.to(memory_format=torch.channels_last).weight.requires_grad_(not frozen)
            for solver in ("euler", "rk4"):
                x = LAYOUTS["channels_last"](sample_input(2, C, 4, 6, dtype=torch.float64))
                cotangent = sample_input(2, 8, 4 // stride, 6 // stride, dtype=torch.float64, seed=1)
                assert_right(reference.SOBlock(field, solver=solver), (x,), LAYOUTS["channels_last"](cotangent))


def a_training_step_of_sonet() -> None:
    losses = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = nets.sonet(width=8, solver="rk4").double().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(2):
            images = sample_input(2, 3, 8, 8, dtype=torch.float64, seed=step).contiguous(memory_format=layout)
            loss = F.cross_entropy(model(images), torch.tensor([1, 7]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10), losses


CRASHES = {f.__name__: f for f in (group_norm_itself, blocks_around_group_norm, skew_pair_on_images)}
CRASHES["a_training_step_of_sonet"] = a_training_step_of_sonet
LAST = {"crash": lambda: os.kill(os.getpid(), signal.SIGKILL)}


def test_alive_and_right() -> None:
    ended, said = in_process(*CRASHES, "crash")
    assert ended == list(CRASHES), f"{ended} ended well, then {said}"
    assert said.startswith(f"{-signal.SIGKILL}: "), said


@pytest.mark.parametrize(
    ("norm", "batch", "in_graph"), [("group", 1, True), ("layer", 2, True), ("batch", 2, True), ("batch", 2, False)]
)
def test_nothing_is_repaired_where_nothing_is_broken(
    norm: str, batch: int, in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise AssertionError("the mode costs time")

    monkeypatch.setattr(faults, "repaired_norms", refuse)
    module = reference.PreActBranch(C, norm=norm)
    x = sample_input(batch, C, 5, 4).requires_grad_(in_graph)
    for make in BLOCKS.values():
        make(module)(x).sum().backward()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "enable_grad", torch.no_grad)
        reference.SSP3(reference.PreActBranch(C, norm=nn.InstanceNorm2d))(x)
    with pytest.raises(AssertionError, match="the mode costs time"):
        reference.SSP3(reference.PreActBranch(C, norm=nn.InstanceNorm2d))(x)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        torch.manual_seed(0)
        (CRASHES | LAST)[case]()
        print(case, flush=True)
