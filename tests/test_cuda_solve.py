"""The program of csrc/cuda for a skew pair's solution with steps by error, on the test machine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_cases import name_of
from pairwise import SEEDS, Case, covering
from simulator import ORDERS, barriers, counting, fenced, order, without
from test_cuda_barriers import source_line
from test_cuda_programs import _on_the_test_machine as _on_the_test_machine
from test_cuda_skew import _before_there_is_an_input as _before_there_is_an_input
from test_cuda_skew import field_of
from test_synchronisations import Reads
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference, steps
from fastode.dispatch import choice, trial
from fastode.embedded import EMBEDDED
from fastode.ops.resident.engine import Resident
from fastode.testing import assert_blocks_equal, sample_input

# Tolerances, the first step and t₁: a chosen first step; one that is rejected; several steps; one that overshoots.
OPTIONS: dict[str, dict[str, Any]] = {
    "chosen": {"rtol": 0.1, "atol": 0.1},
    "rejected": {"rtol": 0.02, "atol": 0.02, "first_step": 4.0, "t1": 2.0},
    "several": {"rtol": 0.05, "atol": 0.02, "first_step": 0.25, "t1": 1.5},
    "overshot": {"rtol": 0.1, "atol": 0.1, "first_step": 1.5},
}
FACTORS = {
    # Channels of x, channels of y, stride, side of x.
    "map": ((16, 16, 1, 8), (32, 32, 1, 8), (16, 16, 1, 16), (5, 3, 1, 8), (3, 10, 2, 16)),
    "norm": ("group", "instance", "none", "fixed"),
    "activation": ("tanh", "leaky_relu", "softplus"),  # the last is not zero at zero
    "method": tuple(EMBEDDED),
    "options": tuple(OPTIONS),
    "gamma": (0.0, 0.3),
    "dtype": (torch.bfloat16, torch.float16),
    "layout": ("contiguous", "channels_last"),
    "batch": (1, 3),  # on the test machine's two blocks
    "alone": (False, True),
    "order": tuple(ORDERS),
}  # fmt: skip
WHOLE, PART = (16, 16, 1, 8), (4, 10, 2, 16)  # of a program's map
BASE: Case = {
    "map": WHOLE, "norm": "group", "activation": "tanh", "method": "bosh3", "options": "several", "gamma": 0.3,
    "dtype": torch.bfloat16, "layout": "channels_last", "batch": 3, "alone": False, "order": "forward",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_is_unread() -> Iterator[None]:
    """What a test leaves unread is no other's."""
    yield
    steps._unread.clear()


def blocks_of(case: Case, **changes: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The reference's solution, the program's, and an input."""
    torch.manual_seed(3)
    channels, _, _, side = case["map"]
    options = OPTIONS[case["options"]] | changes
    solver = Solver(case["method"], per_sample=case["alone"], **options)
    plain = reference.SOBlock(field_of(case), solver).to(case["dtype"]).eval()
    twin = copy.deepcopy(plain)
    fastode.fuse(twin, engine=Resident.name)
    x = sample_input(case["batch"], channels, side, side, dtype=case["dtype"], layout=case["layout"], seed=1)
    return plain, twin, x


@pytest.mark.parametrize("case", covering(FACTORS, seed=SEEDS[0]), ids=name_of)
def test_solutions_equal_their_reference(case: Case) -> None:
    plain, fused, x = blocks_of(case)
    with order(case["order"]):
        assert_blocks_equal(plain, fused, x, mode="forward")


def steps_of(block: nn.Module, x: Tensor) -> list[Any]:
    with fastode.record_steps() as log, torch.no_grad():
        block(x)
    return list(log)


@pytest.mark.parametrize("alone", FACTORS["alone"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [WHOLE, PART])
def test_it_takes_the_same_steps(size: tuple[int, ...], options: str, alone: bool) -> None:
    """As the reference in float64, as far as float16 has digits; channels that nobody has count for nothing."""
    case = BASE | {"options": options, "alone": alone, "dtype": torch.float16, "map": size, "activation": "softplus"}
    case |= {"norm": "none"} if size == PART else {}
    plain, fused, x = blocks_of(case)
    wanted, found = steps_of(plain.double(), x.double()), steps_of(fused, x)
    assert len(wanted) == len(found) == (3 if alone else 1)
    for one, other in zip(wanted, found, strict=True):
        assert other.times == pytest.approx(one.times, rel=2e-2)
        assert other.ratios == pytest.approx(one.ratios, rel=5e-2, abs=1e-5)  # beside rounding
        assert (other.evaluations, len(other.rejected)) == (one.evaluations, len(one.rejected))
        assert (other.block, other.sample) == (one.block, one.sample)
        assert len(other.rejected) > 0 or options != "rejected"
        assert len(other.times) > 3 or options != "several" or size == PART


def solved(case: Case, name: str, **changes: Any) -> Tensor:
    _, fused, x = blocks_of(case, **changes)
    with order(name), torch.no_grad():
        return fused(x)


def test_a_missing_barrier_is_seen() -> None:
    met, seen = set(), set()
    for norm, size, alone in (("group", WHOLE, False), ("none", PART, False), ("none", WHOLE, True)):
        case = BASE | {"norm": norm, "map": size, "alone": alone, "method": "adaptive_heun", "options": "overshot"}
        right = solved(case, "forward")
        assert right.isfinite().all() and all(torch.equal(right, solved(case, name)) for name in ORDERS)
        every = barriers(lambda case=case: solved(case, "forward"))
        met |= set(every)
        for barrier in every:
            with without(barrier):
                if not all(torch.equal(right, found) for found in tried(case)):
                    seen.add(barrier)
    assert {barrier for barrier in met - seen if "// unseen:" not in source_line(barrier)} == set()
    assert any("grid_barrier" in source_line(barrier) for barrier in seen)


def tried(case: Case) -> list[Tensor]:
    """A solution in every order; NaN where the machine found something wrong."""
    found = []
    for name in ORDERS:
        try:
            found.append(solved(case, name, max_steps=40))
        except RuntimeError:
            found.append(torch.tensor(torch.nan))
    return found


@pytest.mark.parametrize("alone", FACTORS["alone"])
def test_a_solution_is_one_launch_and_reads_nothing_back(alone: bool) -> None:
    _, fused, x = blocks_of(BASE | {"options": "rejected", "alone": alone})
    assert len(steps_of(fused, x)[0].rejected) > 0
    with counting() as counts, Reads(x, *fused.parameters()) as reads, torch.no_grad():
        fused(x)
    assert (counts["launch"], reads.count) == (1, 0)
    assert (counts["grid_barrier"] > 0) == (not alone)


def test_a_record_of_many_attempts_has_all() -> None:
    case = BASE | {"method": "adaptive_heun", "options": "several", "batch": 1}
    _, fused, x = blocks_of(case, first_step=1e-12)
    (solve,) = steps_of(fused, x)
    assert len(solve.times) > 3 and solve.times[1] == 1e-12
    with pytest.MonkeyPatch.context() as patch, counting() as counts:
        patch.setattr("fastode.ops.resident.solve._ROOM", 2)
        assert steps_of(fused, x) == [solve]
    assert counts["launch"] == 2


@pytest.mark.parametrize("alone", FACTORS["alone"])
def test_a_solve_that_fails_leaves_nan_and_says_why_when_it_is_asked(alone: bool) -> None:
    cases: list[tuple[dict[str, Any], float, str]] = [
        ({"max_steps": 1}, 1.0, "max_steps = 1 attempts did not reach t1 = 1.5"),
        ({"first_step": None}, float("nan"), "the field gave a value that is not finite"),
        ({"first_step": 0.1}, float("inf"), "the field gave a value that is not finite"),
    ]
    for changes, factor, reason in cases:
        _, fused, x = blocks_of(BASE | {"alone": alone, "norm": "none"}, **changes)
        right = solved(BASE | {"norm": "none", "alone": alone}, "forward")
        assert not right.isnan().any()
        x[-1] *= factor
        with torch.no_grad():
            y = fused(x)
        nothing = y.flatten(1).isnan().all(1)
        assert nothing.tolist() == ([False, False, True] if alone and factor != 1 else [True] * 3)
        assert not y[~nothing].isnan().any()
        with pytest.raises(SolveError) as caught:
            fastode.check_solves()
        assert reason in caught.value.reason
        fastode.check_solves()  # it was told
        with pytest.raises(SolveError) as again:
            steps_of(fused, x)
        assert str(again.value) == str(caught.value) or factor != 1  # a log alone does not see that x is NaN


def test_maps_may_lie_anywhere() -> None:
    for size in (WHOLE, PART):
        _, fused, x = blocks_of(BASE | {"map": size})
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        with torch.no_grad():
            wanted = fused(x)
            assert not wanted.isnan().any()
            assert torch.equal(fused(wide[..., 1::2].copy_(x)), wanted) and torch.equal(fused(fenced(x)), wanted)


def test_what_has_no_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "DEVICES", ("cpu",))  # where the choice depends on what will be differentiated
    monkeypatch.setattr(trial, "is_known", lambda call: True)
    _, fused, x = blocks_of(BASE)
    gradients = "its programs for CUDA make no gradients of a skew pair's solution with steps by error"
    for _ in range(2):
        assert choice.can_use(Resident.name, fused, x) == (False, gradients)
        with torch.no_grad():
            assert choice.can_use(Resident.name, fused, x) == (True, "")
            fused(x)
        with pytest.raises(ValueError, match=gradients):
            fused(x)
    tableau = EMBEDDED["bosh3"]
    rows = tuple((*row, *(0.0,) * (i - len(row))) for i, row in enumerate((*tableau.a, *[()] * 13)))
    more = (0.0,) * 13
    weights = {name: (*getattr(tableau, name), *more) for name in ("b", "b_error", "b_mid", "c")}
    _, fused, x = blocks_of(BASE | {"method": dataclasses.replace(tableau, name="of 17 stages", a=rows, **weights)})
    with torch.no_grad():
        assert choice.can_use(Resident.name, fused, x) == (
            False, "its programs for CUDA take schemes of 16 stages at most, and this one has 17"
        )  # fmt: skip
