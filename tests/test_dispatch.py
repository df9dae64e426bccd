"""The trials by which a CUDA card proves the engines itself: here on the CPU, with times that are given."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trial_bench import Bench, block, tf32_forbidden, trials_on_the_cpu, used  # noqa: F401 (a fixture)

import fastode
from fastode import functional, reference
from fastode.dispatch import choice, decisions, trial
from fastode.native import cuda
from fastode.ops.engine import no_operators
from fastode.reference.skew import skew_field
from fastode.testing import compare_tensors, sample_input

ROOT = Path(__file__).resolve().parent.parent


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
    as_twin = trial._as_twin

    def made(plain: nn.Module, engine: str) -> nn.Module:
        twin = as_twin(plain, engine)
        if engine == "resident":
            twin.__class__ = bad
        return twin

    monkeypatch.setattr(trial, "_as_twin", made)
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
    decisions.path().rename(shipped / decisions.NAME)
    versions = decisions.versions()
    monkeypatch.setattr(decisions, "versions", lambda: versions)
    monkeypatch.setattr(decisions, "PACKAGE", shipped)
    bench.forget()
    assert used(module, x) == "resident" and len(bench.trials) == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"card": 3}', ""])
def test_a_broken_file_is_told_of_and_replaced(bench: Bench, text: str) -> None:
    decisions.path().write_text(text)
    with pytest.warns(RuntimeWarning, match="fastode cannot read the decisions in .*decisions.json .*replace the file"):
        assert used(block(), sample_input(2, 4, 3, 3)) == "resident"
    assert len(bench.trials) == 1 and len(bench.decisions) == 1


def test_a_decision_that_cannot_be_used_is_made_again(bench: Bench) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    used(module, x)
    ((card, entries),) = bench.file.items()
    ((key, entry),) = entries.items()
    decisions.path().write_text(json.dumps({card: {key: entry | {"engine": "gone"}}}))
    bench.forget()
    assert used(module, x) == "resident" and len(bench.trials) == 2
    decisions.path().write_text(json.dumps({card: {key: {"winner": "staged"}}}))
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
from fastode.dispatch import decisions
for i in range(15):
    decisions.remember(None, f"{sys.argv[1]} {i}", decisions.Decision("staged", {}, {}, "2026-01-01"))
    assert len(decisions._load(decisions.path())["no card, " + decisions.versions()]) > i
"""


def test_processes_that_write_at_once_lose_nothing(bench: Bench) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT) for name in "abc"]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0, 0]
    assert sorted(bench.decisions) == sorted(f"{name} {i}" for name in "abc" for i in range(15))
    assert {path.name for path in decisions.path().parent.iterdir()} == {"decisions.json", "decisions.lock"}


def test_a_named_engine_needs_no_trial(bench: Bench) -> None:
    module = block()
    module.engine = "staged"
    assert used(module, sample_input(2, 4, 3, 3)) == "staged" and bench.trials == []


def test_no_trial_while_a_graph_is_captured_or_inside_a_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), sample_input(2, 4, 3, 3)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_capturing", lambda: True)
        assert used(module, x) == "reference"
    monkeypatch.setattr(trial._state, "under_way", True, raising=False)
    with choice.recording() as engines:
        module(x)
    assert bench.trials == [] and engines == {}  # what a trial runs is not reported either


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
    truth, run = (
        skew_field(*(t.to(dtype) for t in (y, z, weight)), 2, 1, 0.1, make_activation(activation))
        for dtype in (torch.float64, torch.float32)
    )
    halves = [dict(zip("yz", (t.detach() for t in pair), strict=True)) for pair in (found, truth, run)]
    comparison = compare_tensors(halves[0], halves[1], [halves[2]], weight[0].numel())
    assert comparison.ok, comparison.describe()


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
    assert len(bench.trials) == 2 and keys[0].startswith("skew_pair, ") and keys[1].startswith("skew_solution by rk4 ")
    assert all(entry["refused"] == {} for entry in bench.decisions.values())


def test_a_device_without_kernels_is_named() -> None:
    module = block()
    assert module.why_not("staged", torch.empty(2, 4, 3, 3, device="meta")) == (
        "the input is on meta, and there are kernels for the CPU and CUDA only"
    )


def test_a_triton_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(key: str = "CUDA") -> None:
        raise ImportError("no symbol\nof that name")

    monkeypatch.setattr(cuda, "_reason", None)
    monkeypatch.setattr(cuda, "why_not", lambda: "")
    monkeypatch.setattr(cuda, "implement", fails)
    cuda.register()
    assert no_operators("cuda") == "Triton's operators cannot be registered: no symbol of that name"
