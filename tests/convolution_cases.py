"""The fused convolutions against plain PyTorch in float64, by the rule of fastode.testing, on any device."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from operators_plain import ACTIVATIONS, NORMS, Pointwise, combination, gradients
from pairwise import Case, covering
from torch import Tensor

from fastode.testing import compare_tensors, sample_input

FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": ((3, 3), (1, 1), (3, 5)),
    "dilation": ((1, 1), (2, 1)),
    "inputs": (3, 8, 21),
    "outputs": (3, 8, 21),
    "size": ((2, 3), (5, 3), (7, 9)),
    "batch": (1, 2),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "norm": tuple(NORMS),
    "known": (True, False),
    "groups": ("one", "some", "all"),
    "activation": tuple(ACTIVATIONS),
    "affine": ("both", "weight", "bias", "none"),
    "next_norm": ("none", "group", "batch"),
    "terms": (0, 1, 4),
    "bias": (True, False),
    "image": (True, False),
    "right": ("plain", "group", "batch"),
    "param_grads": (True, False),
}
SOME_GROUPS = {3: 3, 8: 4, 21: 7, 64: 8}
COEFFICIENTS = [0.75, -0.2, 1.0, 1.0 / 3.0, -1.25]
CASES = covering(FACTORS, seed=8)
# For a card alone: maps of several blocks and steps under the plans that they have in networks.
LARGE = [case | {"inputs": 64, "outputs": 64, "size": (32, 32), "batch": 4} for case in CASES[::3]]


class Sample:
    """The operands of one case on a device."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device, self.dtype = case, device, case["dtype"]
        kernel, (up, across) = case["kernel"], case["dilation"]
        self.padding = (up * (kernel[0] // 2), across * (kernel[1] // 2))
        taps = kernel[0] * kernel[1]
        generator = torch.Generator().manual_seed(6)
        weight = torch.randn(case["outputs"], case["inputs"], *kernel, generator=generator)
        self.weight = (weight / (taps * case["inputs"]) ** 0.5).to(device, self.dtype)
        self.bias = torch.randn(case["outputs"], generator=generator).to(device, self.dtype) if case["bias"] else None
        self.unit, self.h, self.norm_weight, self.norm_bias, self.given = self.normed(
            case["norm"], case["activation"], case["inputs"], 0
        )
        self.terms = [self.map(case["outputs"], 20 + i) for i in range(case["terms"])]
        self.addends = [self.map(case["inputs"], 30 + i) for i in range(case["terms"])]
        self.coefs = COEFFICIENTS[: 1 + case["terms"]]
        self.cot = self.map(case["outputs"], 12)
        pixels = case["batch"] * case["size"][0] * case["size"][1]
        self.longest = max(taps * max(case["inputs"], case["outputs"]), pixels * max(case["inputs"], 8))

    def map(self, channels: int, seed: int) -> Tensor:
        c = self.case
        x = sample_input(c["batch"], channels, *c["size"], dtype=self.dtype, layout="channels_last", seed=seed)
        return x.to(self.device)

    def normed(self, norm: str, activation: str, channels: int, seed: int) -> tuple[Any, ...]:
        """A norm and an activation, a map for them, weight, bias and fixed statistics."""
        groups = {"one": 1, "some": SOME_GROUPS[channels], "all": channels}[self.case["groups"]]
        unit = Pointwise(norm, groups, activation)
        generator = torch.Generator().manual_seed(7 + seed)
        rows = torch.rand(4, channels, generator=generator) + 0.5
        rows[1:3] -= 1.0
        weight, bias, mean, variance = rows.to(self.device).unbind()
        affine = self.case["affine"] if norm != "none" else "none"
        return (
            unit, self.map(channels, seed), weight if affine in ("both", "weight") else None,
            bias if affine in ("both", "bias") else None, torch.stack([mean, variance]) if norm == "fixed" else None,
        )  # fmt: skip

    @cached_property
    def operand(self) -> Any:
        """act(norm(h)) as a convolution reads it."""
        from fastode.ops.triton import convolution

        stats = self.given
        if self.unit.norm in ("group", "batch"):
            stats = self.unit.statistics(self.h.double()).float()
        return convolution.value_of(convolution.Unit(self.h, *self.unit.codes), stats, self.norm_weight, self.norm_bias)

    @cached_property
    def right(self) -> tuple[Any, ...]:
        """The cotangent of the convolution's result as an operand, and what it is of: the norm and its map."""
        from fastode.ops.triton import convolution, gather

        if self.case["right"] == "plain":
            return convolution.Operand(self.cot), None
        normed = self.normed(self.case["right"], "identity", self.case["outputs"], 40)
        unit, h, weight, bias, _ = normed
        stats = unit.statistics(h.double())
        spread = [unit._spread(each, h) for each in stats]
        rstd = torch.rsqrt(spread[1] + unit.eps)
        scaled = self.cot.double() * rstd * (1 if weight is None else weight[:, None, None])
        sets = [unit.statistics(scaled * factor)[0] for factor in (1.0, h.double() - spread[0])]
        operand = convolution.Operand(
            self.cot, gather.PULLED.value, convolution.Unit(h, *unit.codes), stats.float(), torch.stack(sets).float(),
            weight, bias,
        )  # fmt: skip
        return operand, normed

    def convolve(self, a: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(a.dtype)
        return F.conv2d(a, self.weight.to(a.dtype), bias, 1, self.padding, self.case["dilation"])

    def result_bar(self, dtype: torch.dtype) -> Tensor:
        """The cotangent of the convolution's result."""
        cot, normed = self.cot.to(dtype), self.right[1]
        if normed is None:
            return cot
        unit, h, weight, bias, _ = normed
        leaf = h.to(dtype).requires_grad_()
        return gradients((unit(leaf, *_cast(dtype, weight, bias)) * cot).sum(), leaf)[0]

    def compare(self, found: dict[str, Tensor], plain: Any) -> None:
        truth = plain(torch.float64)
        runs = [{name: t.to(found[name].dtype) for name, t in plain(torch.float32).items()}]
        comparison = compare_tensors(found, truth, runs, self.longest, dtype=self.dtype)
        assert comparison.ok, comparison.describe()
        for name in found:
            assert found[name].dim() != 4 or found[name].is_contiguous(memory_format=torch.channels_last), name


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _coefficients(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check_convolution(case: Case, device: str = "cpu") -> None:
    """The value, its combination and the combination's statistics; the input's where they were not known."""
    from fastode.ops.triton import convolution

    s = Sample(case, device)
    following = Pointwise(case["next_norm"], SOME_GROUPS[case["outputs"]], "identity")
    computed = not case["known"] and case["norm"] in ("group", "batch")
    made = convolution.convolution(
        replace(s.operand, stats=None) if computed else s.operand, s.weight, s.bias, case["dilation"], s.terms,
        _coefficients(s.coefs), case["image"], following.codes[:2],
    )  # fmt: skip
    found = {"out": made.out} | ({"image": made.image} if case["image"] else {})
    assert (made.image is None) == (not case["image"])

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        image = s.convolve(s.unit(s.h.to(dtype), *_cast(dtype, s.norm_weight, s.norm_bias, s.given)))
        values = {"image": image, "out": combination([image, *_cast(dtype, *s.terms)], s.coefs)}
        return {name: values[name] for name in found}

    s.compare(found, plain)
    if computed:
        compare_statistics(made.own, s.unit, s.h, s.longest)
    if case["next_norm"] == "none":
        assert made.stats is None
        return
    # Of what is stored: a backward pass normalises that.
    compare_statistics(made.stats, following, made.out, s.longest)


def compare_statistics(found: Tensor, norm: Pointwise, x: Tensor, longest: int) -> None:
    names = ("mean", "variance")
    truth, run = norm.statistics(x.double()), norm.statistics(x.float())
    comparison = compare_tensors(
        dict(zip(names, found, strict=True)), dict(zip(names, truth, strict=True)),
        [dict(zip(names, run, strict=True))], longest,
    )  # fmt: skip
    assert comparison.ok, comparison.describe()


def check_pull(case: Case, device: str = "cpu") -> None:
    """The data gradient, through the norm and the activation of the convolution's input."""
    from fastode.ops.fused import sweeps
    from fastode.ops.triton import convolution

    s = Sample(case, device)
    if s.operand.unit is None:
        out = convolution.convolution(
            s.right[0], s.weight, None, case["dilation"], s.addends, _coefficients(s.coefs), transposed=True
        ).out
        bars = None
    else:
        pulled = convolution.pull(
            s.right[0], s.weight, s.operand, case["dilation"], s.addends, _coefficients(s.coefs), case["param_grads"]
        )
        bars = pulled.bars
        out = pulled.operand.x
        if pulled.waits:
            out = sweeps.pull_set(pulled.operand, s.addends, _coefficients(s.coefs))
    names = [("norm weight", s.norm_weight), ("norm bias", s.norm_bias)]
    asked = case["param_grads"] and case["norm"] != "none"
    assert bars is not None or not asked
    found = {"out": out}
    if asked:
        found |= {name: bar for (name, given), bar in zip(names, bars, strict=True) if given is not None}

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (s.h, s.norm_weight, s.norm_bias)]
        value = s.convolve(s.unit(*leaves, *_cast(dtype, s.given)))
        hbar, *params = gradients((value * s.result_bar(dtype)).sum(), *leaves)
        values = {"out": combination([hbar, *_cast(dtype, *s.addends)], s.coefs)}
        values |= {name: bar for (name, _), bar in zip(names, params, strict=True) if bar is not None}
        return {name: values[name] for name in found}

    s.compare(found, plain)


def check_weight_gradient(case: Case, device: str = "cpu") -> None:
    """The gradients of weight and bias."""
    from fastode.ops.triton import convolution

    s = Sample(case, device)
    weight_bar, bias_bar = convolution.weight_gradient(
        s.operand, s.right[0], case["kernel"], case["dilation"], case["bias"]
    )
    assert (bias_bar is None) == (not case["bias"])
    found = {"weight": weight_bar} | ({"bias": bias_bar} if case["bias"] else {})
    # Before a norm that takes it away again a bias has no gradient but rounding: it is judged beside the weight's.
    if case["bias"] and case["right"] != "plain":
        found = {"weight and bias": torch.cat([weight_bar.flatten(), bias_bar])}

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        a = s.unit(s.h.to(dtype), *_cast(dtype, s.norm_weight, s.norm_bias, s.given))
        bar = s.result_bar(dtype)
        weight = s.weight.to(dtype).requires_grad_()
        value = F.conv2d(a, weight, None, 1, s.padding, case["dilation"])
        values = {"weight": gradients((value * bar).sum(), weight)[0], "bias": bar.sum((0, 2, 3))}
        values["weight and bias"] = torch.cat([each.flatten() for each in values.values()])
        return {name: values[name] for name in found}

    s.compare(found, plain)


CHECKS = {"convolution": check_convolution, "pull": check_pull, "weight gradient": check_weight_gradient}
