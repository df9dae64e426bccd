"""What `make fuzz` leaves out: cases in which a fused block and its reference cannot be compared, and why."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.reference.skew import PADDING
from fastode.testing import Comparison, Judge, sample_input
from fastode.testing.compare import cotangents_of, run

from . import rejudge
from .drawn import BY_ERROR, EXACT, Case


def excused(judge: Judge, fused: nn.Module, case: Case) -> str:
    """Why a fused block that is not equal cannot be compared; empty if it can."""
    if case.family in BY_ERROR and is_close(fused, case):
        return f"a step was accepted or rejected by less than {rejudge.CLOSE}"
    if case.family == EXACT and not took_the_same(judge, fused, case):
        return "its solves took other numbers of iterations, or did not converge"
    try:
        comparison = judge.compare(fused)
    except Exception:  # which is the failure
        return ""
    if is_misconvolved(case):
        return "PyTorch's convolution is wrong on its maps"
    if is_cancelled(judge, fused, comparison, case):
        return "what differs is a coefficient's gradient, by less than a rounding of the terms that cancel in it"
    if is_rounding(judge, comparison, case):
        return "what differs is the rounding of gradients that are zero, behind a norm of nearly constants"
    return ""


def took_the_same(judge: Judge, fused: nn.Module, case: Case) -> bool:
    """Whether the implicit steps of both versions, and their gradients, converged in as many iterations."""
    found = []
    for block in (case.plain, fused):
        with fastode.record_steps() as log:
            judge.run(block)
        found.append([(solve.what, solve.iterations, solve.products, solve.converged) for solve in log.implicit])
    return found[0] == found[1] and all(converged for *_, converged in found[0])


def is_close(fused: nn.Module, case: Case) -> bool:
    """Whether an attempt of either version has an error of nearly what is tolerated."""
    with fastode.record_steps() as log, torch.no_grad():
        for block in (copy.deepcopy(case.plain), fused):
            block(*case.inputs)
    ratios = [ratio for solve in log for ratio in (*solve.ratios, *(attempt[2] for attempt in solve.rejected))]
    return any(abs(ratio - 1) < rejudge.CLOSE for ratio in ratios)


def is_misconvolved(case: Case) -> bool:
    """Whether PyTorch's convolution in bfloat16 is wrong on the maps of a skew pair (docs/pytorch-faults.md, 5)."""
    field = next((module for module in case.plain.modules() if isinstance(module, reference.SkewPair)), None)
    if field is None or torch.bfloat16 not in (case.autocast, field.weight.dtype):
        return False
    pair = (sample_input(*case.inputs[-1].shape).bfloat16(), field.weight.detach().bfloat16())
    found, exact = (
        F.conv2d(z, weight, stride=field.stride, padding=PADDING).double()
        for z, weight in (pair, tuple(t.double() for t in pair))
    )
    return not torch.linalg.vector_norm(found - exact) <= 0.1 * torch.linalg.vector_norm(exact)


NOTHING = 1e-8  # relative to the others: what is smaller in float64 is rounding, however often a norm has raised it
MOST_RATIO = 10.0  # of such rounding to what the reference's few samples of it allow
NEARLY = 0.05  # a set whose spread is less, relative to its largest value: its norm raises rounding twentyfold


def is_rounding(judge: Judge, comparison: Comparison, case: Case) -> bool:
    """Whether all that differs is gradients that are zero in exact arithmetic, and a norm is given nearly constants.

    A norm multiplies rounding by size/spread there, by up to 1/√ε, and two of them by its square.
    """
    exact, found = copy.deepcopy(case.plain).double(), []
    for module in exact.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            module.register_forward_pre_hook(lambda norm, given: found.append(sees_constants(norm, given[0])))
    doubled = tuple(x.double() for x in case.inputs)
    truths = run(exact, doubled, judge.cotangents, case.mode)
    sizes = {name: float(t.norm()) for name, t in truths.items() if name.startswith("gradient") and t is not None}
    zero = [name for name, size in sizes.items() if size <= NOTHING * max(sizes.values())]
    return any(found) and all(row.ok or (row.name in zero and row.ratio <= MOST_RATIO) for row in comparison.rows)


def sees_constants(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm that takes its statistics from x finds a set of nearly one value in it."""
    if isinstance(norm, nn.GroupNorm):
        sets = x.reshape(x.shape[0] * norm.num_groups, -1)
    elif not norm.training and getattr(norm, "running_mean", None) is not None:
        return False
    else:
        sets = x.transpose(0, 1).flatten(1) if isinstance(norm, nn.BatchNorm2d) else x.flatten(0, 1).flatten(1)
    return bool((sets.std(1, correction=0) <= NEARLY * sets.abs().amax(1)).any())


def is_cancelled(judge: Judge, fused: nn.Module, comparison: Comparison, case: Case) -> bool:
    """Whether all that differs is gradients of a learned scheme's parameters, by less than a rounding of their terms.

    Such a gradient is a sum over the scheme's coefficients, and cancels to a hundredth of its terms where both
    evaluations of f are nearly alike. The reference rounds each term to the dtype, and its few runs may round them all
    alike.
    """
    wrong = {row.name.removeprefix("gradient of block.") for row in comparison.rows if not row.ok}
    if not isinstance(case.plain.block, reference.Ark) or wrong - {"a21", "b10"}:
        return False
    exact = copy.deepcopy(case.plain).double()
    table = torch.stack(exact.block.coefficients())  # type: ignore[operator]
    given = table.detach().requires_grad_()
    exact.block.coefficients = lambda: given  # type: ignore[assignment]
    y = exact(*(x.detach().double() for x in case.inputs))
    (bars,) = torch.autograd.grad(y, given, (judge.cotangents or cotangents_of((y,)))[0].double())
    found, eps = judge.run(fused), torch.finfo(case.autocast or case.inputs[0].dtype).eps
    for name in wrong:
        terms = terms_of(table, bars, exact.block.get_parameter(name))  # type: ignore[operator]
        value = found[f"gradient of block.{name}"]
        if value is None or not abs(float(value) - float(terms.sum())) <= eps * float(terms.abs().sum()):
            return False
    return True


def terms_of(table: Tensor, bars: Tensor, parameter: Tensor) -> Tensor:
    """What each entry of a table that a parameter makes adds to its gradient, from the entries' own."""
    pairs = zip(table.flatten(), bars.flatten(), strict=True)
    return torch.stack([torch.autograd.grad(entry, parameter, bar, retain_graph=True)[0] for entry, bar in pairs])
