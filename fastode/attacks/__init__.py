"""Attacks on classifiers: FGSM, PGD, BIM, DI²-FGSM, SPSA and transfer, and from libraries C&W, Boundary and APGD.

Every one is a function of (model, images, labels) with keywords that returns images, and leaves the model as it was;
`run` makes a report of one.
"""

from .blind import spsa, transfer
from .gradient import bim, di2_fgsm, fgsm, pgd
from .libraries import apgd, boundary, cw_l2, cw_linf
from .report import ATTACKS, Report, run
from .task import Queries

__all__ = [
    "ATTACKS",
    "Queries",
    "Report",
    "apgd",
    "bim",
    "boundary",
    "cw_l2",
    "cw_linf",
    "di2_fgsm",
    "fgsm",
    "pgd",
    "run",
    "spsa",
    "transfer",
]
