"""Two recipes on 10,000 images of CIFAR-10 at reduced epochs: between their quick size and the papers'."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastode import nets
from fastode.recipes import RECIPES
from fastode.recipes.plan import Network, Plan, Recipe

__all__ = ["CIFAR10"]

IMAGES = (
    "The images are a part of CIFAR-10 that passed through JPEG once: these numbers can be compared with each other, "
    "not with the paper's."
)


def _reduced(
    quick: Plan, networks: tuple[Network, ...], epochs: int, milestones: tuple[int, ...], time: str, note: str
) -> Plan:
    """The quick plan with the paper's width, all training images and more epochs."""
    slower = partial(quick.training.optimizer, lr=0.05)  # for batches of 64
    schedule = replace(quick.training, epochs=epochs, batch=64, optimizer=slower, milestones=milestones, images=None)
    return replace(
        quick, data="cifar10", networks=networks, training=schedule, images=1000, seeds=1, time=time,
        note=f"{note} {IMAGES}",
    )  # fmt: skip


def _table3(paper: bool, colour: bool) -> Plan:
    networks = (
        Network("ResNet-18", partial(nets.resnet18, width=16)),
        Network("IE-ResNet-1-18", partial(nets.ie_resnet18, steps=1, step_size=0.1, width=16)),
    )
    quick = RECIPES["001-table3"].plan(False, True)
    note = "Width 16 as the paper's, trained by PGD-3 in place of PGD-10 for 8 epochs in place of 180."
    return _reduced(quick, networks, 8, (6,), "A quarter of an hour on one thread.", note)


def _table2(paper: bool, colour: bool) -> Plan:
    quick = RECIPES["004-table2"].plan(False, True)
    blocks = {"ResNet": "res", "SSP-2": "ssp2", "SSP-3": "ssp3", "SSP-adap": "adap"}
    networks = tuple(
        Network(name, partial(nets.sspnet, block, n=1, width=16), paper=f"{name}, N = 6, K = 7")
        for name, block in blocks.items()
    )
    note = (
        "Width 16 as the paper's, one block in a group in place of 6 or 10, trained by PGD-3 in place of PGD-7 for 10 "
        "epochs in place of 200."
    )
    return _reduced(quick, networks, 10, (8,), "Half an hour on one thread.", note)


CIFAR10 = {
    name: Recipe(f"{name}-cifar10", RECIPES[name].paper, title, plan)
    for name, title, plan in (
        ("001-table3", "adversarial training and PGD-20 on a part of CIFAR-10", _table3),
        ("004-table2", "SSPNets trained by PGD, and perturbation growth, on a part of CIFAR-10", _table2),
    )
}
