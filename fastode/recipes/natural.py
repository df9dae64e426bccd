"""The recipe of "Towards Natural Robustness Against Adversarial Examples" (paper 002): Neural ODEs beside ResNet-50."""

from __future__ import annotations

from functools import partial

import torch

from .. import nets, training
from .measures import Alone, Attacked, Clean, Distances
from .plan import NOT_RUN, Claim, Measure, Network, Plan, Recipe, Table, Training

__all__ = ["TABLE1"]

PAPER = "Towards Natural Robustness Against Adversarial Examples, 2020, paper 002"
# FGSM and PGD at four radii each.
MNIST = {
    "ResNet50": (99.33, 25.20, 10.95, 9.80, 9.75, 0, 0, 0, 0),
    "Neural ODE": (99.05, 97.50, 97.46, 97.52, 97.48, 93.62, 90.55, 84.64, 75.23),
}
CIFAR = {
    "ResNet50": (89.60, 4.65, 4.16, 3.60, 3.26, 0, 0, 0, 0),
    "Neural ODE": (69.94, 60.70, 60.65, 60.67, 60.67, 59.15, 56.93, 53.58, 49.53),
}


def _table1(paper: bool, colour: bool) -> Plan:
    radii = {f"{grey}/255": grey / 255 for grey in (8, 12, 16, 20)} if colour else {
        f"{radius:g}": radius for radius in (0.2, 0.3, 0.4, 0.5)
    }  # fmt: skip
    fgsm = [Attacked(f"FGSM {name}", "fgsm", {"eps": radius}) for name, radius in radii.items()]
    pgd = [Attacked(f"PGD {name}", "pgd", {"eps": radius, "step_size": 0.01, "steps": 40})
           for name, radius in radii.items()]  # fmt: skip
    measures: tuple[Measure, ...] = (Clean(), *fgsm, *pgd)
    distances = (2.0, 4.0, 6.0, 8.0, 10.0)
    options = {"steps": 1000, "step_size": 0.1, "source_step": 0.1}
    boundary = Alone(Distances("ε =", "boundary", distances, options, 1000 if paper else 20))
    columns = tuple(column for measure in measures for column in measure.columns)
    numbers = {name: dict(zip(columns, row, strict=True)) for name, row in (CIFAR if colour else MNIST).items()}
    tables = (
        Table("Table 1", "FGSM and PGD by radius", measures, numbers),
        Table("Figure 3", "Boundary attack, right by Euclidean distance", (boundary,), axis="columns",
              note="1,000 steps of the walk for each image alone, for those of a batch share the solver's steps, from "
              "a start that takes more questions; the text has no numbers."),
    )  # fmt: skip
    claims = (
        Claim("a Neural ODE is more robust than ResNet-50", "Table 1", columns[1:], ("ResNet50", "Neural ODE")),
        Claim("and against the Boundary attack", "Figure 3", boundary.columns, ("ResNet50", "Neural ODE")),
    )
    ode = nets.neural_ode_cifar if colour else nets.neural_ode_mnist
    note = "The paper does not say how ResNet-50 is trained: as the Neural ODE is here."
    if paper:
        networks = (Network("ResNet50", nets.resnet50), Network("Neural ODE", ode))
        epochs, rate = (200, 1e-4) if colour else (100, 1e-3)
        milestones = tuple(range(50, epochs, 50))
        schedule = Training(training.natural, epochs, 32, partial(torch.optim.Adam, lr=rate), milestones, 0.5)
        return Plan("mnist or cifar10", networks, schedule, tables, 10_000, 500, 1, NOT_RUN,
                    claims, note)  # fmt: skip
    # Of 16 channels a group norm has 16 groups, which leave a mean over positions little to see.
    networks = (
        Network("ResNet50", partial(nets.resnet50, width=4)),
        Network("Neural ODE", partial(ode, width=16, norm="layer")),
    )
    quick = Training(training.natural, 8, 32, partial(torch.optim.Adam, lr=1e-2), milestones=(6,))
    return Plan("digits", networks, quick, tables, 100, 50, 1, "About six minutes.", claims,
                f"{note} Widths 4 and 16 in place of 64 and 128, the Neural ODE's norms of one group in place of 32, "
                "Adam at 1e-2; Boundary on 20 images.")  # fmt: skip


TABLE1 = Recipe("002-table1", PAPER, "Neural ODEs and ResNet-50 under FGSM, PGD and Boundary", _table1)
