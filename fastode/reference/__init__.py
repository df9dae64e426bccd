"""The papers' blocks in plain PyTorch: the definitions that every faster version is held against."""

from . import blocks, branches, chain, connections, exact, skew, solvers, timed
from .blocks import *
from .branches import *
from .chain import *
from .connections import *
from .exact import *
from .plain import plain_norms
from .skew import *
from .solvers import *
from .timed import *

__all__ = ["plain_norms"]
__all__ += blocks.__all__
__all__ += branches.__all__
__all__ += chain.__all__
__all__ += connections.__all__
__all__ += exact.__all__
__all__ += skew.__all__
__all__ += solvers.__all__
__all__ += timed.__all__
