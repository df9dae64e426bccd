"""The benchmarks measure what they say: counts, turns, memory, and nothing that is wrong has a speed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastode
from benchmarks import (
    bench_nets,
    contenders,
    counts,
    data,
    families,
    header,
    measure,
    memory,
    others,
    printing,
    run,
    suites,
    timing,
    workloads,
)
from benchmarks.contenders import Contender
from fastode import nets, reference, testing

CPU = torch.device("cpu")


def test_the_machine_is_measured_by_the_faster_product() -> None:
    calls = {0.02: lambda: time.sleep(0.02), 0.001: lambda: time.sleep(0.001)}
    assert timing.fastest([calls[0.02], calls[0.001]]) is calls[0.001]
    assert timing.fastest([calls[0.001], calls[0.02]]) is calls[0.001]
    machine = timing.machine()
    assert machine.matmul_flops == 2 * 2048**3
    product = machine.matmul()
    assert isinstance(product, torch.Tensor)
    assert torch.equal(product.to_dense() if product.is_mkldnn else product, torch.full((2048, 2048), 2048.0))


class NoModules(contextlib.nullcontext):
    """In place of the counter's module tracker, whose hooks break under IE-Skip's autograd.grad inside a module."""

    parents = ("Global",)


def counted(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        call()
    return counter.get_total_flops()


def small(build: Callable[[], nn.Module], channels: int = 4) -> workloads.Workload:
    return workloads.Workload("ie", "k1", f"{channels}@8", build, lambda device: (data.feature_maps(2, channels, 8),))


def ie_skip(channels: int = 4, **options: Any) -> nn.Module:
    return reference.IESkip(reference.PreActBranch(channels, norm="layer", bias=False), **options)


@pytest.mark.parametrize(
    ("block", "mode"),
    [
        (ie_skip(steps=1), "forward"),
        (ie_skip(steps=3), "forward"),
        (ie_skip(steps=2, detach=True), "train"),
        (reference.SSP2(reference.PreActBranch(4)), "train"),
        (reference.SSP3(reference.PreActBranch(4)), "input_grad"),
        (reference.Midpoint(reference.PreActBranch(4)), "train"),
        (reference.Ark(reference.PreActBranch(4)), "train"),
        (reference.ResBlock(reference.PreActBranch(4)), "train"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_counts_agree_with_the_flop_counter(block: nn.Module, mode: str) -> None:
    x = data.feature_maps(2, 4, 8)
    assert counts.flops(block, (x,), mode) == counted(workloads.work(block, (x,), mode).run)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["forward", "input_grad", "train"])
def test_counts_of_the_skew_pair_agree_with_the_flop_counter(stride: int, mode: str) -> None:
    pair = reference.SkewPair(3, 8, stride=stride)
    inputs = (data.feature_maps(2, 8, 8 // stride), data.feature_maps(2, 3, 8))
    assert counts.flops(pair, inputs, mode) == counted(workloads.work(pair, inputs, mode).run)


def test_counts_of_a_solve_leave_the_last_half_evaluation_out() -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8), solver="rk4")
    inputs = (data.feature_maps(2, 3, 8),)
    assert counts.flops(block, inputs, "forward") * 8 == counted(workloads.work(block, inputs, "forward").run) * 7


SOLVES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    # 2 evaluations for the first step's size, 6 for each attempt; what is rejected has no derivative.
    "solver": ({}, (1, 0, 0)),
    "constant": ({"gradient": "constant"}, (1, 0, 1)),
    "rejected": ({"first_step": 2.0, "rtol": 1e-3, "atol": 1e-3}, (0, 1, 0)),
    "exact": ({"first_step": 2.0, "rtol": 1e-3, "atol": 1e-3, "gradient": "exact"}, (0, 0, 0)),
}


@pytest.mark.parametrize("name", SOLVES)
def test_counts_of_an_adaptive_solve_are_those_of_its_steps(name: str) -> None:
    options, (chooses, idle_attempts, idle) = SOLVES[name]
    torch.manual_seed(0)
    block = reference.SOBlock(reference.SkewPair(3, 8), **options)
    x = data.feature_maps(2, 3, 8)
    with fastode.record_steps() as log:
        block(x)
    (solve,) = log
    attempts = len(solve.times) - 1 + len(solve.rejected)
    assert (len(solve.rejected) > 0) == ("first_step" in options)
    evaluations = 1 + chooses + 6 * attempts
    assert counts.flops(block, (x,), "forward") == counted(workloads.work(block, (x,), "forward").run)
    unit = counts.flops(block.field, block.field.initial_state(x), "forward") // 2
    backward = evaluations - idle - idle_attempts * 6 * len(solve.rejected)
    assert counts.flops(block, (x,), "input_grad") == (2 * evaluations + 2 * backward - 1) * unit


def test_counts_of_samples_that_step_alone_add_up() -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8), per_sample=True, rtol=1e-2, atol=1e-2)
    x = data.feature_maps(2, 3, 8) * torch.tensor([0.1, 10.0]).view(2, 1, 1, 1)
    with fastode.record_steps() as log:
        block(x)
    assert len({solve.evaluations for solve in log}) > 1
    assert counts.flops(block, (x,), "forward") == counted(workloads.work(block, (x,), "forward").run)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_counts_of_a_block_of_odenet_agree_with_the_flop_counter(solver: str) -> None:
    block = nets.odenet(width=8, blocks=1, solver=solver).get_submodule("block0")
    x = data.feature_maps(2, 8, 8)
    assert counts.flops(block, (x,), "forward") == counted(workloads.work(block, (x,), "forward").run)


def test_counts_of_a_network_add_up() -> None:
    block = reference.SSP2(reference.PreActBranch(8))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    images = data.images(2)
    assert counts.flops(network, (images,), "forward") == counted(workloads.work(network, (images,), "forward").run)


def test_the_step_of_ie_skip_is_18_convolutions() -> None:
    assert 2 * counts.ie_skip(1).total("train") == 18


def test_turns_are_taken_in_order_and_ratios_are_paired() -> None:
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) for name in "abc"}
    drift = iter(range(1, 1000))

    def clock(run_: timing.Run, repeats: int) -> float:
        # The machine slows down by the turn; paired ratios must not see it beyond a neighbour's share.
        run_()
        return {"a": 1.0, "b": 2.0, "c": 4.0}[turns[-1]] * (1000 + next(drift))

    times = timing.interleave(runs, clock, seconds=0.0, rounds=(6, 6), warm=1)
    assert "".join(turns).endswith("abc" * 6)
    assert len(times.seconds["a"]) == 6
    assert times.ratio("a", "c").median == pytest.approx(4.0, rel=0.01)
    assert times.ratio("c", "a").median == pytest.approx(0.25, rel=0.01)


def test_rounds_end_with_the_time_but_not_before_the_least_number() -> None:
    now = iter(range(1000))
    times = timing.interleave({"a": lambda: None}, lambda r, n: 1.0, seconds=9.0, rounds=(3, 40), now=lambda: next(now))
    assert 3 < len(times.seconds["a"]) < 40


def test_a_contender_that_raises_during_its_turns_is_reported() -> None:
    calls = iter(range(100))

    def breaks() -> None:
        if next(calls) > 4:
            raise RuntimeError("out of\nluck")

    times = timing.interleave({"good": lambda: None, "bad": breaks}, lambda r, n: (r(), 1.0)[1], rounds=(5, 5))
    assert times.errors == {"bad": "RuntimeError: out of luck"}
    assert len(times.seconds["good"]) == 5 and "bad" not in times.seconds


def test_memory_sees_the_peak_and_not_the_sum() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(2_000_000)
        third = torch.empty(500_000)
        del second
        return third

    # The profiler's own scalars may add a few bytes.
    assert 10_000_000 <= memory.peak_bytes(call) < 10_001_000


class Wrong(nn.Module):
    """IE-Skip with half its step size."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.branch = block.branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.IESkip(self.branch, step_size=0.05)(x)


def refuses(module: nn.Module, inputs: workloads.Inputs) -> nn.Module:
    raise RuntimeError("no such kernel")


@pytest.mark.usefixtures("small_roofline")
def test_a_contender_that_is_not_equal_has_no_speed() -> None:
    wrong = Contender("fused", "wrong", True, False, lambda module, inputs: Wrong(module))
    fails = Contender("compile", None, True, False, refuses)
    taking_part = [contenders.CONTENDERS["eager"], contenders.CONTENDERS["eager-cl"], wrong, fails]
    rows = measure.measure(small(ie_skip), "train", "float32", CPU, taking_part, seconds=0.0, rounds=(2, 2))
    eager, _, unequal, failed = rows
    assert eager["errors"] == "" and eager["median_ms"] > 0 and eager["ratio_to_best_other"]["than"] == "eager-cl"
    assert unequal["errors"].startswith("not equal: ") and unequal["equality"]["ok"] is False
    assert failed["errors"] == "RuntimeError: no such kernel"
    for row in (unequal, failed):
        assert not {"median_ms", "gflops", "ratio_to_eager", "peak_mb"} & set(row)
        assert row["errors"] in printing.line(row)


class Clipped(nn.Module):
    """What exceeds 1; its slope at 1 is `slope`."""

    def __init__(self, slope: float, scale: float = 1.0) -> None:
        super().__init__()
        self.slope, self.scale = slope, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = torch.relu(self.scale * (x - 1))
        return above + self.slope * torch.where(x == 1, x - 1, 0)


def test_a_mask_that_the_reference_flips_too_is_no_error() -> None:
    x = 2 * data.feature_maps(2, 4, 8)
    low = (testing.moved(x, 0) < x) & (testing.moved(x, 1) < x)  # where four runs do not see the other side
    x[tuple(low.nonzero()[0])] = 1.0
    rival = Contender("fused", "any", True, False, lambda module, inputs: module)
    judge = functools.cache(functools.partial(testing.Judge, Clipped(0.0), (x,)))

    def found(module: nn.Module) -> dict[str, Any]:
        return measure.equality(rival, Clipped(0.0), module, (x,), "train", judge)

    assert found(Clipped(0.0)) == {"ok": True, "worst": 0.0, "tensor": "output"}
    flipped = found(Clipped(1.0))
    assert flipped["ok"] and "by 4 runs of the reference" in flipped["note"]
    assert not judge().compare(Clipped(1.0)).ok and not found(Clipped(2.5))["ok"]
    assert not found(Clipped(0.0, scale=0.99))["ok"]


class Itself(Clipped):
    """Judged itself and not a copy, as a compiled module is; counts its calls."""

    calls: torch.Tensor

    def __init__(self, slope: float) -> None:
        super().__init__(slope)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self


def test_a_second_judgement_begins_where_the_first_did() -> None:
    module = Itself(1.0)
    seen = []

    class Refuses:
        smooth = False

        def compare(self, module: nn.Module, inputs: workloads.Inputs) -> testing.Comparison:
            seen.append(float(module.calls))
            module(*inputs)
            return testing.Comparison((testing.Row("output", 2.0, 1.0),))

    rival = Contender("compile", None, False, False, lambda module, inputs: module)
    row = measure.equality(rival, module, module, (torch.ones(1),), "train", lambda **options: Refuses())
    assert seen == [0.0, 0.0] and not row["ok"] and "2 of allowed by 4 runs" in row["note"]


@pytest.mark.usefixtures("small_roofline")
def test_the_project_takes_part_and_is_equal() -> None:
    item = suites.Item(small(lambda: ie_skip(8), 8), "train", "float32", ())
    taking_part, _ = run.contenders_of(item, CPU, ())
    rows = measure.measure(item.workload, "train", "float32", CPU, taking_part, seconds=0.0, rounds=(2, 2))
    fused = [row for row in rows if row["contender"] == "fused"]
    assert fused and all(row["equality"]["ok"] and row["ratio_to_better_eager"]["median"] > 0 for row in fused)


@pytest.mark.parametrize("mode", testing.MODES)
@pytest.mark.parametrize("options", [{"steps": 3}, {"detach": True}, {"theta": 0.5}], ids=str)
def test_the_closed_form_by_vjp_is_ie_skip(options: dict[str, Any], mode: testing.Mode) -> None:
    block = ie_skip(**options)
    testing.assert_blocks_equal(block, contenders.vjp_block(block), data.feature_maps(2, 4, 8), mode=mode)


def test_a_closed_form_that_changes_buffers_is_refused() -> None:
    with pytest.raises(workloads.Unavailable, match="changes buffers"):
        contenders.vjp_block(reference.IESkip(reference.PreActBranch(4)))


def test_torchdiffeq_solves_the_same_block() -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8), solver="rk4", steps=2)
    testing.assert_blocks_equal(block, others.torchdiffeq_block(block), data.feature_maps(2, 3, 8))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("gradient", ["solver", "constant"])
def test_torchdiffeq_solves_the_same_block_by_its_error(gradient: str, compiled: bool) -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8, activation="tanh"), gradient=gradient)
    contenders.configure_dynamo()
    mode = "input_grad" if compiled else "train"  # compiled, unused halves have no zero gradient
    testing.assert_blocks_equal(block, others.torchdiffeq_block(block, compiled), data.feature_maps(2, 3, 8), mode=mode)


def test_torchdiffeq_has_no_steps_of_each_sample() -> None:
    with pytest.raises(workloads.Unavailable, match="no steps of each sample"):
        others.torchdiffeq_block(reference.SOBlock(reference.SkewPair(3, 8), per_sample=True))


class Other(nn.Module):
    """Stands for a solver with steps of its own, `shift` away from the reference."""

    def __init__(self, block: nn.Module, shift: float) -> None:
        super().__init__()
        self.block, self.shift, self.counted = block, shift, {"solves": 2, "accepted": 5, "rejected": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.shift


def test_a_contender_with_steps_of_its_own_is_judged_by_the_tolerance() -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8), per_sample=True, rtol=1e-2, atol=1e-2)
    assert others.steps_otherwise("torchode", block) and not others.steps_otherwise("torchdiffeq", block)
    near, far = (
        others.within_tolerance(block, Other(block, shift), (data.feature_maps(2, 3, 8),)) for shift in (0, 10)
    )
    assert near["ok"] and "5 steps accepted" in near["note"]
    assert not far["ok"] and far["worst"] > 1


def test_torchode_is_a_contender_where_samples_step_alone() -> None:
    block = reference.SOBlock(reference.SkewPair(3, 8), per_sample=True, rtol=1e-2, atol=1e-2)
    if importlib.util.find_spec("torchode") is None:
        with pytest.raises(workloads.Unavailable, match="torchode is not installed"):
            others.torchode_block(block)
        return
    assert others.within_tolerance(block, others.torchode_block(block), (data.feature_maps(2, 3, 8),))["ok"]


def test_a_record_has_no_path_of_the_machine() -> None:
    told = f"in `/usr/lib/python3/dist-packages/torch/compiler/__init__.py`\nand ({timing.ROOT}/fastode/nn.py)"
    assert timing.one_line(told, 400) == "in `torch/compiler/__init__.py` and (fastode/nn.py)"
    assert timing.message(OSError(told)) == "OSError: in `torch/compiler/__init__.py` and (fastode/nn.py)"


@pytest.mark.usefixtures("small_roofline")
def test_a_compiled_contender_with_a_graph_break_is_reported_as_failed() -> None:
    def breaking(module: nn.Module, inputs: workloads.Inputs) -> nn.Module:
        class Breaks(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                torch._dynamo.graph_break()
                return module(x)

        contenders.configure_dynamo()
        return contenders.Pinned(module, torch.compile(Breaks(), backend="eager"))

    taking_part = [contenders.CONTENDERS["eager"], Contender("compile", None, False, True, breaking)]
    rows = measure.measure(small(ie_skip), "forward", "float32", CPU, taking_part, seconds=0.0, rounds=(2, 2))
    assert rows[1]["errors"].startswith("graph break: ") and "median_ms" not in rows[1]


def test_inputs_are_the_photographs_and_always_the_same() -> None:
    assert data.source().startswith("photographs")
    images = data.images(64)
    assert torch.equal(images, data.images(64)) and images.std() > 0.5
    assert set(data.labels(64).tolist()) == {0, 1}
    maps = data.feature_maps(4, 16, 8)
    assert maps.shape == (4, 16, 8, 8) and abs(float(maps.std()) - 1) < 1e-3


def test_the_default_suite_is_as_documented() -> None:
    items = suites.plan("default", CPU, ["float32"])
    shapes = {(item.workload.id, item.workload.shape) for item in items}
    assert sorted(name for name, _ in shapes) == ["ie", "ie", "skew", "skew", "ssp3", "ssp3"]
    assert {item.mode for item in items} == set(workloads.BLOCK_MODES) and len(items) == 18
    assert [item.rivals for item in items if item.rivals] == [("vjp-compile",)]


def test_the_middle_suite_is_as_documented() -> None:
    parts = dict(suites.parts("cpu", ("float32", "bfloat16"), ()))
    assert all(parts.values())
    blocks = {name: {(i.workload.shape, i.mode) for i in items} for name, items in parts.items()}
    assert len(blocks["cpu-ie"]) == 4 * 3 and len(blocks["cpu-ssp3"]) == len(blocks["cpu-skew-rk4"]) == 3 * 3
    assert {m for _, m in blocks["cpu-bfloat16-ie"]} == {m for _, m in blocks["cpu-bfloat16-skew-pair"]}
    assert {m for _, m in blocks["cpu-bfloat16-ie"]} == {"forward", "train"}
    assert len(blocks["cpu-bfloat16-skew-pair"]) == len(blocks["cpu-bfloat16-skew-rk4"]) == 3 * 2
    assert {i.rivals for i in parts["cpu-ie"]} == {("compile", "compile-cl", "vjp-compile")}
    assert {i.own for items in parts.values() for i in items} == {"fused:auto"}
    assert [name for name, _ in suites.parts("cpu", ("float32",), ("sspnet",))] == ["cpu-sspnet"]
    assert len(blocks["cpu-solve"]) == len(blocks["cpu-solve-constant"]) == len(blocks["cpu-solve-per-sample"]) == 9
    assert {m for name in ("sonet", "soblock-resnet10", "odenet") for _, m in blocks[f"cpu-{name}"]} == {
        "train",
        "pgd_step",
    }


def test_a_step_of_pgd_is_a_tenth_of_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = (data.images(2),)
    flops, moved = bench_nets.count(network, images, "pgd_step")
    assert bench_nets.count(network, images, "pgd10") == (10 * flops, 10 * moved)
    assert counted(bench_nets.work(network, images, "pgd10").run) == 10 * counted(
        bench_nets.work(network, images, "pgd_step").run
    )


def test_every_workload_can_be_named_once() -> None:
    found = [(w.name, w.statistics) for w in families.everything()]
    assert len(found) == len(set(found))
    assert {w.id for w in families.everything()} == {
        "ie", "ie-bn", "wrn", "ssp2", "ssp3", "ark", "midpoint", "res", "skew", "solve", "conv", "nets",
        "networks",
    }  # fmt: skip


def test_pgd_stays_within_its_radius_and_raises_the_loss() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images, labels = data.images(8), data.labels(8)
    attacked = bench_nets.pgd(network.requires_grad_(False), images, labels)
    assert 0 < (attacked - images).abs().max() <= bench_nets.RADIUS * (1 + 1e-5)
    loss = nn.functional.cross_entropy
    assert loss(network(attacked), labels) > loss(network(images), labels)


@pytest.mark.usefixtures("small_roofline")
def test_without_a_terminal_there_are_plain_lines_only(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)  # of this process, which has other tests
    wanted = ["--only", "ie", "--variants", "k1", "--shapes", "128@4", "--modes", "forward", "--batch", "2"]
    assert run.main([*wanted, "--contenders", "eager,eager-cl", "--seconds", "0"]) == 0
    found = "".join(capfd.readouterr())
    lines = found.split("\n")
    assert [line.split()[:4] for line in lines[1:3]] == [["ie", "k1", "128@4", "forward"]] * 2
    # No bar, no colour, no frame.
    assert not {"\r", "\x1b", "|", "━", "│"} & set(found) and len(lines) == 5 and not lines[-1]


def test_two_processors_of_one_model_name_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, found = torch.device("cpu"), set()
    for features in (["avx2"], ["avx2", "avx512f"]):
        monkeypatch.setattr(header, "kernel_features", lambda telling=False, features=features: features)
        found.add(header.folder_name(cpu))
    wide, narrow = sorted(found, key=len)
    assert narrow == wide.replace(f"-{torch.get_num_threads()}-threads", f"-avx2-{torch.get_num_threads()}-threads")
