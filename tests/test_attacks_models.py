"""What `fastode.attacks` does with a model: left as it was, fused, with other gradients, as a graph, in a report."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_cases import CLASSES, batch, network, seeded
from torch import Tensor, nn

import fastode
from fastode import attacks, nets, reference
from fastode.attacks import held as holding
from fastode.attacks import report
from fastode.attacks.task import uncounted
from fastode.fusion import graphs


class Failing(nn.Module):
    """Fails at its third call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.inner[1].running_mean = self.inner[1].running_mean + 1  # another tensor in its place
        if self.calls == 3:
            raise RuntimeError("at the third call")
        return self.inner(x)


def state_of(model: nn.Module) -> list[Any]:
    return [
        [part.training for part in model.modules()],
        [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
    ]


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(mode: str, fails: bool) -> None:
    model = Failing(network())
    images, labels = batch(model.inner)
    model.train()
    model.inner[1].eval()
    model.inner[0].weight.requires_grad_(False)
    F.cross_entropy(model.inner(images), labels).backward()
    held, before = [p.grad for p in model.parameters()], state_of(model)
    model.calls = 0 if fails else 10
    with torch.no_grad():  # the attack takes gradients all the same
        if fails:
            with pytest.raises(RuntimeError, match="at the third call"):
                attacks.pgd(model, images, labels, eps=0.1, mode=mode)
        else:
            for attack in (attacks.pgd, attacks.spsa):
                attack(model, images, labels, eps=0.1, steps=3, mode=mode)
        assert not torch.is_grad_enabled()
    after = state_of(model)
    assert all(now is was for now, was in zip((p.grad for p in model.parameters()), held, strict=True))
    assert str(after) == str(before)


def test_a_graph_from_before_the_attack_is_still_good() -> None:
    model = network()
    images, labels = batch(model)
    loss = F.cross_entropy(model(images), labels)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    attacks.pgd(model, images, labels, eps=0.1, steps=2, mode="train")
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))  # type: ignore[arg-type]


def test_under_inference_mode_and_autocast() -> None:
    model = network(torch.float32).eval()
    images, labels = batch(model, dtype=torch.float32)
    expected = attacks.pgd(model, images, labels, eps=0.1, random_start=False)
    with torch.inference_mode():
        found = attacks.pgd(model, images.clone(), labels, eps=0.1, random_start=False)
    assert torch.equal(found, expected)
    kinds: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = attacks.pgd(model, images, labels, eps=0.1, random_start=False)
    assert set(kinds) == {torch.bfloat16} and low.dtype == torch.float32
    assert (low - images).abs().max() <= 0.1 + 1e-6 and ((low - expected).abs() < 1e-6).float().mean() > 0.5


def test_buffers_are_put_back_when_each_of_their_cards_has_compared_them(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"waits for {device}"))

    class Flag:
        def __bool__(self) -> bool:
            events.append("reads")
            return False

    class Buffer:
        """As of a card, with what the comparison asks of it."""

        is_cuda = True

        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

        def __ne__(self, other: object) -> Any:
            return SimpleNamespace(any=lambda: SimpleNamespace(to=lambda *_, **__: Flag()))

    made: list[Any] = [(nn.Module(), name, Buffer(name), None) for name in ("cuda:0", "cuda:1", "cuda:1")]
    holding._put_back(made)
    assert sorted(events[:2]) == ["waits for cuda:0", "waits for cuda:1"] and events[2:] == ["reads"] * 3


def test_fused_networks_are_attacked_as_their_reference() -> None:
    torch.manual_seed(0)
    plain = nets.sspnet_mnist("ssp3", n=1, width=8).double().eval()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    labels = plain(images).argmax(1)
    runs = [attacks.run("pgd", net, images, labels, eps=0.02, steps=3, generator=seeded()) for net in (plain, fused)]
    assert torch.allclose(runs[0].images, runs[1].images, rtol=0, atol=1e-9)
    assert runs[0].notes == () and runs[1].notes == (report.FUSED,)
    assert report.FUSED in str(runs[1])


def test_the_solvers_gradient_is_set_and_put_back() -> None:
    torch.manual_seed(0)
    block = reference.SOBlock(reference.SkewPair(3, 4), solver="dopri5")
    fixed = reference.SOBlock(reference.SkewPair(3, 4), solver="euler")
    gradients: list[tuple[str, str]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fixed = block, fixed

        def forward(self, x: Tensor) -> Tensor:
            gradients.append((block.gradient, fixed.gradient))
            if len(gradients) == 3:
                raise RuntimeError("the third")
            y = block(x)
            return torch.cat([part.mean((2, 3)) for part in (y if isinstance(y, tuple) else (y,))], 1)

    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    model = Model()
    with pytest.raises(RuntimeError, match="the third"):
        attacks.pgd(model, images, labels, eps=0.1, solver_gradient="exact")
    assert gradients == [("exact", "solver")] * 3 and (block.gradient, fixed.gradient) == ("solver", "solver")
    usual = attacks.run("fgsm", model, images, labels, eps=0.1)
    exact = attacks.run("fgsm", model, images, labels, eps=0.1, solver_gradient="exact")
    assert usual.notes == (report.MASKED,) and exact.notes == ()
    assert attacks.run("spsa", model, images, labels, eps=0.1, steps=1, samples=1).notes == ()
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert attacks.run("transfer", other, images, labels, eps=0.1, source=model).notes == (report.MASKED,)
    assert attacks.run("transfer", model, images, labels, eps=0.1, source=other).notes == ()


def test_transfer_attacks_another_model() -> None:
    model, oracle = network().eval(), network().eval()
    torch.manual_seed(9)
    oracle[5].reset_parameters()
    images, labels = batch(model)
    found = attacks.run("transfer", model, images, labels, source=oracle, eps=0.2)
    assert torch.equal(found.images, attacks.fgsm(oracle, images, labels, eps=0.2))
    with torch.no_grad():
        assert torch.equal(found.success, model(found.images).argmax(1) != labels)
    more = attacks.transfer(model, images, labels, source=oracle, attack=attacks.bim, eps=0.2, steps=3)
    assert torch.equal(more, attacks.bim(oracle, images, labels, eps=0.2, steps=3))


def test_the_report_of_batches_is_that_of_all() -> None:
    model = network().eval()
    images, labels = batch(model, 7)
    targets = (labels + 1) % CLASSES
    whole, parts = (
        attacks.run("bim", model, images, labels, eps=0.3, targets=targets, batch_size=size) for size in (None, 3)
    )
    assert torch.allclose(whole.images, parts.images) and torch.equal(whole.success, parts.success)
    assert whole.queries == parts.queries == attacks.Queries(70, 70)
    with torch.no_grad():
        assert torch.equal(whole.success, model(whole.images).argmax(1) == targets)
    delta = (whole.images - images).flatten(1)
    assert torch.equal(whole.linf, delta.abs().amax(1)) and torch.equal(whole.l2, delta.norm(dim=1))
    assert whole.accuracy == pytest.approx(6 / 7)
    assert whole.robust_accuracy == float((whole.correct & ~whole.success).double().mean())
    own = attacks.run(lambda model, images, labels: images, model, images, labels)
    assert own.robust_accuracy == own.accuracy and own.queries == attacks.Queries(0, 0)


class Replays:
    """A capture on the CPU: a replay calls again."""

    captured = 0

    def capture(self, run: Callable[[], Sequence[Any]], pool: Any) -> tuple[list[Any], Callable[[], object]]:
        self.captured += 1

        def replay() -> None:
            with uncounted():  # on a card no Python runs
                run()

        return [], replay


def test_a_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    images, labels = batch(model)
    with pytest.raises(
        ValueError, match=r"^graphed must be False where images are on cpu: graphs are of CUDA devices$"
    ):
        attacks.pgd(model, images, labels, eps=0.1, graphed=True)
    replays = Replays()
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "capture", replays.capture)
    monkeypatch.setattr(graphs, "pool_handle", lambda: None)
    plain = attacks.run("pgd", model, images, labels, eps=0.1, restarts=2, generator=seeded())
    found = attacks.run("pgd", model, images, labels, eps=0.1, restarts=2, generator=seeded(), graphed=True)
    assert torch.equal(found.images, plain.images) and found.queries == plain.queries
    assert replays.captured == 1
    found, plain = (
        attacks.run("bim", model, images, labels, eps=0.1, momentum=0.9, graphed=graphed) for graphed in (True, False)
    )
    assert torch.equal(found.images, plain.images) and found.queries == plain.queries


def test_the_package_imports_attacks_and_training_when_they_are_asked_for() -> None:
    late = {"fastode.attacks", "fastode.released", "fastode.robustness", "fastode.training"}
    late |= {"lightning_fabric", "matplotlib"}
    code = (
        f"import sys, fastode; assert not {late} & set(sys.modules); fastode.attacks.pgd; "
        "fastode.training.Trainer; fastode.robustness.evaluate; fastode.released.load; "
        "assert 'lightning_fabric' not in sys.modules; "
        "print('asked')"
    )
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ran.stdout == "asked\n", ran.stderr
    with pytest.raises(AttributeError, match=re.escape("module 'fastode' has no attribute 'attack'")):
        fastode.attack  # type: ignore[attr-defined]  # noqa: B018
