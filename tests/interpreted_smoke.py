"""The table of kernels of `benchmarks.gpu` without a card: test_triton.py runs this in a process that interprets.

Every row is run on Triton's operators with the launches written down and not made: together they must be all kernels.
One row at a small shape is launched for good, and judged.
"""

from __future__ import annotations

from typing import Any

import interpreted_blocks
import interpreting  # before any kernel is made
import pytest
import torch

from benchmarks import contenders, gpu_rows, inside, workloads
from fastode import reference
from fastode.testing import sample_input

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _triton_operators() -> None:
    interpreting.use_operators()


def launched(row: gpu_rows.Row, engine: str) -> set[str]:
    """The names of the kernels that a row's forward and backward would launch."""
    found: set[str] = set()

    def keeping(real: Any) -> Any:
        return lambda kernel, programs, *arguments, **constants: found.add(kernel.__name__)

    block, few, _ = gpu_rows.ready(row, engine, "train", CPU, gpu_rows.SANITIZED_SAMPLES)
    module, own = contenders.fused(engine).make(block, few)
    with inside.launches_replaced(keeping):
        for mode in ("train", "forward"):
            workloads.work(module, own, mode).run()
    return found


def test_the_rows_launch_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    for fused_convolutions in (False, True):
        engine = interpreted_blocks.engine_of(monkeypatch, fused_convolutions)
        for row in gpu_rows.TABLE:
            found |= launched(row, engine)
    assert found == inside.kernel_names() and len(found) > 15


def test_a_row_is_launched_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> torch.nn.Module:
        return reference.ResBlock(reference.PreActBranch(4, norm="layer", activation="tanh"))

    tiny = workloads.Workload("res", "", "4@3", build, lambda device: (sample_input(2, 4, 3, 3),))
    monkeypatch.setattr(gpu_rows, "workload", lambda row: tiny)
    (result,) = gpu_rows.judge(f"{gpu_rows.TABLE[0].name} | staged", CPU)
    assert result["ok"] and 0 <= result["worst"] <= 1
    assert {"value_set_kernel", "cotangent_set_kernel"} <= set(result["kernels"])
    assert gpu_rows.line(result).endswith("s") and "equal" in gpu_rows.line(result)
