"""The trials by which a CUDA card proves the engines itself: here on the CPU, with times that are given."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastode
from fastode import _build, _cuda, _decisions, _dispatch, _functional_skew, _one_step, _trial, functional, reference
from fastode._decisions import Decision
from fastode.ops import resident
from fastode.reference.skew import skew_field
from fastode.testing import compare_tensors, sample_input

ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """Trials on the CPU: the times they find are given, and those that were made are written down."""

    def __init__(self) -> None:
        self.seconds = {"resident": 0.001, "staged": 0.002, "reference": 0.003}
        self.trials: list[str] = []

    @property
    def file(self) -> dict[str, Any]:
        return json.loads(_decisions.path().read_text())

    @property
    def decisions(self) -> dict[str, Any]:
        (entries,) = self.file.values()
        return entries

    def forget(self) -> None:
        """As a new process would start."""
        _decisions._memory.clear()
        _decisions._told.clear()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    assert _build.load(announce=False) is None
    found = Bench()
    real_try = _trial._try
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
    monkeypatch.setattr(_trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(_trial, "_try", tried)
    monkeypatch.setattr(_trial, "_clock", clock)
    found.forget()
    yield found
    found.forget()


def block(kind: str = "SSP2", channels: int = 4, norm: str = "layer", **options: Any) -> nn.Module:
    torch.manual_seed(3)
    made = getattr(reference, kind)(reference.PreActBranch(channels, norm=norm, activation="tanh"), **options)
    fastode.fuse(made)
    return made


def used(module: nn.Module, *inputs: Tensor) -> str:
    with _dispatch.recording() as engines:
        module(*inputs)
    return engines[module]


def test_the_fastest_that_is_equal_is_taken_and_remembered(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    assert used(module, x) == "resident"
    assert bench.trials == ["train"]
    ((key, entry),) = bench.decisions.items()
    assert key.startswith("shu_osher ") and key.endswith(" | 2x4x3x3 float32 contiguous in tf32 | train")
    assert entry["engine"] == "resident" and entry["refused"] == {}
    assert entry["milliseconds"] == {"resident": 1.0, "staged": 2.0, "reference": 3.0}
    assert used(module, x) == "resident" and bench.trials == ["train"]
    bench.forget()
    assert used(module, x) == "resident" and bench.trials == ["train"]


def test_a_slow_engine_is_left_with_its_time_as_the_reason(bench: Bench) -> None:
    bench.seconds["reference"] = 0.0005
    module, x = block(), sample_input(2, 4, 3, 3)
    report = fastode.fuse(module, example=x)
    assert bench.trials == ["forward"]
    assert report.rows[0].engines == ("reference",)
    assert report.rows[0].reason == (
        "resident: in a trial on this card it took 1 ms, and reference 0.5 ms; "
        "staged: in a trial on this card it took 2 ms, and reference 0.5 ms"
    )


class Off(reference.ShuOsher):
    """A block that is wrong by a part in a thousand."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * super().forward(x)


class Fails(reference.ShuOsher):
    """A block whose kernels do not launch."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of\nregisters")


@pytest.mark.parametrize(
    ("bad", "verdict"), [(Off, "was not equal: "), (Fails, "failed (RuntimeError: out of registers)")]
)
def test_an_engine_that_is_wrong_or_fails_is_not_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, bad: type[nn.Module], verdict: str
) -> None:
    as_twin = _trial._as_twin

    def made(plain: nn.Module, engine: str) -> nn.Module:
        twin = as_twin(plain, engine)
        if engine == "resident":
            twin.__class__ = bad
        return twin

    monkeypatch.setattr(_trial, "_as_twin", made)
    if bad is Fails:  # it takes no further turn, and the clock tells by the turn whose it is
        bench.seconds = dict.fromkeys(bench.seconds, 0.001)
    module, x = block(), sample_input(2, 4, 3, 3)
    assert used(module, x) == "staged"
    ((_, entry),) = bench.decisions.items()
    assert entry["engine"] == "staged" and entry["refused"]["resident"].startswith(verdict)
    assert verdict in module.against("resident", x)


def test_with_trials_off_only_the_file_is_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    monkeypatch.setenv("FASTODE_TUNE", "0")
    assert used(module, x) == "reference" and bench.trials == []
    assert module.against("staged", x) == "no trial on this card has shown it to be equal and faster"
    monkeypatch.setenv("FASTODE_TUNE", "1")
    assert used(module, x) == "resident" and len(bench.trials) == 1
    bench.forget()
    monkeypatch.setenv("FASTODE_TUNE", "0")
    assert used(module, x) == "resident" and len(bench.trials) == 1


def test_a_file_in_the_package_is_asked_too(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    used(module, x)
    shipped = tmp_path / "package"
    shipped.mkdir()
    _decisions.path().rename(shipped / _decisions.NAME)
    versions = _decisions.versions()
    monkeypatch.setattr(_decisions, "versions", lambda: versions)
    monkeypatch.setattr(_decisions, "PACKAGE", shipped)
    bench.forget()
    assert used(module, x) == "resident" and len(bench.trials) == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"card": 3}', ""])
def test_a_broken_file_is_told_of_and_replaced(bench: Bench, text: str) -> None:
    _decisions.path().write_text(text)
    with pytest.warns(RuntimeWarning, match="fastode cannot read the decisions in .*decisions.json .*replace the file"):
        assert used(block(), sample_input(2, 4, 3, 3)) == "resident"
    assert len(bench.trials) == 1 and len(bench.decisions) == 1


def test_a_decision_that_cannot_be_used_is_made_again(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    used(module, x)
    ((card, entries),) = bench.file.items()
    ((key, entry),) = entries.items()
    _decisions.path().write_text(json.dumps({card: {key: entry | {"engine": "gone"}}}))
    bench.forget()
    assert used(module, x) == "resident" and len(bench.trials) == 2
    _decisions.path().write_text(json.dumps({card: {key: {"winner": "staged"}}}))
    bench.forget()
    with pytest.warns(RuntimeWarning, match="does not understand the decision"):
        assert used(module, x) == "resident"
    assert len(bench.trials) == 3 and bench.decisions[key]["engine"] == "resident"


def test_a_cache_that_cannot_be_written_is_told_of(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "file" / "cache"))
    module, x = block(), sample_input(2, 4, 3, 3)
    with pytest.warns(RuntimeWarning, match="cannot keep what its trials decide"):
        assert used(module, x) == "resident"
    assert used(module, x) == "resident" and len(bench.trials) == 1


WRITER = """
import sys
from fastode import _decisions
for i in range(15):
    _decisions.remember(None, f"{sys.argv[1]} {i}", _decisions.Decision("staged", {}, {}, "2026-01-01"))
    assert len(_decisions._load(_decisions.path())["no card, " + _decisions.versions()]) > i
"""


def test_processes_that_write_at_once_lose_nothing(bench: Bench) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT) for name in "abc"]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0, 0]
    assert sorted(bench.decisions) == sorted(f"{name} {i}" for name in "abc" for i in range(15))
    assert {path.name for path in _decisions.path().parent.iterdir()} == {"decisions.json", "decisions.lock"}


def test_a_named_engine_needs_no_trial(bench: Bench) -> None:
    module = block()
    module.engine = "staged"
    assert used(module, sample_input(2, 4, 3, 3)) == "staged" and bench.trials == []


def test_no_trial_while_a_graph_is_captured_or_inside_a_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    with monkeypatch.context() as patch:
        patch.setattr(_trial, "_capturing", lambda: True)
        assert used(module, x) == "reference"
    monkeypatch.setattr(_trial._state, "under_way", True, raising=False)
    with _dispatch.recording() as engines:
        module(x)
    assert bench.trials == [] and engines == {}  # what a trial runs is not reported either


def test_tracing_takes_what_is_known_and_makes_no_trial(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    torch.compiler.reset()
    unknown = torch.compile(module, backend="aot_eager")(x)
    assert bench.trials == []
    run = module(x)
    assert bench.trials == ["train"]
    truth = copy.deepcopy(module).double()(x.double())
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    known = torch.compile(module, backend=backend, fullgraph=True)(x)
    assert "autograd_function_apply" in graphs[0].code or "resident" in graphs[0].code
    for found in (unknown, known):
        comparison = compare_tensors({"y": found.detach()}, {"y": truth.detach()}, [{"y": run.detach()}], 36)
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


MODES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "forward": lambda module, x: torch.no_grad()(module)(x),
    "forward, inference": lambda module, x: torch.inference_mode()(module)(x.clone()),
    "input_grad": lambda module, x: module.requires_grad_(False)(x.requires_grad_()).sum().backward(),
    "train": lambda module, x: module(x).sum().backward(),
    "train, autocast": lambda module, x: torch.autocast("cpu", torch.bfloat16)(module)(x).sum().backward(),
    "train, checkpoint": lambda module, x: checkpoint(module, x.requires_grad_(), use_reentrant=False).sum().backward(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["IESkip", "SSP3", "Ark", "ResBlock"])
def test_a_trial_leaves_no_trace_in_the_call(bench: Bench, kind: str, mode: str) -> None:
    module, x = block(kind, norm="batch"), sample_input(3, 4, 3, 3)
    twin, kept, random = copy.deepcopy(module), x.clone(), torch.get_rng_state()
    MODES[mode](module, x)
    assert bench.trials == [mode.split(",")[0]]
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, kept)
    ((key, entry),) = bench.decisions.items()
    assert entry["refused"] == {} and ("autocast to bfloat16" in key) == ("autocast" in mode)
    twin.engine = entry["engine"]
    MODES[mode](twin, kept.clone())
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name


def test_parameters_that_are_results_can_be_tried(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    given = {name: 2 * p for name, p in module.named_parameters()}
    torch.func.functional_call(module, given, (x,)).sum().backward()
    assert bench.trials == ["train"] and all(p.grad is not None for p in module.parameters())


def test_calls_that_differ_are_tried_apart(bench: Bench) -> None:
    x = sample_input(2, 4, 3, 3)
    calls: list[tuple[nn.Module, Tensor]] = [
        (block(), x),
        (block(), x[:1]),
        (block(), x.to(memory_format=torch.channels_last)),
        (block().double(), x.double()),
        (block(norm="batch"), x),
        (block(norm="batch").eval(), x),
        (block("SSP3"), x),
        (block("IESkip"), x),
        (block("IESkip", steps=2), x),
        (block("IESkip", detach=True), x),
        (block().requires_grad_(False), x),
    ]
    for count, (module, given) in enumerate(calls, 1):
        module(given)
        module(given)
        assert len(bench.trials) == len(bench.decisions) == count
    with tf32_forbidden():
        block()(x)
    assert len(bench.trials) == len(bench.decisions) == len(calls) + 1
    bench.trials.pop()
    # What changes no kernel changes no decision.
    block("IESkip", step_size=0.2)(x)
    fastode.functional.ie_skip(x, reference.PreActBranch(4, norm="layer", activation="tanh"))
    assert len(bench.trials) == len(calls)


@contextmanager
def tf32_forbidden() -> Iterator[None]:
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def test_what_tf32_cannot_change_does_not_depend_on_it(bench: Bench) -> None:
    x = sample_input(2, 4, 3, 3)
    doubled, lowered = block().double(), block()
    for _ in range(2):
        with tf32_forbidden():
            doubled(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                lowered(x)
        doubled(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            lowered(x)
    assert len(bench.trials) == 2


@pytest.mark.parametrize("mode", ["forward", "input_grad", "train"])
@pytest.mark.parametrize("activation", [None, "tanh", nn.ELU(0.5)])
def test_the_skew_pair_as_a_function_is_tried(bench: Bench, activation: Any, mode: str) -> None:
    weight = torch.randn(4, 2, 4, 4, requires_grad=mode == "train")
    y, z = sample_input(2, 4, 4, 4), sample_input(2, 2, 8, 8)
    bench.seconds |= {"resident": 0.009}
    z.requires_grad_(mode != "forward")
    options = {"stride": 2, "activation": activation, "gamma": 0.1}
    for _ in range(2):
        found = functional.skew_pair(y, z, weight, **options)
    assert bench.trials == [mode]
    ((_, entry),) = bench.decisions.items()
    assert entry["engine"] == "staged" and entry["refused"] == {}
    truth = skew_field(*(t.double() for t in (y, z, weight)), 2, 1, 0.1, make_activation(activation))
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-4)


def make_activation(activation: Any) -> Callable[[Tensor], Tensor]:
    return torch.tanh if activation == "tanh" else activation or nn.Identity()


def test_skew_blocks_are_tried_as_a_whole(bench: Bench) -> None:
    pair = reference.SkewPair(4, 4)
    solve = reference.SOBlock(reference.SkewPair(4, 4), solver="rk4")
    for module in (pair, solve):
        fastode.fuse(module)
    y = sample_input(2, 4, 4, 4)
    bench.seconds |= {"resident": 0.009}
    assert used(pair, y, y) == "staged" and used(solve, y) == "staged"
    keys = sorted(bench.decisions)
    assert len(bench.trials) == 2 and keys[0].startswith("skew_pair ") and keys[1].startswith("skew_solution by rk4 ")
    assert all(entry["refused"] == {} for entry in bench.decisions.values())


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


def test_a_device_without_kernels_is_named() -> None:
    module = block()
    assert module.why_not("staged", torch.empty(2, 4, 3, 3, device="meta")) == (
        "the input is on meta, and there are kernels for the CPU and CUDA only"
    )


def test_a_triton_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(key: str = "CUDA") -> None:
        raise ImportError("no symbol\nof that name")

    monkeypatch.setattr(_cuda, "_reason", None)
    monkeypatch.setattr(_cuda, "why_not", lambda: "")
    monkeypatch.setattr(_cuda, "implement", fails)
    _cuda.register()
    assert _dispatch.no_operators("cuda") == "Triton's operators cannot be registered: no symbol of that name"
