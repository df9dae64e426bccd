"""The second judgement of random blocks: it excuses rounding that the first cannot see, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import drawn, fuzz, rejudge, wide
from fastode import Solver, record_steps, reference
from fastode.testing import Judge, sample_input
from fastode.testing.compare import run
from fastode.testing.record import Shifted

pytestmark = pytest.mark.skipif(not wide.WIDER, reason="long double is float64 here")


# Those that have a wide truth.
FAMILIES = [family for family in drawn.FAMILIES if family not in (*drawn.BY_ERROR, drawn.EXACT)]


def float64_cases(count: int) -> list[drawn.Case]:
    by_family: dict[str, list[drawn.Case]] = {family: [] for family in FAMILIES}
    for index in range(1000):
        case = drawn.draw_case(2, index)
        cases = by_family.get(case.family)
        if cases is not None and len(cases) < count and case.inputs[0].dtype is torch.float64:
            cases += [] if "mish" in case.text else [case]
            if all(len(cases) == count for cases in by_family.values()):
                break
    return [case for cases in by_family.values() for case in cases]


CASES = float64_cases(3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text[:60])
def test_the_wide_truth_is_the_float64_one_with_more_digits(case: drawn.Case) -> None:
    inputs = tuple(x.contiguous() for x in case.inputs)
    judge = Judge(case.plain, inputs, mode=case.mode)
    truths = wide.truth(case.plain, inputs, judge.cotangents, case.mode)
    comparison = judge.verdict(truths)
    # Where float64's own rounding is far above a few units, the rule's runs may not show all of it.
    assert comparison.worst.ratio < 10, comparison.describe()


def second_differences(case: drawn.Case, make: Any) -> float:
    """Over a step so small that only rounding is left, relative to the values: the worst of outputs and gradients."""
    found = []
    for step in (-1, 0, 1):
        # Few enough digits for the step to be exact.
        inputs = tuple(x.contiguous().float().double() + step * 2.0**-36 for x in case.inputs)
        block, values = make(case.plain, inputs)
        with wide.Arithmetic():
            found.append(run(block, values, None, case.mode))
    worst = 0.0
    for name in found[0]:
        if not name.startswith(("output", "gradient of input")) or found[0][name] is None:
            continue
        low, here, high = (t.values if isinstance(t, wide.Wide) else t.numpy() for t in (each[name] for each in found))
        worst = max(worst, float(np.abs((high - here) - (here - low)).max() / np.abs(here).max()))
    return worst


def widened(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return wide.widened(block), tuple(map(wide.Wide.of, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_the_wide_truth_rounds_to_float64(family: str) -> None:
    cases = [case for case in CASES if case.family == family and case.mode != "forward"]
    assert cases
    for case in cases:
        plain = second_differences(case, lambda block, inputs: (block, inputs))
        assert second_differences(case, widened) <= plain / 100, case.text


# Of three hundred seconds each: what the engines return here is nearer to the wide truth than the reference is, or has
# one pre-activation on the other side of a kink (2424). Of thirty seconds of 7: a solve's sums that cancel to 1e-4.
@pytest.mark.parametrize(
    ("seed", "index"), [(11, 2334), (11, 2424), (11, 2876), (11, 5575), (11, 7336), (11, 10789), (2026, 2586), (7, 34)]
)
def test_blocks_that_failed_the_first_judgement(seed: int, index: int) -> None:
    assert fuzz.run_case(seed, index)[1] == []


class Crossed(reference.ResBlock):
    """A residual block with the pre-activations of some pixels moved, and wrong by a factor."""

    places: list[tuple[int, ...]]
    step = -1e-15
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.zeros(x.shape, dtype=x.dtype)
        for place in self.places:
            steps[place] = self.step
        with Shifted([steps]):
            return super().forward(x * self.factor) / self.factor


def judged(places: list[tuple[int, ...]], **changes: float) -> tuple[bool, bool]:
    """Whether a `Crossed` block passes the first judgement, and the second."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)).double()
    x = sample_input(1, 2, 4, 4, dtype=torch.float64)
    x[0, 0].view(-1)[:6] = 1e-18
    x[0, 1, 0, 0] = 1.0
    crossed = Crossed(branch)
    crossed.places = places
    for name, value in changes.items():
        setattr(crossed, name, value)
    plain = reference.ResBlock(branch)
    judge = rejudge.judge_again(plain, x, "train", None)
    return Judge(plain, x).compare(crossed).ok, rejudge.compare_again(judge, crossed).ok


def test_a_kink_within_rounding_may_be_crossed() -> None:
    assert judged([]) == (True, True)
    assert judged([(0, 0, 0, 1)]) == (False, True)
    assert judged([(0, 0, 0, 1), (0, 0, 1, 0)]) == (False, True)


def test_no_more_than_a_few_kinks_are_crossed() -> None:
    assert judged([(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3)]) == (False, False)


def test_a_kink_beyond_rounding_is_not_crossed() -> None:
    # Six of the entries are within rounding of the kink, and the one that is crossed is none of them.
    assert judged([(0, 1, 0, 0)], step=-10.0) == (False, False)


def test_a_fault_beside_a_crossed_kink_is_found() -> None:
    assert judged([(0, 0, 0, 1)], factor=1.0 + 1e-9) == (False, False)


class Longer(reference.SOBlock):
    """A solution whose first step is longer by `longer`, relative to it, and whose output is multiplied."""

    longer = 0.0
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), record_steps() as log:
            super().forward(x)
        with rejudge.moved_first_steps([self.longer * size for size in rejudge.first_steps(log)]):
            return super().forward(x) * self.factor


@pytest.mark.parametrize("gradient", ["solver", "constant"])  # torchdiffeq's solves, and the reference's own
def test_a_first_step_may_be_longer_by_rounding(gradient: Any) -> None:
    assert judged_longer(gradient) == (True, True)
    assert judged_longer(gradient, longer=1e-5) == (False, True)
    assert judged_longer(gradient, longer=1e-3) == (False, False)
    assert judged_longer(gradient, longer=1e-5, factor=1.0 + 1e-5) == (False, False)


def judged_longer(gradient: Any, **changes: float) -> tuple[bool, bool]:
    """Whether a `Longer` block passes the first judgement, and either."""
    torch.manual_seed(0)
    # Errors far from the tolerance's ends, which a first step decides what is made of.
    solver = Solver("bosh3", rtol=1e-2, atol=1e-2, t1=0.5, gradient=gradient)
    block = Longer(reference.SkewPair(2, 2, activation=nn.Tanh), solver).double()
    plain, x = copy.deepcopy(block), sample_input(2, 2, 4, 4, dtype=torch.float64)
    for name, value in changes.items():
        setattr(block, name, value)
    judge = Judge(plain, x)
    either = rejudge.compare_by_either(judge, plain, block, "train", None, by_error=True)
    return judge.compare(block).ok, either.ok
