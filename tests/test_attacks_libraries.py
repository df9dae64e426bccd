"""The attacks behind which libraries stand, with stand-ins for these: what reaches them, and what is made of theirs.

`python -m benchmarks.attack_check` runs the libraries themselves.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from attack_cases import batch, network, seeded
from torch import Tensor, nn

from fastode import attacks


class Art:
    """Stands for ART: every attack moves its images by SHIFT, and notes what it was given."""

    shift: float = 0.25

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.drawn: list[float] = []

    def attack(self, name: str) -> Any:
        def make(classifier: Any, **options: Any) -> Any:
            self.given = {"name": name, "classifier": classifier, **options}
            return SimpleNamespace(generate=self.generate)

        return make

    def generate(self, x: Any, y: Any) -> Any:
        self.given |= {"x": x, "y": y}
        self.drawn.append(float(numpy.random.uniform()))  # noqa: NPY002 - the global generator, as ART
        unit = self.given["classifier"].model
        unit.train()  # what a library sets on the model it got
        leaf = torch.from_numpy(x).requires_grad_()
        (gradient,) = torch.autograd.grad(unit(leaf).sum(), leaf)
        assert gradient.shape == leaf.shape
        moved = numpy.clip(x + self.shift, 0, 1)
        moved[-1] = x[-1]  # the last one fails
        return moved


def classifier(model: nn.Module, loss: Any, shape: Any, classes: int, **options: Any) -> Any:
    return SimpleNamespace(model=model, shape=shape, classes=classes, **options)


@pytest.fixture
def art(monkeypatch: pytest.MonkeyPatch) -> Art:
    found = Art()
    names = ("art", "art.attacks", "art.attacks.evasion", "art.estimators", "art.estimators.classification")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("CarliniL2Method", "CarliniLInfMethod", "AutoProjectedGradientDescent"):
        setattr(modules["art.attacks.evasion"], name, found.attack(name))
    modules["art.attacks"].evasion = modules["art.attacks.evasion"]  # type: ignore[attr-defined]
    modules["art.estimators.classification"].PyTorchClassifier = classifier  # type: ignore[attr-defined]
    return found


class Brighter(nn.Module):
    """Takes an image for class 1 if it is brighter than 0 on average; of pixels in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        bright = self.weight * x.mean((1, 2, 3))
        return torch.stack([-bright, bright, -10 + 0 * bright], 1)


BOUNDS = (-1.0, 1.0)


def levels() -> tuple[Tensor, Tensor]:
    """Four images of one value each and their classes; the first is fooled from the start, the last will not be."""
    values = torch.tensor([-0.5, -0.2, -0.9, -0.1], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 0])
    return values.view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous(), labels


def test_a_library_sees_images_from_zero_to_one_and_what_is_not_fooled(art: Art) -> None:
    model = Brighter()
    images, labels = levels()
    moved = attacks.cw_l2(model, images, labels, bounds=BOUNDS, steps=7, searches=3, constant=2.0, confidence=0.5)
    # Twice as far apart as from 0 to 1: a shift of 0.25 there is one of 0.5 here.
    assert torch.allclose(moved[1], images[1] + 0.5) and moved.dtype == torch.float64
    for unchanged in (0, 2, 3):  # fooled already; moved, but not enough; failed
        assert torch.equal(moved[unchanged], images[unchanged])
    given = art.given
    assert given["x"].dtype == numpy.float32 and given["x"].shape == (3, 3, 2, 2) and given["y"].tolist() == [0, 0, 0]
    assert numpy.allclose(given["x"][:, 0, 0, 0], [0.4, 0.05, 0.45])
    options = {name: given[name] for name in ("max_iter", "binary_search_steps", "initial_const", "confidence")}
    assert options == {"max_iter": 7, "binary_search_steps": 3, "initial_const": 2.0, "confidence": 0.5}
    assert (given["name"], given["targeted"], given["verbose"]) == ("CarliniL2Method", False, False)
    assert (given["classifier"].shape, given["classifier"].classes) == ((3, 2, 2), 3)
    assert given["classifier"].clip_values == (0.0, 1.0) and given["classifier"].device_type == "cpu"
    assert all(x.min() >= -1 and x.max() <= 1 and x.dtype == torch.float64 for x in model.seen)


def test_farther_than_eps_does_not_count(art: Art) -> None:
    images, labels = levels()
    for eps, reached in ((0.49, False), (0.51, True)):
        moved = attacks.cw_linf(Brighter(), images, labels, bounds=BOUNDS, eps=eps)
        assert torch.equal(moved[1], images[1]) != reached
    for eps, reached in ((0.5 * 12**0.5 - 0.01, False), (0.5 * 12**0.5 + 0.01, True)):
        moved = attacks.cw_l2(Brighter(), images, labels, bounds=BOUNDS, eps=eps)
        assert torch.equal(moved[1], images[1]) != reached


def test_apgd_is_given_its_radius_in_units_of_zero_to_one(art: Art) -> None:
    images, labels = levels()
    moved = attacks.apgd(Brighter(), images, labels, bounds=BOUNDS, eps=0.4, steps=9, restarts=2, loss="dlr")
    given = art.given
    names = ("name", "norm", "eps", "eps_step", "max_iter", "nb_random_init", "loss_type")
    assert [given[name] for name in names] == [
        "AutoProjectedGradientDescent", "inf", 0.2, pytest.approx(0.4), 9, 2, "difference_logits_ratio",
    ]  # fmt: skip
    # The stand-in goes farther than it may: what is returned does not.
    assert (moved - images).abs().max() <= 0.4 + 1e-9 and torch.allclose(moved[1], images[1] + 0.4)
    targets = torch.ones(4, dtype=torch.int64)
    attacks.apgd(Brighter(), images, labels, bounds=BOUNDS, eps=0.4, targets=targets)
    assert art.given["targeted"] and art.given["y"].tolist() == [1, 1, 1, 1]
    two = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with pytest.raises(ValueError, match=r"^loss must be 'ce' with fewer than 3 classes, got 'dlr' with 2$"):
        attacks.apgd(two, images, two(images).argmax(1), bounds=BOUNDS, eps=0.4, loss="dlr")


def test_the_model_is_out_of_the_librarys_reach_and_global_random_numbers_are_put_back(art: Art) -> None:
    model = network().train()
    images, labels = batch(model)
    before = [buffer.clone() for buffer in model.buffers()]
    numpy.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    for seed in (1, 1, 2):
        attacks.apgd(model, images, labels, eps=0.3, generator=seeded(seed))
    assert art.drawn[0] == art.drawn[1] != art.drawn[2]
    after = float(numpy.random.uniform()), float(torch.rand(()))  # noqa: NPY002
    numpy.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert after == (float(numpy.random.uniform()), float(torch.rand(())))  # noqa: NPY002
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(now, was) for now, was in zip(model.buffers(), before, strict=True))
    art.generate = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        attacks.apgd(model, images, labels, eps=0.3)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_report_counts_what_a_library_asks(art: Art) -> None:
    images, labels = levels()
    report = attacks.run("cw_l2", Brighter(), images, labels, bounds=BOUNDS)
    # All of them before, the three that are left by the stand-in, and all of them after.
    assert report.queries == attacks.Queries(4 + 3 + 4, 3) and report.robust_accuracy == 0.5


class Foolbox(ModuleType):
    """Stands for foolbox: a start that is found for all but the last image, and a walk that comes half way back."""

    def __init__(self) -> None:
        super().__init__("foolbox")
        self.given: dict[str, Any] = {}
        self.criteria = SimpleNamespace(Misclassification=lambda labels: labels)
        self.attacks = SimpleNamespace(
            LinearSearchBlendedUniformNoiseAttack=lambda **options: SimpleNamespace(run=self.start),
            BoundaryAttack=self.walker,
        )

    def PyTorchModel(self, model: nn.Module, bounds: Any, device: Any) -> nn.Module:
        assert not model.training and bounds == (0, 1)
        return model

    def start(self, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        found = torch.ones_like(x)
        found[-1] = x[-1]
        return found

    def walker(self, **options: Any) -> Any:
        def run(model: nn.Module, x: Tensor, labels: Tensor, starting_points: Tensor) -> Tensor:
            self.given = {**options, "x": x, "labels": labels, "starts": starting_points}
            return x + (starting_points - x) * 0.75

        return SimpleNamespace(run=run)


def test_boundary_walks_from_the_starts_that_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Foolbox()
    monkeypatch.setitem(sys.modules, "foolbox", box)
    images, labels = levels()
    moved = attacks.boundary(Brighter(), images, labels, bounds=BOUNDS, steps=40, step_size=0.2, source_step=0.3)
    assert (box.given["steps"], box.given["spherical_step"], box.given["source_step"]) == (40, 0.2, 0.3)
    assert len(box.given["x"]) == 2 and box.given["labels"].tolist() == [0, 0]
    assert torch.equal(moved[0], images[0]) and torch.equal(moved[3], images[3])
    assert torch.allclose(moved[1:3], images[1:3] + 0.75 * (1 - images[1:3]))
    near = attacks.boundary(Brighter(), images, labels, bounds=BOUNDS, eps=4.0)
    assert torch.equal(near[2], images[2]) and not torch.equal(near[1], images[1])
