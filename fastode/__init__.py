"""Fast kernels for neural networks built as ODE schemes.

`fuse` swaps the blocks of a model for their fused twins, in place; `unfuse` swaps them back. Importing this package
compiles nothing.
"""

from . import branch, functional, nets, nn, reference, tableau
from .dispatch.registry import register
from .fusion.graphs import graphed
from .fusion.report import FusionReport
from .fusion.swap import fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "FusionReport",
    "branch",
    "functional",
    "fuse",
    "graphed",
    "nets",
    "nn",
    "reference",
    "register",
    "tableau",
    "unfuse",
]
