"""The programs of csrc/cuda on the test machine: whole blocks, equal to their reference by the one rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from block_cases import ACTIVATIONS, case_of, make_input, make_pair, name_of
from pairwise import SEEDS, Case, covering
from simulator import ORDERS, blocks, counting, fenced, load, order, quick_float16, unasked
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch import choice, trial
from fastode.native import cuda_library, nodes, operators
from fastode.native.constants import TILES
from fastode.ops import engine as face
from fastode.ops.resident import card
from fastode.ops.resident.engine import Resident
from fastode.tableau import Tableau
from fastode.testing import MODES, assert_blocks_equal

# Every pair of values of two factors is in some case. The test machine has two blocks, which three samples share.
FACTORS = {
    "family": ("res", "ssp2", "ssp3", "midpoint", "poly", "ark", "custom", "ie"),
    "norm": ("group", "layer", "layer_bare", "instance", "instance_input", "batch_eval", "none"),
    "activation": tuple(ACTIVATIONS),
    "convolution": ("3x3", "3x3_no_bias"),
    "shape": ("one_layer", "two_layers", "three_layers"),
    "dtype": (torch.bfloat16, torch.float16),
    "map": tuple(TILES),
    "layout": ("contiguous", "channels_last", "sliced"),
    "batch": (1, 3),
    "mode": ("train", "input_grad", "forward"),
    "steps": (1, 2, 3),
    "theta": (1.0, 0.5),
    "detach": (False, True),
    "order": tuple(ORDERS),
}


def possible(case: Case) -> bool:
    units = {"one_layer": 1, "two_layers": 2, "three_layers": 3}[case["shape"]]
    return units <= TILES[case["map"]] and not (case["family"] == "ark" and case["mode"] != "forward")


# With batch norms in training the programs are others.
COUPLED = FACTORS | {"norm": ("batch", "batch_bare", "batch_cumulative"), "dtype": (torch.bfloat16,)}
CASES = [case for factors in (FACTORS, COUPLED) for case in covering(factors, seed=SEEDS[0], possible=possible)]


@pytest.fixture(autouse=True)
def _on_the_test_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU are a card's: its programs run, and what the engine says of a card holds for them."""
    assert operators.load() is None
    load()
    for name in (
        "resident_rk_forward", "resident_rk_backward", "resident_ie_forward", "resident_ie_backward",
        "resident_march_forward", "resident_march_backward", "resident_solve_forward",
        "resident_solve_backward",
    ):  # fmt: skip
        monkeypatch.setattr(torch.ops.fastode, name, getattr(torch.ops.fastode_simt, name))
    monkeypatch.setattr(nodes, "module", None)  # which call the operators past Python
    monkeypatch.setitem(face.STORAGE, "cpu", face.STORAGE["cuda"])
    monkeypatch.setattr(cuda_library, "why_not", lambda index=None: "")
    monkeypatch.setattr(card, "holds", lambda x: True)
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call))
    with quick_float16():
        yield


def judge(case: Case) -> None:
    (channels, side), order_name = case["map"], case["order"]
    full = case_of(**{key: value for key, value in case.items() if key not in ("map", "order")})
    full |= {"channels": channels, "size": (side, side)}
    plain, fused = make_pair(full)
    fused.engine = Resident.name
    with order(order_name):
        assert_blocks_equal(plain, fused, make_input(full), mode=full["mode"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_blocks_equal_their_reference(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize(("norm", "dtype"), [("group", torch.float16), ("batch", torch.bfloat16)])
@pytest.mark.parametrize("activation", FACTORS["activation"])
def test_a_step_of_ie_skip_is_differentiated_twice_through_every_activation(
    activation: str, norm: str, dtype: torch.dtype
) -> None:
    judge(
        {
            "family": "ie", "norm": norm, "activation": activation, "convolution": "3x3", "shape": "two_layers",
            "dtype": dtype, "map": (16, 8), "layout": "channels_last", "batch": 3, "mode": "train", "steps": 2,
            "theta": 0.5, "detach": False, "order": "random 1",
        }
    )  # fmt: skip


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("family", "mode", "launches"), [
    ("ssp3", "forward", 1), ("ie", "forward", 1), ("ssp3", "input_grad", 2), ("ie", "input_grad", 2),
    ("ssp3", "train", 4), ("ie", "train", 4),
])  # fmt: skip
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_block_is_one_launch_each_way(family: str, mode: str, launches: int, keeps: bool, norm: str) -> None:
    """Beside those two, a training step has one for all convolutions and one that adds up."""
    case = case_of(family, norm=norm, dtype=torch.bfloat16, channels=16, size=(8, 8), mode=mode)
    _, fused = make_pair(case)
    fused.engine = Resident.name
    fused.requires_grad_(mode == "train")
    x = make_input(case).requires_grad_(mode != "forward")
    saved = nullcontext() if keeps else torch.autograd.graph.save_on_cpu()
    with counting() as counts, saved:
        y = fused(x)
        if mode != "forward":
            y.float().sum().backward()
    # What is kept beside saved tensors is not where hooks take those: the forward runs again then.
    assert counts["launch"] == launches + (not keeps and mode != "forward")


# ---- what a caller may hand over beside fresh, dense tensors

BATCH, CHANNELS, SIDE = 3, 16, 8
SMALL = {"dtype": torch.bfloat16, "channels": CHANNELS, "size": (SIDE, SIDE), "batch": BATCH}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def pixels_first(*, offset: int, channels: int) -> Tensor:
    """A map whose channels lie together, `channels` apart from pixel to pixel, that begins at `offset`."""
    last = numbers(BATCH * SIDE * SIDE * channels + offset)[offset:].view(BATCH, SIDE, SIDE, channels)
    return last[..., :CHANNELS].permute(0, 3, 1, 2)


MAPS: dict[str, Callable[[], Tensor]] = {
    "begins at an odd place": lambda: pixels_first(offset=1, channels=CHANNELS),
    "channels of an odd number": lambda: pixels_first(offset=0, channels=CHANNELS + 1),
    "channels behind one": lambda: pixels_first(offset=1, channels=CHANNELS + 2),
    "samples at odd places": lambda: torch.as_strided(
        numbers(BATCH * (SIDE * SIDE * CHANNELS + 1)),
        (BATCH, CHANNELS, SIDE, SIDE),
        (SIDE * SIDE * CHANNELS + 1, 1, SIDE * CHANNELS, CHANNELS),
    ),
    "every other column": lambda: numbers(BATCH, CHANNELS, SIDE, 2 * SIDE + 1)[..., 1::2],
    "rows and columns changed": lambda: numbers(BATCH, SIDE, SIDE, CHANNELS).permute(0, 3, 2, 1),
    "one number": lambda: numbers(1, 1, 1, 1).expand(BATCH, CHANNELS, SIDE, SIDE),
    "one pixel": lambda: numbers(BATCH, 1, 1, CHANNELS).expand(-1, SIDE, SIDE, -1).permute(0, 3, 1, 2),
}


def on_programs(block: nn.Module) -> nn.Module:
    block.engine = Resident.name  # type: ignore[assignment]
    return block


def results(block: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """y, then the gradients of x and of every parameter."""
    leaf = x.detach().requires_grad_()
    y = block(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], cotangent)]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["ssp3", "ie"])
@pytest.mark.parametrize("strides", MAPS)
def test_maps_may_lie_anywhere(strides: str, family: str) -> None:
    """The test machine refuses a word between two words' places, as a card does."""
    block, dense = on_programs(make_pair(case_of(family, **SMALL))[1]), numbers(BATCH, CHANNELS, SIDE, SIDE)
    view = MAPS[strides]()
    assert_same_bits(results(block, view, dense), results(block, fenced(view), dense))
    assert_same_bits(results(block, dense, view), results(block, dense, fenced(view)))


@pytest.mark.parametrize("norm", ["group", "batch_eval", "batch"])
def test_parameters_may_lie_anywhere(norm: str) -> None:
    block = on_programs(make_pair(case_of("ie", norm=norm, theta=0.5, steps=2, **SMALL))[1])
    other, x, cotangent = copy.deepcopy(block), make_input(case_of(**SMALL)), numbers(BATCH, CHANNELS, SIDE, SIDE)
    for tensor in [*other.parameters(), *[buffer for buffer in other.buffers() if buffer.is_floating_point()]]:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
        tensor.data = wide[..., 1::2].copy_(tensor.data)
    assert_same_bits(results(other, x, cotangent), results(block, x, cotangent))


def placed(weight: Tensor, layout: str) -> Tensor:
    """The numbers of a convolution's weight where a program's fast ways, and others, find them."""
    if layout == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    if layout == "rows apart":  # input channels lie together, and something between the rows
        wide = torch.full((weight.shape[0], 3, 4, weight.shape[1]), torch.nan, dtype=weight.dtype)
        wide[:, :, :3] = weight.permute(0, 2, 3, 1)
        return wide[:, :, :3].permute(0, 3, 1, 2)
    offset = {"contiguous": 0, "behind one": 1, "behind four": 4}[layout]
    return torch.cat([weight.new_zeros(offset), weight.flatten()])[offset:].view(weight.shape)


@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize("layout", ["channels_last", "rows apart", "contiguous", "behind one", "behind four"])
def test_weights_may_lie_anywhere(layout: str, size: tuple[int, int]) -> None:
    channels, side = size
    full = case_of("res", channels=channels, size=(side, side), shape="one_layer", dtype=torch.float16, batch=1)
    block = on_programs(make_pair(full)[1])
    other, x = copy.deepcopy(block), make_input(full)
    for weight in (module.weight for module in other.modules() if isinstance(module, nn.Conv2d)):
        weight.data = placed(weight.data, layout)
    strided = torch.empty(channels, 2 * channels, 3, 3, dtype=torch.float16)[:, ::2]
    for weight in (module.weight for module in block.modules() if isinstance(module, nn.Conv2d)):
        weight.data = strided.copy_(weight.data)
    with torch.no_grad():
        assert torch.equal(other(x), block(x))


def without_weights(branch: nn.Module) -> nn.Module:
    """Its norms have a bias and no weight, with which PyTorch can differentiate batch norm and not group norm."""
    for module in branch.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = None  # type: ignore[assignment]
    return branch


@pytest.mark.parametrize("norm", ["batch", "batch_eval"])
@pytest.mark.parametrize("family", ["ssp2", "ie"])
def test_a_norm_with_a_bias_alone_is_trained(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, theta=0.5, **SMALL)
    plain, fused = (without_weights(block) for block in make_pair(case))
    assert_blocks_equal(plain, on_programs(fused), make_input(case))


# Entries that are zero below the diagonal, on it, and in a whole column.
SPARSE = {
    "an unused evaluation": (((1.0,), (0.5, 0.5)), ((0.5,), (0.3, 0.0))),
    "an unused first evaluation": (((1.0,), (0.5, 0.5)), ((0.0,), (0.0, 0.5))),
    "three stages": (((1.0,), (1.0, 0.0), (0.5, 0.5, 0.0)), ((0.4,), (0.1, 0.0), (0.2, 0.0, 0.1))),
}


def sparse_pair(name: str, branch: nn.Module) -> tuple[nn.Module, nn.Module]:
    alpha, beta = SPARSE[name]
    tableau = Tableau("sparse", order=1, alpha=alpha, beta=beta)
    return reference.ShuOsher(branch, tableau), on_programs(fastode.nn.ShuOsher(copy.deepcopy(branch), tableau))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", SPARSE)
def test_coefficients_may_be_zero(name: str, norm: str) -> None:
    """Tables of two stages are read by the programs, as learned ones are: the host does not know their zeros."""
    case = case_of("ssp2", norm=norm, **SMALL)
    plain, fused = sparse_pair(name, make_pair(case)[0].branch)
    assert_blocks_equal(plain, fused, make_input(case), mode=MODES)


def assert_as_finite(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Both have numbers in the same places, at least one of which is not finite."""
    cotangent = numbers(*x.shape)
    wanted = [torch.isfinite(each) for each in results(plain, x, cotangent)]
    assert_same_bits([torch.isfinite(each) for each in results(fused, x, cotangent)], wanted)
    assert not all(each.all() for each in wanted)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("family", ["res", "ssp3", "ie"])
@pytest.mark.parametrize("activation", ["tanh", "elu", "softplus", "leaky_relu"])
def test_what_is_infinite_spreads_as_in_the_reference(activation: str, family: str, value: float) -> None:
    """Without a norm a unit's pull-back asks nothing of its input but the activation's slope."""
    case = case_of(family, norm="none", activation=activation, theta=0.5, **SMALL)
    plain, fused = make_pair(case)
    x = make_input(case)
    x[0, 3, 4, 4] = value
    assert_as_finite(plain, on_programs(fused), x)


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_infinite_counts_nothing_zero_times(name: str) -> None:
    case = case_of("ssp2", norm="none", **SMALL)
    plain, fused = sparse_pair(name, make_pair(case)[0].branch)
    x = make_input(case)
    x[0, 3, 4, 4] = torch.inf
    assert_as_finite(plain, fused, x)


def test_a_batch_norm_in_training_of_float16_is_refused() -> None:
    block = make_pair(case_of("ssp3", norm="batch", **SMALL | {"dtype": torch.float16}))[1]
    reason = "its programs for CUDA take batch norms in training in bfloat16 only, and not in torch.float16"
    assert choice.can_use(Resident.name, block, make_input(case_of(**SMALL)).half()) == (False, reason)
    assert choice.can_use(Resident.name, block.eval(), make_input(case_of(**SMALL)).half()) == (True, "")


def test_a_batch_norm_in_training_beside_another_norm_is_refused() -> None:
    block = make_pair(case_of("ie", norm="batch", **SMALL))[1]
    x = make_input(case_of(**SMALL))
    assert choice.can_use(Resident.name, block, x) == (True, "")
    block.branch[3] = nn.GroupNorm(1, CHANNELS).to(x.dtype)  # type: ignore[union-attr, operator]
    reason = "its programs for CUDA take no batch norm in training beside a norm of each sample by itself"
    assert choice.can_use(Resident.name, block, x) == (False, reason)


@pytest.mark.parametrize("family", ["ssp2", "ie"])
@pytest.mark.parametrize("fixed", [0, 3])
def test_one_of_two_batch_norms_may_have_given_statistics(fixed: int, family: str) -> None:
    case = case_of(family, norm="batch", activation="silu", theta=0.5, steps=2, **SMALL)
    plain, fused = make_pair(case)
    for block in (plain, fused):
        block.branch[fixed].eval()  # type: ignore[index, union-attr]
    for name in ORDERS:
        with order(name):
            assert_blocks_equal(copy.deepcopy(plain), on_programs(copy.deepcopy(fused)), make_input(case))


@pytest.mark.parametrize("family", ["ssp3", "ie"])
def test_a_batch_norms_mean_may_be_far_above_its_deviation(family: str) -> None:
    case = case_of(family, norm="batch", steps=2, **SMALL)
    plain, fused = make_pair(case)
    assert_blocks_equal(plain, on_programs(fused), make_input(case) * 0.05 + 8)


def test_coefficients_that_are_all_that_is_trained_are_refused() -> None:
    block = on_programs(make_pair(case_of("ark", **SMALL))[1])
    block.branch.requires_grad_(False)  # type: ignore[union-attr]
    x = make_input(case_of(**SMALL))
    reason = "its programs for CUDA make no gradients of a scheme's coefficients"
    assert choice.can_use(Resident.name, block, x) == (False, reason)
    with torch.no_grad():
        assert choice.can_use(Resident.name, block, x) == (True, "")


def test_they_are_refused_also_after_a_call_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is kept from call to call; on a card it depends on what will be differentiated."""
    monkeypatch.setattr(trial, "DEVICES", ("cpu",))
    monkeypatch.setattr(trial, "is_known", lambda call: True)
    block = on_programs(make_pair(case_of("ark", **SMALL))[1])
    block.branch.requires_grad_(False)  # type: ignore[union-attr]
    x = make_input(case_of(**SMALL))
    for _ in range(2):
        with torch.no_grad():
            block(x)
    with pytest.raises(ValueError, match="its programs for CUDA make no gradients of a scheme's coefficients"):
        block(x)


def test_a_card_that_could_not_be_asked_is_asked_again() -> None:
    """How many blocks run at a time is remembered of an answer alone; without one each sample has a block."""
    case = case_of("ssp3", **SMALL | {"batch": 5, "norm": "batch"})
    block, x = on_programs(make_pair(case)[1]), make_input(case)

    def met() -> int:
        with torch.no_grad(), counting() as counts:
            block(x)
        return counts["block_barrier"]

    usual = met()
    with blocks(3):
        met()  # the last answer is another card's
    with unasked():
        assert met() > usual
    assert met() == usual
