"""Every C++ operator against a plain PyTorch implementation in float64, by the rule of fastode.testing."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from operators_plain import ACTIVATIONS, NORMS, Pointwise, combination, gradients, value_and_tangent
from pairwise import SEEDS, Case, all_pairs, covering, pairs_of
from torch import Tensor

from fastode.native import operators
from fastode.testing import compare_tensors, moved, sample_input

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FACTORS = {
    "norm": tuple(NORMS),
    "groups": ("one", "some", "all"),
    "activation": tuple(ACTIVATIONS),
    "dtype": DTYPES,
    "size": ((1, 1), (3, 5), (7, 7), (17, 9)),
    "channels": (1, 3, 8, 16, 20, 33),
    "batch": (0, 1, 5),
    "terms": (1, 2, 4),
    "affine": ("both", "weight", "bias", "none"),
    "param_grads": (True, False),
    "tangent": (True, False),
}
GROUPS = {1: 1, 3: 3, 8: 4, 16: 2, 20: 5, 33: 11}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
COEFFICIENTS = [0.75, -0.2, 1.0, 1.0 / 3.0, -1.25]
NONE = torch.empty(0, dtype=torch.float64)  # one term is taken as it is
CASES = [case for seed in SEEDS for case in covering(FACTORS, seed=seed)]


@pytest.fixture(scope="module")
def ops() -> Any:
    reason = operators.load(announce=False)
    assert reason is None, reason
    return torch.ops.fastode


def name_of(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sample:
    """The operands of one case."""

    layout = "channels_last"

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, case["dtype"]
        self.acc = accumulator(self.dtype)
        channels = case["channels"]
        groups = {"one": 1, "some": GROUPS[channels], "all": channels}[case["groups"]]
        self.unit = Pointwise(case["norm"], groups, case["activation"])
        self.coefs = COEFFICIENTS[: case["terms"]]
        self.terms = [self.map(i) for i in range(case["terms"])]
        self.h, self.t, self.cot, self.cot_tangent = self.map(0), self.map(11), self.map(12), self.map(13)
        generator = torch.Generator().manual_seed(5)
        normed = case["norm"] != "none"
        self.weight = torch.rand(channels, generator=generator).add(0.5).to(self.acc)
        self.bias = torch.randn(channels, generator=generator).to(self.acc)
        self.weight = self.weight if normed and case["affine"] in ("both", "weight") else None
        self.bias = self.bias if normed and case["affine"] in ("both", "bias") else None
        fixed = torch.stack(
            [torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5]
        )
        self.fixed = fixed.to(self.acc) if case["norm"] == "fixed" else None
        self.longest = max(self.h[:1].numel(), self.h[:, 0].numel(), 1)

    def map(self, seed: int) -> Tensor:
        c = self.case
        return sample_input(c["batch"], c["channels"], *c["size"], dtype=c["dtype"], layout=self.layout, seed=seed)

    @property
    def moving(self) -> bool:
        """Whether the statistics are the input's own."""
        return self.case["norm"] in ("group", "batch")

    def coef_tensor(self, count: int) -> Tensor:
        return torch.tensor(COEFFICIENTS[:count], dtype=torch.float64)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def leaf(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def check(s: Sample, found: dict[str, Tensor], *plain: Any) -> None:
    """Against the first `plain(dtype)` in float64 for the truth, all of them in the accumulator's precision for R."""
    truth = plain[0](torch.float64)
    runs = [{name: t.to(found[name].dtype) for name, t in run(s.acc).items()} for run in plain]
    comparison = compare_tensors(found, truth, runs, s.longest)
    assert comparison.ok, comparison.describe()
    for name in found:
        if found[name].dim() == 4:
            assert found[name].is_contiguous(memory_format=FORMATS[s.layout]), name
            assert found[name].dtype == s.dtype, name
        else:
            assert found[name].dtype == s.acc, name


def test_design_covers_every_pair() -> None:
    assert all_pairs(FACTORS) <= set().union(*map(pairs_of, CASES))


@pytest.mark.parametrize("case", CASES, ids=name_of)
class TestOperators:
    def test_combine(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        _, _, _, act, p, q = s.unit.codes
        found = {"a": ops.combine(s.terms, s.coef_tensor(len(s.terms)), act, p, q)}
        check(s, found, lambda d: {"a": s.unit.activate(combination(cast(d, *s.terms), s.coefs))})

    def test_norm_act(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        u, a, stats = ops.norm_act(s.terms, s.coef_tensor(len(s.terms)), s.weight, s.bias, s.fixed, *s.unit.codes)
        found = {"a": a, "u": u} | ({"stats": stats} if s.moving else {})

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            h = combination(cast(dtype, *s.terms), s.coefs)
            # What is stored is what is normalised: u is rounded once to the map's dtype.
            h = h.to(s.dtype).to(dtype)
            values = {"a": s.unit(h, *cast(dtype, s.weight, s.bias, s.fixed)), "u": h}
            if s.moving:
                values["stats"] = s.unit.statistics(h)
            return {name: values[name] for name in found}

        check(s, found, plain)

    def test_one_term_without_a_coefficient_is_not_copied(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        one, arguments = torch.ones(1, dtype=torch.float64), (s.weight, s.bias, s.fixed, *s.unit.codes)
        u, *found = ops.norm_act([s.h], NONE, *arguments)
        copied, *expected = ops.norm_act([s.h], one, *arguments)
        assert u.numel() == 0
        assert torch.equal(copied.nan_to_num(), s.h)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))

    def test_norm_act_reuses_statistics(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        if not s.moving:
            return
        first = ops.norm_act([s.h], NONE, s.weight, s.bias, None, *s.unit.codes)
        again = ops.norm_act([s.h], NONE, s.weight, s.bias, first[2], *s.unit.codes)
        assert torch.equal(first[1].nan_to_num(), again[1].nan_to_num())
        # Other statistics must be seen: mean - 1 shifts every x-hat up, where no activation is flat.
        means, variances = first[2].unbind()
        other = ops.norm_act([s.h], NONE, s.weight, s.bias, torch.stack([means - 1, variances]), *s.unit.codes)
        assert first[1].numel() == 0 or not torch.equal(first[1], other[1])

    def statistics(self, ops: Any, s: Sample) -> Tensor:
        if s.fixed is not None:
            return s.fixed
        return ops.norm_act([s.h], NONE, s.weight, s.bias, None, *s.unit.codes)[2]

    def test_norm_act_vjp(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        addends = [s.map(30 + i) for i in range(len(s.terms) - 1)]
        coefs = s.coef_tensor(1 + len(addends))
        stats = self.statistics(ops, s)
        out, wbar, bbar = ops.norm_act_vjp(
            s.h, s.cot, stats, s.weight, s.bias, addends, coefs, case["param_grads"], *s.unit.codes
        )

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            h, weight, bias = leaf(dtype, s.h, s.weight, s.bias)
            inner = (s.unit(h, weight, bias, *cast(dtype, s.fixed)) * s.cot.to(dtype)).sum()
            hbar, *params = gradients(inner, h, weight, bias)
            values = {"out": combination([hbar, *cast(dtype, *addends)], COEFFICIENTS[: 1 + len(addends)])}
            return values | parameter_gradients(case, *params)

        check(s, {"out": out} | parameter_gradients(case, wbar, bbar, s), plain)

    def test_norm_act_dual(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        stacked, stats, tstats = ops.norm_act_dual(s.h, s.t, s.weight, s.bias, s.fixed, *s.unit.codes)
        value, tangent = stacked.chunk(2)
        found = {"value": value, "tangent": tangent}
        found |= {"stats": stats, "tstats": tstats} if s.moving else {}

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            (h,) = leaf(dtype, s.h)
            value, tangent = value_and_tangent(s.unit, h, s.t.to(dtype), *cast(dtype, s.weight, s.bias, s.fixed))
            values = {"value": value.detach(), "tangent": tangent.detach()}
            if s.moving:
                values["stats"] = s.unit.statistics(h).detach()
                values["tstats"] = s.unit.tangent_statistics(h, s.t.to(dtype)).detach()
            return values

        check(s, found, plain)

    def test_norm_act_second(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        both = case["tangent"]
        addends = [] if both else [s.map(30 + i) for i in range(len(s.terms) - 1)]
        coefs = torch.ones(1, dtype=torch.float64) if both else s.coef_tensor(1 + len(addends))
        _, stats, tstats = ops.norm_act_dual(s.h, s.t, s.weight, s.bias, s.fixed, *s.unit.codes)
        stats = stats if s.fixed is None else s.fixed
        cotangents = torch.cat([s.cot, s.cot_tangent]).contiguous(memory_format=FORMATS[s.layout])
        out, wbar, bbar = ops.norm_act_second(
            s.h, s.t, cotangents, stats, tstats, s.weight, s.bias, addends, coefs, case["param_grads"], both,
            *s.unit.codes,
        )  # fmt: skip

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            h, t, weight, bias = leaf(dtype, s.h, s.t, s.weight, s.bias)
            value, tangent = value_and_tangent(s.unit, h, t, weight, bias, *cast(dtype, s.fixed))
            inner = (value * s.cot.to(dtype) + tangent * s.cot_tangent.to(dtype)).sum()
            hbar, tbar, *params = gradients(inner, h, t, weight, bias)
            if both:
                values = {"hbar": hbar, "tbar": tbar}
            else:
                values = {"hbar": combination([hbar, *cast(dtype, *addends)], COEFFICIENTS[: 1 + len(addends)])}
            return values | parameter_gradients(case, *params)

        found = dict(zip(("hbar", "tbar"), out.chunk(2), strict=True)) if both else {"hbar": out}
        check(s, found | parameter_gradients(case, wbar, bbar, s), plain)

    def test_dots(self, ops: Any, case: Case) -> None:
        s = Sample(case)
        if case["batch"] == 0:
            assert torch.equal(ops.dots(s.cot, s.terms), torch.zeros(len(s.terms), dtype=s.acc))
            return
        # With a part of it in each, no product is so small that it is rounding alone.
        terms = [term + s.cot for term in s.terms]
        found = {f"dot {i}": value for i, value in enumerate(ops.dots(s.cot, terms).unbind())}

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            return {f"dot {i}": (s.cot.to(dtype) * term.to(dtype)).sum() for i, term in enumerate(terms)}

        s.longest = s.cot.numel()
        check(s, found, plain)


def parameter_gradients(
    case: Case, wbar: Tensor | None, bbar: Tensor | None, s: Sample | None = None
) -> dict[str, Any]:
    """The affine parameters' gradients that the case asks for; with a sample, that nothing else was computed."""
    asked = case["param_grads"] and case["norm"] != "none"
    if s is not None and not case["param_grads"]:
        assert wbar.numel() == 0 and bbar.numel() == 0
    has_weight, has_bias = case["affine"] in ("both", "weight"), case["affine"] in ("both", "bias")
    return ({"wbar": wbar} if asked and has_weight else {}) | ({"bbar": bbar} if asked and has_bias else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_statistics_of_a_mean_far_above_the_deviation(ops: Any, dtype: torch.dtype, norm: str) -> None:
    # E[x^2] - E[x]^2 has no digit of the variance left here, not even in float64.
    mean = 2.0**11 if dtype == torch.float32 else 2.0**25
    h = (sample_input(4, 16, 17, 9, dtype=torch.float64, layout="channels_last") * 0.5 + mean).to(dtype)
    unit = Pointwise(norm, 4, "identity")

    def named(statistics: Tensor) -> dict[str, Tensor]:
        return dict(zip(("mean", "variance"), statistics.unbind(), strict=True))

    found = ops.norm_act([h], NONE, None, None, None, *unit.codes)[2]
    # The subtraction is exact, so the truth does not lose what it is to measure.
    truth = named(unit.statistics(h.double() - mean))
    truth["mean"] = truth["mean"] + mean
    runs = [named(unit.statistics(run)) for run in (h, moved(h, 0), moved(h, 1))]
    comparison = compare_tensors(named(found), truth, runs, h[:, 0].numel())
    assert comparison.ok, comparison.describe()
    squares = unit.statistics(h * h)[0] - unit.statistics(h)[0] ** 2
    naive = compare_tensors({"mean": found[0], "variance": squares}, truth, runs, h[:, 0].numel())
    assert not naive.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_mean_is_rounded_once(ops: Any, dtype: torch.dtype) -> None:
    h = (0.9 + 0.01 * sample_input(3, 64, 7, 9, dtype=torch.float64, layout="channels_last")).to(dtype)
    found = ops.norm_act([h], NONE, None, None, None, *Pointwise("batch", 1, "identity").codes)[2][0]
    exact = [float(sum(map(Fraction, channel.flatten().tolist())) / 189) for channel in h.unbind(1)]
    assert torch.equal(found, torch.tensor(exact, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_slope_at_the_kink(ops: Any, dtype: torch.dtype, activation: str, slope: float) -> None:
    h = torch.zeros(2, 3, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    unit = Pointwise("none", 1, activation)
    one = torch.ones(1, dtype=torch.float64)
    stats = ops.norm_act([h], NONE, None, None, None, *unit.codes)[2]
    out, _, _ = ops.norm_act_vjp(h, torch.ones_like(h), stats, None, None, [], one, False, *unit.codes)
    assert torch.equal(out, torch.full_like(h, slope))
    stacked, _, _ = ops.norm_act_dual(h, torch.ones_like(h), None, None, None, *unit.codes)
    assert torch.equal(stacked[2:], torch.full_like(h, slope))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(ops: Any, activation: str, value: float) -> None:
    h = sample_input(2, 3, 4, 5, layout="channels_last")
    h[0, 1, 2, 3] = value
    unit = Pointwise("none", 1, activation)
    found = {"a": ops.norm_act([h], NONE, None, None, None, *unit.codes)[1]}
    comparison = compare_tensors(found, {"a": unit.activate(h.double())}, [{"a": unit.activate(h)}], 1)
    assert comparison.ok, comparison.describe()


OPERATOR_NAMES = ("combine", "norm_act", "norm_act_vjp", "norm_act_dual", "norm_act_second", "dots")


@pytest.mark.parametrize("norm", tuple(NORMS))
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_opcheck(ops: Any, operator: str, norm: str) -> None:
    case = {key: values[-1] for key, values in FACTORS.items()} | {
        "norm": norm, "dtype": torch.float32, "channels": 8, "size": (3, 5), "groups": "some", "batch": 2,
        "affine": "both", "terms": 2, "tangent": True,
    }  # fmt: skip
    s = Sample(case)
    one, two = s.coef_tensor(1), s.coef_tensor(2)
    norms = (s.weight, s.bias)
    _, stats, tstats = ops.norm_act_dual(s.h, s.t, *norms, s.fixed, *s.unit.codes)
    stats = stats if s.fixed is None else s.fixed
    cotangents = torch.cat([s.cot, s.cot_tangent]).contiguous(memory_format=torch.channels_last)
    arguments = {
        "combine": [(s.terms, two, *s.unit.codes[3:])],
        "norm_act": [
            (s.terms[: max(1, len(coefs))], coefs, *norms, given, *s.unit.codes)
            for coefs, given in ((two, s.fixed), (one, s.fixed), (one[:0], stats))
        ],
        "norm_act_vjp": [(s.h, s.cot, stats, *norms, [s.t], two, flag, *s.unit.codes) for flag in (True, False)],
        "norm_act_dual": [(s.h, s.t, *norms, s.fixed, *s.unit.codes)],
        "norm_act_second": [
            (s.h, s.t, cotangents, stats, tstats, *norms, addends, coefs, flag, not addends, *s.unit.codes)
            for flag in (True, False) for addends, coefs in (([], one), ([s.t], two))
        ],
        "dots": [(s.cot, s.terms)],
    }  # fmt: skip
    for args in arguments[operator]:
        torch.library.opcheck(getattr(ops, operator).default, args)
