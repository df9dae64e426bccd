"""Fast kernels for neural networks built as ODE schemes.

`fuse` swaps the blocks of a model for their fused twins, in place; `unfuse` swaps them back. Importing this package
compiles nothing.
"""

import importlib
import re
from typing import TYPE_CHECKING, Any

import torch

if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):  # before anything that an older one lacks
    raise ImportError(f"fastode needs torch 2.11 or later, got torch {torch.__version__}")

from . import branch, embedded, functional, nets, nn, reference, tableau
from .dispatch.registry import register
from .foreign.adapt import adapt
from .fusion.graphs import graphed
from .fusion.report import FusionReport
from .fusion.swap import fuse, unfuse
from .solver import SolveError, Solver
from .steps import check_solves, record_steps

if TYPE_CHECKING:
    from . import attacks, recipes, released, robustness, stability, training

__version__ = "0.1.0"

__all__ = [
    "FusionReport",
    "SolveError",
    "Solver",
    "adapt",
    "attacks",
    "branch",
    "check_solves",
    "embedded",
    "functional",
    "fuse",
    "graphed",
    "nets",
    "nn",
    "recipes",
    "record_steps",
    "reference",
    "register",
    "released",
    "robustness",
    "stability",
    "tableau",
    "training",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """Import what not every program needs when it is asked for."""
    if name == "attacks":
        return importlib.import_module("fastode.attacks")
    if name == "recipes":
        return importlib.import_module("fastode.recipes")
    if name == "released":
        return importlib.import_module("fastode.released")
    if name == "robustness":
        return importlib.import_module("fastode.robustness")
    if name == "stability":
        return importlib.import_module("fastode.stability")
    if name == "training":
        return importlib.import_module("fastode.training")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
