"""`fastode.attacks`: ours against plain loops, and what they promise of the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_cases import batch, network, seeded
from torch import Tensor, nn

from fastode import attacks


def image_gradient(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf)), leaf)[0]


def length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def plain_pgd(
    model: nn.Module, images: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], eps: float, alpha: float,
    steps: int, norm: str = "linf",
) -> Tensor:  # fmt: skip
    """Madry's loop, written as the papers have it."""
    x = start
    for _ in range(steps):
        gradient = image_gradient(model, x, loss)
        if norm == "linf":
            x = images + (x + alpha * gradient.sign() - images).clamp(-eps, eps)
        else:
            delta = x + alpha * gradient / length(gradient) - images
            x = images + delta * (eps / length(delta)).clamp(max=1)
        x = x.clamp(0, 1)
    return x


def hinge(labels: Tensor, confidence: float) -> Callable[[Tensor], Tensor]:
    """Minus C&W's max(z_y - max over j of z_j, -κ), sample by sample."""

    def loss(logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for z, y in zip(logits, labels, strict=True):
            others = torch.cat([z[:y], z[y + 1 :]]).max()
            total = total - torch.clamp(z[y] - others, min=-confidence)
        return total

    return loss


def test_fgsm_and_pgd_are_the_plain_loops() -> None:
    model = network().eval()
    images, labels = batch(model)

    def ce(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def away(logits: Tensor) -> Tensor:
        return -F.cross_entropy(logits, labels)

    cases: list[tuple[Any, dict[str, Any], Callable[[Tensor], Tensor], tuple[Any, ...]]] = [
        (attacks.fgsm, {}, ce, (0.1, 0.1, 1)),
        (attacks.pgd, {"step_size": 0.02, "steps": 7, "random_start": False}, ce, (0.1, 0.02, 7)),
        (attacks.pgd, {"steps": 5, "random_start": False}, ce, (0.1, 0.05, 5)),
        (attacks.pgd, {"steps": 5, "norm": "l2", "random_start": False}, ce, (0.1, 0.05, 5, "l2")),
        (attacks.pgd, {"steps": 5, "targets": labels, "random_start": False}, away, (0.1, 0.05, 5)),
        (attacks.bim, {"steps": 4}, ce, (0.1, 0.025, 4)),
    ]
    for attack, options, loss, plain in cases:
        found = attack(model, images, labels, eps=0.1, **options)
        assert torch.allclose(found, plain_pgd(model, images, images, loss, *plain), rtol=0, atol=1e-12), attack
    for confidence in (0.05, 50.0):
        options = {"loss": "margin", "confidence": confidence, "steps": 5, "random_start": False}
        found = attacks.pgd(model, images, labels, eps=0.1, **options)
        expected = plain_pgd(model, images, images, hinge(labels, confidence), 0.1, 0.05, 5)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_the_divergence_of_trades_from_normal_noise() -> None:
    model = network().eval()
    images, labels = batch(model)
    with torch.no_grad():
        clean = model(images)
    noise = 0.001 * torch.randn(images.shape, generator=seeded(), dtype=images.dtype)

    def divergence(logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), F.softmax(clean, 1), reduction="sum")

    found = attacks.pgd(
        model, images, labels, eps=0.1, step_size=0.02, steps=4, loss="kl", random_start=0.001, generator=seeded()
    )
    expected = plain_pgd(model, images, (images + noise).clamp(0, 1), divergence, 0.1, 0.02, 4)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_momentum_is_that_of_mi_fgsm() -> None:
    model = network().eval()
    images, labels = batch(model)
    x, g = images, torch.zeros_like(images)
    for _ in range(4):
        gradient = image_gradient(model, x, lambda logits: F.cross_entropy(logits, labels))
        g = 0.9 * g + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        x = torch.min(torch.max(x + 0.025 * g.sign(), images - 0.1), images + 0.1).clamp(0, 1)
    found = attacks.bim(model, images, labels, eps=0.1, steps=4, momentum=0.9)
    assert torch.allclose(found, x, rtol=0, atol=1e-12)
    # Without a chance of a change, DI² is the same.
    same = attacks.di2_fgsm(model, images, labels, eps=0.1, steps=4, momentum=0.9, probability=0.0)
    assert torch.equal(same, found)


@pytest.mark.parametrize("resize", [0.5, 1.5])
def test_di2_shows_the_model_resized_and_padded_images(resize: float) -> None:
    """An image of ones tells in what the model sees how large it became and where it lies."""
    seen: list[Tensor] = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return torch.stack([x.sum((1, 2, 3)), -x.square().sum((1, 2, 3))], 1)

    images = torch.ones(2, 3, 8, 8)
    labels = torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = {"eps": 1e-9, "steps": 60, "resize": resize}
    attacks.di2_fgsm(Looking(), images, labels, probability=0.5, generator=seeded(), **options)
    full = max(8, int(8 * resize))
    corners, sides, unchanged = set(), set(), 0
    for x in seen:
        filled = x[0, 0] > 0.5
        if x.shape[-1] == 8 and filled.all():
            unchanged += 1
            continue
        rows, columns = (filled.any(dim).nonzero().squeeze(1) for dim in (1, 0))
        side = len(rows)
        assert x.shape[-2:] == (full, full) and len(columns) == side
        assert torch.equal(filled.float(), torch.outer(filled.any(1).float(), filled.any(0).float()))
        sides.add(side)
        corners.add((int(rows[0]), int(columns[0])))
    assert sides == set(range(min(8, int(8 * resize)), full)) and len(corners) > 6
    assert 18 <= unchanged <= 42  # binomial, 60 draws of one half


def test_spsa_estimates_the_gradient_and_adam_follows_it() -> None:
    """On a linear model an estimate over all signs is the gradient itself; here it is its mean up to noise."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images, labels = 0.25 + 0.5 * torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    others = (model(images) - 1e9 * F.one_hot(labels, 3)).argmax(1)
    weight = model[1].weight.detach()
    truth = (weight[others] - weight[labels]).view_as(images)
    # One step of Adam is a step by signs; the largest entries are above the noise of 2,000 directions.
    moved = attacks.spsa(model, images, labels, eps=0.2, steps=1, samples=2000, delta=1e-3, generator=seeded())
    clear = truth.abs() > 6 * truth.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / 2000**0.5
    assert int(clear.sum()) > 24
    assert torch.equal((moved - images).sign()[clear], truth.sign()[clear])
    assert torch.allclose((moved - images).abs(), torch.full_like(images, 0.01), atol=1e-6)
    far = attacks.spsa(model, images, labels, eps=0.05, steps=30, generator=seeded())
    assert (far - images).abs().max() <= 0.05 + 1e-12
    plain = attacks.pgd(model, images, labels, eps=0.05, loss="margin", random_start=False)

    def margin(x: Tensor) -> Tensor:
        return -hinge(labels, 1e9)(model(x))

    assert margin(far) < margin(images) - 0.8 * (margin(images) - margin(plain))
    chunks = [
        attacks.spsa(model, images, labels, eps=0.05, steps=3, generator=seeded(), batch_size=size)
        for size in (1, 24, 4096)
    ]
    assert torch.allclose(chunks[0], chunks[1]) and torch.allclose(chunks[0], chunks[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_stay_in_the_ball_the_bounds_and_the_memory_format(norm: str, dtype: torch.dtype) -> None:
    model = network(dtype).eval()
    images, labels = batch(model, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    for options in ({}, {"restarts": 3}, {"early_stop": True}, {"early_stop": True, "restarts": 2}, {"loss": "kl"}):
        found = attacks.pgd(model, images, labels, eps=0.3, norm=norm, generator=seeded(), **options)  # type: ignore[arg-type]
        delta = (found - images).flatten(1)
        assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= 0.3 * (1 + 1e-6)
        assert found.min() >= 0 and found.max() <= 1
        assert found.is_contiguous(memory_format=torch.channels_last) and not found.requires_grad
        assert found.dtype == dtype and torch.equal(images, before)


def test_random_starts_fill_the_ball() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, labels = torch.full((4000, 3, 2, 2), 0.5), torch.zeros(4000, dtype=torch.int64)
    options: dict[str, Any] = {"eps": 0.2, "step_size": 1e-9, "steps": 1}
    delta = attacks.pgd(model, images, labels, generator=seeded(), **options) - images
    assert abs(float(delta.mean())) < 0.003 and abs(float(delta.std()) - 0.2 / 3**0.5) < 0.003
    lengths = (
        (attacks.pgd(model, images, labels, norm="l2", generator=seeded(), **options) - images).flatten(1).norm(dim=1)
    )
    # P(length < r) = (r / 0.2)^12: the median lies at 0.2 / 2^(1/12).
    assert abs(float((lengths < 0.2 * 0.5 ** (1 / 12)).float().mean()) - 0.5) < 0.04 and lengths.max() <= 0.2001


def test_normalised_images_have_bounds_and_radii_of_each_channel() -> None:
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])

    class Normalised(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1))

    inner = network(torch.float32).eval()
    model = Normalised(inner)
    images, labels = batch(model, dtype=torch.float32)
    expected = attacks.pgd(model, images, labels, eps=0.05, step_size=0.01, random_start=False)
    found = attacks.pgd(
        inner,
        (images - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1),
        labels,
        eps=0.05 / deviation,
        step_size=(0.01 / deviation).tolist(),
        bounds=(-mean / deviation, (1 - mean) / deviation),
        random_start=False,
    )
    assert torch.allclose(found * deviation.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1), expected, atol=1e-5)


def test_a_generator_makes_attacks_repeatable() -> None:
    model = network().eval()
    images, labels = batch(model)
    for attack, options in ((attacks.pgd, {}), (attacks.di2_fgsm, {}), (attacks.spsa, {"steps": 3})):
        runs = [attack(model, images, labels, eps=0.1, generator=seeded(s), **options) for s in (5, 5, 6)]  # type: ignore[operator]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_early_stop_leaves_out_what_is_fooled() -> None:
    model = network().eval()
    images, labels = batch(model, 16)
    options: dict[str, Any] = {"eps": 0.13, "step_size": 0.02, "steps": 15, "generator": seeded()}
    whole = attacks.run("pgd", model, images, labels, **options)
    options["generator"] = seeded()
    early = attacks.run("pgd", model, images, labels, early_stop=True, **options)
    assert torch.equal(early.images[0], images[0]) and not early.correct[0] and early.success[0]
    assert torch.equal(early.success, whole.success) and 4 < int(early.success.sum()) < 16
    assert torch.equal(early.images[~early.success], whole.images[~early.success])
    assert (early.linf <= whole.linf + 1e-12).all() and early.queries.gradient < whole.queries.gradient
    assert whole.queries == attacks.Queries(16 * 15, 16 * 15)


def test_restarts_keep_the_first_success_else_the_largest_loss() -> None:
    model = network().eval()
    images, labels = batch(model, 16)
    options: dict[str, Any] = {"eps": 0.15, "steps": 2, "step_size": 0.01}
    generator = seeded()
    singles = [attacks.pgd(model, images, labels, generator=generator, **options) for _ in range(3)]
    found = attacks.pgd(model, images, labels, generator=seeded(), restarts=3, **options)
    left = attacks.pgd(model, images, labels, generator=seeded(), restarts=3, early_stop=True, **options)
    with torch.no_grad():
        logits = [model(x) for x in singles]
        wrong = torch.stack([z.argmax(1) != labels for z in logits])
        losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    assert wrong.any(0).any() and not wrong.any(0).all()
    for i in range(16):
        best = int(wrong[:, i].int().argmax()) if wrong[:, i].any() else int(losses[:, i].argmax())
        assert torch.equal(found[i], singles[best][i])
        if not wrong[:, i].any():
            assert torch.equal(left[i], found[i])
    with torch.no_grad():
        assert torch.equal(model(left).argmax(1) != labels, wrong.any(0))
