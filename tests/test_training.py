"""Whole networks trained side by side: fused and unfused stay together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import nets
from fastode.testing import sample_input
from fastode.testing.compare import moved

STEPS = 10
ENGINES = ("resident", "staged")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ie_resnet18": lambda: nets.ie_resnet18(steps=1, step_size=0.1, width=8),
    "ie_resnet18_batch": lambda: nets.ie_resnet18(steps=2, step_size=0.1, width=8, norm="batch"),
    "sspnet_ssp3": lambda: nets.sspnet("ssp3", n=1, width=8),
    "sspnet_adap": lambda: nets.sspnet("adap", n=1, width=8, norm="group"),
}


MOVES = 12  # runs of the reference on images that differ in their last digit


def losses(
    model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format, move: int | None = None
) -> list[Tensor]:
    """The losses of ten SGD steps with momentum on random images and labels; `move` moves the images' last digits."""
    model = model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    labels = torch.arange(8) % 10
    found = []
    for step in range(STEPS):
        images = sample_input(8, 3, 16, 16, dtype=dtype, seed=step).to(memory_format=memory_format)
        images = images if move is None else moved(images, STEPS * move + step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.detach().double())
    return found


def furthest(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs()) for a, b in zip(first, second, strict=True))


def fused_copy(model: nn.Module, engine: str) -> nn.Module:
    model = copy.deepcopy(model)
    report = fastode.fuse(model, engine=engine, example=sample_input(2, 3, 16, 16))
    assert report.fused > 0, str(report)
    assert all(row.engines == (engine,) for row in report.rows if row.is_fused)
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_in_float64(name: str, engine: str) -> None:
    model = NETWORKS[name]()
    expected = losses(copy.deepcopy(model), torch.float64, torch.contiguous_format)
    found = losses(fused_copy(model, engine), torch.float64, torch.contiguous_format)
    assert furthest(found, expected) <= 1e-9
    assert furthest(expected[:1] * (STEPS - 1), expected[1:]) > 1e-3, "the network did not train"


@functools.cache
def reference_in_float32(name: str) -> tuple[nn.Module, list[Tensor], float]:
    """An untrained network, its losses in float32, and how far those of as good a run are from them, at most."""
    model = NETWORKS[name]()
    expected = losses(copy.deepcopy(model), torch.float32, torch.contiguous_format)
    # One run says little: a value that rounding takes over a kink of ReLU moves all that comes after it.
    others = [losses(copy.deepcopy(model), torch.float32, torch.channels_last)]
    others += [losses(copy.deepcopy(model), torch.float32, torch.contiguous_format, move) for move in range(MOVES)]
    return model, expected, max(furthest(other, expected) for other in others)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_in_float32(name: str, engine: str) -> None:
    model, expected, apart = reference_in_float32(name)
    found = losses(fused_copy(model, engine), torch.float32, torch.contiguous_format)
    assert furthest(found, expected) <= 10 * apart


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_of_a_network_after_ten_steps(engine: str) -> None:
    model = nets.sspnet("ssp2", n=1, width=8)
    fused = fused_copy(model, engine)
    for network in (model, fused):
        losses(network, torch.float64, torch.contiguous_format)
    state = fused.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            # The same bound as the losses: both are sums over the same ten steps.
            assert float((state[name] - buffer).abs().max()) <= 1e-9 * float(buffer.abs().max()), name
        else:
            assert torch.equal(state[name], buffer), name
