"""What "auto" gives to the resident engine before it asks the lines, and the bounds of skew pairs.

These are small calls, and bfloat16 maps all of whose convolutions are filtered.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.ops.resident import pairs, rule, small

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _measured_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose lines take nothing, and that has dot products of bfloat16."""
    lines = {f"{f} {n} {d}": rule.NEVER for f in rule.FAMILIES for n in rule.NORMS for d in rule.DTYPES}
    monkeypatch.setattr(rule, "_rule", rule.Rule(lines, "a test", True))
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", True)
    monkeypatch.setattr(rule, "threads", lambda: 2)


def against(block: nn.Module, *inputs: Tensor) -> str:
    """Why "auto" leaves a block's call."""
    fastode.fuse(block)
    fused: Any = block
    return fused.against("resident", *inputs)


def halving(channels: int) -> reference.ResBlock:
    """A block of three convolutions, with 26 C² multiply-adds for each pixel of its result."""
    branch = nn.Sequential(
        *(nn.Conv2d(channels, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
    )
    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, channels, 1))
    return reference.ResBlock(branch, shortcut=shortcut, post_activation=nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize(
    ("block", "shape", "products"),
    [
        (reference.SSP3(reference.PreActBranch(16, norm="batch")), (2, 16, 8, 6), 18 * 16 * 16 * 48 * 2),
        (reference.IESkip(reference.PreActBranch(4, layers=1)), (3, 4, 5, 5), 9 * 4 * 4 * 25 * 3),
        (halving(8), (1, 8, 8, 8), 19 * 8 * 8 * 16),
        (reference.Chain(nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU()), (2, 3, 6, 4), 75 * 8 * 48),
        (reference.SOBlock(reference.SkewPair(4, 8, 2), solver="rk4"), (2, 4, 8, 8), 2 * 16 * 32 * 16 * 2),
        (reference.SOBlock(reference.SkewPair(4, 4)), (2, 4, 6, 6), 18 * 16 * 36 * 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_products_are_counted_and_bound(
    block: nn.Module, shape: tuple[int, ...], products: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(shape, dtype=dtype)
    monkeypatch.setattr(pairs, "slower", lambda *_: None)
    monkeypatch.setattr(small, "PRODUCTS", products / 2)
    block.to(dtype)
    assert against(block, x) == ""
    monkeypatch.setattr(rule, "threads", lambda: 1)
    assert against(block, x)
    monkeypatch.setattr(small, "PRODUCTS", products)
    assert against(block, x) == ""
    monkeypatch.setattr(rule, "threads", lambda: 16)  # counts as two
    monkeypatch.setattr(small, "PRODUCTS", products / 2 - 1)
    assert against(block, x)


def test_what_is_not_small() -> None:
    wide = reference.SSP2(reference.PreActBranch(65))
    assert against(wide, torch.zeros(1, 65, 4, 4))
    assert against(reference.Chain(nn.BatchNorm2d(8), nn.ReLU()), torch.zeros(2, 8, 4, 4))  # no products
    alone = reference.Chain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    assert against(alone, torch.zeros(2, 3, 4, 4)) == ""
    assert against(alone, torch.zeros(1, 3, 4, 4))  # a thread is left without a sample


def test_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = reference.SSP2(reference.PreActBranch(8)), torch.zeros(2, 8, 4, 4)
    assert against(block, x) == ""
    monkeypatch.setattr(rule, "_tiles", True)
    assert against(block, x) and small.in_words() == "not measured"
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_rule", rule.Rule(rule._rule.lines, "a test", False))
    assert against(block, x) and small.in_words() == "not measured"


def test_an_exported_call_does_not_look_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "is_exporting", lambda: True)
    assert against(reference.SSP2(reference.PreActBranch(8)), torch.zeros(2, 8, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("channels", "norm", "activation", "what"),
    [
        (8, nn.Identity, nn.ReLU, "of fewer than 16 channels"),
        (8, lambda: nn.GroupNorm(1, 8), nn.Tanh, "of fewer than 16 channels"),
        (16, nn.Identity, nn.GELU, "with GELU and no norm"),
        (16, lambda: nn.GroupNorm(1, 16), nn.GELU, ""),
        (16, nn.Identity, nn.ReLU, ""),
        (16, lambda: nn.BatchNorm2d(16), nn.SiLU, ""),
    ],
)
def test_one_convolution_in_contiguous_memory(
    channels: int, norm: Any, activation: Any, what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "PRODUCTS", 1 << 40)
    block = reference.Chain(nn.Conv2d(3, channels, 3, padding=1), norm(), activation()).to(dtype)
    most = (1 << 17) // (channels * 64)
    few, many = (torch.zeros(samples, 3, 8, 8, dtype=dtype) for samples in (most, most + 1))
    assert against(block, few) == ""
    told = f"for one convolution {what} and more than {1 << 17} entries not in channels_last, {SLOW}" if what else ""
    assert against(block, many) == told
    if not isinstance(block[1], nn.Identity):
        assert against(block, many.contiguous(memory_format=torch.channels_last)) == ""


SLOW = "it was measured to be slower than plain PyTorch"


@pytest.mark.parametrize(
    ("norm", "shape", "layout", "reason"),
    [
        ("layer", (8, 64, 8, 8), "contiguous", ""),
        ("layer", (32, 128, 8, 8), "channels_last", "with 64 channels and more and more than 75000000 multiply-adds"),
        ("layer", (16, 64, 7, 7), "channels_last", ""),
        ("layer", (32, 64, 7, 7), "channels_last", "with 64 channels and more and more than 30000000 multiply-adds"),
        ("group", (32, 64, 7, 7), "channels_last", ""),  # PyTorch's norms take longer
        ("group", (64, 128, 4, 4), "channels_last", "with 128 channels and more and fewer than 49 pixels"),
        ("layer", (1, 128, 16, 16), "channels_last", "with fewer samples than threads and more than 16384 entries"),
        ("layer", (17, 8, 32, 32), "contiguous", "with fewer than 16 channels and more than 131072 entries"),
        ("layer", (64, 16, 32, 32), "contiguous", ""),
        ("layer", (64, 8, 32, 32), "channels_last", ""),
        ("none", (64, 8, 32, 32), "channels_last", "without norms with fewer than 16 channels"),
        ("none", (64, 32, 8, 8), "channels_last", ""),
        ("none", (64, 32, 16, 16), "channels_last", "without norms with a feature map of one sample of more than 16"),
        ("none", (2, 96, 10, 10), "channels_last", ""),
        ("none", (16, 96, 10, 10), "channels_last", "without norms with more than 32 channels"),
    ],
)
def test_bounds_of_pairs_on_bfloat16_maps(norm: str, shape: tuple[int, ...], layout: str, reason: str) -> None:
    pair: nn.Module = reference.SkewPair(shape[1], shape[1], norm=norm)
    x = torch.zeros(shape, dtype=BF16)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    with torch.autocast("cpu", BF16):
        told = against(pair, x, x)
    assert told.startswith(f"under autocast {reason}" if reason else "")
    assert bool(told) == bool(reason) == told.endswith(SLOW)
    told = against(pair.to(BF16), x, x)
    assert told.startswith(reason) and bool(told) == bool(reason) == told.endswith(SLOW)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((8, 32, 7, 7), ""),
        ((16, 128, 7, 7), ""),
        ((16, 128, 4, 4), "with 128 channels and more and fewer than 49 pixels"),
        ((1, 64, 32, 32), ""),
        ((1, 96, 32, 32), "with fewer samples than threads and more than 65536 entries"),
        ((16, 136, 8, 8), "with more than 0 channels"),  # the line says
    ],
)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_bounds_of_solutions_on_bfloat16_maps(shape: tuple[int, ...], reason: str, solver: str) -> None:
    block = reference.SOBlock(reference.SkewPair(shape[1], shape[1], norm="none"), solver=solver).to(BF16)
    told = against(block, torch.zeros(shape, dtype=BF16))
    assert told.startswith(reason) and bool(told) == bool(reason)


@pytest.mark.parametrize(("solver", "side", "left"), [("rk4", 4, True), ("rk4", 8, False), ("dopri5", 4, False)])
def test_wide_solutions_in_float32_under_autocast(solver: str, side: int, left: bool) -> None:
    block = reference.SOBlock(reference.SkewPair(256, 256), solver=solver)
    with torch.autocast("cpu", BF16):
        told = against(block, torch.zeros(8, 256, side, side))
    assert ("with 128 channels and more and fewer than 49 pixels" in told) == left


@pytest.mark.parametrize(
    ("norm", "shape", "left"),
    [
        ("layer", (32, 128, 7, 7), True),
        ("batch", (32, 128, 7, 7), True),
        ("group", (32, 128, 7, 7), False),  # four channels each: PyTorch's norms take longer
        ("layer", (20, 128, 7, 7), False),
        ("layer", (40, 128, 8, 7), True),
        ("layer", (40, 128, 7, 8), False),
        ("layer", (64, 95, 8, 7), False),
    ],
)
def test_uneven_schemes_on_bfloat16_maps(
    norm: str, shape: tuple[int, ...], left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {f"shu_osher {norms} bfloat16": rule.Line() for norms in rule.NORMS}
    monkeypatch.setattr(rule, "_rule", rule.Rule(lines, "a test", True))
    block = reference.SSP3(reference.PreActBranch(shape[1], norm=norm)).to(BF16)
    x = torch.zeros(shape, dtype=BF16)
    assert against(block, x) == ""
    told = against(block, x.contiguous(memory_format=torch.channels_last))
    assert told.startswith("with 96 channels and more of widths" if left else "") and bool(told) == left


def wide(norm: str) -> nn.Module:
    """A branch of 512 channels."""
    return reference.PreActBranch(512, norm=norm)


@pytest.mark.parametrize(
    "make",
    [
        lambda: reference.Chain(nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1)),
        lambda: reference.ResBlock(wide("batch")),
        lambda: reference.SSP2(wide("none")),
        lambda: reference.IESkip(wide("layer")),
    ],
    ids=["chain", "one step", "scheme", "IE-Skip"],
)
def test_wide_bfloat16_maps_are_taken_where_all_convolutions_are_filtered(make: Any) -> None:
    block = make().to(BF16)
    shapes = {(32, 8): True, (32, 7): False, (4, 4): False}
    for (samples, side), taken in shapes.items():
        x = torch.empty(samples, 512, side, side, dtype=BF16).contiguous(memory_format=torch.channels_last)
        assert bool(against(block, x)) != taken
        assert against(block, x.contiguous())
    if isinstance(block, reference.Chain):
        block.append(nn.Conv2d(512, 512, 3, 2, 1).to(BF16))
        x = torch.empty(32, 512, 8, 8, dtype=BF16).contiguous(memory_format=torch.channels_last)
        assert against(block, x)
