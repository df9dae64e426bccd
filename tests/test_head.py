"""A head, the mean of every channel and a linear layer, in one call: equal to its layers, or left to them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_cases import name_of
from called import Names
from pairwise import Case, all_pairs, covering, pairs_of
from second_derivatives import compare_second_derivatives
from torch import Tensor, nn

import fastode
from benchmarks.drawn import randomise
from fastode import reference
from fastode.dispatch.choice import recording
from fastode.ops.resident import head as resident_head
from fastode.testing import assert_blocks_equal, sample_input

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CALL = "resident_head_forward"
FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": (F32, F64, BF16),  # of the map
    "autocast": (False, True),
    "weights": (F32, F64, BF16),
    "channels": (1, 5, 16, 35, 256),
    "classes": (1, 7, 10, 100),
    "size": ((1, 1), (2, 3), (4, 4), (7, 5), (8, 8)),
    "batch": (1, 2, 7, 40),
    "layout": ("contiguous", "channels_last"),
    "bias": (True, False),
    "mode": ("train", "input_grad", "forward"),
}


def possible(case: Case) -> bool:
    """Whether PyTorch runs it, and the engine: no operators take parameters narrower than the map."""
    map_, weights = case.get("dtype"), case.get("weights")
    if (map_, weights) == (F32, BF16):
        return False
    if not case.get("autocast") or map_ == F64 or weights == F64:
        return map_ is None or weights is None or map_ == weights
    return True


CASES = [case for case in covering(FACTORS, seed=3, possible=possible) if possible(case)]


def head(channels: int = 5, classes: int = 3, bias: bool = True) -> reference.Chain:
    torch.manual_seed(3)
    return reference.Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes, bias))


def fused(model: nn.Module, engine: str = "auto") -> nn.Module:
    twin = copy.deepcopy(model)
    fastode.fuse(twin, engine=engine)
    return twin


def is_one_call(model: nn.Module, x: Tensor) -> bool:
    with Names() as names:
        model(x)
    return names.called[CALL] == 1 and not names.called["mean"] and not names.called["addmm"]


def test_the_design_covers_every_pair_that_there_is() -> None:
    covered = set().union(*map(pairs_of, CASES))
    for pair in all_pairs(FACTORS) - covered:
        assert not any(possible({"autocast": lowers, **dict(pair)}) for lowers in (False, True)), pair


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equal(case: Case) -> None:
    plain = head(case["channels"], case["classes"], case["bias"])
    randomise(plain)
    plain.to(case["weights"])
    twin = fused(plain, "resident")
    x = sample_input(case["batch"], case["channels"], *case["size"], dtype=case["dtype"], layout=case["layout"])
    lower = BF16 if case["autocast"] else None
    assert_blocks_equal(plain, twin, x, mode=case["mode"], autocast=lower)
    with torch.autocast("cpu", enabled=case["autocast"]), torch.set_grad_enabled(case["mode"] != "forward"):
        assert is_one_call(twin, x)
        y, wanted = twin(x), plain(x)
    assert (y.dtype, y.shape, y.stride(), y.requires_grad) == (
        wanted.dtype, wanted.shape, wanted.stride(), wanted.requires_grad
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_more_samples_than_a_thread_is_worth(threads: int) -> None:
    torch.set_num_threads(threads)
    plain = head(64, 10)
    assert_blocks_equal(plain, fused(plain), sample_input(200, 64, 8, 8, dtype=F32))


def behind_a_block() -> nn.Module:
    branch = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 5, 3, padding=1))
    lead = nn.Conv2d(3, 5, 3, padding=1)
    return reference.Chain(lead, reference.ResBlock(branch), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


# What a chain has in front of its head.
CHAINS: dict[str, Callable[[], nn.Module]] = {
    "norm and activation": lambda: reference.Chain(
        nn.GroupNorm(1, 3), nn.Softplus(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1, 3), nn.Linear(3, 4)
    ),
    "activation": lambda: reference.Chain(nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
    "convolution": lambda: reference.Chain(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    ),
    "block": behind_a_block,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "resident", "staged", "reference"])
@pytest.mark.parametrize("name", CHAINS)
def test_behind_what_a_chain_begins_with(name: str, engine: str) -> None:
    torch.manual_seed(1)
    plain = CHAINS[name]().double()
    twin = fused(plain, engine)
    x = sample_input(4, 3, 6, 6, dtype=F64)
    assert_blocks_equal(plain, twin, x)
    for _ in range(2):  # also once what was decided is known
        with torch.no_grad():
            assert is_one_call(twin, x) == (engine in ("auto", "resident"))


def test_the_engine_that_runs_a_head_is_reported() -> None:
    x = sample_input(2, 5, 4, 4, dtype=F32)
    for engine, wanted in (("auto", "resident"), ("staged", "reference"), ("reference", "reference")):
        twin = fused(head(), engine)
        with recording() as used:
            twin(x)
        assert used == {twin: wanted}
    assert fused(head()).why_not("resident", x) == ""
    assert "input's dtype" in fused(head()).why_not("resident", x.double())
    assert "float16" in fused(head()).why_not("resident", x.half())


def test_gradients_of_gradients() -> None:
    plain = head().double()
    twin = fused(plain)
    x = sample_input(3, 5, 2, 3, dtype=F64)
    compare_second_derivatives(plain, plain, twin, x)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(twin, leaf) and torch.autograd.gradgradcheck(twin, leaf)


def test_a_graph_that_is_kept_gives_its_gradients_twice() -> None:
    twin = fused(head())
    leaf = sample_input(3, 5, 2, 3, dtype=F32).requires_grad_()
    y = twin(leaf)
    first = torch.autograd.grad(y.sum(), [leaf, *twin.parameters()], retain_graph=True)
    again = torch.autograd.grad(y.sum(), [leaf, *twin.parameters()])
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), leaf)


def test_without_a_node_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastode.native.nodes, "module", None)
    plain = head(35, 10)
    twin = fused(plain)
    x = sample_input(7, 35, 4, 4, dtype=F32)
    assert_blocks_equal(plain, twin, x)
    assert_blocks_equal(plain, twin, x, autocast=BF16)
    with torch.no_grad():
        assert is_one_call(twin, x)


def test_only_the_gradients_that_are_asked_for() -> None:
    twin = fused(head())
    twin[2].bias.requires_grad_(False)
    x = sample_input(3, 5, 2, 3, dtype=F32)
    twin(x).sum().backward()
    assert twin[2].weight.grad is not None and twin[2].bias.grad is None
    leaf = x.clone().requires_grad_()
    (bar,) = torch.autograd.grad(twin(leaf).sum(), leaf)
    torch.testing.assert_close(bar, (twin[2].weight.sum(0) / 6)[None, :, None, None].expand_as(x))


def with_hook() -> nn.Module:
    model = head()
    model[1].register_forward_hook(lambda module, given, result: result * 2)
    return model


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


# Heads that are more than the mean of every channel and a linear layer, for maps of 5 channels.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a hook": with_hook,
    "another size": lambda: reference.Chain(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)),
    "the largest": lambda: reference.Chain(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    "another layer": lambda: reference.Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Halved(5, 3)),
    "samples flattened": lambda: reference.Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(0, 2), nn.Linear(1, 3)),
    "more behind": lambda: reference.Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3), nn.Tanh()),
    "more between": lambda: reference.Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0), nn.Linear(5, 3)),
    "parametrized": lambda: reference.Chain(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_are_left_to_their_layers(name: str) -> None:
    torch.manual_seed(2)
    plain = OTHERS[name]()
    twin = fused(plain)
    x = sample_input(2, 5, 4, 4, dtype=F32)
    assert not is_one_call(twin, x)
    assert torch.equal(twin(x), plain(x))


def test_a_hook_that_comes_later_is_seen_and_so_is_another_layer() -> None:
    twin = fused(head())
    x = sample_input(2, 5, 4, 4, dtype=F32)
    y = twin(x)
    handle = twin[2].register_forward_hook(lambda module, given, result: result + 1)
    torch.testing.assert_close(twin(x), y + 1)
    handle.remove()
    twin[2] = nn.Linear(5, 9)
    assert twin(x).shape == (2, 9)
    assert is_one_call(twin, x)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 5, 0, 3), torch.ones(0, 5, 2, 3), torch.ones(5, 2, 3), torch.ones(2, 4, 2, 3), torch.ones(2, 5)],
    ids=lambda x: str(list(x.shape)),
)
def test_what_fits_no_head_is_left_to_pytorch(x: Tensor) -> None:
    plain = head()
    twin = fused(plain)
    refused, words = None, ""
    try:
        wanted = plain(x)
    except Exception as error:
        refused, words = type(error), str(error)
    if refused is not None:
        with pytest.raises(refused, match=re.escape(words)):
            twin(x)
    else:
        torch.testing.assert_close(twin(x), wanted, equal_nan=True)


def test_many_weights_are_left_to_matrix_products() -> None:
    twin = fused(head(1024, 65))
    x = sample_input(2, 1024, 2, 2, dtype=F32)
    assert not is_one_call(twin, x)
    assert str(resident_head.MOST_ENTRIES) in twin.against("resident", x)
    twin.engine = "resident"
    assert is_one_call(twin, x)


def test_many_classes_are_left_to_matrix_products_without_gradients() -> None:
    twin = fused(head(16, resident_head.MOST_CLASSES + 1))
    x = sample_input(2, 16, 2, 2, dtype=F32)
    assert is_one_call(twin, x)
    with torch.no_grad():
        assert not is_one_call(twin, x)
        assert str(resident_head.MOST_CLASSES) in twin.against("resident", x)
        with torch.autocast("cpu"):
            assert is_one_call(twin, x)


def test_strided_maps_and_expanded_cotangents() -> None:
    plain = head()
    twin = fused(plain)
    base = sample_input(3, 10, 6, 7, dtype=F32)
    for x in (base[:, ::2], base[:, :5, ::2, ::3], base[:, :5].transpose(2, 3), base[:1, :5].expand(4, 5, 6, 7)):
        assert_blocks_equal(plain, twin, x, cotangent=torch.tensor(2.0).expand(len(x), 3))


def test_strided_parameters() -> None:
    plain = head(6, 4)
    twin = fused(plain)
    twin[2].weight = nn.Parameter(plain[2].weight.detach().t().contiguous().t())
    twin[2].bias = nn.Parameter(plain[2].bias.detach().repeat_interleave(2)[::2])
    assert twin[2].weight.stride() == (1, 4) and twin[2].bias.stride() == (2,)
    x, found = sample_input(3, 6, 4, 4, dtype=F32), []
    for model in (twin, fused(plain)):
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert all(map(torch.equal, *found))


def test_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = head()
    twin = fused(plain)
    monkeypatch.setattr(fastode.native.operators, "_state", fastode.native.operators._State(reason="no compiler"))
    x = sample_input(3, 5, 4, 4, dtype=F32)
    assert torch.equal(twin(x), plain(x))
    assert "no compiler" in twin.why_not("resident", x)


def test_under_compile_and_transforms() -> None:
    plain = head()
    twin = fused(plain)
    x = sample_input(3, 5, 4, 4, dtype=F32)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True)(x), plain(x))
    torch.testing.assert_close(torch.func.vmap(twin)(x[:, None]), plain(x)[:, None])
    torch.testing.assert_close(torch.func.jacrev(twin)(x), torch.func.jacrev(plain)(x))
    values = {name: 2 * value.detach() for name, value in plain.named_parameters()}
    wanted = torch.func.functional_call(plain, values, (x,))
    torch.testing.assert_close(torch.func.functional_call(twin, values, (x,)), wanted)


def test_not_finite() -> None:
    plain = head(16, 3)
    twin = fused(plain)
    x = sample_input(3, 16, 4, 4, dtype=F32)
    x[0, 3, 1, 1], x[1, 2, 0, 0] = float("nan"), float("inf")
    assert_blocks_equal(plain, twin, x)
