"""Whole networks on 32x32 images: forward, PGD-10 or one step of it, a training step, and one on PGD-10's images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastode import nets

from . import counts, data
from .workloads import BATCH, WIDE_BATCH, Inputs, Work, Workload

MODES = ("forward", "pgd10", "train", "adv_train")
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


def work(module: nn.Module, inputs: Inputs, mode: str) -> Work:
    """A network's turn; a training step is the loss and every parameter's gradient, without the optimiser's update."""
    (images,) = inputs
    labels = data.labels(len(images)).to(images.device)

    def clear() -> None:
        module.zero_grad(set_to_none=True)

    def forward() -> object:
        with torch.no_grad():
            return module(images)

    def attack(steps: int = PGD_STEPS) -> Tensor:
        module.requires_grad_(False)
        return pgd(module, images, labels, steps)

    def train(batch: Tensor) -> None:
        clear()
        module.requires_grad_(True)
        F.cross_entropy(module(batch), labels).backward()

    def adversarial() -> None:
        clear()
        train(attack())

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "pgd_step": lambda: attack(1),
        "pgd10": attack,
        "train": lambda: train(images),
        "adv_train": adversarial,
    }
    module.requires_grad_(mode == "train")
    return Work(runs[mode], clear)


def count(module: nn.Module, inputs: Inputs, mode: str) -> tuple[int, int]:
    """Least FLOPs and bytes: PGD-10 is ten forwards with the image's gradient."""
    with torch.no_grad():
        outputs = (module(*inputs),)

    def both(part: str) -> tuple[int, int]:
        return counts.flops(module, inputs, part), counts.least_bytes(module, inputs, outputs, part)

    if mode in ("forward", "train"):
        return both(mode)
    steps = 1 if mode == "pgd_step" else PGD_STEPS
    attack = tuple(steps * amount for amount in both("input_grad"))
    step = both("train") if mode == "adv_train" else (0, 0)
    return attack[0] + step[0], attack[1] + step[1]


def batch_of(kind: str, device: str) -> int:
    """The papers' batch: 128, 100 for SONet and its rivals; on a CPU those take 32, WideResNet 8 and ODENet 2."""
    smaller = {"sonet": SONET_BATCH, "odenet": ODENET_BATCH, "wide": WIDE_BATCH}
    return BATCH if kind == "full" else smaller[kind][device]


def workloads() -> list[Workload]:
    """nets: every network of the table."""

    def inputs(kind: str, device: str) -> Inputs:
        return (data.images(batch_of(kind, device)),)

    return [
        Workload(
            "nets",
            name,
            "3@32",
            build,
            partial(inputs, kind),
            modes=MODES,
            own="fused:auto",
            work=work,
            count=count,
        )
        for name, (build, kind) in NETWORKS.items()
    ]
