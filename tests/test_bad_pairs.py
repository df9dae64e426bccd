"""Bad input to the skew-symmetric blocks: what is refused, in which words."""

import math
import re

import pytest
import torch

from fastode import functional, reference
from fastode import nn as fused


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def pair(y=(2, 3, 3, 3), z=(2, 2, 6, 6), **options):
    return torch.randn(y, **options), torch.randn(z, **options)


PAIRS = [
    (lambda: pair(y=(2, 4, 3, 3)), ValueError, "y must be a tensor [N, 3, H, W], got shape [2, 4, 3, 3]"),
    (lambda: pair(z=(2, 6, 6)), ValueError, "z must be a tensor [N, 2, H, W], got shape [2, 6, 6]"),
    (
        lambda: pair(z=(2, 2, 7, 6)),
        ValueError,
        "z must be a tensor of shape [2, 2, 6, 6] to match y, got shape [2, 2, 7, 6]",
    ),
    (lambda: pair(dtype=torch.float64), TypeError, "y must be of the parameters' dtype float32, got float64"),
    (lambda: pair(device="meta"), ValueError, "y must be on the parameters' device cpu, got meta"),
    (lambda: (1.0, pair()[1]), TypeError, "y must be a tensor [N, 3, H, W], got 1.0"),
]


def skew_function(y, z, weight=None, **options):
    weight = torch.randn(3, 2, 4, 4) if weight is None else weight
    return functional.skew_pair(y, z, weight, **{"stride": 2, **options})


@pytest.mark.parametrize("case", range(len(PAIRS)))
def test_a_pair_that_does_not_fit(case):
    make, error, message = PAIRS[case]
    for kind in (reference.SkewPair, fused.SkewPair):
        field = kind(2, 3, stride=2, norm="batch")
        before = [tensor.clone() for tensor in field.state_dict().values()]
        with refused(error, message):
            field(*make())
        assert all(torch.equal(old, new) for old, new in zip(before, field.state_dict().values(), strict=True))
    with refused(error, message):
        skew_function(*make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"weight": torch.ones(3, 2, 4)},
            ValueError,
            "weight must be a tensor [C_out, C_in, k, k], got shape [3, 2, 4]",
        ),
        ({"weight": 1}, TypeError, "weight must be a tensor [C_out, C_in, k, k], got 1"),
        ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be an int >= 0, got -1"),
        ({"padding": 1.0}, TypeError, "padding must be an int >= 0, got 1.0"),
        ({"gamma": math.nan}, ValueError, "gamma must be a finite number, got nan"),
    ],
)
def test_arguments_of_the_skew_function(options, error, message):
    with refused(error, message):
        skew_function(*pair(), **options)


@pytest.mark.parametrize("kinds", [reference, fused], ids=["reference", "fused"])
def test_arguments_of_the_skew_blocks(kinds):
    with refused(ValueError, "gamma must be a finite number >= 0, got -1"):
        kinds.SkewPair(2, 3, gamma=-1)
    with refused(ValueError, "stride must be 1 or 2, got 3"):
        kinds.SkewPair(2, 3, stride=3)
    field = kinds.SkewPair(2, 3)
    with refused(ValueError, "steps must be an int >= 1, got 0"):
        kinds.SOBlock(field, solver="rk4", steps=0)
    with refused(ValueError, "rtol must be a finite number > 0, got nan"):
        kinds.SOBlock(field, rtol=math.nan)
    with refused(ValueError, "t1 must be a finite number > 0, got -1.0"):
        kinds.SOBlock(field, t1=-1.0)
    with pytest.raises(ValueError, match=r"^solver must be one of 'euler', .*, got 'rk5'$"):
        kinds.SOBlock(field, solver="rk5")
