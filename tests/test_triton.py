"""The Triton engine without a card: its operators interpreted, its kernels compiled, its launches counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_operators
import torch

from benchmarks import kernels
from fastode.native import cuda, operators
from fastode.ops.triton import launch, passes
from fastode.testing import sample_input

CASES = test_operators.CASES
METHODS = sorted(name for name in vars(test_operators.TestOperators) if name.startswith("test_"))
HERE = Path(__file__).parent
SOURCE = HERE.parent / "csrc" / "ops.cpp"
# In processes of their own, because one that interprets cannot compile.
INTERPRETED = {"operators": ("operators",), "blocks": ("blocks", "convolutions", "pairs", "smoke")}
GROUP, BATCH, NONE = kernels.DEFAULTS


@pytest.mark.parametrize("names", INTERPRETED.values(), ids=INTERPRETED)
def test_interpreted(names: tuple[str, ...]) -> None:
    files = [str(HERE / f"interpreted_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [GROUP, BATCH], ids=["group", "batch"])
def test_compiles_for_hopper_without_spills(maps: kernels.Maps, dtype: torch.dtype) -> None:
    # The others of `make kernels` differ from these in sizes only.
    rows = [
        kernels.compile_offline(*each)
        for each in kernels.launches([maps], [dtype], [90])
        if "silu" in each[1] and "two" not in each[1]
    ]
    assert {row.kernel.split("_")[0] for row in rows} >= {"value", "cotangent", "tangent", "second"}
    assert [row for row in rows if row.spills or not row.registers] == []
    # Maps are read and written 16 bytes at a time.
    assert [row for row in rows if row.widest < 128 and not row.kernel.startswith("dots_finish")] == []


# The table of README.md: launches of each operator for GroupNorm in one sweep of a program, BatchNorm, and no norm.
LAUNCHES = {
    "norm_act": (1, 3, 1),
    "norm_act of two terms": (1, 3, 1),
    "norm_act again": (1, 1, 1),
    "norm_act_vjp": (1, 3, 1),
    "norm_act_vjp, parameters": (2, 3, 1),
    "norm_act_vjp of two addends": (2, 3, 1),
    "norm_act_dual": (1, 3, 1),
    "norm_act_second": (2, 3, 1),
    "norm_act_second of two addends": (2, 3, 1),
    "combine": (1, 1, 1),
    "combine_pair": (1, 1, 1),
    "dots": (2, 2, 2),
}


@pytest.mark.parametrize("operator", LAUNCHES)
def test_launches(operator: str) -> None:
    counts = []
    for maps in (GROUP, BATCH, NONE):
        with kernels.recording() as recorded:
            kernels.operators(maps, torch.bfloat16, kernels.RELU)[operator]()
        counts.append(len(recorded))
    assert tuple(counts) == LAUNCHES[operator]


def test_schemas_are_those_of_the_library() -> None:
    assert operators.load(announce=False) is None
    found = {str(torch._C.parse_schema(f"fastode::{schema}")) for schema in cuda.schemas(SOURCE)}
    names = {schema.split("(")[0] for schema in found if "::resident_" not in schema}
    assert names == {f"fastode::{f.__name__}" for f in passes.OPERATORS} | {"fastode::move_running"}  # of CPUs alone
    assert found == {str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastode::")}


def test_without_a_card_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "_reason", None)
    assert cuda.no_kernels() == "the operators were not loaded"
    cuda.register()
    assert cuda.no_kernels() == cuda.why_not() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert cuda.why_not() == "Triton is not installed"


class OnCard:
    """The operators, called with maps, statistics and parameters moved to a device, and their results moved back."""

    def __init__(self, device: str, learned: bool) -> None:
        self.device, self.learned = device, learned

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.fastode, name)
        names = [argument.name for argument in operator.default._schema.arguments]

        def moved(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [moved(each) for each in value]
            return value.to(self.device) if isinstance(value, torch.Tensor) else value

        def call(*arguments: Any) -> Any:
            pairs = zip(names, arguments, strict=True)
            result = operator(*(v if n == "coefs" and not self.learned else moved(v) for n, v in pairs))
            return result.cpu() if isinstance(result, torch.Tensor) else tuple(each.cpu() for each in result)

        return call


@pytest.fixture
def _registered() -> None:
    assert operators.load(announce=False) is None
    cuda.register()
    assert cuda.no_kernels() == ""


@pytest.mark.gpu
@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("learned", [False, True], ids=["constants", "learned"])
@pytest.mark.parametrize("layout", test_operators.FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_operators_on_the_card(monkeypatch: pytest.MonkeyPatch, method: str, layout: str, learned: bool) -> None:
    monkeypatch.setattr(test_operators.Sample, "layout", layout)
    half = [case | {"dtype": torch.float16} for case in CASES if case["dtype"] == torch.bfloat16]
    for case in CASES + half:
        getattr(test_operators.TestOperators(), method)(OnCard("cuda", learned), case)


@pytest.mark.gpu
@pytest.mark.usefixtures("_registered")
def test_operators_can_be_captured() -> None:
    x = sample_input(4, 16, 8, 8, dtype=torch.bfloat16, layout="channels_last").cuda()
    codes, two = (2, 1, 1e-5, 1, 0.0, 0.0), torch.tensor([0.5, 2.0], dtype=torch.float64)

    def run() -> tuple[torch.Tensor, ...]:
        u, a, stats = torch.ops.fastode.norm_act([x, x], two, None, None, None, *codes)
        return a, torch.ops.fastode.norm_act_vjp(u, a, stats, None, None, [x], two, False, *codes)[0]

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(-0.75)
    graph.replay()
    for replayed, direct in zip(captured, run(), strict=True):
        assert torch.equal(replayed, direct)


def test_coefficients_of_float64_maps_are_filled_in_where_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture refuses a copy from the host's memory."""
    copies: list[Any] = []
    coefs: Any = SimpleNamespace(is_cpu=True, tolist=lambda: [0.5, 1 / 3], to=copies.append)
    card = torch.device("cuda")
    x: Any = SimpleNamespace(dtype=torch.float64, is_cpu=False, device=card, new_full=torch.zeros(1).new_full)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        found, loaded = launch.coefficients(coefs, x)
        assert loaded and copies == ([] if capturing else [card])
        if capturing:
            assert torch.equal(found, torch.tensor([0.5, 1 / 3], dtype=torch.float64))
