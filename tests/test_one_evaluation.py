"""Blocks of one evaluation on CPUs with AVX2 alone: what bounds beside the rule's lines leave to PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastode
from fastode import reference
from fastode.ops.resident import one_evaluation
from fastode.ops.resident import rule as measured
from fastode.ops.resident.engine import Resident
from fastode.ops.resident.rule import Line, Rule

WIDE = Line(most_channels=640, most_kb=1024)
LINES = {f"{family} {norms} float32": WIDE for family in ("chain", "chain3") for norms in measured.NORMS}
WINOGRAD = Path(__file__).resolve().parents[1] / "csrc" / "cpu" / "resident" / "winograd.h"


@pytest.fixture(autouse=True)
def _a_cpu_with_avx2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_rule", Rule(LINES, "a test", True))
    monkeypatch.setattr(measured, "_has_wide_registers", False)
    torch.set_num_threads(2)


def told(block: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> str:
    block = nn.Sequential(block.to(dtype))
    fastode.fuse(block)
    answer = block[0].against("resident", torch.zeros(shape, dtype=dtype))  # type: ignore[operator]
    ending = " it was measured to be slower than plain PyTorch"
    assert isinstance(answer, str) and (not answer or answer.endswith(ending))
    return answer.removesuffix(ending)


def keeping(channels: int) -> nn.Module:
    return reference.ResBlock(reference.PreActBranch(channels, norm="batch"))


def halving(channels: int, out: int) -> nn.Module:
    first = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
    branch = nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1))
    return reference.ResBlock(branch, shortcut=nn.Conv2d(channels, out, 1, 2))


def bottleneck(channels: int, stride: int = 1) -> nn.Module:
    inner, out = channels // 4, channels * stride
    branch = nn.Sequential(
        *(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.ReLU()),
        *(nn.Conv2d(inner, inner, 3, stride, 1), nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, out, 1)),
    )
    return reference.ResBlock(branch, shortcut=nn.Conv2d(channels, out, 1, stride) if stride > 1 else None)


def test_the_bound_on_samples_is_the_one_that_the_engine_filters_by() -> None:
    text = WINOGRAD.read_text()
    assert re.search(rf"kVectorBytes == 64 \? worth : {one_evaluation.WORTH};", text)
    assert "(3 * height - 2) * (3 * width - 2) - 4 * height * width" in text
    assert measured.saved_products(4, 4) == 36 and measured.saved_products(8, 6) == 22 * 16 - 4 * 48


def test_wide_convolutions_are_left_until_they_have_samples_enough_to_be_filtered() -> None:
    assert told(keeping(160), 2, 160, 4, 4) == ""
    assert told(keeping(161), 17, 161, 4, 4) == "with more than 160 channels and fewer than 18 samples of 4×4"
    assert told(keeping(161), 18, 161, 4, 4) == ""
    assert told(keeping(161), 2, 161, 8, 8) == "with more than 160 channels and fewer than 3 samples of 8×8"
    assert told(keeping(161), 3, 161, 8, 8) == ""
    assert told(halving(128, 256), 2, 128, 8, 8) == ""
    assert told(halving(128, 257), 17, 128, 8, 8) == "with more than 256 channels and fewer than 18 samples of 4×4"
    # Maps that are never filtered keep the bound on steps with batch norms.
    assert told(keeping(161), 15, 161, 2, 2) == "with fewer than 8 samples and 512 pixels for each thread"
    assert told(keeping(161), 15, 161, 7, 7) == "with fewer than 8 samples and 512 pixels for each thread"
    assert told(keeping(161), 16, 161, 7, 7) == told(keeping(160), 2, 160, 7, 7) == ""


def test_one_sample_for_two_threads_is_taken_where_it_is_narrow() -> None:
    few = "with fewer samples than threads"
    assert told(keeping(64), 1, 64, 32, 32) == told(halving(32, 64), 1, 32, 32, 32) == ""
    assert told(keeping(64), 1, 64, 34, 34) == told(keeping(65), 1, 65, 8, 8) == few
    torch.set_num_threads(3)
    assert told(keeping(64), 1, 64, 8, 8) == few and told(keeping(64), 2, 64, 8, 8) == ""


def test_bottlenecks_have_bounds_of_their_own() -> None:
    most = "with so many 1×1 or halving convolutions with "
    assert told(bottleneck(256), 2, 256, 56, 56) == told(bottleneck(1024), 2, 1024, 14, 14) == ""
    assert told(bottleneck(1024), 4, 1024, 8, 8) == most + "fewer than 196 pixels"
    assert told(bottleneck(640), 4, 640, 8, 8) == ""
    assert told(bottleneck(1028), 4, 1028, 14, 14) == most + "more than 1024 channels"
    assert told(bottleneck(256), 2, 256, 58, 58) == most + "a feature map of one sample of more than 3136 KB"
    assert told(bottleneck(64, 2), 2, 64, 16, 16) == ""
    assert told(bottleneck(68, 2), 2, 68, 16, 16) == most + "more than 128 channels"


def test_what_has_nothing_to_filter_is_left_sooner() -> None:
    most = "with so many 1×1 or halving convolutions with "

    def chain(channels: int, kernel: int, stride: int, *norm: nn.Module) -> nn.Module:
        return reference.Chain(nn.Conv2d(channels, channels, kernel, stride, kernel // 2), *norm, nn.ReLU())

    assert told(chain(128, 1, 1, nn.BatchNorm2d(128)), 2, 128, 8, 8) == ""
    assert told(chain(129, 1, 1, nn.GroupNorm(1, 129)), 2, 129, 8, 8) == most + "more than 128 channels"
    assert told(chain(64, 1, 1), 2, 64, 16, 16) == told(chain(640, 3, 1), 3, 640, 8, 8) == ""
    assert told(chain(65, 1, 1), 2, 65, 8, 8) == told(chain(65, 3, 2), 2, 65, 8, 8) == most + "more than 64 channels"
    assert told(chain(64, 1, 2), 2, 64, 18, 18) == most + "a feature map of one sample of more than 64 KB"
    pointwise = nn.Sequential(nn.Conv2d(130, 130, 1), nn.BatchNorm2d(130), nn.ReLU(), nn.Conv2d(130, 130, 1))
    assert told(reference.ResBlock(pointwise), 4, 130, 16, 16) == most + "more than 128 channels"


def test_the_bounds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = dict(one_evaluation.in_words())
    assert words["halving bottleneck float32"] == "at most 128 channels"
    assert words["3×3 of a chain float32"].startswith("with more than 160 channels, 256 where")
    assert all(any(f"  {name} " in row for row in Resident().rule_in_words()) for name in words)
    monkeypatch.setattr(measured, "_has_wide_registers", True)
    assert one_evaluation.in_words() == []


def test_other_dtypes_and_cpus_keep_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    few = "with fewer than 8 samples and 512 pixels for each thread"
    lines = {name.replace("float32", "float64"): line for name, line in LINES.items()}
    monkeypatch.setattr(measured, "_rule", Rule(LINES | lines, "a test", True))
    assert told(keeping(16), 2, 16, 8, 8) == ""
    assert told(keeping(16), 2, 16, 8, 8, dtype=torch.float64) == few
    monkeypatch.setattr(measured, "_has_wide_registers", True)
    assert told(keeping(16), 2, 16, 8, 8) == few
    monkeypatch.setattr(measured, "_has_wide_registers", False)
    monkeypatch.setattr(measured, "_rule", Rule({"chain batch float32": WIDE}, "a test", True))
    assert told(keeping(16), 2, 16, 8, 8) == few
