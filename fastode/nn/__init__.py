"""The fused twins of the reference blocks: the same constructors, parameters and buffers, less time and memory.

A twin adds no state to its reference. `fastode.fuse` swaps it in by assigning `__class__`.
"""

from .one_step import SSP2, SSP3, Ark, IESkip, Midpoint, ResBlock, ShuOsher
from .skew import SkewLinear, SkewPair, SOBlock, SOClassifier

__all__ = [
    "SSP2",
    "SSP3",
    "Ark",
    "IESkip",
    "Midpoint",
    "ResBlock",
    "SOBlock",
    "SOClassifier",
    "ShuOsher",
    "SkewLinear",
    "SkewPair",
]
