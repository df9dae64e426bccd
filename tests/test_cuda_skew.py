"""The skew pair's programs of csrc/cuda on the test machine: equal to the reference by the one rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_cases import name_of
from judging import assert_equal_by_either
from pairwise import SEEDS, Case, covering
from simulator import ORDERS, barriers, counting, fenced, look_for_needed, order
from test_cuda_barriers import same, source_line
from test_cuda_programs import _on_the_test_machine as _on_the_test_machine
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch import choice
from fastode.native.constants import KEEP_NOTHING, TILES
from fastode.ops.resident import card, skew
from fastode.ops.resident.engine import Resident
from fastode.testing import sample_input

NORMS: dict[str, Any] = {"group": "group", "instance": "instance", "none": "none", "fixed": nn.BatchNorm2d}
FACTORS = {
    # Channels of x, channels of y, stride, side of x.
    "map": tuple((channels, channels, 1, side) for channels, side in TILES),
    "norm": tuple(NORMS),
    "activation": ("leaky_relu", "tanh", "softplus", "elu", "relu", "silu"),
    "solver": ("euler", "midpoint", "rk4"),
    "gamma": (0.0, 0.3),
    "dtype": (torch.bfloat16, torch.float16),
    "layout": ("contiguous", "channels_last"),
    "batch": (1, 3),  # on the test machine's two blocks
    "mode": ("train", "input_grad", "forward"),
    "steps": (1, 2, 3),
    "order": tuple(ORDERS),
}
# Pairs that lie in part of a program's map.
PARTS = FACTORS | {
    "map": ((3, 16, 1, 8), (5, 3, 1, 16), (10, 48, 1, 8), (4, 16, 2, 16), (3, 10, 2, 32)),
    "activation": ("tanh", "softplus"),  # the second is not zero at zero
    "steps": (1, 2),
}
CASES = [case for factors in (FACTORS, PARTS) for case in covering(factors, seed=SEEDS[0])]


@pytest.fixture(autouse=True)
def _before_there_is_an_input(monkeypatch: pytest.MonkeyPatch, _on_the_test_machine: None) -> None:
    """`fuse` asks an engine about blocks before there is an input."""
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call) if call.inputs else "")


BASE: Case = {
    "map": (16, 16, 1, 8), "norm": "group", "activation": "tanh", "solver": "midpoint", "gamma": 0.3,
    "dtype": torch.bfloat16, "layout": "channels_last", "batch": 3, "mode": "train", "steps": 2, "order": "forward",
}  # fmt: skip


def grouped(channels: int) -> nn.Module:
    """A group norm of channels that eight groups do not divide."""
    return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)


def field_of(case: Case) -> reference.SkewPair:
    """The reference's pair, with norms that change something."""
    channels, out, stride, _ = case["map"]
    norm = case["norm"] if out % 8 == channels % 8 == 0 or case["norm"] != "group" else grouped
    field = reference.SkewPair(channels, out, stride, case["gamma"], case["activation"], NORMS.get(norm, norm))
    for module in field.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return field


def blocks_of(case: Case) -> tuple[nn.Module, nn.Module, Tensor]:
    """The reference's solution, the program's, and an input."""
    torch.manual_seed(3)
    (channels, _, _, side), dtype = case["map"], case["dtype"]
    plain = reference.SOBlock(field_of(case), solver=case["solver"], t1=0.8, steps=case["steps"]).to(dtype).eval()
    twin = copy.deepcopy(plain)
    fastode.fuse(twin, engine=Resident.name)
    return plain, twin, sample_input(case["batch"], channels, side, side, dtype=dtype, layout=case["layout"], seed=1)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_solutions_equal_their_reference(case: Case) -> None:
    plain, fused, x = blocks_of(case)
    with order(case["order"]):
        assert_equal_by_either(plain, [fused], x, [case["mode"]])


def solved(case: Case, name: str) -> list[Tensor]:
    """A solution, and what gradients the case's mode has."""
    _, fused, x = blocks_of(case)
    x.requires_grad_(case["mode"] != "forward")
    fused.requires_grad_(case["mode"] == "train")
    with order(name):
        y = fused(x)
        wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y, wanted, torch.ones_like(y)) if x.requires_grad else ()
    return [y.detach(), *gradients]


@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_a_missing_barrier_is_seen(mode: str) -> None:
    met, seen = set(), set()
    for norm, size in (("group", BASE["map"]), ("none", BASE["map"]), ("fixed", BASE["map"]), ("none", (4, 10, 2, 16))):
        case = BASE | {"norm": norm, "mode": mode, "map": size}
        right = solved(case, "forward")
        assert right[0].isfinite().all() and all(same(right, solved(case, name)) for name in ORDERS)
        every = barriers(lambda case=case: solved(case, "forward"))
        met |= set(every)
        look_for_needed(
            every, seen, lambda case=case, right=right: all(same(right, solved(case, name)) for name in ORDERS)
        )
    assert met
    # W has no bias, whose sums need a barrier: test_cuda_barriers sees those of the program for all convolutions.
    silent = {barrier for barrier in met - seen if not barrier.startswith("weights.cuh:")}
    assert {barrier for barrier in silent if "// unseen:" not in source_line(barrier)} == set()


@pytest.mark.parametrize(("mode", "launches"), [("forward", 1), ("input_grad", 2), ("train", 4)])
def test_a_solution_is_one_launch_each_way(mode: str, launches: int) -> None:
    """Beside those two, a training step has one for W and one that adds up."""
    with counting() as counts:
        solved(BASE | {"steps": 3, "mode": mode}, "forward")
    assert counts["launch"] == launches


def test_a_backward_that_finds_nothing_solves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = solved(BASE, "forward")
    monkeypatch.setattr(skew, "keeps", lambda ctx, x: KEEP_NOTHING)  # as under torch.compile
    with counting() as counts:
        again = solved(BASE, "forward")
    assert counts["launch"] == 5
    assert same(kept, again)


@pytest.mark.parametrize("trained", ["weight", "norms"])
def test_only_the_gradients_that_are_asked_for_are_made(trained: str) -> None:
    _, block, x = blocks_of(BASE)
    every = dict(zip(["x", *(name for name, _ in block.named_parameters())], solved(BASE, "forward")[1:], strict=True))
    block.requires_grad_(False)
    chosen = [(name, p) for name, p in block.named_parameters() if ("norm" in name) == (trained == "norms")]
    for _, p in chosen:
        p.requires_grad_()
    with counting() as counts:
        y = block(x.requires_grad_())
        y.backward(torch.ones_like(y))
    assert counts["launch"] == {"weight": 4, "norms": 3}[trained]
    assert chosen and all(torch.equal(p.grad, every[name]) for name, p in [("x", x), *chosen])


def test_weights_norms_and_maps_may_lie_anywhere() -> None:
    _, block, x = blocks_of(BASE | {"norm": "fixed"})
    other = copy.deepcopy(block)
    for tensor in [*other.parameters(), *[buffer for buffer in other.buffers() if buffer.is_floating_point()]]:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
        tensor.data = wide[..., 1::2].copy_(tensor.data)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    with torch.no_grad():
        wanted = block(x)
        assert torch.equal(other(x), wanted)
        assert torch.equal(block(wide[..., 1::2].copy_(x)), wanted)
        assert torch.equal(block(fenced(x)), wanted)


def test_a_part_of_a_map_and_stride_2_may_lie_anywhere() -> None:
    _, block, x = blocks_of(BASE | {"map": (3, 10, 2, 16), "batch": 1})
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    found = []
    for image in (x, fenced(x), wide[..., 1::2].copy_(x)):
        image.requires_grad_()
        y = block(image)
        found.append([y, *torch.autograd.grad(y, [image, *block.parameters()], torch.ones_like(y))])
    assert all(same(found[0], other) for other in found[1:])


def test_what_has_no_program_is_refused() -> None:
    _, block, x = blocks_of(BASE)
    assert choice.can_use(Resident.name, block, x) == (True, "")
    with torch.no_grad():
        assert choice.can_use(Resident.name, block, x) == (True, "")
        assert choice.can_use(Resident.name, block.field, (x, x)) == (
            False, "its programs for CUDA are of a skew pair's solutions, and not of the pair alone"
        )  # fmt: skip
        for sizes, reason in (
            ((16, 65, 1, 8), "have room for 64 channels at 8x8, and this skew pair needs 65"),
            ((17, 32, 2, 16), "have room for 64 channels at 8x8, and this skew pair needs 68"),
            ((16, 16, 2, 8), "are of skew pairs with y of 32x32, 16x16, 8x8 pixels, and not of 4x4"),
        ):
            _, other, image = blocks_of(BASE | {"map": sizes, "norm": "none"})
            assert choice.can_use(Resident.name, other, image) == (False, f"its programs for CUDA {reason}")
        block.field.weight = nn.Parameter(torch.zeros(16, 16, 5, 5, dtype=x.dtype))
        reason = (
            "its programs for CUDA are of skew pairs with a 3x3 convolution of stride 1, or a 4x4 one of stride 2, and "
            "a padding of 1"
        )
        assert choice.can_use(Resident.name, block, x) == (False, reason)
