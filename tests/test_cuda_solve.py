"""The programs of csrc/cuda for a skew pair's solution with steps by error, on the test machine."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_cases import name_of
from pairwise import SEEDS, Case, covering
from simulator import ORDERS, barriers, counting, fenced, look_for_needed, order
from test_cuda_barriers import same, source_line
from test_cuda_programs import _on_the_test_machine as _on_the_test_machine
from test_cuda_skew import _before_there_is_an_input as _before_there_is_an_input
from test_cuda_skew import field_of
from test_synchronisations import Reads
from torch import Tensor, nn

import fastode
from fastode import SolveError, Solver, reference, steps
from fastode.dispatch import choice, trial
from fastode.embedded import EMBEDDED
from fastode.native.constants import KEEP_NOTHING
from fastode.ops.resident.engine import Resident
from fastode.ops.schemes import by_error
from fastode.ops.schemes.by_error import Steps
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
# Of gradients: as above, with fewer schemes.
BACKWARDS = FACTORS | {
    "map": (WHOLE, (32, 32, 1, 8), (16, 16, 1, 16), PART),
    "method": ("dopri5", "bosh3", "adaptive_heun"),
    "gradient": ("solver", "constant"),
    "mode": ("train", "input_grad"),
}
BASE: Case = {
    "map": WHOLE, "norm": "group", "activation": "tanh", "method": "bosh3", "options": "several", "gamma": 0.3,
    "dtype": torch.bfloat16, "layout": "channels_last", "batch": 3, "alone": False, "order": "forward",
    "gradient": "solver", "mode": "forward",
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
    solver = Solver(case["method"], per_sample=case["alone"], gradient=case.get("gradient", "solver"), **options)
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


@pytest.mark.parametrize("case", covering(BACKWARDS, seed=SEEDS[0]), ids=name_of)
def test_gradients_equal_their_reference(case: Case) -> None:
    plain, fused, x = blocks_of(case)
    with order(case["order"]):
        assert_blocks_equal(plain, fused, x, mode=case["mode"])


@pytest.mark.parametrize("alone", FACTORS["alone"])
def test_what_goes_through_the_first_size_is_the_references(alone: bool) -> None:
    """In digits that a whole gradient in float16 does not have: where steps are long, of the gradients' difference."""
    found: dict[str, list[Tensor]] = {}
    case = BASE | {"options": "chosen", "alone": alone, "dtype": torch.float16, "norm": "none"}
    for gradient in BACKWARDS["gradient"]:
        changes = {"method": "adaptive_heun", "gradient": gradient}
        plain, fused, x = blocks_of(case | changes, rtol=3.0, atol=3.0, t1=10.0)
        for block in (plain, fused):
            block.field.weight.data *= 4
        inputs = (2 * x.double()).requires_grad_(), (2 * x).requires_grad_()
        for block, leaf in zip((plain.double(), fused), inputs, strict=True):
            y = block(leaf)
            bar = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            found.setdefault(gradient, []).append(torch.autograd.grad(y, leaf, bar)[0].double())
    wanted, other = (one - two for one, two in zip(found["solver"], found["constant"], strict=True))
    rounding = 2 * torch.finfo(torch.float16).eps * found["solver"][0].norm()
    assert wanted.norm() > 2 * rounding and (other - wanted).norm() <= rounding


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


def solved(case: Case, name: str, **changes: Any) -> list[Tensor]:
    """A solution, and what gradients the case's mode has."""
    _, fused, x = blocks_of(case, **changes)
    x.requires_grad_(case["mode"] != "forward")
    fused.requires_grad_(case["mode"] == "train")
    with order(name):
        return differentiated(fused, x)


def differentiated(block: nn.Module, x: Tensor) -> list[Tensor]:
    y = block(x)
    wanted = (x, *(p for p in block.parameters() if p.requires_grad))
    # As torch.autograd.grad does, in which no mode that counts reads is at work.
    run = torch.autograd.Variable._execution_engine.run_backward
    gradients = run((y,), (torch.ones_like(y),), False, False, wanted, True, False) if x.requires_grad else ()
    return [y.detach(), *gradients]


# Mode, norm, map, and whether each sample is alone. No sum of a norm waits where its statistics are given and no
# parameter is trained.
WAITING = {
    "forward": (("forward", "group", WHOLE, False), ("forward", "none", PART, False), ("forward", "none", WHOLE, True)),
    "backward": (
        ("train", "group", WHOLE, False),
        ("train", "none", PART, False),
        ("input_grad", "fixed", WHOLE, True),
    ),
}


@pytest.mark.parametrize("way", WAITING)
def test_a_missing_barrier_is_seen(way: str) -> None:
    met, seen = set(), set()
    for mode, norm, size, alone in WAITING[way]:
        case = BASE | {"norm": norm, "map": size, "alone": alone, "method": "adaptive_heun", "mode": mode}
        case |= {"options": "overshot" if way == "forward" else "chosen"}
        right = solved(case, "forward")
        assert right[0].isfinite().all() and all(same(right, solved(case, name)) for name in ORDERS)
        every = set(barriers(lambda case=case: solved(case, "forward")))
        if way == "backward":
            every -= set(barriers(lambda case=case: solved(case | {"mode": "forward"}, "forward")))
        met |= every
        look_for_needed(every, seen, lambda case=case, right=right: all(same(right, found) for found in tried(case)))
    assert {barrier for barrier in met - seen if "// unseen:" not in source_line(barrier)} == set()
    assert any("grid_barrier" in source_line(barrier) for barrier in seen) == (way == "forward")


def tried(case: Case) -> list[list[Tensor]]:
    """A solution in every order; NaN where the machine found something wrong."""
    found = []
    for name in ORDERS:
        try:
            found.append(solved(case, name, max_steps=40))
        except RuntimeError:
            found.append([torch.tensor(torch.nan)])
    return found


@pytest.mark.parametrize("gradient", ["constant", "solver"])
@pytest.mark.parametrize("alone", FACTORS["alone"])
@pytest.mark.parametrize(("mode", "launches"), [("forward", 1), ("input_grad", 2), ("train", 3)])
def test_a_solution_is_one_launch_each_way_and_reads_nothing_back(
    mode: str, launches: int, alone: bool, gradient: str
) -> None:
    """Beside those two, a training step has one that adds up."""
    _, fused, x = blocks_of(BASE | {"options": "chosen", "alone": alone, "gradient": gradient})
    x.requires_grad_(mode != "forward")
    fused.requires_grad_(mode == "train")
    with counting() as counts, Reads(x, *fused.parameters()) as reads:
        differentiated(fused, x)
    assert (counts["launch"], reads.count) == (launches, 0)
    assert (counts["grid_barrier"] > 0) == (not alone)


@pytest.mark.parametrize("alone", FACTORS["alone"])
@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun"])  # whose last stage is the step's end, and is not
def test_where_only_some_beginnings_have_room_the_others_are_made_again(method: str, alone: bool) -> None:
    case = BASE | {"method": method, "mode": "train", "alone": alone, "batch": 2, "dtype": torch.float16}
    small: dict[str, Any] = {"first_step": 1e-6, "rtol": 5e-3, "atol": 2e-3}
    plain, fused, x = blocks_of(case, **small)
    least = {"bosh3": 8, "adaptive_heun": 16}[method]
    assert all(len(solve.times) > least + 1 for solve in steps_of(fused, x))
    with order("random 1"):
        assert_blocks_equal(plain, fused, x, mode="train")


def test_a_backward_that_finds_nothing_solves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BASE | {"mode": "train", "options": "chosen"}
    kept = solved(case, "forward")
    monkeypatch.setattr("fastode.ops.resident.solve.keeps", lambda ctx, x: KEEP_NOTHING)  # as under torch.compile
    with counting() as counts:
        again = solved(case, "forward")
    assert counts["launch"] == 4
    assert same(kept, again)


@pytest.mark.parametrize("trained", ["weight", "norms"])
def test_only_the_gradients_that_are_asked_for_are_made(trained: str) -> None:
    case = BASE | {"mode": "train"}
    _, block, x = blocks_of(case)
    every = dict(zip(["x", *(name for name, _ in block.named_parameters())], solved(case, "forward")[1:], strict=True))
    block.requires_grad_(False)
    chosen = [(name, p) for name, p in block.named_parameters() if ("norm" in name) == (trained == "norms")]
    for _, p in chosen:
        p.requires_grad_()
    y = block(x.requires_grad_())
    y.backward(torch.ones_like(y), retain_graph=True)
    found = [p.grad.clone() for _, p in chosen]
    y.backward(torch.ones_like(y))  # what is kept is still there
    assert chosen and all(torch.equal(grad, every[name]) for grad, (name, _) in zip(found, chosen, strict=True))
    assert all(torch.equal(p.grad, 2 * every[name]) for name, p in [("x", x), *chosen])


@pytest.mark.parametrize("alone", FACTORS["alone"])
def test_a_backward_that_is_differentiated_asks_for_the_steps(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused, x = blocks_of(BASE | {"options": "rejected", "alone": alone})
    taken: list[Steps] = []

    def retaken(slope: Any, state: Any, solver: Solver, steps: Steps) -> Any:
        taken.append(steps)
        return by_error.retaken(slope, state, solver, steps)

    monkeypatch.setattr("fastode.dispatch.skew.by_error", SimpleNamespace(retaken=retaken))
    y = fused(x.requires_grad_())
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), x)
    assert second.isfinite().all() and second.any()
    for found, solve in zip(taken, steps_of(fused, x), strict=True):
        ends = list(itertools.accumulate(found.sizes, initial=0.0))
        assert ends == pytest.approx(solve.times) and not found.first_stayed


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
        ({"first_step": None}, float("nan"), "the state is not finite"),
        ({"first_step": 0.1}, float("inf"), "the state is not finite"),
    ]
    for changes, factor, reason in cases:
        _, fused, x = blocks_of(BASE | {"alone": alone, "norm": "none"}, **changes)
        (right,) = solved(BASE | {"norm": "none", "alone": alone}, "forward")
        assert not right.isnan().any()
        x[-1] *= factor
        y, *gradients = differentiated(fused, x.requires_grad_())
        nothing = y.flatten(1).isnan().all(1)
        assert torch.equal(gradients[0].flatten(1).isnan().all(1), nothing)
        assert all(gradient.isnan().all() for gradient in gradients[1:])
        x.requires_grad_(False)
        assert nothing.tolist() == ([False, False, True] if alone and factor != 1 else [True] * 3)
        assert not y[~nothing].isnan().any()
        with pytest.raises(SolveError) as caught:
            fastode.check_solves()
        assert reason in caught.value.reason
        fastode.check_solves()  # it was told
        with pytest.raises(SolveError) as again:
            steps_of(fused, x)
        assert str(again.value) == str(caught.value)


@pytest.mark.parametrize("alone", FACTORS["alone"])
def test_more_steps_than_have_room_for_gradients_are_a_solve_that_fails(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused, x = blocks_of(BASE | {"alone": alone}, first_step=1e-3)
    steps = min(len(solve.times) - 1 for solve in steps_of(fused, x))
    assert steps > 2
    for most, fails in ((steps, False), (steps - 1, True)):
        monkeypatch.setattr("fastode.ops.resident.solve._MOST_TAKEN", most)
        with torch.no_grad():
            assert not fused(x).isnan().any()
        found = differentiated(fused, x[:1].clone().requires_grad_())
        assert all(each.isnan().any() == fails for each in found)
        if fails:
            reason = f"it took more steps than the {most} of which a card keeps the sizes for gradients"
            with pytest.raises(SolveError, match=reason):
                fastode.check_solves()
        else:
            fastode.check_solves()


def test_maps_may_lie_anywhere() -> None:
    for size in (WHOLE, PART):
        _, fused, x = blocks_of(BASE | {"map": size})
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        with torch.no_grad():
            wanted = fused(x)
            assert not wanted.isnan().any()
            assert torch.equal(fused(wide[..., 1::2].copy_(x)), wanted) and torch.equal(fused(fenced(x)), wanted)
        images = (x, wide[..., 1::2], fenced(x))
        every = [differentiated(fused, image.detach().requires_grad_()) for image in images]
        assert all(same(every[0], other) for other in every[1:])


def test_what_has_no_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "DEVICES", ("cpu",))  # where the choice depends on what will be differentiated
    monkeypatch.setattr(trial, "is_known", lambda call: True)
    _, fused, x = blocks_of(BASE | {"gradient": "exact"})
    gradients = "its programs for CUDA make no gradients through the size of every step by error"
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


def test_what_a_graph_captures_is_not_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused, x = blocks_of(BASE)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        steps._unread.clear()
        with torch.no_grad():
            fused(x)
        assert len(steps._unread) == (not capturing)
