"""fastode.training: each loss and its gradients against a plain implementation on a tiny network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastode import attacks, reference, training

LABELS = torch.tensor([0, 2, 1, 2])


def network() -> nn.Module:
    torch.manual_seed(0)
    block = reference.SSP2(reference.PreActBranch(2, norm="batch"))
    return nn.Sequential(nn.Conv2d(1, 2, 3), block, nn.Flatten(), nn.Linear(8, 3)).double().train()


def images() -> Tensor:
    return torch.rand(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One step of the sign of the gradient in eval mode."""
    other = copy.deepcopy(model).eval()
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(other(x), y), x)
    return x + 0.1 * gradient.sign()  # with a graph: the loss has to leave it out


def plain_natural(model: nn.Module, x: Tensor) -> Tensor:
    return -model(x).softmax(1).log()[torch.arange(4), LABELS].mean()


def plain_noise(model: nn.Module, x: Tensor) -> Tensor:
    drawn = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    return plain_natural(model, x + (0.6 * drawn - 0.3))


def plain_adversarial(model: nn.Module, x: Tensor) -> Tensor:
    return plain_natural(model, attack(model, x, LABELS).detach())


def plain_trades(model: nn.Module, x: Tensor) -> Tensor:
    moved = attack(model, x, LABELS).detach()
    logits = model(x)
    clean, robust = logits.softmax(1), model(moved).softmax(1)
    natural = -clean.log()[torch.arange(4), LABELS].mean()
    return natural + 6.0 * (clean * (clean.log() - robust.log())).sum() / 4


CASES: dict[str, tuple[Callable[..., training.Loss], Callable[[nn.Module, Tensor], Tensor]]] = {
    "natural": (lambda m, x: training.natural(m, x, LABELS), plain_natural),
    "noise": (
        lambda m, x: training.uniform_noise(m, x, LABELS, eps=0.3, generator=torch.Generator().manual_seed(2)),
        plain_noise,
    ),
    "adversarial": (lambda m, x: training.adversarial(m, x, LABELS, attack=attack), plain_adversarial),
    "trades": (lambda m, x: training.trades(m, x, LABELS, attack=attack), plain_trades),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_statistics_are_those_of_a_plain_implementation(name: str) -> None:
    ours, plain = CASES[name]
    model, other = network(), network()
    found, wanted = ours(model, images()), plain(other, images())
    found.value.backward()
    wanted.backward()
    torch.testing.assert_close(found.value, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not any(value.requires_grad for value in found.log.values())


def test_pgd_by_the_divergence_is_an_attack_for_trades() -> None:
    model = network()
    pgd = partial(attacks.pgd, eps=0.1, steps=3, loss="kl", random_start=0.001)
    found = training.trades(model, images(), LABELS, attack=partial(pgd, generator=torch.Generator().manual_seed(3)))
    model = network()
    moved = pgd(model, images(), LABELS, generator=torch.Generator().manual_seed(3))
    wanted = training.trades(model, images(), LABELS, attack=lambda model, x, y: moved)
    assert torch.equal(found.value, wanted.value)
    assert found.log["divergence"] > 0
    assert model.training


X = torch.rand(2, 1, 2, 2)
Y = torch.tensor([0, 1])
TINY = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: training.natural(TINY, X, Y.float()), TypeError, "labels must be of dtype int64, got float32"),
        (lambda: training.natural(TINY, X, Y[:1]), ValueError, "labels must be a tensor [2], got shape [1]"),
        (lambda: training.natural(TINY, X, Y + 1), ValueError, "labels must be in [0, 2), got 1 to 2"),
        (lambda: training.natural(TINY, X.to("meta"), Y.to("meta")), ValueError,
         "images must be on the model's device cpu, got meta"),
        (lambda: training.natural(TINY, X, Y.to("meta")), ValueError,
         "labels must be on the images' device cpu, got meta"),
        (lambda: training.natural(nn.Identity(), X, Y), ValueError,
         "model must return logits [2, classes], got shape [2, 1, 2, 2]"),
        (lambda: training.uniform_noise(TINY, X, Y, eps=0), ValueError, "eps must be a finite number > 0, got 0"),
        (lambda: training.trades(TINY, X, Y, attack=None), TypeError,
         "attack must be a function of (model, images, labels), got None"),
        (lambda: training.adversarial(TINY, X, Y, attack=lambda m, x, y: x[:1]), ValueError,
         "attack must return images [2, 1, 2, 2], got a tensor of shape [1, 1, 2, 2]"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_images_of_another_dtype_than_the_models_are_named() -> None:
    message = r"^images must be of the model's dtype float32, or autocast be on, got float16: ."
    for loss in (training.natural, partial(training.uniform_noise, eps=0.1)):
        with pytest.raises(TypeError, match=message):
            loss(TINY, X.half(), Y)
