"""A tiny recipe, whose images are made: two networks that tell rows from columns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastode import nets, training
from fastode.recipes import Claim, Images, Network, Plan, Recipe, Table, Training, measures


def digits(seed: int = 0) -> Images:
    """Two classes of 12×12 images: bright rows or bright columns, and noise."""
    random = torch.Generator().manual_seed(seed)

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 2
        images = 0.5 * torch.rand(count, 1, 12, 12, generator=random)
        for image, label in zip(images, labels.tolist(), strict=True):
            (image[0].T if label else image[0])[::3] += 0.4
        return images, labels

    return Images(part(64), part(32), "stripes")


CLEAN, FGSM = measures.Clean(), measures.Attacked("FGSM", "fgsm", {"eps": 0.1})
TINY = Plan(
    data="stripes",
    networks=(
        Network("res", partial(nets.sspnet_mnist, "res", n=1, width=4, norm="layer"), paper="ResNet"),
        Network("ssp3", partial(nets.sspnet_mnist, "ssp3", n=1, width=4, norm="layer")),
    ),
    training=Training(training.natural, 2, 8, partial(torch.optim.Adam, lr=0.02), milestones=(1,), factor=0.5),
    tables=(Table("Table 1", "tiny", (CLEAN, FGSM), {"ResNet": {"FGSM": 50.0}}),),
    images=32,
    batch=16,
    seeds=2,
    time="A second.",
    claims=(Claim("SSP is more robust", "Table 1", ("FGSM",), ("res", "ssp3")),),
)
RECIPE = Recipe("tiny", "nobody, 2026", "a tiny one", lambda paper, colour: TINY)
