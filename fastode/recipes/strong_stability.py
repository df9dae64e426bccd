"""Recipes of Kim et al. 2020 (paper 004): SSPNets on MNIST by noise, on CIFAR-10 by PGD, and how perturbations grow."""

from __future__ import annotations

from functools import partial

import torch

from .. import attacks, nets, training
from .measures import Attacked, Clean, Growth
from .plan import NOT_RUN, Claim, Measure, Network, Plan, Recipe, Table, Training

__all__ = ["TABLE1", "TABLE2"]

PAPER = "Kim et al. 2020, paper 004"
BLOCKS = {"ResNet": "res", "mid-RK2": "midpoint", "SSP-2": "ssp2", "SSP-3": "ssp3", "SSP-adap": "adap"}


def _table1(paper: bool, colour: bool) -> Plan:
    names = ("ResNet", "SSP-2", "SSP-3", "SSP-adap")
    columns = ("natural", "FGSM", "PGD-20", "PGD-30")
    numbers = {
        "ResNet": (99.61, 76.74, 57.99, 17.73),
        "SSP-2": (99.54, 79.84, 59.79, 18.50),
        "SSP-3": (99.60, 80.22, 61.76, 19.30),
        "SSP-adap": (99.46, 85.86, 76.11, 51.02),
    }
    eps = 8 / 255 if colour else 0.3 if paper else 0.15
    measures: list[Measure] = [Clean(), Attacked("FGSM", "fgsm", {"eps": eps})]
    for steps in (20, 30):
        options = {"eps": eps, "step_size": eps / 30, "steps": steps}
        measures.append(Attacked(f"PGD-{steps}", "pgd", options))
    width = 64 if paper else 16
    networks = tuple(Network(name, partial(nets.sspnet_mnist, BLOCKS[name], n=6, width=width)) for name in names)
    table = Table("Table 1", "trained with uniform noise", tuple(measures),
                  {name: dict(zip(columns, row, strict=True)) for name, row in numbers.items()})  # fmt: skip
    claims = tuple(
        Claim(f"{name} is more robust than ResNet", "Table 1", columns[1:], ("ResNet", name)) for name in names[1:]
    )
    loss = partial(training.uniform_noise, eps=eps)
    note = (
        "The paper names no step size of PGD on MNIST. 0.01 is taken: 20 steps do not reach the whole radius then, "
        "30 do, and the paper's numbers fall between the two."
    )
    if paper:
        adam = partial(torch.optim.Adam, lr=1e-4)
        return Plan("mnist", networks, Training(loss, 100, 128, adam), (table,), 10_000, 500, 1,
                    NOT_RUN, claims, note)  # fmt: skip
    quick = Training(loss, 10, 64, partial(torch.optim.Adam, lr=1e-3))
    return Plan("digits", networks, quick, (table,), 300, 100, 3, "Four minutes.", claims,
                f"Width 16 in place of 64, ε = 0.15 for grey images in place of 0.3, Adam at 1e-3. {note}")  # fmt: skip


TABLE1 = Recipe("004-table1", PAPER, "SSPNets trained with uniform noise (in the paper MNIST)", _table1)

# N blocks in a group, K steps of PGD in training: clean, FGSM, PGD-7, PGD-12 and PGD-20.
TABLE2_NUMBERS = {
    (6, 7): {"ResNet": (83.57, 51.16, 43.89, 42.15, 41.50), "mid-RK2": (84.07, 51.56, 43.77, 41.93, 41.29),
             "SSP-2": (82.57, 52.23, 45.77, 44.26, 43.68), "SSP-3": (83.76, 51.65, 44.78, 43.05, 42.46),
             "SSP-adap": (83.76, 52.83, 46.40, 44.55, 44.03)},
    (6, 12): {"ResNet": (80.10, 53.04, 48.17, 46.91, 46.50), "mid-RK2": (79.57, 53.26, 48.49, 47.40, 46.93),
              "SSP-2": (78.99, 54.26, 50.73, 49.83, 49.61), "SSP-3": (79.66, 54.40, 50.92, 49.99, 49.76),
              "SSP-adap": (79.88, 55.04, 50.66, 49.64, 49.43)},
    (10, 7): {"ResNet": (85.16, 52.25, 43.98, 41.88, 41.11), "mid-RK2": (84.51, 51.46, 43.43, 41.22, 40.45),
              "SSP-2": (84.37, 53.73, 47.14, 45.02, 44.27), "SSP-3": (85.05, 53.50, 47.19, 45.58, 44.97),
              "SSP-adap": (85.04, 53.08, 45.92, 43.76, 43.10)},
    (10, 12): {"ResNet": (81.81, 54.67, 49.57, 47.99, 47.55), "mid-RK2": (81.98, 55.22, 49.68, 48.18, 47.75),
               "SSP-2": (81.44, 54.97, 50.74, 49.57, 49.32), "SSP-3": (81.19, 55.07, 50.32, 49.29, 48.90),
               "SSP-adap": (81.56, 56.43, 51.66, 50.54, 50.16)},
}  # fmt: skip


def _table2(paper: bool, colour: bool) -> Plan:
    eps = 8 / 255 if colour or paper else 0.1
    columns = ("natural", "FGSM", "PGD-7", "PGD-12", "PGD-20")
    attack = {"eps": eps, "step_size": eps / 4}
    measures: tuple[Measure, ...] = (
        Clean(),
        Attacked("FGSM", "fgsm", {"eps": eps}),
        *(Attacked(f"PGD-{steps}", "pgd", {**attack, "steps": steps}) for steps in (7, 12, 20)),
    )
    numbers = {
        f"{name}, N = {n}, K = {k}": dict(zip(columns, row, strict=True))
        for (n, k), rows in TABLE2_NUMBERS.items()
        for name, row in rows.items()
    }

    def loss(steps: int, step_size: float) -> partial[training.Loss]:
        return partial(training.adversarial, attack=partial(attacks.pgd, eps=eps, step_size=step_size, steps=steps))

    if paper:
        networks = tuple(
            Network(f"{name}, N = {n}, K = {k}", partial(nets.sspnet, BLOCKS[name], n=n), loss=loss(k, eps / 4))
            for n, k in TABLE2_NUMBERS
            for name in BLOCKS
        )
        pairs = [(f"ResNet, N = {n}, K = {k}", f"{name}, N = {n}, K = {k}") for n, k in TABLE2_NUMBERS
                 for name in ("SSP-2", "SSP-3", "SSP-adap")]  # fmt: skip
    else:
        networks = tuple(
            Network(name, partial(nets.sspnet, block, n=1, width=8), paper=f"{name}, N = 6, K = 7")
            for name, block in BLOCKS.items()
        )
        pairs = [("ResNet", name) for name in ("SSP-2", "SSP-3", "SSP-adap")]
    growth = Growth(("group1", "group2", "group3"), (1, 2), {**attack, "steps": 20}, None if paper else 100)
    tables = (
        Table("Table 2", "adversarial training", measures, numbers),
        Table("Figure 4", "perturbation growth by group", (growth,), unit="growth ratio",
              note="Mean of ‖f(x) − f(x')‖ / ‖x − x'‖ over images x' of PGD-20; the text has no numbers."),
    )  # fmt: skip
    claims = [
        *(Claim(f"{better} is more robust than {worse}", "Table 2", columns[1:], (worse, better))
          for worse, better in pairs),
        *(Claim(f"perturbations grow less in {better} than in {worse}", "Figure 4", growth.columns, (better, worse))
          for worse, better in pairs),
    ]  # fmt: skip
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if paper:
        schedule = Training(loss(7, eps / 4), 200, 128, sgd, milestones=(60, 100, 140), augment=True)
        return Plan("cifar10", networks, schedule, tables, 10_000, 500, 1, NOT_RUN, tuple(claims),
                    "Images are moved and mirrored, which the paper does not speak of.")  # fmt: skip
    slower = partial(sgd, lr=0.03)  # for smaller batches
    quick = Training(loss(3, eps / 2), 8, 32, slower, milestones=(6,), images=2000)
    note = (
        "One block in a group in place of 6 or 10, width 8 in place of 16, trained by PGD-3, ε = 0.1 for grey images."
    )
    return Plan("digits", networks, quick, tables, 200, 100, 1, "Four minutes.", tuple(claims), note)


TABLE2 = Recipe("004-table2", PAPER, "SSPNets trained by PGD, and perturbation growth (in the paper CIFAR-10)", _table2)
