"""Which engine is chosen: fused convolutions, and what a traced call takes; on the CPU, with times that are given."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trial_bench import Bench, block, traced, trials_on_the_cpu, used  # noqa: F401 (a fixture)

import fastode
from fastode import _cuda, _decisions, _dispatch, _functional_skew, _one_step, _trial, functional, reference
from fastode._decisions import Decision
from fastode.ops import resident
from fastode.testing import compare_tensors, sample_input

ROOT = Path(__file__).resolve().parent.parent


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
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        taken: list[str] = []
        function = functional.shu_osher_function
        patch.setattr(functional, "shu_osher_function", lambda engine: taken.append(engine) or function(engine))
        for batch in (2, 3, 4, 5):  # the second of them makes the batch a symbol
            compiled(sample_input(batch, 4, 3, 3))
    # Dynamo may look at a frame more than once; for the last batch no file holds anything.
    assert set(taken) == {"resident"} and len(taken) >= 3 and len(bench.trials) == 3
    torch.compiler.reset()


def test_tracing_takes_the_second_best_that_is_equal_where_the_best_cannot_be_traced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = resident.why_not
    monkeypatch.setattr(resident, "why_not", lambda *rest: "no" if torch.compiler.is_compiling() else able(*rest))
    module, x = block(), sample_input(2, 4, 3, 3)
    assert used(module, x) == "resident"
    ((key, entry),) = bench.decisions.items()
    traced = functools.partial(_trial._against_traced, wanted=key, index=None, candidates="staged reference")
    assert traced("staged") == ""
    torch.compiler.reset()
    graphs: list[str] = []
    torch.compile(module, backend=lambda g, _: graphs.append(g.code) or g.forward, fullgraph=True)(x)
    assert "autograd_function_apply" in graphs[0]
    torch.compiler.reset()
    # Nothing that was not equal is taken, and nothing that was slower than the reference: that was not judged.
    for changes in (
        {"refused": {"staged": "was not equal"}},
        {"milliseconds": entry["milliseconds"] | {"staged": 9.0}},
    ):
        _decisions._memory[f"None {key}"] = Decision(**(entry | changes))
        assert traced("staged") != "" and traced("reference") == ""


def test_every_engine_faster_than_the_reference_is_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    fault = _trial._fault
    monkeypatch.setattr(_trial, "_fault", lambda p, m, *rest: judged.append(m.engine) or fault(p, m, *rest))
    block()(sample_input(2, 4, 3, 3))
    bench.seconds["staged"] = 0.004
    block()(sample_input(3, 4, 3, 3))
    assert judged == ["resident", "staged", "resident"]


def test_fused_convolutions_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    assert module.why_not("fused_convolution", x) == "it runs on CUDA only"
    assert fastode.nn.SkewPair(4, 4).why_not("fused_convolution", x) == "it runs on CUDA only"
    module.engine = "fused_convolution"
    message = "engine must be one that can run this block, got 'fused_convolution': it runs on CUDA only"
    with pytest.raises(ValueError, match=f"^{message}$"):
        module(x)
    monkeypatch.setattr(_cuda, "why_not", lambda: "there is no CUDA device")
    assert module.why_not("fused_convolution", None) == "there is no CUDA device"
    assert fastode.fuse(module, engine="fused_convolution").rows[0].engines == ()
    assert "fused_convolution" not in str(fastode.fuse(module))  # nobody asked for it


@pytest.mark.parametrize("kind", ["IESkip", "SSP3", "Ark", "ResBlock"])
def test_fused_convolutions_are_the_staged_engine_with_another_plan(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module, x = block(kind), sample_input(2, 4, 3, 3)
    monkeypatch.setattr(_dispatch, "_HOME", {})  # the CPU stands for the card
    plans: list[tuple[str, bool]] = []
    real = _one_step.Plan

    def planned(*rest: Any, **options: Any) -> Any:
        plans.append((module.engine, options["fused"]))
        return real(*rest, **(options | {"fused": False}))

    monkeypatch.setattr(_one_step, "Plan", planned)
    for module.engine in ("fused_convolution", "staged", "resident"):
        assert used(module, x) == module.engine
    assert plans == [("fused_convolution", True), ("staged", False), ("resident", False)]
    assert (
        module.double().why_not("fused_convolution", x.double()) == "there are no fused convolutions for torch.float64"
    )


def test_a_skew_pair_has_fused_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_HOME", {})
    pairs: list[tuple[str, bool]] = []
    real = _functional_skew.Pair

    def made(*rest: Any, **options: Any) -> Any:
        pairs.append((module.engine, options["fused"]))
        return real(*rest)

    monkeypatch.setattr(_functional_skew, "Pair", made)
    y = sample_input(2, 4, 4, 4)
    for kind in (fastode.nn.SkewPair(4, 4), fastode.nn.SOBlock(fastode.nn.SkewPair(4, 4), solver="rk4")):
        module = kind
        for module.engine in ("fused_convolution", "staged", "resident"):
            assert used(module, *[y] * (1 + isinstance(module, reference.SkewPair))) == module.engine
    # Whether an engine can run is asked with a pair of its own.
    assert [fused for engine, fused in pairs if engine == "fused_convolution"] == [False, True] * 2
    assert not any(fused for engine, fused in pairs if engine != "fused_convolution")
    reason = fastode.nn.SkewPair(4, 4).double().why_not("fused_convolution", (y.double(), y.double()))
    assert reason == "there are no fused convolutions for torch.float64"


def test_auto_takes_fused_convolutions_after_a_trial_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_HOME", {"resident": "cuda"})
    real = _one_step.Plan
    monkeypatch.setattr(_one_step, "Plan", lambda *rest, **options: real(*rest, **(options | {"fused": False})))
    bench.seconds = {"fused_convolution": 0.001, "staged": 0.002, "reference": 0.003}
    module, x = block(), sample_input(2, 4, 3, 3)
    assert used(module, x) == "fused_convolution"
    ((_, entry),) = bench.decisions.items()
    assert entry["engine"] == "fused_convolution" and entry["refused"] == {}
    bench.seconds["fused_convolution"] = 0.0025
    assert used(module, x[:1]) == "staged"
    assert module.against("fused_convolution", x[:1]) == ("in a trial on this card it took 2.5 ms, and staged 2 ms")
    monkeypatch.setenv("FASTODE_TUNE", "0")
    assert used(module, sample_input(5, 4, 3, 3)) == "reference"


def test_importing_imports_no_tracer_and_no_triton() -> None:
    code = "import sys, fastode; print([name for name in ('torch._dynamo', 'triton') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
