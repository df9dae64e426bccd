"""The rule itself: it takes what only rounds differently, and refuses what is wrong by little."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastode import reference
from fastode.tableau import SSP3, Tableau
from fastode.testing import (
    Comparison,
    Judge,
    assert_blocks_equal,
    compare_blocks,
    compare_tensors,
    moved,
    sample_input,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
STEP = 0.2


def make_branch(dtype: torch.dtype, norm: str = "layer", activation: str = "tanh") -> nn.Module:
    torch.manual_seed(3)
    branch = reference.PreActBranch(8, norm=norm, activation=activation)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.mul_(1.5)
    return branch.to(dtype)


def make_input(dtype: torch.dtype, batch: int = 4) -> Tensor:
    return sample_input(batch, 8, 7, 7, dtype=dtype)


def implicit(
    dtype: torch.dtype, kind: type[reference.IESkip] = reference.IESkip, **changes: object
) -> reference.IESkip:
    return kind(make_branch(dtype), **({"steps": 2, "step_size": STEP} | changes))


class OtherOrder(reference.IESkip):
    """The same numbers, summed in another order: channels_last, the batch in halves."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.contiguous(memory_format=torch.channels_last).chunk(2)
        return torch.cat([super(OtherOrder, self).forward(half) for half in halves])


class AllZero(reference.IESkip):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


class HalfRounded(reference.IESkip):
    """The block with its result rounded to half the digits."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        half = torch.float8_e4m3fn if y.dtype == torch.bfloat16 else torch.bfloat16
        return y + (y.detach().to(half).to(y.dtype) - y.detach())


class NaNFree(reference.IESkip):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).nan_to_num()


class _Normalise(torch.autograd.Function):
    """x-hat with the right cotangent, whose own derivative forgets that the statistics depend on x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, eps: float) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        rstd = torch.rsqrt(x.var((1, 2, 3), correction=0, keepdim=True) + eps)
        normalised = (x - mean) * rstd
        ctx.save_for_backward(normalised, rstd)
        return normalised

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, cotangent: Tensor) -> tuple[Tensor, None]:
        normalised, rstd = (t.detach() for t in ctx.saved_tensors)
        mean = cotangent.mean((1, 2, 3), keepdim=True)
        return rstd * (cotangent - mean - normalised * (normalised * cotangent).mean((1, 2, 3), keepdim=True)), None


class FirstOrderNorm(nn.GroupNorm):
    """Layer normalisation right in value and gradient, without its second-order term."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = _Normalise.apply(x, self.eps)
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


def first_order(block: nn.Module) -> nn.Module:
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = FirstOrderNorm
    return block


def failing(comparison: Comparison) -> set[str]:
    return {row.name for row in comparison.rows if not row.ok}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "input_grad", "forward"])
def test_accepts_another_order_of_summation(dtype: torch.dtype, mode: str) -> None:
    comparison = compare_blocks(implicit(dtype), implicit(dtype, OtherOrder), make_input(dtype), mode=mode)
    assert comparison.ok, comparison.describe()
    names = {row.name for row in comparison.rows}
    assert ("gradient of input" in names) == (mode != "forward")
    assert ("gradient of branch.2.weight" in names) == (mode == "train")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_an_all_zero_output(dtype: torch.dtype) -> None:
    comparison = compare_blocks(implicit(dtype), implicit(dtype, AllZero), make_input(dtype))
    assert {"output", "gradient of input", "gradient of branch.2.weight"} <= failing(comparison)
    assert not compare_blocks(implicit(dtype), implicit(dtype, AllZero), make_input(dtype), mode="forward").ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "input_grad", "forward"])
def test_rejects_half_the_step_size(dtype: torch.dtype, mode: str) -> None:
    half = implicit(dtype, step_size=STEP / 2)
    assert "output" in failing(compare_blocks(implicit(dtype), half, make_input(dtype), mode=mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "input_grad"])
def test_rejects_a_detached_gradient(dtype: torch.dtype, mode: str) -> None:
    found = failing(compare_blocks(implicit(dtype), implicit(dtype, detach=True), make_input(dtype), mode=mode))
    assert "gradient of input" in found
    assert "output" not in found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "input_grad"])
def test_rejects_a_missing_second_order_term_of_the_norm(dtype: torch.dtype, mode: str) -> None:
    # Nine pixels and a long step make the term a fifth of the gradient: more than bfloat16 blurs.
    block, x = implicit(dtype, step_size=0.5), sample_input(4, 8, 3, 3, dtype=dtype)
    found = failing(compare_blocks(block, first_order(block), x, mode=mode))
    assert "gradient of input" in found
    assert "output" not in found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_without_its_second_order_term_is_right_to_first_order(dtype: torch.dtype) -> None:
    # So the rejection above is of the missing term, not of a norm that is wrong anyhow.
    block = reference.SSP3(make_branch(dtype))
    assert_blocks_equal(block, first_order(block), make_input(dtype))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("coefficients", ["alpha", "beta"])
def test_rejects_a_stage_coefficient_off_by_one_percent(stage: int, coefficients: str) -> None:
    rows = {"alpha": [list(row) for row in SSP3.alpha], "beta": [list(row) for row in SSP3.beta]}
    rows[coefficients][stage][-1] *= 1.01
    if coefficients == "alpha":
        if stage == 0:
            return  # a single entry of its row, which must be one
        rows["alpha"][stage][0] = 1.0 - sum(rows["alpha"][stage][1:])
    wrong = Tableau("wrong", tuple(map(tuple, rows["alpha"])), tuple(map(tuple, rows["beta"])), order=1)
    block = reference.ShuOsher(make_branch(torch.float32), SSP3)
    comparison = compare_blocks(block, reference.ShuOsher(make_branch(torch.float32), wrong), make_input(torch.float32))
    assert {"output", "gradient of input"} <= failing(comparison)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_half_the_digits(dtype: torch.dtype) -> None:
    comparison = compare_blocks(implicit(dtype), implicit(dtype, HalfRounded), make_input(dtype))
    assert failing(comparison) == {"output"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_a_missing_update_of_running_statistics(dtype: torch.dtype) -> None:
    right = reference.SSP3(make_branch(dtype, norm="batch"))
    stopped = copy.deepcopy(right)
    stopped.branch[0].momentum = 0.0
    found = failing(compare_blocks(right, stopped, make_input(dtype)))
    assert found == {"buffer branch.0.running_mean", "buffer branch.0.running_var"}


def test_rejects_a_change_of_the_input() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0) - 1.0

    found = failing(compare_blocks(nn.Identity(), InPlace(), make_input(torch.float64), mode="forward"))
    assert "input afterwards" in found


def test_rejects_a_single_wrong_entry_pointwise() -> None:
    class OneWrong(reference.SSP3):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            wrong = torch.zeros_like(y)
            # 3e-4 of the largest entry, in one of 25,000: below what the two-norm of a float32 sum sees.
            wrong[0, 0, 0, 0] = 3e-4
            return y + wrong

    x = make_input(torch.float32, batch=64)
    comparison = compare_blocks(
        reference.SSP3(make_branch(torch.float32)), OneWrong(make_branch(torch.float32)), x, mode="forward"
    )
    (row,) = [row for row in comparison.rows if row.name == "output"]
    assert row.err <= row.allowed
    assert row.pointwise is not None and row.pointwise > 1.0
    assert not comparison.ok


def test_judges_single_entries_only_clear_of_kinks() -> None:
    x = torch.ones(1, 2, 3, 3)
    block = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))

    def pointwise(x: Tensor) -> bool:
        return all(row.pointwise is not None for row in compare_blocks(block, block, x).rows if row.name == "output")

    assert pointwise(x)
    x[0, 0, 0, 0] = 0.0
    assert not pointwise(x)
    block[0] = nn.Tanh()
    assert pointwise(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_must_agree(value: float) -> None:
    x = make_input(torch.float32)
    x[1, 2, 3, 4] = value
    block = implicit(torch.float32)
    assert compare_blocks(block, implicit(torch.float32), x).ok
    assert "output" in failing(compare_blocks(block, implicit(torch.float32, NaNFree), x))
    found = {"t": torch.tensor([1.0, value])}
    assert not compare_tensors(found, {"t": torch.tensor([1.0, -value if value == value else 1.0])}, [], 1).ok


def test_a_gradient_that_is_zero_is_compared_with_the_largest() -> None:
    block = reference.SSP3(make_branch(torch.float32, norm="batch"))
    # The first convolution's bias stands before a norm: its gradient is nothing but rounding.
    comparison = compare_blocks(block, copy.deepcopy(block), make_input(torch.float32))
    assert comparison.ok, comparison.describe()

    class Tilted(reference.SSP3):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * self.branch[2].bias.sum() - 0.01 * self.branch[2].bias.detach().sum()

    tilted = Tilted(copy.deepcopy(block.branch))
    assert failing(compare_blocks(block, tilted, make_input(torch.float32))) == {"gradient of branch.2.bias"}


def test_shapes_dtypes_and_missing_gradients() -> None:
    x = make_input(torch.float32)
    block = nn.Sequential(nn.Conv2d(8, 8, 1))

    class Wide(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    class Unused(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, self[0].weight, self[0].bias.detach())

    conv = copy.deepcopy(block[0])
    assert "output" in failing(compare_blocks(block, Wide(conv), x))
    assert failing(compare_blocks(block, Unused(conv), x)) == {"gradient of 0.bias"}
    assert "found nothing" in compare_blocks(block, Unused(conv), x).describe()


def test_assert_raises_with_the_table() -> None:
    block = implicit(torch.float32)
    with pytest.raises(AssertionError, match=r"^FAIL "):
        assert_blocks_equal(block, implicit(torch.float32, AllZero), make_input(torch.float32))
    with pytest.raises(ValueError, match=r"^mode must be one of train, input_grad, forward, got 'both'$"):
        compare_blocks(block, block, make_input(torch.float32), mode="both")
    for modes in (("train", "both"), ()):
        with pytest.raises(ValueError, match=r"^mode must be one of train, input_grad, forward, or several, got \("):
            assert_blocks_equal(block, block, make_input(torch.float32), mode=modes)


class WrongInOneMode(nn.Module):
    """A block that is wrong in one mode: "forward" is under no_grad, in "train" parameters need gradients."""

    def __init__(self, block: nn.Module, wrong: str) -> None:
        super().__init__()
        self.branch, self.wrong = block.branch, wrong
        self.wrapped = [block]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wrapped[0](x)
        trains = any(p.requires_grad for p in self.parameters())
        mode = "train" if trains else "input_grad"
        return y * 2 if self.wrong == (mode if torch.is_grad_enabled() else "forward") else y


@pytest.mark.parametrize("wrong", ["train", "input_grad", "forward", "never"])
def test_several_modes_are_each_judged(wrong: str) -> None:
    block = reference.SSP3(make_branch(torch.float32))
    twin = WrongInOneMode(copy.deepcopy(block), wrong)
    modes = ("forward", "input_grad", "train")
    if wrong == "never":
        return assert_blocks_equal(block, twin, make_input(torch.float32), mode=modes)
    with pytest.raises(AssertionError, match=f"in mode {wrong}$"):
        assert_blocks_equal(block, twin, make_input(torch.float32), mode=modes)


class Off(reference.IESkip):
    """The block with every entry of its result moved by a share of it, up or down."""

    share = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        signs = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).sign()
        return y + (y.detach() * signs.to(y.dtype) * self.share).to(y.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_quick_verdict_is_that_of_the_rule(activation: str, dtype: torch.dtype) -> None:
    block = reference.IESkip(make_branch(dtype, activation=activation), 2, STEP)
    judge, off = Judge(block, make_input(dtype)), Off(make_branch(dtype, activation=activation), 2, STEP)
    eps, found = torch.finfo(dtype).eps, []
    for share in [0.0, *(2.0**k for k in range(-2, 9))]:
        off.share = share * eps
        quick = judge.compare(off, quick=True)
        full = judge.compare(off)
        assert quick.ok == full.ok, f"{share}: {quick.describe()}\n{full.describe()}"
        assert all(one.allowed <= all_.allowed for one, all_ in zip(quick.rows, full.rows, strict=True))
        found.append(full.ok)
    assert found[0] and not found[-1]


class Counted(reference.IESkip):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(x)


def test_a_quick_verdict_runs_the_reference_as_often_as_it_needs() -> None:
    def calls_of(twin: nn.Module, quick: bool) -> int:
        Counted.calls = 0
        compare_blocks(implicit(torch.float32, Counted), twin, make_input(torch.float32), quick=quick)
        return Counted.calls

    assert calls_of(implicit(torch.float32), quick=False) == 5
    assert calls_of(implicit(torch.float32), quick=True) == 2
    assert calls_of(implicit(torch.float32, AllZero), quick=True) == 5


def test_a_run_that_is_made_later_is_of_the_reference_as_it_was() -> None:
    block, x = implicit(torch.float32), make_input(torch.float32)
    g = make_input(torch.float32).flip(0)
    judge, before = Judge(block, x, cotangent=g), compare_blocks(block, implicit(torch.float32), x, cotangent=g)
    with torch.no_grad():
        x_then = x.clone()
        for tensor in (x, g, *block.parameters()):
            tensor.mul_(-0.5)
    assert judge.compare(implicit(torch.float32), x_then) == before


class Overflows(nn.Module):
    """The identity but for one entry, which may be infinite."""

    calls = 0

    def __init__(self, infinite: bool) -> None:
        super().__init__()
        self.infinite = infinite

    def forward(self, x: Tensor) -> Tensor:
        Overflows.calls += 1
        y = x.clone()
        if self.infinite:
            y[0, 0, 0, 0] = float("inf")
        return y


def test_no_quick_verdict_where_a_value_is_not_finite() -> None:
    Overflows.calls = 0
    judge = Judge(Overflows(True), make_input(torch.float32), mode="forward")
    assert judge.compare(Overflows(True), quick=True).ok
    assert Overflows.calls == 5 + 1  # every run of the reference, and the block's own
    assert not judge.compare(Overflows(False), quick=True).ok


def test_nothing_outlives_a_comparison() -> None:
    block = reference.SSP3(make_branch(torch.float32, norm="batch"))
    before = copy.deepcopy(block.state_dict())
    x = make_input(torch.float32)
    kept = x.clone()
    compare_blocks(block, block, x)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(x, kept) and x.grad is None and not x.requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_moved_by_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    x = make_input(dtype)
    shift = (moved(x, 0).double() - x.double()).abs() / x.double().abs()
    eps = torch.finfo(dtype).eps
    assert bool((shift > eps / 4).all()) and bool((shift <= eps).all())
    if dtype == torch.float32:
        coarse = (moved(x, 0, torch.bfloat16).double() - x.double()).abs() / x.double().abs()
        eps = torch.finfo(torch.bfloat16).eps
        assert bool((coarse > eps / 4).all()) and bool((coarse <= eps * (1 + eps)).all())
    ups = (moved(x, 0) > x).double().mean()
    assert 0.4 < float(ups) < 0.6
    assert not torch.equal(moved(x, 0), moved(x, 1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_sample_input(layout: str) -> None:
    x = sample_input(2, 3, 5, 4, layout=layout, seed=1)
    assert torch.equal(x, sample_input(2, 3, 5, 4, seed=1))
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


class SlightlyOtherCoefficient(reference.Ark):
    """Ark with a gradient of b10 that is one part in a thousand too large."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not y.requires_grad:
            return y
        self.b10.register_hook(lambda g: g * 1.001)
        return y


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_single_parameters_are_judged_where_they_do_not_cancel(norm: str, seed: int) -> None:
    block = reference.Ark(make_branch(torch.float64, norm), learn_a21=True).double()
    x = sample_input(4, 8, 7, 7, dtype=torch.float64, seed=seed)
    (cotangent,) = Judge(block, x).cotangents or ()
    _, slope = torch.autograd.functional.jvp(
        lambda b10: torch.func.functional_call(block, {"b10": b10}, (x,)), block.b10, torch.ones_like(block.b10)
    )
    gradient = (cotangent * slope).sum()
    assert gradient > 0.5 * cotangent.norm() * slope.norm()  # a random cotangent gives about 1/sqrt(n) = 0.025
    torch.testing.assert_close(torch.autograd.grad(block(x), block.b10, cotangent)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slightly_wrong_gradient_of_a_single_parameter_is_refused(dtype: torch.dtype) -> None:
    block = reference.Ark(make_branch(dtype))
    wrong = SlightlyOtherCoefficient(make_branch(dtype))
    wrong.load_state_dict(block.state_dict())
    comparison = compare_blocks(block, wrong, make_input(dtype))
    assert [row.name for row in comparison.rows if not row.ok] == ["gradient of b10"]
    assert compare_blocks(block, block, make_input(dtype)).ok


def test_only_parameters_of_one_entry_turn_the_cotangent() -> None:
    assert Judge(reference.SSP2(make_branch(torch.float64)), make_input(torch.float64)).cotangents is None
    frozen = reference.Ark(make_branch(torch.float64), learn_b10=False)
    assert Judge(frozen, make_input(torch.float64)).cotangents is None
