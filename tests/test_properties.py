"""Equality on random configurations, and what must hold for any block."""

from __future__ import annotations

import copy

import torch
from block_cases import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FAMILIES,
    NORMS,
    SHAPES,
    make_branch,
    make_input,
    make_pair,
    possible,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pairwise import Case

import fastode
from fastode import reference
from fastode.tableau import Tableau
from fastode.testing import assert_blocks_equal, compare_tensors, sample_input

# Several channels and pixels: single numbers and sets of two values, whose gradients can cancel down to rounding in any
# implementation, are met in test_equality.py; a search for failures would find nothing else.
COMMON = {
    "norm": st.sampled_from(sorted(NORMS)),
    "activation": st.sampled_from(sorted(ACTIVATIONS)),
    "convolution": st.sampled_from(sorted(CONVOLUTIONS)),
    "shape": st.sampled_from(sorted(SHAPES)),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    "size": st.tuples(st.integers(2, 9), st.integers(2, 9)),
    "channels": st.sampled_from([3, 8, 16, 20]),
    "layout": st.sampled_from(["contiguous", "channels_last", "sliced"]),
    "batch": st.integers(0, 4),
    "mode": st.sampled_from(["train", "input_grad", "forward"]),
    "steps": st.integers(1, 4),
    "theta": st.floats(0.0, 1.0),
    "detach": st.booleans(),
}
CASES = st.fixed_dictionaries({"family": st.sampled_from(sorted(FAMILIES)), **COMMON})
EXACT = CASES.map(lambda case: case | {"dtype": torch.float64, "batch": max(case["batch"], 2)})


@settings(max_examples=80)
@given(case=CASES)
def test_any_block_equals_its_reference(case: Case) -> None:
    assume(possible(case))
    plain, fused = make_pair(case)
    assert_blocks_equal(plain, fused, make_input(case), mode=case["mode"])


@st.composite
def tableaus(draw: st.DrawFn) -> Tableau:
    """Any explicit scheme of up to four stages: rows of alpha made to sum to one, any beta."""
    alpha, beta = [], []
    for stage in range(1, draw(st.integers(1, 4)) + 1):
        weights = draw(st.lists(st.integers(-2, 8), min_size=stage, max_size=stage).filter(lambda row: sum(row) > 0))
        alpha.append(tuple(weight / sum(weights) for weight in weights))
        beta.append(tuple(draw(st.integers(-4, 8)) / 8 for _ in range(stage)))
    return Tableau("random", tuple(alpha), tuple(beta), order=1)


@settings(max_examples=40)
@given(tableau=tableaus(), case=EXACT)
def test_any_scheme_equals_its_reference(tableau: Tableau, case: Case) -> None:
    assume(possible(case))
    torch.manual_seed(0)
    branch = make_branch(case)
    plain = reference.ShuOsher(branch, tableau)
    fused = fastode.nn.ShuOsher(copy.deepcopy(branch), tableau)
    fused.engine = "staged"
    assert_blocks_equal(plain, fused, make_input(case), mode=case["mode"])


@settings(max_examples=30)
@given(case=EXACT)
def test_samples_do_not_meet_but_in_batch_norm(case: Case) -> None:
    assume(case["norm"] == "batch_eval" or not case["norm"].startswith("batch"))
    assume(possible(case | {"batch": 1}))
    _, fused = make_pair(case)
    x = make_input(case)
    with torch.no_grad():
        whole, parts = copy.deepcopy(fused)(x), torch.cat([copy.deepcopy(fused)(sample) for sample in x.split(1)])
    comparison = compare_tensors({"output": parts}, {"output": whole}, [], x[0].numel() * 25)
    assert comparison.ok, comparison.describe()


@settings(max_examples=30)
@given(case=EXACT, factor=st.sampled_from([0.5, -2.0, 3.0]))
def test_gradients_are_linear_in_the_cotangent(case: Case, factor: float) -> None:
    assume(possible(case))
    _, fused = make_pair(case)
    x = make_input(case).requires_grad_()
    y = copy.deepcopy(fused)(x)
    cotangent = sample_input(*y.shape, dtype=y.dtype, seed=4)
    once, scaled = (torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in (cotangent, factor * cotangent))
    comparison = compare_tensors({"x": scaled}, {"x": factor * once}, [], x[0].numel() * 25)
    assert comparison.ok, comparison.describe()


@settings(max_examples=20)
@given(case=EXACT)
def test_calls_repeat_exactly(case: Case) -> None:
    assume(possible(case))
    _, fused = make_pair(case)
    runs = []
    for _ in range(2):
        block, x = copy.deepcopy(fused), make_input(case).requires_grad_()
        y = block(x)
        runs.append((y.detach(), *torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)))
    for first, second in zip(*runs, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
