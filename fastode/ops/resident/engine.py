"""The resident engine: a whole block in one operator, sample by sample, while a sample stays in a core's cache.

README.md beside this file says how it works and what it stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...native import cuda_library
from ...native.constants import MOST_PAIR_CHANNELS
from ..engine import NO_EXACT_IE, NO_ODE_SOLUTION, ODE_SOLUTION, Call, OperatorEngine
from ..met import Met
from ..plan import MaybeTensors, Plan
from ..schemes.chain.chain import Chain
from ..schemes.implicit_euler.descent import Descent
from ..schemes.ode import solution
from ..schemes.runge_kutta.stages import Scheme
from ..schemes.skew_pair.linear import Linear
from ..schemes.skew_pair.pair import Pair
from . import bfloat16, card, chain, functions, head, linear, one_evaluation, pairs, rule, skew, small, solve
from .call import places_of
from .field import ResidentField


class Resident(OperatorEngine):
    """Small feature maps: on the CPU, and on a card as one launch (card.py)."""

    name = "resident"
    devices = ("cpu", "cuda")
    ie_skip = functions.ResidentIESkipFunction
    shu_osher = functions.ResidentShuOsherFunction
    chain = chain.ResidentChainFunction
    head = head.ResidentHeadFunction
    skew_pair = skew.ResidentSkewFunction
    skew_solution = skew.ResidentMarchFunction
    skew_adaptive = solve.ResidentSolveFunction
    ode_solution = solution.make_solution_function(ResidentField)
    skew_linear = linear.ResidentLinearFunction
    linear_solution = linear.ResidentLinearSolveFunction
    solution_from_x = True
    steps_inside = True

    def apart(self, results: Any, plans: Sequence[Plan], rule: Descent | Scheme | None = None) -> Any:
        if len(results) == 1 or type(results[1]) is Met:
            return results
        places = places_of(plans, (True,) if rule is None else functions.used(rule))
        return (results[0], *Met(results[1], places).apart())

    def refuses(self, call: Call) -> str:
        if call.family == "exact_ie":
            return NO_EXACT_IE
        if isinstance(call.program, Chain):
            if call.x is not None and call.x.device.type == "cuda":
                return "it has no programs of chains, or of blocks that change the shape, for CUDA"
            if not call.program.units:
                return head.refuses(call)
            return chain.refuses(call.program, call.x) or _refuses_dtypes(call.lower, call.tensors, call.x)
        if call.x is not None and call.x.device.type == "cuda":
            if call.family == ODE_SOLUTION:
                return NO_ODE_SOLUTION
            return (
                card.refuses(call)
                or _refuses_autocast(call.lower)
                or _refuses_dtypes(None, call.tensors, call.x)
                or card.lacks_programs(call)
            )
        if isinstance(call.program, Plan):
            reason = _refuses_field(call.program, call.x) if call.family == ODE_SOLUTION else ""
            return reason or _refuses_branch(call.program, call.tensors, call.x)
        if isinstance(call.program, Linear):
            return _refuses_linear(call.program, call.tensors, call.x)
        assert call.program is not None
        return _refuses_pair(call.program, call.tensors, call.inputs, alone=call.family == "skew_pair")

    def against(self, call: Call) -> str:
        x, program, pixels = call.inputs[-1], call.program, None
        if isinstance(program, Linear):
            assert call.tensors[0] is not None
            return rule.slower_linear(call.family, call.tensors[0])
        if isinstance(program, Chain) and not program.units:
            return head.slower(call)
        if isinstance(program, Chain) and (slower := chain.slower_alone(x, program)):
            return slower
        if call.family != ODE_SOLUTION and small.is_small(call):
            return ""
        if isinstance(program, Chain):
            return chain.slower(x, program)
        if isinstance(program, Plan):
            coupled = any(unit.norm is not None and unit.norm.mode == "batch" for unit in program.units)
            widest = max([x.shape[1], *[unit.conv.out_channels for unit in program.units if unit.conv is not None]])
            if x.dtype == torch.bfloat16 and call.family != ODE_SOLUTION:
                convs = [(unit.conv, x.shape[2], x.shape[3]) for unit in program.units if unit.conv is not None]
                if bfloat16.is_filtered_whole(x, convs):
                    return ""
            by_hand = program.lower is not None and x.dtype != torch.float64 and not rule.multiplies_widened()
            if by_hand and call.family in bfloat16.FLOAT32_MAPS:
                slower = bfloat16.slower(call.family, x, widest)
                if slower or x.dtype == torch.float32:
                    return slower
            if call.family == "shu_osher" and not call.is_single and x.dtype == torch.bfloat16:
                norms = [unit.norm for unit in program.units if unit.norm is not None]
                narrow = any(norm.has_narrow_groups(widest) for norm in norms)
                uneven = bfloat16.slower_scheme(x, widest, narrow, small.products(call))
                if uneven:
                    return uneven
            if call.is_single and x.dtype == torch.bfloat16 and rule.multiplies_pairs():
                return bfloat16.slower_chain(x, _one_evaluation(program, x), casts=program.lower is not None)
            if call.is_single and x.dtype != torch.bfloat16:
                few = rule.FEW_OF_STEPS if coupled else (0, 0)
                found, pixels = one_evaluation.convolutions((program,), x), x.shape[2] * x.shape[3]
                normed = any(unit.norm is not None for unit in program.units)
                return one_evaluation.slower(x, found, normed, coupled, widest, pixels, few)
        else:
            assert program is not None and call.tensors[0] is not None
            coupled = any(norm is not None and norm.mode == "batch" for norm in program.norms)
            if x.dtype == torch.bfloat16 or (program.lower is not None and x.dtype != torch.float64):
                known = pairs.slower(call, program)
                if known is not None:
                    return known
            outputs, inputs = call.tensors[0].shape[:2]
            widest = max(outputs, inputs)
            pixels = x.shape[2] * x.shape[3] * max(inputs, outputs // program.stride**2) // widest
        # Steps by error are measured by those of equal size: their evaluations are the same.
        family = "skew_solution" if call.family == "skew_adaptive" else call.family
        return rule.slower(family, coupled, x, widest, pixels)

    def describe(self, device: str) -> tuple[bool, str]:
        return cuda_library.available() if device == "cuda" else super().describe(device)

    def rule_in_words(self) -> list[str]:
        bounds = [*one_evaluation.in_words(), *bfloat16.in_words(), *pairs.in_words()]
        bounds.append(("small calls", small.in_words()))
        return [*rule.in_words(), *[f"  {name:<32}{words}" for name, words in bounds]]


def _one_evaluation(plan: Plan, x: Tensor) -> bfloat16.OneEvaluation:
    convs = [unit.conv for unit in plan.units if unit.conv is not None]
    norms = [unit.norm for unit in plan.units if unit.norm is not None]
    fewest, count = chain.of_few_channels(convs)
    widest = max([x.shape[1], *[conv.out_channels for conv in convs]])
    untiled = 0 if bfloat16.fills_tiles(x.shape[3]) else widest
    coupled = any(norm.mode == "batch" for norm in norms)
    return bfloat16.OneEvaluation(
        fewest, widest, x.shape[2] * x.shape[3], untiled, count, normed=len(norms) > 0, coupled=coupled
    )


def _refuses_branch(plan: Plan, tensors: MaybeTensors, x: Tensor | None) -> str:
    for unit, tracks in zip(plan.units, plan.tracked, strict=True):
        conv, norm = unit.conv, unit.norm
        if conv is not None and (conv.groups != 1 or tuple(conv.dilation) != (1, 1)):
            return "it has kernels for convolutions without groups and dilation only"
        if norm is not None and norm.mode == "group" and tracks:
            return "it has no running statistics of an instance norm"
    return _refuses_dtypes(plan.lower, tensors, x)


def _refuses_field(field: Plan, x: Tensor | None) -> str:
    if any(unit.norm is not None and unit.norm.mode == "batch" for unit in field.units):
        return "a batch norm of the field couples the samples, which it takes one by one"
    last = field.units[-1]
    if last.conv is None and last.activation is not None and last.activation.kind in ("softplus", "sigmoid"):
        return f"a field that ends in {last.activation.kind} is not zero where a vector of channels is empty"
    if x is not None and x.dtype not in (torch.float32, torch.float64):
        return "it solves a single map's equation in float32 and float64 only"
    return ""


def _refuses_pair(pair: Pair, tensors: MaybeTensors, states: Sequence[Tensor], *, alone: bool) -> str:
    weight = tensors[0]
    assert weight is not None
    stride, padding, (height, width) = pair.stride, pair.padding, weight.shape[2:]
    odd = stride == 1 and height % 2 == 1 and padding == height // 2
    halving = stride == 2 and height == 4 and padding == 1
    if height != width or not (odd or halving):
        return "it has kernels for odd sides at stride 1 that keep the size, and for 4×4 at stride 2 with padding 1"
    if any(norm is not None and norm.mode == "batch" for norm in pair.norms):
        return "a batch norm of the skew pair couples the samples, which it takes one by one"
    if any(pair.tracked):
        return "it has no running statistics of an instance norm"
    if max(weight.shape[:2]) > MOST_PAIR_CHANNELS:
        return f"it has the skew pair for at most {MOST_PAIR_CHANNELS} channels"
    # A solution of float32 is float32 whatever its slopes are; those of the pair alone have dtypes of their own.
    if alone and pair.lower is not None and any(state.dtype == torch.float32 for state in states):
        return "it lowers the convolutions of states in bfloat16 alone, and not of float32, as autocast asks"
    return _refuses_dtypes(pair.lower, tensors, states[-1] if states else None)


def _refuses_linear(linear: Linear, tensors: MaybeTensors, x: Tensor | None) -> str:
    if linear.lower is not None:
        return "it does not lower matrix products as autocast asks"
    if x is not None and x.dtype not in (torch.float32, torch.float64):
        return f"it has the field of two matrix products in float32 and float64, and not in {x.dtype}"
    return _refuses_dtypes(None, tensors, x)


def _refuses_dtypes(lower: torch.dtype | None, tensors: MaybeTensors, x: Tensor | None) -> str:
    # Autocast leaves float64 alone; of other maps it takes parameters in either dtype, as the operators do.
    if x is None or (lower is not None and x.dtype != torch.float64):
        return ""
    for tensor in tensors:
        if tensor is not None and tensor.dtype != x.dtype:
            return "its parameters are not of the input's dtype"
    return ""


def _refuses_autocast(lower: torch.dtype | None) -> str:
    return "" if lower is None else "it does not lower convolutions as autocast asks"
