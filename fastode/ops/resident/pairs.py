"""Where the resident engine is slower than plain PyTorch for skew pairs on bfloat16 maps, and for their solutions on
these and, under autocast, on float32 maps.

The bounds are of two threads of an AMD EPYC with dot products of bfloat16, 2026-11-28 and 29: 550 random pairs of 8 to
128 channels, 4x4 to 32x32 and 1 to 64 samples, and solutions by RK4, each beside eager forwards, in an attack's step
and in a training step. Numbers are eager's time in the resident engine's, in a pair's slowest mode. Of 160 solutions on
float32 maps, which it multiplies in float32, those within the bounds had 1.06 to 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import Call
from ..schemes.skew_pair.pair import Pair, has_slow_norms
from . import bfloat16, rule
from .rule import Line
from .small import few_products

# The pair alone on other CPUs, AMX tiles included, under autocast: fewest channels, and what else held at first.
ELSEWHERE = (16, Line(most_channels=64))
# The pair alone under autocast, of 160 channels 0.84 to 1.2, of 256 0.68 to 1.04. Solutions by equal steps from float32
# maps of 160 to 256 channels, which are multiplied in float32, 1.08 to 1.7 at 8x8 and 0.64 to 0.86 at 4x4.
MOST_CHANNELS = 128
# From so many channels on, of fewer pixels: a pair 0.5 to 1.1, a solution 0.6 to 0.9.
WIDE, FEWEST_PIXELS = 128, 49
# Of fewer samples than threads, of more entries of y: a pair 0.6 to 0.95, a solution 0.75.
MOST_ALONE, MOST_OF_SOLUTION = 1 << 14, 1 << 16
# Without norms, of fewer channels: of 8 at 32x32 0.6 to 0.9, of 3 on one side 0.6 to 3.5.
FEWEST_UNNORMED = 16
# Without norms, within these bounds 1.0 to 2.5. Up to so many channels from 7x7 on, with fewer multiply-adds of an
# evaluation for each thread, 1.0 to 1.4; of more 0.6 to 1.0.
UNNORMED, WIDER_UNNORMED, PRODUCTS_UNNORMED = Line(most_channels=32, most_kb=16), 96, 30_000_000
# With norms, from so many channels on, of more multiply-adds 0.8 to 1.05, of fewer 1.0 to 1.8; on maps of fewer than
# so many pixels it begins earlier.
FROM_CHANNELS, PRODUCTS, FEW_PIXELS, PRODUCTS_OF_FEW_PIXELS = 64, 75_000_000, 64, 30_000_000
# In contiguous memory, of fewer channels, of more entries of y an attack's step 0.90 to 1.06; of fewer entries 1.0 to
# 1.6. (From 16 channels on 1.1 to 1.7, 100 random pairs from 14x14 to 32x32, 2026-11-29.)
NARROW, MOST_NARROW = 16, 1 << 17


def slower(call: Call, pair: Pair) -> str | None:
    """Why a pair or its solution in bfloat16 or under autocast is taken to be slower than plain PyTorch, or empty.

    None where the lines of rule.py are to say.
    """
    weight, alone = call.tensors[0], call.family == "skew_pair"
    assert weight is not None
    if rule.on_tiles() and call.inputs[0].dtype == torch.float32:
        return f"{bfloat16.IN_FLOAT32}it is expected to be slower than plain PyTorch"
    if rule.multiplies_widened():
        return None
    if not rule.multiplies_pairs():
        beyond = _elsewhere(call, weight) if alone and pair.lower is not None else None
    elif max(weight.shape[:2]) > MOST_CHANNELS:
        beyond = f"with more than {MOST_CHANNELS} channels" if alone and pair.lower is not None else None
        if call.family == "skew_solution" and pair.lower is not None and call.inputs[0].dtype == torch.float32:
            beyond = _solution(call, weight) or None
    else:
        beyond = _pair(call, pair, weight) if alone else _solution(call, weight)
    if not beyond:
        return beyond
    where = "under autocast " if pair.lower is not None else ""
    return f"{where}{beyond} {rule.SLOWER}"


def in_words() -> list[tuple[str, str]]:
    """The bounds in force, by what they are of."""
    if rule.multiplies_widened():
        return []
    if not rule.multiplies_pairs():
        fewest, line = ELSEWHERE
        return [("skew_pair, autocast", f"{fewest} channels at least, on both sides, and {line.describe()}")]
    few = f"at most {MOST_CHANNELS} channels, of {WIDE} and more at least {FEWEST_PIXELS} pixels"
    normed = f"from {FROM_CHANNELS} channels on at most {PRODUCTS} multiply-adds for each thread"
    bare = f"{FEWEST_UNNORMED} channels at least, and {UNNORMED.describe()}, or at most {WIDER_UNNORMED} channels and "
    return [
        ("skew_pair, bfloat16", f"{few}; {normed}"),
        ("the same, no norms", f"{bare}{PRODUCTS_UNNORMED} multiply-adds for each thread"),
        ("skew_solution, bfloat16", few),
    ]


def _elsewhere(call: Call, weight: Tensor) -> str | None:
    fewest, line = ELSEWHERE
    if min(weight.shape[:2]) < fewest:
        return f"with fewer than {fewest} channels"
    return line.beyond(max(weight.shape[:2]), _pixels(call, weight), 4, 1, 1) or None


def _pixels(call: Call, weight: Tensor) -> int:
    """Of y."""
    x = call.inputs[0]
    halved = call.family != "skew_pair" and weight.shape[2] % 2 == 0  # a solution gets z
    return x.shape[2] * x.shape[3] // (4 if halved else 1)


def _solution(call: Call, weight: Tensor) -> str:
    widest, pixels, batch = max(weight.shape[:2]), _pixels(call, weight), rule.samples(call.inputs[0])
    if widest >= WIDE and pixels < FEWEST_PIXELS:
        return f"with {WIDE} channels and more and fewer than {FEWEST_PIXELS} pixels"
    few = rule.few_for_threads(batch)
    return f"{few} and more than {MOST_OF_SOLUTION} entries" if few and widest * pixels > MOST_OF_SOLUTION else ""


def _pair(call: Call, pair: Pair, weight: Tensor) -> str:
    y, widest, pixels = call.inputs[0], max(weight.shape[:2]), _pixels(call, weight)
    normed = any(norm is not None for norm in pair.norms)
    batch = rule.samples(y)
    if widest >= WIDE and pixels < FEWEST_PIXELS:
        return f"with {WIDE} channels and more and fewer than {FEWEST_PIXELS} pixels"
    if not normed and min(weight.shape[:2]) < FEWEST_UNNORMED:
        return f"without norms with fewer than {FEWEST_UNNORMED} channels"
    few = rule.few_for_threads(batch)
    if few and widest * pixels > MOST_ALONE:
        return f"{few} and more than {MOST_ALONE} entries"
    if has_slow_norms(pair, y, weight):
        return ""
    if min(weight.shape[:2]) < NARROW and rule.is_large_contiguous(y, MOST_NARROW):
        return f"with fewer than {NARROW} channels and more than {MOST_NARROW} entries not in channels_last"
    if not normed:
        wider = widest <= WIDER_UNNORMED and pixels >= FEWEST_PIXELS and few_products(call, PRODUCTS_UNNORMED)
        beyond = "" if wider else UNNORMED.beyond(widest, pixels, 4, None, 1)
        return f"without norms {beyond}" if beyond else ""
    most = PRODUCTS if pixels >= FEW_PIXELS else PRODUCTS_OF_FEW_PIXELS
    if widest < FROM_CHANNELS or batch is None or few_products(call, most):
        return ""
    return f"with {FROM_CHANNELS} channels and more and more than {most} multiply-adds for each thread"
