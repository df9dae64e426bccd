"""Recipes of Huang et al. 2020 (paper 003): solvers and their steps under PGD, and C&W and SPSA beside PGD."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .. import attacks, nets, training
from ..reference import SkewPair, SOBlock
from ..solver import Solver
from .measures import Alone, Attacked, Clean, StepTimes
from .plan import NOT_RUN, Claim, Measure, Network, Plan, Recipe, Table, Training

__all__ = ["TABLE2", "TABLE4"]

PAPER = "Huang et al. 2020, paper 003"
SOLVERS = {"Euler": Solver("euler"), "RK4": Solver("rk4")} | {
    f"{name}({tolerance:g})": Solver(method, tolerance, tolerance)
    for name, method in (("Dopri5", "dopri5"), ("Bosh3", "bosh3"), ("Adaptive Heun", "adaptive_heun"))
    for tolerance in (0.1, 0.01, 0.001)
}
# Natural, PGD-20 and PGD-1000.
TABLE2_NUMBERS = {
    "SOBlock, Euler": (94.41, 0, 0), "SOBlock, RK4": (92.06, 0, 0),
    "SOBlock, Dopri5(0.1)": (94.22, 71.20, 63.20), "SOBlock, Dopri5(0.01)": (93.98, 64.66, 46.40),
    "SOBlock, Dopri5(0.001)": (94.32, 63.87, 46.20), "SOBlock, Bosh3(0.1)": (92.85, 66.00, 52.84),
    "SOBlock, Bosh3(0.01)": (92.30, 67.06, 59.74), "SOBlock, Bosh3(0.001)": (92.38, 65.03, 55.31),
    "SOBlock, Adaptive Heun(0.1)": (92.42, 61.16, 55.84), "SOBlock, Adaptive Heun(0.01)": (92.43, 63.95, 53.79),
    "SOBlock, Adaptive Heun(0.001)": (92.73, 57.68, 45.33),
    "ODENet, Euler": (87.04, 0, 0), "ODENet, RK4": (87.78, 0, 0),
    "ODENet, Dopri5(0.1)": (87.41, 42.69, 13.14), "ODENet, Dopri5(0.01)": (87.46, 37.20, 8.36),
    "ODENet, Dopri5(0.001)": (87.54, 36.19, 7.75),
}  # fmt: skip
TABLE3_NUMBERS = {
    "ODENet, Dopri5(0.1)": ("[0.0, 0.262, 1.0]", "[0.0, 0.253, 1.0]", "[0.0, 0.244, 1.0]"),
    "ODENet, Dopri5(0.01)": ("[0.0, 0.155, 0.827, 1.0]", "[0.0, 0.150, 0.793, 1.0]", "[0.0, 0.149, 0.789, 1.0]"),
    "ODENet, Dopri5(0.001)": (
        "[0.0, 0.097, 0.423, 1.0]", "[0.0, 0.096, 0.420, 1.0]", "[0.0, 0.094, 0.409, 0.981, 1.0]",
    ),
}  # fmt: skip
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def soblock_wide_resnet(*, solver: Solver, in_channels: int, num_classes: int, width: int = 16) -> nn.Sequential:
    """WideResNet-34-10 with a skew-symmetric ODE block in place of its first convolution (Section 6.1).

    Args:
        solver: of the block.
        in_channels: channels of the image.
        num_classes: number of logits.
        width: channels of the block.
    """
    network = nets.wide_resnet34_10("res", in_channels=in_channels, num_classes=num_classes, width=width, norm="batch",
                                    shortcut_kernel=1)  # fmt: skip
    network.stem = SOBlock(SkewPair(in_channels, width, norm="group"), solver)
    return network


def _pgd(steps: int, eps: float, column: str = "", images: int | None = None) -> Attacked:
    """From the image itself, in steps of 0.003 at a radius of 0.031."""
    options: dict[str, Any] = {"eps": eps, "step_size": eps * 3 / 31, "steps": steps, "random_start": False}
    return Attacked(column or f"PGD-{steps}", "pgd", options, images)


def _table2(paper: bool, colour: bool) -> Plan:
    eps = 0.031 if colour or paper else 0.1
    many = 1000 if paper else 100
    if paper:
        networks = [Network(f"SOBlock, {name}", partial(soblock_wide_resnet, solver=solver))
                    for name, solver in SOLVERS.items()]  # fmt: skip
        of_odenet: list[str] = ["Euler", "RK4", "Dopri5(0.1)", "Dopri5(0.01)", "Dopri5(0.001)"]
        odenet = nets.odenet
    else:
        networks = [Network(f"SOBlock, {name}", partial(nets.soblock_resnet10, solver=SOLVERS[name], width=16))
                    for name in ("Euler", "RK4", "Dopri5(0.1)", "Dopri5(0.001)")]  # fmt: skip
        of_odenet = ["Euler", "Dopri5(0.1)"]
        odenet = partial(nets.odenet, width=8, blocks=2)
    networks += [Network(f"ODENet, {name}", partial(odenet, solver=SOLVERS[name])) for name in of_odenet]
    columns = ("natural", "PGD-20", f"PGD-{many}")
    numbers = {row: dict(zip(columns[: None if paper else 2], values, strict=False))
               for row, values in TABLE2_NUMBERS.items()}  # fmt: skip
    attack = {key: value for key, value in _pgd(1, eps).options.items() if key != "steps"}
    iterations = (1, 100, 1000) if paper else (1, 20, 100)
    times = StepTimes(iterations, attack, 100 if paper else 20)
    steps = {row: dict(zip(times.columns, values, strict=True)) for row, values in TABLE3_NUMBERS.items()}
    note = "The first adaptive block's times, of one batch that shares its steps."
    tables = (
        Table("Table 2", "solvers under PGD", (Clean(), _pgd(20, eps), _pgd(many, eps)), numbers),
        Table("Table 3", "steps by PGD iterations", (times,), steps if paper else {}, unit="times", axis="", note=note),
    )
    claims = [
        Claim(f"{kind} with an adaptive solver holds against PGD and with Euler does not", "Table 2", columns[1:],
              (f"{kind}, Euler", f"{kind}, Dopri5(0.1)"))
        for kind in ("SOBlock", "ODENet")
    ]  # fmt: skip
    claims.append(Claim("a larger tolerance is more robust", "Table 2", columns[1:],
                        ("SOBlock, Dopri5(0.001)", "SOBlock, Dopri5(0.1)")))  # fmt: skip
    if paper:
        schedule = Training(training.natural, 350, 100, SGD, milestones=(150, 300), augment=True)
        return Plan("cifar10", tuple(networks), schedule, tables, 10_000, 100, 1, NOT_RUN,
                    tuple(claims), "SOBlock's network is WideResNet-34-10, as in Section 6.1. Images are moved and "
                    "mirrored, which the paper does not speak of.")  # fmt: skip
    quick = Training(training.natural, 4, 50, SGD, milestones=(3,), images=2000)
    return Plan("digits", tuple(networks), quick, tables, 100, 50, 1, "About five minutes.", tuple(claims),
                "SOBlock's network is ResNet10 of width 16 in place of WideResNet-34-10; PGD-100 stands for "
                "PGD-1000; ε = 0.1 for grey images.")  # fmt: skip


TABLE2 = Recipe("003-table2", PAPER, "solvers under PGD, and the steps that they take", _table2)

# Natural, PGD-20 (Table 1), C&W and SPSA, by channels.
TABLE4_NUMBERS = {
    32: {"SONet": (88.08, 53.67, 0, 2.50), "SOBlock": (90.28, 58.21, 0, 7.64),
         "ResNet10-TRADES-1": (81.52, 35.26, 37.61, 68.30), "ResNet10-TRADES-6": (73.69, 43.46, 38.92, 63.60)},
    64: {"SONet": (89.36, 61.62, 11.20, 15.10), "SOBlock": (91.57, 62.35, 0, 11.68),
         "ResNet10-TRADES-1": (82.74, 37.64, 35.78, 69.97), "ResNet10-TRADES-6": (76.29, 45.24, 39.77, 65.97)},
}  # fmt: skip


def _table4(paper: bool, colour: bool) -> Plan:
    eps = 0.031 if colour or paper else 0.1
    columns = ("natural", "PGD-20", "C&W ℓ∞", "SPSA")
    # ART's derivative leaves the constant out: from 10 on it runs once for each radius, and finds the same.
    cw = {"eps": eps, "steps": 100} if paper else {"eps": eps, "steps": 50, "constant": 10.0}
    alone = None if paper else 10
    estimate = {"steps": 20, "samples": 32} if paper else {"steps": 10, "samples": 8}
    measures: tuple[Measure, ...] = (
        Clean(),
        _pgd(20, eps),
        Alone(_pgd(20, eps, "PGD-20 alone", alone)),
        Alone(Attacked("C&W ℓ∞", "cw_linf", cw, alone)),
        Attacked("SPSA", "spsa", {"eps": eps, **estimate}, None if paper else 50),
    )

    def trades(beta: float) -> partial[training.Loss]:
        inner = partial(attacks.pgd, eps=eps, step_size=eps * 7 / 31, steps=10, loss="kl", random_start=0.001)
        return partial(training.trades, attack=inner, beta=beta)

    networks: list[Network] = []
    for width in (32, 64) if paper else (8,):
        named = f", {width} channels" if paper else ""
        of_paper = "" if paper else ", 32 channels"
        for name, make, loss in (
            ("SONet", nets.sonet, None),
            ("SOBlock", nets.soblock_resnet10, None),
            ("ResNet10-TRADES-1", nets.resnet10, trades(1.0)),
            ("ResNet10-TRADES-6", nets.resnet10, trades(6.0)),
        ):
            row = f"{name}{of_paper}" if of_paper else ""
            networks.append(Network(f"{name}{named}", partial(make, width=width), row, loss))
    numbers = {
        f"{name}, {width} channels": dict(zip(columns, values, strict=True))
        for width, rows in TABLE4_NUMBERS.items()
        for name, values in rows.items()
    }
    note = (
        "C&W, which takes images one by one, is judged so: images of a batch share a solver's steps, and one that is "
        "moved just far enough alone may be right again among others. PGD-20 alone is of the same images."
    )
    table = Table("Table 4", "C&W and SPSA, and PGD-20 of Table 1", measures, numbers, note=note)
    end = ", 32 channels" if paper else ""
    claims = (
        *(Claim(f"{name} holds better than TRADES against PGD", "Table 4", ("PGD-20",),
                (f"ResNet10-TRADES-6{end}", f"{name}{end}")) for name in ("SONet", "SOBlock")),
        *(Claim(f"{name} falls to C&W and SPSA, and TRADES does not", "Table 4", ("C&W ℓ∞", "SPSA"),
                (f"{name}{end}", f"ResNet10-TRADES-6{end}")) for name in ("SONet", "SOBlock")),
    )  # fmt: skip
    if paper:
        schedule = Training(training.natural, 350, 100, SGD, milestones=(150, 300), augment=True)
        return Plan("cifar10", tuple(networks), schedule, (table,), 1_000, 100, 1, NOT_RUN, claims,
                    "Attacked are the first 1,000 test images: ART takes them one by one. Images are moved and "
                    "mirrored, which the paper does not speak of.")  # fmt: skip
    quick = Training(training.natural, 4, 50, SGD, milestones=(3,))
    note = (
        "Width 8 in place of 32; C&W in 50 steps on 10 images and SPSA in 10 steps of 8 samples on 50, which find less "
        "than the paper's."
    )
    return Plan(
        "photographs",
        tuple(networks),
        quick,
        (table,),
        100,
        50,
        1,
        "About six minutes.",
        claims,
        note,
    )


TABLE4 = Recipe("003-table4", PAPER, "SONet and SOBlock under C&W and SPSA, beside TRADES", _table4)
