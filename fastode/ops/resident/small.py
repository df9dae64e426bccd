"""Calls so small that what is around the products takes the longest, of which plain PyTorch has the most.

The bounds are drawn from 2500 random blocks of every family, norm, memory format and dtype, of 1 to 64 samples, on an
AMD EPYC with dot products of bfloat16, one thread and two, 2026-11-29. Of another 1198 blocks of 8 to 64 channels, 4x4
to 16x16 and 1 to 16 samples none had less than 0.95 of eager's speed in the slowest of forward, attack's and training
step, in the median 3.2 times it.
"""

from __future__ import annotations

from ..engine import Call
from ..plan import Plan
from ..schemes.chain.chain import Chain
from ..schemes.skew_pair.pair import Pair
from . import one_evaluation, rule

PRODUCTS = 10_000_000  # multiply-adds of an evaluation, for each of one or two threads
MOST_CHANNELS = 64  # of the widest map: weights of more are packed, and their gradients added up, for too little
# Without norms, a pair of which one side, and one convolution whose result, has fewer channels than a vector holds.
NARROW, PRODUCTS_OF_NARROW = 16, 2_000_000


def is_small(call: Call) -> bool:
    """Whether a call on the CPU is small enough to be faster whatever else is known of it."""
    x, program = call.inputs[-1], call.program
    if not (rule.measured() and rule.multiplies_pairs()) or rule.samples(x) is None:
        return False
    most = PRODUCTS
    if isinstance(program, Pair):
        weight = call.tensors[0]
        assert weight is not None
        widest, fewest = max(weight.shape[:2]), min(weight.shape[:2])
        if fewest < NARROW and all(norm is None for norm in program.norms):
            most = PRODUCTS_OF_NARROW
    elif isinstance(program, Chain | Plan):
        convs = [unit.conv for unit in program.units if unit.conv is not None and not unit.conv.mean]
        widest = max([x.shape[1], *[conv.out_channels for conv in convs]])
        normed = any(unit.norm is not None for unit in program.units)
        if len(convs) == 1 and not normed:
            if rule.few_for_threads(x.shape[0]):
                return False
            most = PRODUCTS if widest >= NARROW else PRODUCTS_OF_NARROW
    else:
        return False
    return widest <= MOST_CHANNELS and products(call) > 0 and few_products(call, most)


def in_words() -> str:
    """The bounds in words."""
    most = f"at most {PRODUCTS} multiply-adds for each thread and {MOST_CHANNELS} channels, before all others"
    return most if rule.measured() and rule.multiplies_pairs() else "not measured"


def few_products(call: Call, most: int) -> bool:
    """Whether an evaluation has at most so many multiply-adds for each of one or two threads."""
    return products(call) <= most * min(rule.threads(), 2)


def products(call: Call) -> int:
    """Multiply-adds of the convolutions in one evaluation of a block's branch, or of its field."""
    x, program = call.inputs[-1], call.program
    if isinstance(program, Pair):
        assert call.tensors[0] is not None
        weight = call.tensors[0]
        return 2 * weight.numel() * x.shape[0] * x.shape[2] * x.shape[3] // program.stride**2
    assert isinstance(program, Chain | Plan)
    plans = program.plans if isinstance(program, Chain) else (program,)
    total = 0
    for conv, _, (_, height, width) in one_evaluation.convolutions(plans, x):
        if not conv.mean:
            total += conv.in_channels * conv.out_channels * conv.kernel[0] * conv.kernel[1] * height * width
    return total * x.shape[0]
