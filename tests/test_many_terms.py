"""Schemes whose stages combine more tensors than one operator takes."""

from __future__ import annotations

import copy

import pytest
import torch

import fastode
from fastode import reference
from fastode.embedded import EMBEDDED
from fastode.tableau import Butcher, Tableau
from fastode.testing import assert_blocks_equal, sample_input


@pytest.mark.parametrize("stages", [9, 17])
def test_a_dense_scheme_of_many_stages_equals_the_reference(stages: int) -> None:
    alpha = tuple(tuple(1 / (i + 1) for _ in range(i + 1)) for i in range(stages))
    beta = tuple(tuple(0.1 / (k + 1) for k in range(i + 1)) for i in range(stages))
    dense = Tableau("dense", alpha, beta, 1)
    branch = reference.PreActBranch(4, norm="layer", activation="tanh")
    fused = fastode.nn.ShuOsher(branch, dense)
    fused.engine = "staged"
    assert_blocks_equal(reference.ShuOsher(branch, dense), fused, sample_input(2, 4, 3, 3))
    assert torch.isfinite(fused(sample_input(2, 4, 3, 3))).all()


def test_a_solution_of_many_stages_equals_the_reference() -> None:
    method = Butcher("fourteen", EMBEDDED["dopri8"].a, EMBEDDED["dopri8"].b, 8)
    block = reference.SOBlock(reference.SkewPair(3, 8, gamma=0.1, activation="tanh").double(), method)
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine="resident")
    assert_blocks_equal(block, twin, sample_input(2, 3, 6, 6, dtype=torch.float64))
