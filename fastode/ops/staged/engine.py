"""The staged engine: convolutions by PyTorch, everything between two of them in one operator."""

from __future__ import annotations

from functools import partial

import torch

from ...tracing import is_exporting
from ..engine import NO_LINEAR, ODE_SOLUTION, Call, OperatorEngine
from ..plan import Plan
from ..schemes.chain import chain
from ..schemes.implicit_euler import descent, exact
from ..schemes.ode import solution
from ..schemes.runge_kutta import stages
from ..schemes.skew_pair import adaptive, march
from ..schemes.skew_pair.linear import Linear
from ..schemes.skew_pair.pair import Pair, has_slow_norms
from . import field, pair, sweeps

_MOST_CHANNELS = 256  # of the field of a single map's equation, for "auto"
_MOST_OF_SCHEMES = 16  # of an explicit scheme in float32, likewise
_TOO_WIDE_CONTIGUOUS = 256  # of an IE-Skip in float32 whose maps are not channels_last
_MOST_LOWERED = 128  # of an IE-Skip under autocast, likewise
_MOST_LOWERED_PAIR = 64  # of a skew pair's solution by equal steps, under autocast
_FEWEST_OF_SOLUTIONS, _FEWEST_OF_LOWERED_SOLUTIONS = 1 << 16, 1 << 17  # entries, likewise


class Staged(OperatorEngine):
    """Any feature map, on any device with operators."""

    name = "staged"
    devices = ("cpu", "cuda")
    ie_skip = descent.make_function(sweeps, partial(descent.forward, sweeps))
    exact_ie = exact.make_exact_function(sweeps)
    shu_osher = stages.make_function(sweeps, partial(stages.forward, sweeps))
    chain = chain.make_function(sweeps)
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

    def against(self, call: Call) -> str:
        # A chain has one evaluation, whose norms and activations cost PyTorch no more passes than this engine.
        if call.family == "chain":
            return "for chains it was measured to be slower than plain PyTorch"
        # 0.45 to 1.01 of eager's speed at all of 17 shapes, on one thread of an AMD EPYC, 2026-11-27; in bfloat16, on
        # two threads, 2026-11-28, 0.47 to 1.1, but to 1.6 where PyTorch has norms of several groups in channels_last.
        if call.is_single:
            return "for steps of one evaluation it was measured to be slower than plain PyTorch"
        plain_float32 = call.lower is None and call.inputs[0].dtype == torch.float32
        if isinstance(call.program, Pair):
            return _slower_pair(call, call.program)
        if not isinstance(call.program, Plan):
            return ""
        widest = max([0, *[unit.conv.out_channels for unit in call.program.units if unit.conv is not None]])
        # One thread of an AMD EPYC with dot products of bfloat16: schemes took 0.8 to 2.6 times eager's time, in the
        # median 1.35, and IE-Skip past 128 channels 0.7 to 1.6.
        if call.lower is not None and (call.family == "shu_osher" or (call.family == "ie" and widest > _MOST_LOWERED)):
            beyond = "" if call.family == "shu_osher" else f" with more than {_MOST_LOWERED} channels"
            return f"under autocast{beyond} it was measured to be slower than plain PyTorch"
        # Two threads of that CPU, 2026-11-28, 8 to 256 channels: 0.7 to 1.04 without norms, 0.99 to 2.2 with them.
        if call.lower is not None and call.family == "ie" and all(unit.norm is None for unit in call.program.units):
            return "under autocast without norms it was measured to be slower than plain PyTorch"
        if plain_float32 and (slower := _slower_float32(call, widest)):
            return slower
        # One thread of an AMD EPYC: 512 channels at 4×4 took 1.2 to 1.5 times eager's time, 256 at 8×8 0.8.
        if call.family == ODE_SOLUTION and widest > _MOST_CHANNELS:
            return f"with more than {_MOST_CHANNELS} channels it was measured to be slower than plain PyTorch"
        return ""


def _slower_float32(call: Call, widest: int) -> str:
    """Why steps of more than one evaluation are taken to be slower than plain PyTorch in float32; empty if not.

    One thread of an AMD EPYC, 2026-11-27, 1 to 8 samples, the mean of forward, attack's and training step: schemes 0.92
    to 1.4 times as fast as eager at 16 channels, 0.45 to 1.1 from 32 to 512; IE-Skip 0.5 to 0.99 from 256 channels on
    but for 16×16 maps, 0.97 to 1.9 in channels_last and below.
    """
    if call.family == "shu_osher" and widest > _MOST_OF_SCHEMES:
        return f"for schemes with more than {_MOST_OF_SCHEMES} channels it was measured to be slower than plain PyTorch"
    last = call.inputs[0].is_contiguous(memory_format=torch.channels_last)
    if call.family == "ie" and widest >= _TOO_WIDE_CONTIGUOUS and not last:
        beyond = f"with {_TOO_WIDE_CONTIGUOUS} channels and more that are not channels_last"
        return f"{beyond} it was measured to be slower than plain PyTorch"
    return ""


def _slower_pair(call: Call, program: Pair) -> str:
    """Why a skew pair, or its solution, is taken to be slower than plain PyTorch; empty if not.

    In eager's time, two threads of an AMD EPYC with dot products of bfloat16, 2026-11-28: the pair alone 1.05 to 2.1,
    in float32, float64 and bfloat16, with norms and without; a solution by equal steps 0.87 to 1.4 of fewer than 65536
    entries, of more 0.55 to 1.14. Where PyTorch has norms of several groups of fewer than 16 channels on bfloat16 maps
    in channels_last, 0.1 to 1.06, both; of more, 0.9 to 1.3. One thread, 2026-11-27: that solution under autocast past
    64 channels 0.7 to 1.08, by error 0.17 to 0.5.
    """
    x, weight, slower = call.inputs[0], call.tensors[0], "it was measured to be slower than plain PyTorch"
    assert weight is not None
    slow_norms = has_slow_norms(program, x, weight)
    if call.family == "skew_pair":
        return "" if slow_norms else f"for pairs {slower}"
    if call.family != "skew_solution":
        return ""
    if call.lower is not None and max(weight.shape[:2]) > _MOST_LOWERED_PAIR:
        return f"under autocast with more than {_MOST_LOWERED_PAIR} channels {slower}"
    fewest = _FEWEST_OF_SOLUTIONS if call.lower is None else _FEWEST_OF_LOWERED_SOLUTIONS
    if not slow_norms and not is_exporting() and x.numel() < fewest:
        return f"with fewer than {fewest} entries {slower}"
    return ""
