"""The papers' blocks in plain PyTorch: the definitions that every faster version is held against."""

from .blocks import SSP2, SSP3, Ark, IESkip, Midpoint, ResBlock, ShuOsher
from .branches import BottleneckBranch, PreActBranch
from .plain import plain_norms
from .skew import SkewLinear, SkewPair
from .solvers import SOBlock, SOClassifier

__all__ = [
    "SSP2",
    "SSP3",
    "Ark",
    "BottleneckBranch",
    "IESkip",
    "Midpoint",
    "PreActBranch",
    "ResBlock",
    "SOBlock",
    "SOClassifier",
    "ShuOsher",
    "SkewLinear",
    "SkewPair",
    "plain_norms",
]
