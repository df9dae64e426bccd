"""Which engine is chosen: fused convolutions, and what a traced call takes; on the CPU, with times that are given."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trial_bench import Bench, block, traced, trials_on_the_cpu, used  # noqa: F401 (a fixture)

import fastode
from fastode import reference
from fastode.dispatch import decisions, trial
from fastode.dispatch.decisions import Decision
from fastode.dispatch.engines import BY_NAME
from fastode.native import cuda
from fastode.ops import function
from fastode.testing import compare_tensors, sample_input

RESIDENT, FUSED, STAGED = (BY_NAME[name] for name in ("resident", "fused_convolution", "staged"))
ROOT = Path(__file__).resolve().parent.parent


def code_of(graph: torch.fx.GraphModule) -> str:
    """The code of a graph and of the graphs inside it, which an autograd Function becomes."""
    return "".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))


def test_tracing_takes_what_is_known_and_makes_no_trial(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    unknown, engines = traced(module, x)
    assert engines == set() and bench.trials == []
    run = module(x)
    assert bench.trials == ["train"]
    known, engines = traced(module, x)
    assert engines == {"resident"} and bench.trials == ["train"]
    truth = copy.deepcopy(module).double()(x.double())
    for found in (unknown, known):
        comparison = compare_tensors({"y": found}, {"y": truth.detach()}, [{"y": run.detach()}], 36)
        assert comparison.ok, comparison.describe()


def test_tracing_takes_what_a_file_holds_whatever_the_batch(bench: Bench) -> None:
    module = block()
    for batch in (2, 3, 4):
        module(sample_input(batch, 4, 3, 3))
    bench.forget()
    torch.compiler.reset()
    graphs: list[str] = []
    compiled = torch.compile(module, backend=lambda g, _: graphs.append(code_of(g)) or g.forward, fullgraph=True)
    for batch in (2, 3, 4, 5):  # the second of them makes the batch a symbol
        compiled(sample_input(batch, 4, 3, 3))
    # For the last batch no file holds anything.
    assert ["resident_rk_forward" in code for code in graphs] == [True, True, True, False]
    assert len(bench.trials) == 3
    torch.compiler.reset()


def test_tracing_takes_the_second_best_that_is_equal_where_the_best_cannot_be_traced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(RESIDENT), "refuses", lambda self, call: "no" if torch.compiler.is_compiling() else "")
    module, x = block(), sample_input(2, 4, 3, 3)
    assert used(module, x) == "resident"
    ((key, entry),) = bench.decisions.items()
    traced = functools.partial(trial._against_traced, wanted=key, index=None, able=("staged", "reference"))
    assert traced("staged") == ""
    torch.compiler.reset()
    graphs: list[str] = []
    torch.compile(module, backend=lambda g, _: graphs.append(code_of(g)) or g.forward, fullgraph=True)(x)
    assert "fastode.norm_act" in graphs[0] and "resident" not in graphs[0]
    torch.compiler.reset()
    # Nothing that was not equal is taken, and nothing that was slower than the reference: that was not judged.
    for changes in (
        {"refused": {"staged": "was not equal"}},
        {"milliseconds": entry["milliseconds"] | {"staged": 9.0}},
    ):
        decisions._memory[f"None {key}"] = Decision(**(entry | changes))
        assert traced("staged") != "" and traced("reference") == ""


def test_every_engine_faster_than_the_reference_is_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    fault = trial._fault
    monkeypatch.setattr(trial, "_fault", lambda p, m, *rest: judged.append(m.engine) or fault(p, m, *rest))
    block()(sample_input(2, 4, 3, 3))
    bench.seconds["staged"] = 0.004
    block()(sample_input(3, 4, 3, 3))
    assert judged == ["resident", "staged", "resident"]


def test_fused_convolutions_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    assert module.why_not("fused_convolution", x) == "it runs on CUDA only"
    assert fastode.nn.SkewPair(4, 4).why_not("fused_convolution", x, x) == "it runs on CUDA only"
    module.engine = "fused_convolution"
    message = "engine must be one that can run this block, got 'fused_convolution': it runs on CUDA only"
    with pytest.raises(ValueError, match=f"^{message}$"):
        module(x)
    monkeypatch.setattr(cuda, "why_not", lambda: "there is no CUDA device")
    assert module.why_not("fused_convolution") == "there is no CUDA device"
    assert fastode.fuse(module, engine="fused_convolution").rows[0].engines == ()
    assert "fused_convolution" not in str(fastode.fuse(module))  # nobody asked for it


@pytest.fixture
def the_cpu_is_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused convolutions may be asked for on the CPU, where the staged engine's functions stand in for Triton's."""
    stand_in = SimpleNamespace(
        IE_SKIP=type("FusedIESkip", (STAGED.ie_skip,), {}),
        SHU_OSHER=type("FusedShuOsher", (STAGED.shu_osher,), {}),
        SKEW_PAIR=type("FusedSkewPair", (STAGED.skew_pair,), {}),
        SKEW_SOLUTION=type("FusedSolution", (STAGED.skew_solution,), {}),
    )
    monkeypatch.setattr(type(FUSED), "_functions", stand_in)
    monkeypatch.setattr(FUSED, "devices", ("cpu", "cuda"))


def called(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The autograd Functions that are called from now on."""
    found: list[type] = []
    call = function.call
    monkeypatch.setattr(function, "call", lambda kind, *rest: found.append(kind) or call(kind, *rest))
    return found


@pytest.mark.parametrize("kind", ["IESkip", "SSP3", "Ark", "ResBlock"])
def test_a_named_engine_runs_a_block_by_its_own_function(
    monkeypatch: pytest.MonkeyPatch, the_cpu_is_the_card: None, kind: str
) -> None:
    module, x, functions = block(kind), sample_input(2, 4, 3, 3), called(monkeypatch)
    for module.engine in ("fused_convolution", "staged", "resident"):
        assert used(module, x) == module.engine
    family = "ie_skip" if kind == "IESkip" else "shu_osher"
    assert functions == [getattr(engine, family) for engine in (FUSED, STAGED, RESIDENT)]
    assert len(set(functions)) == 3
    reason = module.double().why_not("fused_convolution", x.double())
    assert reason == "there are no fused convolutions for torch.float64"


def test_a_named_engine_runs_a_skew_pair_by_its_own_function(
    monkeypatch: pytest.MonkeyPatch, the_cpu_is_the_card: None
) -> None:
    y, functions = sample_input(2, 4, 4, 4), called(monkeypatch)
    for kind in (fastode.nn.SkewPair(4, 4), fastode.nn.SOBlock(fastode.nn.SkewPair(4, 4), solver="rk4")):
        module = kind
        for module.engine in ("fused_convolution", "staged", "resident"):
            assert used(module, *[y] * (1 + isinstance(module, reference.SkewPair))) == module.engine
    assert functions == [
        getattr(engine, family) for family in ("skew_pair", "skew_solution") for engine in (FUSED, STAGED, RESIDENT)
    ]
    assert len(set(functions)) == 6
    reason = fastode.nn.SkewPair(4, 4).double().why_not("fused_convolution", y.double(), y.double())
    assert reason == "there are no fused convolutions for torch.float64"


def test_auto_takes_fused_convolutions_after_a_trial_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, the_cpu_is_the_card: None
) -> None:
    monkeypatch.setattr(RESIDENT, "devices", ("cuda",))
    bench.seconds = {"fused_convolution": 0.001, "staged": 0.002, "reference": 0.003}
    module, x = block(), sample_input(2, 4, 3, 3)
    functions = called(monkeypatch)
    assert used(module, x) == "fused_convolution" and functions[-1] is FUSED.shu_osher
    ((_, entry),) = bench.decisions.items()
    assert entry["engine"] == "fused_convolution" and entry["refused"] == {}
    bench.seconds["fused_convolution"] = 0.0025
    assert used(module, x[:1]) == "staged" and functions[-1] is STAGED.shu_osher
    assert module.against("fused_convolution", x[:1]) == ("in a trial on this card it took 2.5 ms, and staged 2 ms")
    monkeypatch.setenv("FASTODE_TUNE", "0")
    assert used(module, sample_input(5, 4, 3, 3)) == "reference"


def test_importing_imports_no_tracer_and_no_triton() -> None:
    code = "import sys, fastode; print([name for name in ('torch._dynamo', 'triton') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_trial_waits_for_the_stream_of_the_inputs_card(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.device = device

        def synchronize(self) -> None:
            events.append(f"waits for {self.device}")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    found = Decision("staged", {}, {}, "")
    for device in ("cuda:1", "cpu"):
        assert trial._in_thread(lambda: events.append("tries") or found, torch.device(device)) is found
    assert events == ["waits for cuda:1", "tries", "tries"]
