"""What a training step of a block on a card takes: its tensors counted on the test machine, with no card."""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import case_of, make_input, make_pair
from pairwise import Case
from simulator import ORDERS, blocks, order
from test_cuda_programs import _on_the_test_machine as _on_the_test_machine
from torch import nn

from benchmarks.memory import peak_bytes
from fastode.ops.resident.engine import Resident
from fastode.ops.resident.functions import LESS_MEMORY
from fastode.testing import assert_blocks_equal

# Maps of the batch at the peak of a step, with the result and the input's gradient: all of it, with less memory, and at
# most how large a part of the reference's each is.
STEPS = {
    ("ssp3", "batch_eval"): ((14, 0.88), (5, 0.4)),
    ("ie", "group"): ((14, 0.67), (5, 0.4)),
    ("ssp3", "batch"): ((15, 0.95), (15, 0.95)),  # batch norms couple the samples: it is taken whole
    ("ie", "batch"): ((16, 0.73), (16, 0.73)),
}


def step_of(family: str, norm: str, channels: int, side: int, batch: int) -> Case:
    return case_of(
        family, norm=norm, shape="two_layers", dtype=torch.bfloat16, channels=channels, size=(side, side), batch=batch,
        layout="channels_last", mode="train", steps=1, theta=1.0,
    )  # fmt: skip


def peaks(case: Case) -> tuple[int, int]:
    """The peaks of a step's bytes: the reference's, and the programs'."""
    found = []
    plain, fused = make_pair(case)
    fused.engine = Resident.name
    for block in (plain, fused):
        x = make_input(case).requires_grad_()
        bar = torch.ones_like(x)

        def step(block: nn.Module = block, x: torch.Tensor = x, bar: torch.Tensor = bar) -> None:
            block(x).backward(bar)

        step(x=x[:1].detach().requires_grad_(), bar=bar[:1])  # what is made once does not count
        block.zero_grad(set_to_none=True)
        found.append(peak_bytes(step))
    return found[0], found[1]


@pytest.mark.parametrize("less", [False, True], ids=["all", "less"])
@pytest.mark.parametrize(("family", "norm"), STEPS)
def test_the_maps_of_a_step(family: str, norm: str, less: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample more takes so many maps more, and less than half of one for its statistics."""
    monkeypatch.setenv(LESS_MEMORY, str(int(less)))
    maps, part = STEPS[family, norm][less]
    batches = (4, 8) if less else (2, 4)  # with less memory there are four parts
    few, many = (peaks(step_of(family, norm, 16, 32, batch)) for batch in batches)
    each = [(more - fewer) / (batches[1] - batches[0]) for fewer, more in zip(few, many, strict=True)]
    size = 16 * 32 * 32 * 2
    assert maps <= each[1] / size < maps + 0.5
    assert each[1] <= part * each[0]


@pytest.mark.parametrize("less", [False, True], ids=["all", "less"])
@pytest.mark.parametrize(("family", "norm"), STEPS)
def test_what_a_step_takes_beside_its_maps(family: str, norm: str, less: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of blocks lie where maps have been: of any number of them no more is there than one, and sums."""
    monkeypatch.setenv(LESS_MEMORY, str(int(less)))
    case = step_of(family, norm, 64, 8, 8)
    peak, weights = peaks(case)[1], 2 * 9 * 64 * 64
    maps = STEPS[family, norm][less][0] * make_input(case).numel() * 2
    statistics = 3 * 2 * 8 * 4 * 64 * 4 + 2 * 8 * 3 * 64 * 4
    # The gradients, in their own dtype; a row of shares where the maps have no room for one, and the sums of the parts.
    shares = 2 * 4 * weights if less else 0
    assert peak < maps + statistics + 2 * weights + shares + 20_000


# Shares of 16 channels take 9,280 bytes for each unit, a map of 8×8 2,048.
@pytest.mark.parametrize(("shape", "batch", "count"), [
    pytest.param("one_layer", 3, 2, id="a tensor for one, in two turns"),
    pytest.param("one_layer", 5, 2, id="one in each tensor of maps"),
    pytest.param("two_layers", 17, 24, id="three in each, in two turns"),
    pytest.param("two_layers", 17, 6, id="three in one, in one turn"),
    pytest.param("two_layers", 3, 6, id="a tensor for two, in two turns"),
])  # fmt: skip
@pytest.mark.parametrize("order_name", ORDERS)
def test_shares_lie_where_maps_have_been(shape: str, batch: int, count: int, order_name: str) -> None:
    case = step_of("res", "group", 16, 8, batch) | {"shape": shape}
    plain, fused = make_pair(case)
    fused.engine = Resident.name
    with order(order_name), blocks(count):
        assert_blocks_equal(plain, fused, make_input(case), mode="train")


def test_a_step_takes_no_more_for_more_blocks() -> None:
    """But their sums for the norms' gradients; a share of 64 channels is 36 maps of a sample."""
    case, found = step_of("ssp3", "batch_eval", 64, 8, 16), []
    for count in (2, 16):
        with blocks(count):
            found.append(peaks(case)[1])
    assert 0 <= found[1] - found[0] <= (16 - 2) * 2 * 2 * 64 * 4


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
@pytest.mark.parametrize("norm", ["group", "batch_eval", "batch"])
@pytest.mark.parametrize(("family", "detach"), [("ssp3", False), ("custom", False), ("ie", False), ("ie", True)])
def test_equal_with_less_memory(
    family: str, detach: bool, norm: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four parts, in fewer where there are no four samples, of which the last one may be smaller."""
    monkeypatch.setenv(LESS_MEMORY, "1")
    case = step_of(family, norm, 16, 8, batch) | {"steps": 2, "theta": 0.5, "detach": detach}
    plain, fused = make_pair(case)
    fused.engine = Resident.name
    assert_blocks_equal(plain, fused, make_input(case), mode="train")


def test_with_less_memory_forward_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second backward gives the same bits."""
    monkeypatch.setenv(LESS_MEMORY, "1")
    case = step_of("ie", "group", 16, 8, 5)
    fused = copy.deepcopy(make_pair(case)[1])
    fused.engine = Resident.name
    x = make_input(case).requires_grad_()
    y = fused(x)
    assert y.grad_fn is not None and y.grad_fn.kept == []
    asked = [x, *fused.parameters()]
    first, second = (torch.autograd.grad(y.float().sum(), asked, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
