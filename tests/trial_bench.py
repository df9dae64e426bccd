"""Trials on the CPU, with times that are given: what the tests of the choice of an engine share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fastode
from fastode import reference
from fastode.dispatch import choice, decisions, known, trial
from fastode.dispatch.decisions import Decision
from fastode.native import operators


class Bench:
    """Trials on the CPU: the times they find are given, and those that were made are written down."""

    def __init__(self) -> None:
        self.seconds = {"resident": 0.001, "staged": 0.002, "reference": 0.003}
        self.trials: list[str] = []

    @property
    def file(self) -> dict[str, Any]:
        return json.loads(decisions.path().read_text())

    @property
    def decisions(self) -> dict[str, Any]:
        (entries,) = self.file.values()
        return entries

    def forget(self) -> None:
        """As a new process would start."""
        known.forget()
        decisions._memory.clear()
        decisions._told.clear()


@pytest.fixture(name="bench")
def trials_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    assert operators.load(announce=False) is None
    found = Bench()
    real_try = trial._try
    running: list[str] = []

    def tried(block: nn.Module, names: Any, inputs: Any, mode: str, lower: Any) -> Decision:
        found.trials.append(mode)
        running[:] = names
        return real_try(block, names, inputs, mode, lower)

    def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
        turns = [0]

        def seconds(run: Callable[[], object]) -> float:
            name = running[turns[0] % len(running)]
            turns[0] += 1
            run()
            return found.seconds[name]

        return seconds

    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTODE_TUNE", raising=False)
    monkeypatch.setattr(trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(trial, "_try", tried)
    monkeypatch.setattr(trial, "_clock", clock)
    found.forget()
    yield found
    found.forget()


def block(kind: str = "SSP2", channels: int = 4, norm: str = "layer", **options: Any) -> nn.Module:
    torch.manual_seed(3)
    made = getattr(reference, kind)(reference.PreActBranch(channels, norm=norm, activation="tanh"), **options)
    fastode.fuse(made)
    return made


def used(module: nn.Module, *inputs: Tensor) -> str:
    with choice.recording() as engines:
        module(*inputs)
    return engines[module]


def traced(module: nn.Module, x: Tensor) -> tuple[Tensor, set[str]]:
    """The result of a compiled forward pass, and the engine whose operators its graph has; none for the reference's."""
    names: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.update(node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    y = torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    torch.compiler.reset()
    ours = {name for name in names if name.startswith("fastode::")}
    return y.detach(), {"resident" if name.startswith("fastode::resident_") else "staged" for name in ours}


@contextmanager
def tf32_forbidden() -> Iterator[None]:
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
