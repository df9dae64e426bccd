"""The staged engine: convolutions by PyTorch, everything between two of them in one operator."""

from __future__ import annotations

from functools import partial

import torch

from ..engine import NO_LINEAR, ODE_SOLUTION, Call, OperatorEngine
from ..schemes.implicit_euler import descent, exact
from ..schemes.ode import solution
from ..schemes.runge_kutta import stages
from ..schemes.skew_pair import adaptive, march
from ..schemes.skew_pair.linear import Linear
from . import field, pair, sweeps


class Staged(OperatorEngine):
    """Any feature map, on any device with operators."""

    name = "staged"
    devices = ("cpu", "cuda")
    ie_skip = descent.make_function(sweeps, partial(descent.forward, sweeps))
    exact_ie = exact.make_exact_function(sweeps)
    shu_osher = stages.make_function(sweeps, partial(stages.forward, sweeps))
    skew_pair = march.make_pair_function(pair)
    skew_solution = march.make_march_function(pair)
    skew_adaptive = adaptive.make_adaptive_function(pair)
    ode_solution = solution.make_solution_function(field.StagedField)

    def refuses(self, call: Call) -> str:
        if isinstance(call.program, Linear):
            return NO_LINEAR
        if call.family == ODE_SOLUTION and call.x is not None and call.x.dtype not in (torch.float32, torch.float64):
            return "it solves a single map's equation in float32 and float64 only"
        return ""
