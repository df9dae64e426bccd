"""The families' autograd Functions with fused convolutions; this module imports Triton."""

from __future__ import annotations

from ..schemes.implicit_euler import descent
from ..schemes.runge_kutta import stages
from ..schemes.skew_pair import march
from . import blocks, pair, sweeps

IE_SKIP = descent.make_function(sweeps, blocks.ie_skip)
SHU_OSHER = stages.make_function(sweeps, blocks.shu_osher)
SKEW_PAIR = march.make_pair_function(pair)
SKEW_SOLUTION = march.make_march_function(pair)
