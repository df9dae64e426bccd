"""fastode.training.yopo: loss, gradients and statistics of a plain implementation, and how often it asks what."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import nets, reference, training

LABELS = torch.tensor([0, 2, 1, 2])


def network() -> nn.Sequential:
    """The first module has batch norm too: its own steps must leave the running statistics alone."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Tanh())
    block = reference.SSP2(reference.PreActBranch(2, norm="batch"))
    return nn.Sequential(first, block, nn.Flatten(), nn.Linear(8, 3)).double().train()


def images() -> Tensor:
    return torch.rand(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain(
    model: nn.Sequential, x: Tensor, eps: Tensor, step: float, outer: int, inner: int
) -> tuple[float, list[Tensor], Tensor]:
    """The sum of the losses, all gradients, and the last images, by backward passes and hand-made steps."""
    x0, first, rest = x, model[0], model[1:]
    drawn = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    x = (x0 + eps * (2 * drawn - 1)).clamp(0, 1)
    total, buffers = 0.0, {}
    model.zero_grad()
    for _ in range(outer):
        between = first(x).detach().requires_grad_()
        loss = F.cross_entropy(rest(between), LABELS)
        loss.backward()  # of the rest's parameters alone: the graph is cut between the two
        total += loss.item()
        buffers = {name: each.clone() for name, each in first.named_buffers()}
        for step_number in range(inner + 1):
            leaf = x.detach().requires_grad_()
            hamiltonian = (between.grad * first(leaf)).sum()
            if step_number == inner:
                hamiltonian.backward()
            else:
                (gradient,) = torch.autograd.grad(hamiltonian, leaf)
                x = torch.minimum(torch.maximum(x + step * gradient.sign(), x0 - eps), x0 + eps).clamp(0, 1)
        for name, each in first.named_buffers():
            each.copy_(buffers[name])
    return total, [each.grad for each in model.parameters()], x


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("each_channel", [False, True])
def test_loss_gradients_and_statistics_are_those_of_a_plain_implementation(
    outer: int, inner: int, each_channel: bool
) -> None:
    eps = torch.tensor([0.1, 0.2] if each_channel else [0.1, 0.1], dtype=torch.float64)
    model, other = network(), network()
    found = training.yopo(
        model, images(), LABELS, first=model[0], eps=eps if each_channel else 0.1, step_size=0.07, outer=outer,
        inner=inner, generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert all(each.grad is None for each in model.parameters())  # until the backward pass
    loss, gradients, moved = plain(other, images(), eps.view(1, 2, 1, 1), 0.07, outer, inner)
    assert (moved - images()).abs().amax() > 0.09  # some of it was cut off at the radius
    (2 * found.value).backward()
    assert found.value.item() == pytest.approx(loss, rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-8, atol=1e-12)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(each.requires_grad for each in model.parameters()) and model.training


def test_the_rest_of_the_network_is_asked_only_in_the_propagations() -> None:
    model, asked = network(), {"first": 0, "rest": 0}
    model[0].register_forward_pre_hook(lambda *_: asked.update(first=asked["first"] + 1))
    model[3].register_forward_pre_hook(lambda *_: asked.update(rest=asked["rest"] + 1))
    training.yopo(model, images(), LABELS, first=model[0], eps=0.1, step_size=0.02, outer=3, inner=4)
    assert asked == {"first": 3 * (1 + 4 + 1), "rest": 3}


def test_frozen_parameters_get_no_gradient() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    training.yopo(model, images(), LABELS, first=model[0], eps=0.1, step_size=0.02, outer=2).value.backward()
    without = [name for name, each in model.named_parameters() if each.grad is None]
    assert without == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "3.bias"]


def test_it_trains_a_fused_network_as_the_reference() -> None:
    torch.manual_seed(0)
    model = nets.sspnet("ssp3", n=1, width=4).double()
    fused = copy.deepcopy(model)
    fastode.fuse(fused)
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64)
    rows = []
    for each in (model, fused):
        loss = partial(training.yopo, first=each.stem, eps=0.1, step_size=0.02, outer=2, inner=2)
        optimizer = partial(torch.optim.SGD, lr=0.05)
        rows.append(training.Trainer(each, loss, epochs=3, optimizer=optimizer).fit([(x, torch.arange(8))]))
    assert rows[0][2]["loss"] < rows[0][0]["loss"]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-8)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu_().flatten(1))


class Twice(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear((self.conv(x) + self.conv(x)).flatten(1))


class Without(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        return self.linear(x[:, :, :2, :2].flatten(1))


class Doubled(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(2 * x).flatten(1))


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (Doubled, {"first": nn.Conv2d(2, 2, 3)}, ValueError,
         "first must be a module inside the model, got a Conv2d that is not"),
        (Doubled, {"first": "conv"}, TypeError, "first must be an nn.Module, got 'conv'"),
        (Doubled, {"outer": 0}, ValueError, "outer must be an int >= 1, got 0"),
        (Doubled, {"inner": 1.5}, TypeError, "inner must be an int >= 1, got 1.5"),
        (Doubled, {"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0"),
        (Doubled, {"step_size": -1.0}, ValueError, "step_size must be a finite number > 0, got -1.0"),
        (Doubled, {"bounds": (0.0, 0.5)}, ValueError, "images must be within bounds, 0.0 to 0.5, got values from"),
        (Doubled, {}, ValueError,
         "first must be a module that the images themselves go into, got one that sees something else"),
        (InPlace, {}, ValueError,
         "first must be a module whose output stays as it is, got one that the model changes in place"),
        (Twice, {}, ValueError, "first must be a module that the model calls once for a batch of images, got one that "
         "it calls 2 times; a fused chain calls none of its modules"),
        (Without, {}, ValueError,
         "first must be a module whose output the logits depend on, got one that they do not"),
    ],
)  # fmt: skip
def test_refusals(make: type[InPlace], change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make().double()
    options = {"first": model.conv, "eps": 0.1, "step_size": 0.02, **change}
    with pytest.raises(error) as caught:
        training.yopo(model, images(), LABELS, **options)
    assert str(caught.value).startswith(message)
    assert not model.conv._forward_hooks
