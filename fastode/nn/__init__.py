"""The fused twins of the reference blocks: the same constructors, parameters and buffers, less time and memory.

A twin adds no state to its reference. `fastode.fuse` swaps it in by assigning `__class__`.
"""

from . import chain, ode, one_step, reversible, skew
from .chain import *
from .ode import *
from .one_step import *
from .reversible import *
from .skew import *

__all__: list[str] = []
__all__ += chain.__all__
__all__ += ode.__all__
__all__ += one_step.__all__
__all__ += reversible.__all__
__all__ += skew.__all__
