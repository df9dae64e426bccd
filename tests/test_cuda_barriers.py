"""Each barrier of the programs of csrc/cuda is needed, and the test machine sees where it is missing.

But for those in whose line a comment begins with "unseen:", and says why they stand there all the same.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import case_of, make_input, make_pair
from pairwise import Case
from simulator import DEVICE, ORDERS, barriers, look_for_needed, order
from test_cuda_programs import _on_the_test_machine as _on_the_test_machine
from torch import Tensor

from fastode.ops.resident.engine import Resident

BASE = {
    "convolution": "3x3",
    "shape": "two_layers",
    "dtype": torch.bfloat16,
    "channels": 16,
    "size": (8, 8),
    "batch": 3,  # on the test machine's two blocks
    "steps": 2,
}
NORMS = ("group", "batch_eval", "none", "batch")
PROGRAMS = {
    "scheme, forward": {"family": "ssp2", "mode": "forward"},
    "scheme, input gradient": {"family": "ssp2", "mode": "input_grad"},
    "scheme, step": {"family": "ssp2", "mode": "train"},
    "descent, forward": {"family": "ie", "mode": "forward"},
    "descent, input gradient": {"family": "ie", "mode": "input_grad"},
    "descent, step": {"family": "ie", "mode": "train"},
}


def run(case: Case, name: str) -> list[Tensor]:
    """A block's result and gradients, with turns taken in one of ORDERS."""
    _, fused = make_pair(case)
    fused.engine = Resident.name
    x = make_input(case).requires_grad_(case["mode"] != "forward")
    parameters = list(fused.parameters()) if case["mode"] == "train" else []
    fused.requires_grad_(case["mode"] == "train")
    with order(name):
        y = fused(x)
        gradients = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y)) if x.requires_grad else ()
    return [y.detach(), *gradients]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all are equal, to the last bit; what has a NaN is equal to nothing."""
    return all(map(torch.equal, first, second))


def source_line(barrier: str) -> str:
    name, _, line = barrier.partition(":")
    return (DEVICE / name).read_text().splitlines()[int(line) - 1]


def look_at(case: Case, seen: set[str]) -> set[str]:
    """The barriers of a case; adds those to `seen` whose absence changes something in one of the orders."""
    right = run(case, "forward")
    assert all(tensor.isfinite().all() for tensor in right)
    assert all(same(right, run(case, name)) for name in ORDERS)
    every = set(barriers(lambda: run(case, "forward")))
    look_for_needed(every, seen, lambda: all(same(right, run(case, name)) for name in ORDERS))
    return every


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_barrier_is_seen(program: str) -> None:
    met, seen = set[str](), set[str]()
    for norm in NORMS:
        met |= look_at(case_of(**BASE, **PROGRAMS[program], norm=norm), seen)
    assert met
    assert {barrier for barrier in met - seen if "// unseen:" not in source_line(barrier)} == set()
