"""Whole networks: forwards, PGD-10 or one step of it, a training step, and adversarial ones on PGD-10's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastode import attacks, nets, training

from . import counts, data, foreign
from .workloads import BATCH, TRAINABLE, WIDE_BATCH, Inputs, Work, Workload

MODES = ("forward", "pgd10", "train", "adv_train")
WHOLE_MODES = ("train", "attack_step", "forward", "adv_train", "trades")
# Madry et al. 2018 at the papers' radius, in the data's normalised units.
PGD_STEPS, RADIUS, STRIDE = 10, 8 / 255, 2 / 255

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ie-resnet-1-18": (partial(nets.ie_resnet18, steps=1, step_size=0.1), "full"),
    "ie-resnet-3-18": (partial(nets.ie_resnet18, steps=3, step_size=0.1), "full"),
    "sspnet-2": (partial(nets.sspnet, "ssp2", n=6), "full"),
    "sspnet-3": (partial(nets.sspnet, "ssp3", n=6), "full"),
    "sspnet-adap": (partial(nets.sspnet, "adap", n=6), "full"),
    "sonet": (nets.sonet, "sonet"),
    "soblock-resnet10": (nets.soblock_resnet10, "sonet"),
    "sonet-32": (partial(nets.sonet, width=32), "sonet"),
    "soblock-resnet10-32": (partial(nets.soblock_resnet10, width=32), "sonet"),
    "odenet": (nets.odenet, "odenet"),
    "wrn-34-10": (partial(nets.wide_resnet34_10, skip="ie"), "wide"),
}


@dataclass(frozen=True)
class Whole:
    """A network as a user trains it.

    Attributes:
        make: makes it.
        batch: of images.
        size: of an image.
        read: whether it is others' and its forwards are read.
    """

    make: Callable[[], nn.Module]
    batch: int = 64
    size: int = 32
    read: bool = False


# Of the suite "networks": at the batch of one process, on both widths, and two that others wrote.
WHOLE: dict[str, Whole] = {
    "ie-resnet-1-18-w16": Whole(partial(nets.ie_resnet18, steps=1, step_size=0.1, width=16)),
    "ie-resnet-1-18-w64": Whole(partial(nets.ie_resnet18, steps=1, step_size=0.1)),
    "sspnet-3": Whole(partial(nets.sspnet, "ssp3", n=6)),
    "resnet10-w32": Whole(partial(nets.resnet10, width=32)),
    "soblock-resnet10-w32": Whole(partial(nets.soblock_resnet10, width=32)),
    "resnet18-224": Whole(partial(foreign.ResNet, foreign.BasicBlock, (2, 2, 2, 2)), 8, 224, True),
    "preact-resnet18": Whole(foreign.PreActResNet, read=True),
}
SONET_BATCH = {"cpu": 32, "cuda": 100}  # the truth of a step of 100 images takes more than 24 GB
# The reference keeps the graphs of 14 evaluations in each of 10 blocks: the equality check takes 2.5 GB an image.
ODENET_BATCH = {"cpu": 2, "cuda": 32}


def pgd(module: nn.Module, images: Tensor, labels: Tensor, steps: int = PGD_STEPS) -> Tensor:
    """Projected gradient descent on the images in the maximum norm (Madry et al. 2018, Section 2.1), without restarts.

    Args:
        module: a classifier whose parameters need no gradient meanwhile.
        images: [N, C, H, W].
        labels: [N].
        steps: gradient steps.

    Returns:
        Images within RADIUS of the given ones.
    """
    moved = images.detach()
    for _ in range(steps):
        leaf = moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(module(leaf), labels), leaf)
        moved = leaf.detach() + STRIDE * gradient.sign()
        moved = images + (moved - images).clamp(-RADIUS, RADIUS)
    return moved


def attack_of(images: Tensor, **options: object) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """PGD-10 as a user calls it, in the network's eval mode, with the same random start in every turn."""
    bounds = (float(images.amin()), float(images.amax()))

    def attack(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(0)
        return attacks.pgd(
            module, x, y, eps=RADIUS, step_size=STRIDE, steps=PGD_STEPS, bounds=bounds, generator=generator, **options
        )

    return attack


def work(module: nn.Module, inputs: Inputs, mode: str) -> Work:
    """A network's turn; a training step is the loss and every parameter's gradient, without the optimiser's update.

    "adv_train" and "trades" are steps of fastode.training's losses on PGD-10's images; "attack_step" asks for the
    image's gradient while the parameters are trainable, as in an attack on a network in training, "pgd_step" for that
    of a frozen one.
    """
    (images,) = inputs
    labels = data.labels(len(images)).to(images.device)
    leaf = images.detach().requires_grad_()

    def clear() -> None:
        module.zero_grad(set_to_none=True)

    def forward() -> object:
        with torch.no_grad():
            return module(images)

    def attack(steps: int = PGD_STEPS) -> Tensor:
        module.requires_grad_(False)
        return pgd(module, images, labels, steps)

    def attack_step() -> object:
        return torch.autograd.grad(F.cross_entropy(module(leaf), labels), leaf)

    def train() -> None:
        clear()
        F.cross_entropy(module(images), labels).backward()

    def adversarial() -> None:
        clear()
        training.adversarial(module, images, labels, attack=attack_of(images)).value.backward()

    def trades() -> None:
        clear()
        attack = attack_of(images, loss="kl", random_start=0.001)
        training.trades(module, images, labels, attack=attack).value.backward()

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "pgd_step": lambda: attack(1),
        "pgd10": attack,
        "attack_step": attack_step,
        "train": train,
        "adv_train": adversarial,
        "trades": trades,
    }
    module.requires_grad_(mode in TRAINABLE)
    return Work(runs[mode], clear)


def count(module: nn.Module, inputs: Inputs, mode: str) -> tuple[int, int]:
    """Least FLOPs and bytes: PGD-10 is ten forwards with the image's gradient; TRADES has one, and a step, on top."""
    with torch.no_grad():
        outputs = (module(*inputs),)

    def both(part: str) -> tuple[int, int]:
        return counts.flops(module, inputs, part), counts.least_bytes(module, inputs, outputs, part)

    if mode in ("forward", "train"):
        return both(mode)
    steps = 1 if mode in ("pgd_step", "attack_step") else PGD_STEPS
    total = [steps * amount for amount in both("input_grad")]
    for part in {"adv_train": ("train",), "trades": ("forward", "train", "train")}.get(mode, ()):
        total = [one + other for one, other in zip(total, both(part), strict=True)]
    return total[0], total[1]


def batch_of(kind: str, device: str) -> int:
    """The papers' batch: 128, 100 for SONet and its rivals; on a CPU those take 32, WideResNet 8 and ODENet 2."""
    smaller = {"sonet": SONET_BATCH, "odenet": ODENET_BATCH, "wide": WIDE_BATCH}
    return BATCH if kind == "full" else smaller[kind][device]


def workloads() -> list[Workload]:
    """nets: every network of the table; networks: those that are measured as a user trains them."""

    def inputs(kind: str, device: str) -> Inputs:
        return (data.images(batch_of(kind, device)),)

    shared = {"own": "fused:auto", "work": work, "count": count}
    found = [
        Workload("nets", name, "3@32", build, partial(inputs, kind), modes=MODES, **shared)
        for name, (build, kind) in NETWORKS.items()
    ]
    return found + [
        Workload(
            "networks",
            name,
            f"3@{whole.size}",
            whole.make,
            partial(_enlarged, whole.batch, whole.size),
            modes=WHOLE_MODES,
            read=whole.read,
            **shared,
        )
        for name, whole in WHOLE.items()
    ]


def _enlarged(batch: int, size: int, device: str) -> Inputs:
    """Patches, drawn larger where an image is."""
    images = data.images(batch)
    return (images if size == images.shape[2] else F.interpolate(images, size=(size, size), mode="bilinear"),)
