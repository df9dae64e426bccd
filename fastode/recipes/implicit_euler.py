"""Recipes of Li, He & Lin 2020 (paper 001): IE-ResNets under FGSM, under PGD-20, and by their inner steps K."""

from __future__ import annotations

from functools import partial

import torch

from .. import attacks, nets, training
from .measures import Attacked, Clean
from .plan import NOT_RUN, Claim, Network, Plan, Recipe, Table, Training

__all__ = ["FIGURE6", "TABLE1", "TABLE3"]

PAPER = "Li, He & Lin 2020, paper 001"
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
GREY = 0.1  # the radius of adversarial training on digits, at quick size
QUICK = f"Width 8, trained by PGD-3 at ε = {GREY} for grey images, which is also the radius of PGD-20."
UNSAID = "The paper names neither the batch size nor momentum and weight decay: 128, 0.9 and 5e-4 are taken."


def _table1(paper: bool, colour: bool) -> Plan:
    make = partial(nets.ie_resnet18, step_size=0.05, width=8)
    networks = (
        Network("ResNet-18", partial(nets.resnet18, width=8)),
        Network("IE-ResNet-1-18", partial(make, steps=1)),
        Network("IE-ResNet-3-18", partial(make, steps=3)),
    )
    numbers = {
        "ResNet-18": {"natural": 99.41, "FGSM": 88.45},
        "IE-ResNet-1-18": {"natural": 99.32, "FGSM": 91.36},
        "IE-ResNet-3-18": {"natural": 99.38, "FGSM": 92.27},
    }
    fgsm = Attacked("FGSM", "fgsm", {"eps": 1 / 255 if colour else 0.15})
    table = Table("Table 1", "natural training, FGSM", (Clean(), fgsm), {} if colour else numbers)
    claims = (
        Claim("an IE-ResNet is more robust than ResNet", "Table 1", ("FGSM",), ("ResNet-18", "IE-ResNet-1-18")),
        Claim("more inner steps, more robust", "Table 1", ("FGSM",), ("IE-ResNet-1-18", "IE-ResNet-3-18")),
    )
    if paper:
        schedule = Training(training.natural, 35, 128, SGD, milestones=(16, 23, 31), factor=0.2)
        time = NOT_RUN
        return Plan("mnist", networks, schedule, (table,), 10_000, 500, 1, time, claims,
                    f"{UNSAID} Nor does it name the rate on MNIST: CIFAR-10's is taken, which falls at the same parts "
                    "of 35 epochs.")  # fmt: skip
    quick = Training(training.natural, 4, 64, SGD, milestones=(3,), factor=0.2)
    note = "Width 8 as the paper's; 4 epochs of batches of 64 in place of 35."
    return Plan("digits", networks, quick, (table,), 500, 100, 3, "Four minutes.", claims, note)


TABLE1 = Recipe("001-table1", PAPER, "natural accuracy and FGSM (in the paper MNIST)", _table1)


def _trained_by_pgd(steps: int, eps: float, step_size: float) -> partial[training.Loss]:
    return partial(training.adversarial, attack=partial(attacks.pgd, eps=eps, step_size=step_size, steps=steps))


def _evaluated(eps: float) -> Attacked:
    """PGD-20, whose steps together are 2.5 radii long, as the paper's."""
    return Attacked("PGD-20", "pgd", {"eps": eps, "step_size": eps / 8, "steps": 20})


def _table3(paper: bool, colour: bool) -> Plan:
    numbers = {
        "ResNet-18": {"natural": 80.12, "PGD-20": 39.89},
        "IE-ResNet-1-18": {"natural": 80.14, "PGD-20": 40.91},
        "ResNet-34": {"natural": 82.41, "PGD-20": 42.67},
        "IE-ResNet-1-34": {"natural": 82.50, "PGD-20": 43.89},
        "ResNet-50": {"natural": 83.83, "PGD-20": 44.07},
        "IE-ResNet-1-50": {"natural": 84.49, "PGD-20": 45.31},
    }
    pairs = {18: (nets.resnet18, nets.ie_resnet18), 34: (nets.resnet34, nets.ie_resnet34),
             50: (nets.resnet50, nets.ie_resnet50)}  # fmt: skip
    depths, width = ((18, 34, 50), 16) if paper else ((18,), 8)
    networks = []
    for depth in depths:
        plain, implicit = pairs[depth]
        networks.append(Network(f"ResNet-{depth}", partial(plain, width=width)))
        networks.append(Network(f"IE-ResNet-1-{depth}", partial(implicit, steps=1, step_size=0.1, width=width)))
    eps = 8 / 255 if colour or paper else GREY
    table = Table("Table 3", "adversarial training", (Clean(), _evaluated(eps)), numbers)
    claims = tuple(
        Claim("an IE-ResNet is more robust than its ResNet", "Table 3", ("PGD-20",),
              (f"ResNet-{depth}", f"IE-ResNet-1-{depth}"))
        for depth in depths
    )  # fmt: skip
    if paper:
        schedule = Training(_trained_by_pgd(10, eps, eps / 4), 180, 128, SGD, milestones=(80, 120, 160), factor=0.2,
                            augment=True)  # fmt: skip
        return Plan("cifar10", tuple(networks), schedule, (table,), 10_000, 500, 1, NOT_RUN,
                    claims, f"{UNSAID} Images are moved and mirrored, which it does not speak of; γ = 0.1 is that of "
                    "its Section 5.4.")  # fmt: skip
    quick = Training(_trained_by_pgd(3, eps, eps / 2), 6, 32, SGD, milestones=(5,), factor=0.2, images=2000)
    return Plan("digits", tuple(networks), quick, (table,), 200, 100, 2, "Five minutes.", claims, QUICK)


TABLE3 = Recipe("001-table3", PAPER, "adversarial training and PGD-20 (in the paper CIFAR-10)", _table3)


def _figure6(paper: bool, colour: bool) -> Plan:
    width = 64 if paper else 8
    networks = [Network("K = 0", partial(nets.resnet18, width=width))]
    for steps in (1, 2, 3, 5) if paper else (1, 2, 3):
        make = partial(nets.ie_resnet18, steps=steps, step_size=0.1, width=width)
        networks.append(Network(f"K = {steps}", make))
    eps = 8 / 255 if colour or paper else GREY
    measures = (Clean(), _evaluated(eps))
    note = "The paper's text has no numbers of this figure. K = 0 is ResNet-18."
    table = Table("Figure 6", "inner steps K, trained by PGD-3", measures, axis="rows", note=note)
    names = tuple(network.name for network in networks)
    claims = (Claim("robust accuracy rises with K", "Figure 6", ("PGD-20",), names[1:]),)
    loss = _trained_by_pgd(3, eps, eps / 4 if paper else eps / 2)
    if paper:
        schedule = Training(loss, 180, 128, SGD, milestones=(80, 120, 160), factor=0.2, augment=True)
        return Plan("cifar10", tuple(networks), schedule, (table,), 10_000, 500, 1, NOT_RUN,
                    claims, f"{UNSAID} Nor does its text name the values of K.")  # fmt: skip
    quick = Training(loss, 6, 32, SGD, milestones=(5,), factor=0.2, images=2000)
    return Plan("digits", tuple(networks), quick, (table,), 200, 100, 1, "About five minutes.", claims, QUICK)


FIGURE6 = Recipe("001-figure6", PAPER, "robust accuracy by the inner steps K (in the paper CIFAR-10)", _figure6)
