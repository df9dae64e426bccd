"""The papers' blocks in plain PyTorch: the definitions that every faster version is held against."""

from .blocks import SSP2, SSP3, Ark, IESkip, Midpoint, ResBlock, ShuOsher
from .branches import BottleneckBranch, PreActBranch
from .plain import plain_norms

__all__ = [
    "SSP2",
    "SSP3",
    "Ark",
    "BottleneckBranch",
    "IESkip",
    "Midpoint",
    "PreActBranch",
    "ResBlock",
    "ShuOsher",
    "plain_norms",
]
