"""The Triton operators in the interpreter, by the tests of the C++ operators: what test_triton.py runs in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import interpreting  # noqa: F401  (before any kernel is made)
import pytest
import torch
from pairwise import Case, covering
from test_operators import (  # noqa: F401  (its tests are this module's as well, with its own `ops`)
    CASES,
    FACTORS,
    Sample,
    TestOperators,
    name_of,
    test_slope_at_the_kink,
    test_statistics_of_a_mean_far_above_the_deviation,
    test_values_that_are_not_finite,
)

from fastode.ops.triton import launch, passes, plan

METHODS = sorted(name for name in vars(TestOperators) if name.startswith("test_"))
# Of five samples each would only be interpreted for longer than of two.
SMALL = {5: 2}
PAIRWISE = [case | {"batch": SMALL.get(case["batch"], case["batch"])} for case in covering(FACTORS, seed=5)]
check = TestOperators()
del TestOperators  # or pytest would collect it here, with twice as many cases


@pytest.fixture
def ops() -> Any:
    return passes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", PAIRWISE, ids=name_of)
def test_every_pair(ops: Any, case: Case, method: str) -> None:
    getattr(check, method)(ops, case)


def three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of GroupNorm by chunks, as large ones are."""
    monkeypatch.setattr(plan, "one_program_per_set", lambda g, itemsize: False)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a program, column blocks and uneven chunks, as real maps have."""
    monkeypatch.setattr(plan, "TILE", dict.fromkeys(plan.TILE, 256))
    monkeypatch.setattr(plan, "SET_BYTES", dict.fromkeys(plan.SET_BYTES, 1024))
    monkeypatch.setattr(plan, "MAX_COLUMNS", 16)
    monkeypatch.setattr(plan, "PLANE_COLUMNS", 4)
    monkeypatch.setattr(plan, "PROGRAMS", 5)
    monkeypatch.setattr(plan, "FINISH_TILE", 16)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both."""
    small_tiles(monkeypatch)
    three_launches(monkeypatch)


def learned_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients that a kernel loads, as Ark's are on a card."""
    monkeypatch.setattr(passes, "coefficients", lambda coefs, x: (coefs, coefs is not None))


@contextmanager
def planned(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] | None) -> Iterator[None]:
    """With another plan."""
    caches = [f for module in (plan, launch) for f in vars(module).values() if hasattr(f, "cache_clear")]
    if change is not None:
        change(monkeypatch)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def large(case: Case) -> bool:
    """Whether another plan changes anything in a case."""
    return case["norm"] in ("group", "batch") and case["size"] in ((7, 7), (17, 9)) and case["batch"] > 0


def smaller(case: Case) -> Case:
    """A case of few channels, or on a map that still takes several of the small tiles."""
    return case | {"size": (9, 5)} if case["size"] == (17, 9) and case["channels"] > 8 else case


def combining(case: Case) -> bool:
    return case["terms"] == 4 and case["batch"] > 0 and case["size"] == (3, 5)


PLANS = (
    [(three_launches, case) for case in PAIRWISE if large(case) and case["norm"] == "group"]
    + [(plans, smaller(case)) for plans in (small_tiles, small_chunks) for case in PAIRWISE if large(case)][::4]
    + [(learned_coefficients, case) for case in PAIRWISE if combining(case)]
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("change", "case"), PLANS, ids=[f"{change.__name__}-{name_of(c)}" for change, c in PLANS])
def test_other_plans(
    ops: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], case: Case, method: str
) -> None:
    with planned(monkeypatch, change):
        getattr(check, method)(ops, case)


HALF = [case | {"dtype": torch.float16} for case in PAIRWISE if case["dtype"] == torch.bfloat16][::3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", HALF, ids=name_of)
def test_float16(ops: Any, case: Case, method: str) -> None:
    getattr(check, method)(ops, case)


PLANES = {
    "groups": "some", "activation": "silu", "size": (5, 3), "channels": 8, "batch": 2, "terms": 2, "affine": "both",
    "param_grads": True, "tangent": True,
}  # fmt: skip
NCHW = [
    (change, {"norm": norm, "dtype": dtype} | PLANES)
    for norm, dtype, change in (
        ("group", torch.float32, small_tiles),
        ("group", torch.bfloat16, small_chunks),
        ("group", torch.float16, None),
        ("batch", torch.float32, small_chunks),
        ("batch", torch.bfloat16, None),
        ("fixed", torch.bfloat16, small_tiles),
        ("none", torch.float32, None),
    )
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("change", "case"), NCHW, ids=[name_of(case) for _, case in NCHW])
def test_nchw(
    ops: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] | None, case: Case, method: str
) -> None:
    monkeypatch.setattr(Sample, "layout", "contiguous")
    with planned(monkeypatch, change):
        getattr(check, method)(ops, case)


@pytest.mark.parametrize("case", [case for case in PAIRWISE if case["terms"] > 1][::4], ids=name_of)
def test_combine_pair(ops: Any, case: Case) -> None:
    s = Sample(case)
    first, second = s.terms, s.terms[:-1]
    coefs = torch.arange(1.0, 1.0 + len(first) + len(second), dtype=torch.float64)
    halves = [
        ops.combine(first, coefs[: len(first)], 0, 0.0, 0.0),
        ops.combine(second, coefs[len(first) :], 0, 0.0, 0.0),
    ]
    assert torch.equal(ops.combine_pair(first, second, coefs), torch.cat(halves))
