"""Every fused block equals its reference: a pairwise-covering design over everything that a block may meet."""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import ACTIVATIONS, EXPLICIT, FAMILIES, IMPLICIT, case_of, make_input, make_pair, name_of, possible
from pairwise import SEEDS, Case, all_pairs, covering, design_factors, pairs_of
from torch import Tensor, nn

from fastode.testing import assert_blocks_equal, compare_tensors, sample_input

FACTORS = [(seed, design_factors(factors, seed)) for factors in (IMPLICIT, EXPLICIT) for seed in SEEDS]
DESIGNS = [covering(factors, seed=seed, possible=possible) for seed, factors in FACTORS]
CASES = [case for design in DESIGNS for case in design]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SMOOTH = ("tanh", "softplus", "elu", "silu", "gelu", "gelu_tanh", "sigmoid")


def test_the_designs_have_every_activation_between_them() -> None:
    assert {case["activation"] for case in CASES} == set(ACTIVATIONS) or len(SEEDS) == 1


@pytest.mark.parametrize(("factors", "design"), [(f, d) for (_, f), d in zip(FACTORS, DESIGNS, strict=True)])
def test_design_covers_every_pair_that_there_is(factors: dict, design: list[Case]) -> None:
    assert len(CASES) <= 400
    covered = set().union(*map(pairs_of, design))
    for pair in all_pairs(factors) - covered:
        # Instance norm of one pixel or of no sample: PyTorch refuses both (test_raises_what_the_reference_raises).
        values = dict(pair)
        assert values["norm"].startswith("instance_"), pair
        assert values.get("size") == (1, 1) or values.get("batch") == 0, pair


def strides(x: Tensor) -> list[int]:
    """The strides that mean something: those of the axes with more than one entry."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equal(case: Case) -> None:
    plain, fused = make_pair(case)
    x = make_input(case)
    assert_blocks_equal(plain, fused, x, mode=case["mode"])
    with torch.set_grad_enabled(case["mode"] != "forward"):
        outputs = [copy.deepcopy(block)(x) for block in (plain, fused)]
    assert strides(outputs[1]) == strides(outputs[0])
    assert outputs[1].requires_grad == outputs[0].requires_grad


def raised(block: nn.Module, x: Tensor) -> type[Exception] | None:
    try:
        block(x)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("norm", "batch", "channels"),
    [
        ("batch", 1, 3),
        ("batch_bare", 1, 3),
        ("instance", 1, 3),
        ("instance_input", 2, 3),
        ("instance_running", 2, 3),
        ("instance_running", 0, 3),
    ],
)
def test_raises_what_the_reference_raises(family: str, norm: str, batch: int, channels: int) -> None:
    case = case_of(family, norm=norm, batch=batch, channels=channels, size=(1, 1), dtype=torch.float32)
    plain, fused = make_pair(case)
    x = make_input(case)
    before = copy.deepcopy(fused.state_dict())
    error = raised(plain, x)
    assert error is not None
    assert raised(fused, x) is error
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name


def buffers(block: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in block.named_buffers()}


@pytest.mark.parametrize("norm", ["batch", "batch_cumulative", "instance_running"])
@pytest.mark.parametrize("family", FAMILIES)
def test_running_statistics_over_ten_training_steps(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, batch=4, size=(7, 7), steps=3)
    plain, fused = make_pair(case)
    optimizers = [torch.optim.SGD(block.parameters(), 0.01) for block in (plain, fused)]
    for step in range(10):
        x = make_input(case, seed=step)
        for block, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
        # Each step's inputs are the last one's rounding apart: what the rule allows a call adds up over the calls.
        comparison = compare_tensors(buffers(fused), buffers(plain), [buffers(plain)] * 1, (step + 1) ** 2 * 4 * 49)
        assert comparison.ok, (step, comparison.describe())
    if norm == "instance_running":
        return  # which PyTorch does not count
    counted = [b for name, b in fused.named_buffers() if name.endswith("num_batches_tracked")]
    evaluations = {"ie": 4, "res": 1, "ssp2": 2, "ssp3": 3, "midpoint": 2, "poly": 2, "ark": 2, "custom": 4}[family]
    assert counted and all(int(count) == 10 * evaluations for count in counted)


@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_running_statistics_are_updated_in_order(family: str, mode: str) -> None:
    # The branch's evaluations differ more and more from the first, so a missing or swapped update shows.
    case = case_of(family, norm="batch", batch=3, steps=5, dtype=torch.float32)
    plain, fused = make_pair(case)
    assert_blocks_equal(plain, fused, make_input(case), mode=mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "relu_inplace", "leaky_relu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slope_at_the_kink(family: str, activation: str, dtype: torch.dtype) -> None:
    # A one-layer branch without a norm on zeros: every pre-activation is at the kink, in every precision.
    case = case_of(family, norm="none", activation=activation, shape="one_layer", dtype=dtype)
    plain, fused = make_pair(case)
    gradients = []
    for block in (copy.deepcopy(plain).double(), plain, fused):
        leaf = torch.zeros_like(make_input(case), dtype=next(block.parameters()).dtype, requires_grad=True)
        gradients.append({"x": torch.autograd.grad(block(leaf).sum(), leaf)[0]})
    truth, run, found = gradients
    comparison = compare_tensors(found, truth, [run], 3 * 9)
    assert comparison.ok, comparison.describe()
    if family == "res" and activation != "leaky_relu":
        # One evaluation, at x itself, where the slope is zero: what is left is the skip.
        assert torch.equal(found["x"], torch.ones_like(found["x"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["layer", "batch", "batch_eval", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_not_finite(family: str, norm: str, value: float) -> None:
    case = case_of(family, norm=norm, dtype=torch.float32, size=(7, 7))
    plain, fused = make_pair(case)
    x = make_input(case)
    x[1, 2, 3, 4] = value
    assert_blocks_equal(plain, fused, x, mode="forward")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_asked_for_gets_a_gradient(family: str) -> None:
    case = case_of(family, norm="batch")
    for frozen in ("weight", "bias", "branch.2", "branch.0", "a21"):
        plain, fused = make_pair(case)
        for block in (plain, fused):
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(frozen not in name)
        assert_blocks_equal(plain, fused, make_input(case))
    plain, fused = make_pair(case)
    x = make_input(case)
    for block in (plain, fused):
        block(x).sum().backward()
        assert x.grad is None
    for (name, expected), parameter in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (expected.grad is None) == (parameter.grad is None), name


@pytest.mark.parametrize("norm", ["layer", "group", "batch", "batch_eval", "instance_running", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(family: str, norm: str) -> None:
    for activation in SMOOTH if norm == "layer" else ("tanh",):
        case = case_of(family, norm=norm, activation=activation, channels=2, size=(2, 3), convolution="3x3", steps=2)
        _, fused = make_pair(case)
        names, parameters = zip(*fused.named_parameters(), strict=True)
        start = copy.deepcopy(fused.state_dict())

        def call(x: Tensor, *values: Tensor, block: nn.Module = fused, keys: tuple[str, ...] = names) -> Tensor:
            return torch.func.functional_call(block, dict(zip(keys, values, strict=True)), (x,))

        leaves = [p.detach().clone().requires_grad_() for p in parameters]
        x = sample_input(2, 2, 2, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(call, (x, *leaves), fast_mode=True)
        fused.load_state_dict(start)
