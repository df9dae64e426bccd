"""The suite of whole networks: its parts, what a turn does, autocast, networks of others, and what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastode
from benchmarks import (
    attack_check,
    bench_nets,
    contenders,
    data,
    foreign,
    measure,
    run,
    suites,
    targets,
    workloads,
)
from fastode import reference

CPU = torch.device("cpu")
TWO = (data.images(2),)


class NoModules(contextlib.nullcontext[None]):
    """In place of the counter's module tracker, whose hooks break under autograd.grad inside a module."""

    parents = ("Global",)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def blocks() -> nn.Module:
    body = reference.SSP2(reference.PreActBranch(8, norm="group"))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def workload(build: Callable[[], nn.Module], **options: Any) -> workloads.Workload:
    shared: dict[str, Any] = {"own": "fused:auto", "work": bench_nets.work, "count": bench_nets.count}
    return workloads.Workload(
        "networks", "a", "3@32", build, lambda device: TWO, bench_nets.WHOLE_MODES, **shared, **options
    )


def test_the_suite_is_as_documented() -> None:
    parts = dict(suites.parts("networks", ("float32", "autocast"), ()))
    found = {name: {(item.workload.variant, item.mode) for item in items} for name, items in parts.items()}
    plain = {(name, mode) for name in bench_nets.WHOLE for mode in ("train", "attack_step", "forward")}
    harder = {(name, mode) for name in ("ie-resnet-1-18-w16", "sspnet-3") for mode in ("adv_train", "trades")}
    for prefix in ("networks-", "networks-autocast-"):
        own = {name for name in found if name.startswith("networks-autocast-") == (prefix != "networks-")}
        assert set().union(*(found[name] for name in own)) == plain | harder
        assert all(name.startswith(prefix) for name in own) and len(own) == 9
    assert {item.own for items in parts.values() for item in items} == {"fused:auto"}
    assert {item.rivals for items in parts.values() for item in items} == {()}
    ((_, items),) = suites.parts("networks", ("float32",), ("resnet18",), suites.COMPILED)
    assert items[0].rivals == ("compile", "compile-cl", "fused:auto-compiled") and items[0].workload.read
    batches = {name: (whole.batch, whole.size) for name, whole in bench_nets.WHOLE.items()}
    assert batches.pop("resnet18-224") == (8, 224) and set(batches.values()) == {(64, 32)}
    (images,) = next(w for w in bench_nets.workloads() if w.variant == "resnet18-224").inputs("cpu")
    assert images.shape == (8, 3, 224, 224)


def test_a_part_and_a_batch_can_be_chosen() -> None:
    arguments = run.arguments_of(["--suite", "networks", "--only", "sspnet", "--batch", "3", "--dtypes", "autocast"])
    ((name, kept, items),) = run.sessions(arguments, CPU)
    assert name == "networks-autocast-sspnet" and not kept and len(items) == 3
    few = run.smaller(items[0], arguments.batch)
    assert [len(x) for x in few.workload.inputs("cpu")] == [3] and run.smaller(items[0], None) is items[0]
    with pytest.raises(SystemExit):
        run.arguments_of(["--suite", "networks", "--only", "odenet"])


@pytest.mark.parametrize("mode", [*bench_nets.WHOLE_MODES, "pgd_step"])
def test_a_turn_does_what_is_counted(mode: str) -> None:
    network = tiny()
    turn = bench_nets.work(network, TWO, mode)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        turn.run()
    flops, _ = bench_nets.count(network, TWO, mode)
    # A training step is counted with the gradient of its image (counts.flops), which its turns do not take.
    steps = {"train": 1, "adv_train": 1, "trades": 2}.get(mode, 0)
    image = 2 * 2 * 4 * 30 * 30 * 27
    assert counter.get_total_flops() == flops - steps * image
    grads = [parameter.grad is not None for parameter in network.parameters()]
    assert all(grads) if steps else not any(grads)
    trainable = mode in ("train", "attack_step", "adv_train", "trades")
    assert {parameter.requires_grad for parameter in network.parameters()} == {trainable}


def test_adversarial_steps_are_those_of_the_library_from_the_same_start() -> None:
    network = tiny()
    network.eval()  # so that the loss below needs no other mode
    attack = bench_nets.attack_of(TWO[0])
    images, labels = attack(network, *TWO, data.labels(2)), data.labels(2)
    assert torch.equal(images, attack(network, *TWO, labels))
    assert 0 < (images - TWO[0]).abs().max() <= bench_nets.RADIUS * (1 + 1e-5)
    bench_nets.work(network, TWO, "adv_train").run()
    found = [parameter.grad for parameter in network.parameters()]
    loss = nn.functional.cross_entropy(network(images), labels)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True) if one is not None)


@pytest.mark.usefixtures("small_roofline")
def test_under_autocast_all_contenders_are_and_are_judged() -> None:
    seen = set()
    real = bench_nets.work

    def work(module: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> workloads.Work:
        assert isinstance(module, contenders.Autocast)
        module.module[0].register_forward_hook(lambda *found: seen.add(found[2].dtype))
        assert module(*inputs).dtype == torch.float32
        return real(module, inputs, mode)

    taking_part = [contenders.CONTENDERS["eager"], contenders.CONTENDERS["eager-cl"], contenders.fused("auto")]
    chosen = replace(workload(blocks), work=work)
    rows = measure.measure(chosen, "train", "autocast", CPU, taking_part, seconds=0.0, rounds=(1, 1))
    assert [row["errors"] for row in rows] == [""] * 3 and {row["dtype"] for row in rows} == {"autocast"}
    assert seen == {torch.bfloat16} and rows[2]["equality"]["ok"] and rows[2]["equality"]["worst"] > 0
    assert rows[2]["ratio_to_better_eager"]["median"] > 0
    # What is not equal under autocast has no speed.
    wrong = contenders.Contender("fused", "auto", True, False, lambda module, inputs: _scaled(module))
    rows = measure.measure(chosen, "forward", "autocast", CPU, [wrong], seconds=0.0, rounds=(1, 1))
    assert rows[0]["errors"].startswith("not equal: output")


def _scaled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module[-1].weight.mul_(1.2)
    return module


def test_a_compiled_network_stays_what_it_is() -> None:
    network = tiny()
    pinned = contenders.Pinned(network, torch.compile(network, backend="eager"))
    assert (
        [name for name, _ in pinned.named_children()] == [name for name, _ in network.named_children()] == list("01234")
    )
    assert torch.equal(pinned(*TWO), tiny_again(network)(*TWO))


@pytest.mark.usefixtures("small_roofline")
def test_a_fused_network_takes_part_compiled() -> None:
    rivals = [name for name in suites.COMPILED if name.startswith("fused")]
    item = suites.Item(workload(blocks), "train", "float32", ())
    taking_part, _ = run.contenders_of(item, CPU, ["eager-cl", "fused:auto", *rivals])
    rows = measure.measure(item.workload, "train", "float32", CPU, taking_part, seconds=0.0, rounds=(1, 1))
    assert [row["errors"] for row in rows] == [""] * 3 and rows[2]["engine"] == "auto-compiled"
    assert [row["ratio_to_uncompiled"] is None for row in rows] == [True, True, False]
    assert rows[2]["ratio_to_uncompiled"]["than"] == "fused:auto" and rows[2]["equality"]["ok"]
    assert rows[0]["ratio_to_best_compiled"] is None  # the project's own is no rival of its own
    assert len(targets.lines(rows)) == 1


def tiny_again(network: nn.Module) -> nn.Module:
    found = tiny()
    found.load_state_dict(network.state_dict())
    return found


def test_networks_of_others_are_read() -> None:
    make = lambda: foreign.PreActResNet((1, 1), 16)  # noqa: E731
    (fused,), _ = run.contenders_of(suites.Item(workload(make, read=True), "forward", "float32", ()), CPU, ["fused"])
    network, _ = fused.make(make(), TWO)
    assert all(isinstance(block, fastode.nn.base.Fused) for block in network.layers.modules() if hasattr(block, "bn1"))
    plain, _ = contenders.fused("auto").make(make(), TWO)
    assert not any(isinstance(block, fastode.nn.base.Fused) for block in plain.modules())


def test_what_is_asked_of_networks() -> None:
    def line(
        variant: str, mode: str, dtype: str = "float32", median: float = 2.0, ceiling: float = 9.0
    ) -> targets.Line:
        ratio = {"median": median, "p20": median, "p80": median, "ceiling": ceiling, "memory": 0.5}
        row = {
            "workload": "networks", "variant": variant, "shape": "3@32", "mode": mode, "dtype": dtype, "errors": "",
            "contender": "fused", "engine": "auto", "ratio_to_better_eager": ratio, "ratio_to_best_compiled": None,
        }  # fmt: skip
        (found,) = targets.lines([row])
        return found

    assert line("ie-resnet-1-18-w16", "train").asked == 3.0 and not line("ie-resnet-1-18-w16", "train").ok
    assert line("ie-resnet-1-18-w16", "train", ceiling=2.2).asked == pytest.approx(0.88 * 2.2)
    assert line("sspnet-3", "trades").asked == 1.7 and line("sspnet-3", "trades", "autocast").asked == 1.0
    assert line("sspnet-3", "attack_step", "autocast").asked == 1.8
    assert line("resnet18-224", "forward", median=0.99).ok is False and line("resnet18-224", "forward", median=1.0).ok
    known = set(bench_nets.WHOLE)
    assert all(set(asked) <= known for asked in targets.WHOLE.values())


def test_the_records_of_networks_are_reported_with_the_targets(tmp_path: Path) -> None:
    assert targets.recorded_in(tmp_path) == [] and targets.lines_of(tmp_path) == [targets.NOTHING]
    folder = tmp_path / "a"
    folder.mkdir()
    head = {"suite": "networks-sspnet", "device": "chip", "threads": 2, "date": "2026-01-02T03", "commit": "0123456789"}
    ratio = {"median": 2.0, "p20": 2.0, "p80": 2.0, "ceiling": 9.0, "memory": 0.5}
    row = {
        "workload": "networks", "variant": "sspnet-3", "shape": "3@32", "mode": "train", "dtype": "float32",
        "errors": "",
        "contender": "fused", "engine": "auto", "ratio_to_better_eager": ratio, "ratio_to_best_compiled": None,
    }  # fmt: skip
    run.write_json(folder / "networks-sspnet.json", {"header": head, "rows": [row]})
    text = targets.write(tmp_path)[0].read_text()
    assert "`networks-*.json`" in text and "0.88 of the ceiling" in text
    assert "| networks sspnet-3 | 3@32 | training step | better eager | 1.80 | 2.00 | 2.00–2.00 | 9.00 | yes |" in text


def test_the_speed_of_attacks_is_of_networks_of_the_papers() -> None:
    assert list(attack_check.NETWORKS) == ["ie-resnet-1-18-w16", "sspnet-3"]
    assert attack_check.NETWORKS["ie-resnet-1-18-w16"].keywords["width"] == 16
    assert attack_check.NETWORKS["sspnet-3"].keywords == {"n": 6}  # of width 16, as the paper has it
    found = {
        "network": "a", "steps": 20, "batch": 128, "than": "torchattacks eager", "seconds": {"ours": 1.0},
        "over_gradients": [1.012, 1.0, 1.02], "times_as_fast": [2.5, 2.4, 2.6],
    }  # fmt: skip
    assert attack_check.in_words(found).splitlines() == [
        "a, PGD-20 of 128 images: 2.50 (2.40–2.60) times as fast as torchattacks eager; +1.2 % (+0.0 to +2.0) beside "
        "the sum of its input gradients",
        "  seconds: {'ours': 1.0}",
    ]
