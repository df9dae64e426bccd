"""The measured rule by which "auto" leaves the resident engine on the CPU, and what stands in for it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trial_bench import traced

import fastode
from fastode import reference
from fastode.dispatch import choice, known
from fastode.ops.resident import bfloat16, pairs, small
from fastode.ops.resident import rule as measured
from fastode.ops.resident.rule import Few, Line, Rule
from fastode.testing import compare_tensors, sample_input

MEASURED_ON = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "date": "2026-01-02", "commit": "abc", "kind": "x86"}
FEW = {"below": 2.0, "most_channels": 4, "most_kb": 1}
BOUNDS = {"most_channels": 8, "most_kb": 2, "least_pixels": 4, "least_channels": 2, "few": [FEW]}
LINE = Line(8, 2, 4, 2, (Few(2.0, 4, 1),))


@pytest.fixture(autouse=True)
def _no_call_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines alone are to say."""
    monkeypatch.setattr(small, "MOST_CHANNELS", 0)


def written(folder: Path, **changes: Any) -> Path:
    content = {"rule": {"ie sample float32": BOUNDS | {"why": "so it is"}}, "measured_on": MEASURED_ON} | changes
    folder.mkdir(exist_ok=True)
    measured.path_of("x86", folder).write_text(json.dumps(content))
    return folder


def test_a_measured_rule_is_read(tmp_path: Path) -> None:
    rule = measured.read(written(tmp_path), "x86")
    assert rule.measured and rule.source == "measured on a CPU, 2 threads, torch 2.13.0, 2026-01-02, commit abc"
    assert rule.line("ie", "sample", "float32") == replace(LINE, why="so it is")
    assert rule.line("ie", "batch", "float32") == measured.stand_in("ie", "float32")
    skew = Rule({"skew_pair sample float32": measured.NEVER}, "a test", True)
    assert skew.line("skew_pair", "batch", "float32") == measured.NEVER
    assert skew.line("skew_solution", "batch", "float32") == measured.DEFAULT
    assert measured.as_json(rule.lines) == {"ie sample float32": BOUNDS | {"why": "so it is"}}


def test_what_stands_in_says_why(tmp_path: Path) -> None:
    missing = measured.read(tmp_path / "none", "x86")
    other = measured.read(written(tmp_path / "one"), "aarch64 asimd")
    broken = measured.read(written(tmp_path / "broken", measured_on={}), "x86")
    moved = measured.read(written(tmp_path / "moved", measured_on=MEASURED_ON | {"kind": "arm"}), "x86")
    assert missing.source == "reasoned, not measured: there are rules for no CPU, and this is x86"
    assert other.source == "reasoned, not measured: there are rules for x86, and this is aarch64 asimd"
    assert broken.source.startswith("reasoned, not measured: ") and "cannot be read (KeyError" in broken.source
    assert "cannot be read (ValueError: it is for arm)" in moved.source
    for rule in (missing, other, broken, moved):
        assert not rule.measured and rule.line("ie", "sample", "float32") == measured.stand_in("ie", "float32")


def test_what_stands_in_knows_the_family_the_dtype_and_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for wide, line in ((True, measured.WIDE), (False, measured.DEFAULT)):
        monkeypatch.setattr(measured, "_has_wide_registers", wide)
        assert measured.stand_in("ie", "float32") == measured.stand_in("shu_osher", "float64") == line
        assert measured.stand_in("ie", "bfloat16") == measured.stand_in("skew_pair", "float32") == measured.DEFAULT
        assert measured.stand_in("chain", "float32") == measured.CHAIN


@pytest.mark.parametrize(
    ("shape", "beyond"),
    [
        ((4, 8, 8, 8), ""),
        ((4, 9, 4, 4), "with more than 8 channels"),
        ((4, 8, 9, 8), "with a feature map of one sample of more than 2 KB"),
        ((4, 8, 3, 1), "with fewer than 4 pixels"),
        ((4, 1, 8, 8), "with fewer than 2 channels"),
        ((3, 8, 4, 4), "with fewer than 2 samples for each thread and more than 4 channels"),
        ((3, 4, 9, 8), "with fewer than 2 samples for each thread and a feature map of one sample of more than 1 KB"),
        ((3, 4, 3, 1), ""),
    ],
)
def test_each_bound_has_its_sentence_and_its_number(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], beyond: str
) -> None:
    torch.set_num_threads(2)
    block = reference.IESkip(reference.PreActBranch(shape[1], norm="layer"))
    fastode.fuse(block)
    for is_measured, verdict in ((True, "was measured to be slower"), (False, "is expected to be slower")):
        monkeypatch.setattr(measured, "_rule", Rule({"ie sample float32": LINE}, "a test", is_measured))
        x = torch.zeros(shape)
        reason = f"{beyond} it {verdict} than the others" if beyond else ""
        assert block.against("resident", x) == reason and block.why_not("resident", x) == ""
        assert fastode.fuse(block, example=x).rows[0].reason == (f"resident: {reason}" if beyond else "")
        assert used(block, x) == ("staged" if beyond else "resident")
        block.engine = "resident"  # what is asked for by name runs, slower or not
        assert used(block, x) == "resident"
        block.engine = "auto"


@pytest.mark.parametrize(
    ("block", "shape", "reason"),
    [
        (reference.SSP3(reference.PreActBranch(16)), (2, 16, 4, 4), ""),
        (reference.SSP3(reference.PreActBranch(17)), (2, 17, 4, 4), "for schemes with more than 16 channels"),
        (reference.SSP3(reference.PreActBranch(17)).double(), (2, 17, 4, 4), ""),
        (reference.IESkip(reference.PreActBranch(255)), (2, 255, 4, 4), ""),
        (reference.IESkip(reference.PreActBranch(256)), (2, 256, 4, 4), "with 256 channels and more that are not chan"),
        (reference.SkewPair(4, 4), (2, 4, 4, 4), "for pairs"),
        (reference.SkewPair(8, 8, norm="instance").bfloat16(), (2, 8, 4, 4), "for pairs"),
        (reference.SOBlock(reference.SkewPair(4, 4), solver="rk4"), (2, 4, 4, 4), "with fewer than 65536 entries"),
        (reference.SOBlock(reference.SkewPair(4, 4), solver="rk4"), (16, 4, 32, 32), ""),
        (reference.SOBlock(reference.SkewPair(4, 4)), (2, 4, 4, 4), ""),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_staged_is_left_to_plain_pytorch_where_that_was_faster(
    block: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    fused: Any = copy.deepcopy(block)
    fastode.fuse(fused)
    x = torch.zeros(shape, dtype=next(fused.parameters()).dtype)
    inputs = (x, x) if isinstance(block, reference.SkewPair) else (x,)
    assert fused.why_not("staged", *inputs) == ""
    told = fused.against("staged", *inputs)
    assert told.startswith(reason) and bool(told) == bool(reason)
    if isinstance(block, reference.IESkip) or x.dtype == torch.bfloat16:
        last = [each.contiguous(memory_format=torch.channels_last) for each in inputs]
        assert fused.against("staged", *last) == ""


def test_staged_takes_pairs_whose_group_norms_pytorch_is_slow_in() -> None:
    for channels, norm, taken in ((120, "group", True), (128, "group", False), (128, "instance", True)):
        pair = fastode.nn.SkewPair(channels, channels, norm=norm).bfloat16()
        x = torch.zeros(2, channels, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        assert (pair.against("staged", x, x) == "") == taken


def used(block: nn.Module, x: Tensor) -> str:
    known.forget()  # what was chosen under another rule: outside tests a process has one
    with choice.recording() as engines:
        block(x)
    return engines[block]


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (reference.IESkip(reference.PreActBranch(4, norm="batch")), "ie batch float32"),
        (reference.IESkip(reference.PreActBranch(4, norm="batch")).eval(), "ie sample float32"),
        (reference.SSP3(reference.PreActBranch(4, norm="group")), "shu_osher sample float32"),
        (reference.Ark(reference.PreActBranch(4, norm="batch")), "shu_osher batch float32"),
        (reference.Midpoint(reference.PreActBranch(4, norm="layer")).double(), "shu_osher sample float64"),
        (reference.SSP2(reference.PreActBranch(4, norm="none")).bfloat16(), "shu_osher sample bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_block_has_its_own_line(monkeypatch: pytest.MonkeyPatch, block: nn.Module, line: str) -> None:
    fastode.fuse(block)
    x = torch.zeros(2, 4, 3, 3, dtype=next(block.parameters()).dtype)
    monkeypatch.setattr(measured, "_rule", Rule({line: measured.NEVER}, "a test", True))
    assert used(block, x) == "staged"
    others = {f"{f} {n} {d}" for f in measured.FAMILIES for n in measured.NORMS for d in measured.DTYPES} - {line}
    monkeypatch.setattr(measured, "_rule", Rule(dict.fromkeys(others, measured.NEVER), "a test", True))
    assert used(block, x) == "resident"


@pytest.mark.parametrize(("norm", "norms"), [(nn.BatchNorm2d, "batch"), (nn.Identity, "sample")])
def test_a_chain_has_its_own_line(monkeypatch: pytest.MonkeyPatch, norm: type[nn.Module], norms: str) -> None:
    torch.set_num_threads(2)
    branch = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), norm(16))
    block = fastode.nn.ResBlock(branch, shortcut=nn.Conv2d(16, 16, 1, 2))
    x, own = torch.zeros(2, 16, 6, 6), f"chain {norms} float32"
    monkeypatch.setattr(measured, "_rule", Rule({own: measured.NEVER}, "a test", True))
    assert used(block, x) == "reference"
    assert block.against("resident", x).endswith("it was measured to be slower than plain PyTorch")
    others = {f"{f} {n} {d}" for f in measured.FAMILIES for n in measured.NORMS for d in measured.DTYPES} - {own}
    monkeypatch.setattr(measured, "_rule", Rule(dict.fromkeys(others, measured.NEVER), "a test", True))
    assert used(block, x) == "resident"


def test_chains_of_3x3_convolutions_that_keep_even_sides_have_a_line_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = {"chain sample float32": Line(most_channels=16), "chain3 sample float32": Line(most_channels=32)}
    monkeypatch.setattr(measured, "_rule", Rule(lines, "a test", True))
    torch.set_num_threads(1)

    def told(channels: int, kernel: int = 3, stride: int = 1, count: int = 2, side: int = 8) -> str:
        convs = [nn.Conv2d(channels, channels, kernel, 1, kernel // 2) for _ in range(count - 1)]
        chain = fastode.nn.Chain(*convs, nn.Conv2d(channels, channels, 3, stride, 1), nn.ReLU())
        return chain.against("resident", torch.zeros(4, channels, side, side))

    assert told(32) == "" and told(40).startswith("with more than 32 channels")
    assert told(16, kernel=1) == "" and told(16, stride=2) == ""
    for other in (told(32, kernel=1), told(32, stride=2), told(32, count=1), told(32, side=7)):
        assert other.startswith("with more than 16 channels"), other
    monkeypatch.setattr(measured, "_rule", Rule({"chain sample float32": Line(most_channels=16)}, "a test", True))
    assert told(16) == "" and told(32).startswith("with more than 16 channels")


def test_without_a_line_of_their_own_chains_have_the_bounds_found_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule({"ie sample float32": measured.NEVER}, "a test", True)
    assert rule.line("chain", "batch", "float32") == rule.line("chain", "sample", "float64") == measured.CHAIN
    monkeypatch.setattr(measured, "_rule", rule)
    assert any(row.startswith("  chain ") for row in measured.in_words())
    torch.set_num_threads(1)
    for shape, beyond in (
        ((16, 512, 4, 4), ""),
        ((1, 32, 32, 32), ""),
        ((16, 528, 4, 4), "with more than 512 channels"),
        ((4, 64, 40, 40), "with a feature map of one sample of more than 256 KB"),
        ((1, 127, 8, 8), ""),
        ((3, 128, 8, 8), "with fewer than 4 samples for each thread and more than 127 channels"),
    ):
        verdict = f"{beyond} it is expected to be slower than plain PyTorch" if beyond else ""
        block = fastode.nn.ResBlock(nn.Sequential(nn.Conv2d(shape[1], shape[1], 1)), shortcut=nn.ReLU())
        assert block.against("resident", torch.zeros(shape)) == verdict
    left_out, taken = ((257, 7), (128, 9), (128, 6)), ((256, 7), (127, 9), (128, 14), (128, 28), (128, 2))
    for (channels, size), left in [*((shape, True) for shape in left_out), *((shape, False) for shape in taken)]:
        block = fastode.nn.ResBlock(nn.Sequential(nn.Conv2d(channels, channels, 1)), shortcut=nn.ReLU())
        told = block.against("resident", torch.zeros(8, channels, size, size))
        assert told.startswith("with an uneven map of 128 channels and more whose pixels" if left else "")
        assert ("no multiple of it" in told) == left


def test_blocks_of_one_evaluation_are_held_against_plain_pytorch() -> None:
    torch.set_num_threads(2)
    staged = "for steps of one evaluation it was measured to be slower than plain PyTorch"
    few = "with fewer than {} samples and {} pixels for each thread it was measured to be slower than plain PyTorch"
    wide = "with more than 512 channels it is expected to be slower than plain PyTorch"

    def against(block: reference.ResBlock, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
        x = torch.zeros(shape, dtype=dtype)
        fastode.fuse(block.to(dtype))
        fused: Any = block
        answers = fused.against("resident", x), fused.against("staged", x)
        fastode.unfuse(block)
        return answers

    step = reference.ResBlock(reference.PreActBranch(16, norm="batch"))
    assert against(step, 15, 16, 8, 7) == (few.format(8, 512), staged)
    assert against(step, 16, 16, 8, 7) == against(step, 15, 16, 9, 8) == ("", staged)
    assert against(step.eval(), 15, 16, 8, 7) == ("", staged)
    assert against(reference.ResBlock(reference.PreActBranch(513)).eval(), 8, 513, 1, 1) == (wide, staged)
    assert against(step, 15, 16, 8, 7, dtype=torch.bfloat16) == ("", staged)
    chain = reference.ResBlock(reference.PreActBranch(16), shortcut=nn.Conv2d(16, 16, 1)).float()
    alone = "with fewer samples than threads it was measured to be slower than plain PyTorch"
    assert against(chain, 1, 16, 16, 16)[0] == against(step.eval(), 1, 16, 32, 32)[0] == alone
    assert against(chain, 2, 16, 2, 2)[0] == ""


def test_the_widest_map_of_the_branch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_rule", Rule({"shu_osher sample float32": Line(most_channels=8)}, "a test", True))
    branch = nn.Sequential(nn.Conv2d(4, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 1))
    assert fastode.nn.SSP2(branch).against("resident", torch.zeros(2, 4, 3, 3)).startswith("with more than 8 channels")


def test_small_maps_of_more_channels_may_have_bounds_of_their_own() -> None:
    line = Line(most_channels=64, most_kb=256, small_channels=256, small_kb=16, few=(Few(1.0, 8, 8),))
    assert line.describe() == (
        "at most 64 channels, at most 256 KB for a feature map of one sample, or at most 256 channels and 16 KB, "
        "with fewer than 1 samples for each thread at most 8 channels and 8 KB"
    )
    told = {at: line.beyond(*at, 4, 8, 2) for at in ((64, 1024), (256, 16), (65, 64), (257, 1))}
    assert told == {(64, 1024): "", (256, 16): "", (65, 64): "with more than 64 channels", (257, 1): told[65, 64]}
    assert line.beyond(256, 16, 4, 1, 2) == "with fewer than 1 samples for each thread and more than 8 channels"
    assert measured.from_json(json.loads(json.dumps(measured.as_json({"a": line})))) == {"a": line}


@pytest.mark.parametrize(("channels", "size"), [(160, 32), (256, 16), (512, 4), (640, 8)])
def test_only_the_rule_keeps_resident_from_wide_blocks(
    monkeypatch: pytest.MonkeyPatch, channels: int, size: int
) -> None:
    monkeypatch.setattr(measured, "_rule", Rule({}, "a test", False))
    monkeypatch.setattr(measured, "_has_wide_registers", False)
    x = torch.zeros(1, channels, size, size)
    for norm in ("layer", "batch"):
        block = fastode.nn.SSP2(reference.PreActBranch(channels, norm=norm, layers=1)).requires_grad_(False)
        assert block.against("resident", x) and block.why_not("resident", x) == ""
        with monkeypatch.context() as patch:
            patch.setattr(
                measured, "_rule", Rule({f"shu_osher {n} float32": Line() for n in measured.NORMS}, "a test", True)
            )
            assert used(block, x) == "resident"


def test_where_pytorch_has_no_products_of_bfloat16_such_maps_have_the_lines_of_the_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds = {"chain": 64, "ie": 48, "shu_osher": 40, "skew_pair": 32}
    lines = {f"{family} sample bfloat16": Line(most_channels=most) for family, most in bounds.items()}
    own = Rule(lines | {"ie sample float32": Line(most_channels=24)}, "a test", True)
    for name in ("_tiles", "_products", "_has_wide_registers"):
        monkeypatch.setattr(measured, name, False)
    monkeypatch.setattr(measured, "_rule", own)
    bf16 = torch.bfloat16

    def block(family: str, channels: int) -> Any:
        if family == "chain":
            return fastode.nn.ResBlock(
                nn.Conv2d(channels, channels, 3, 2, 1), shortcut=nn.Conv2d(channels, channels, 1, 2)
            )
        if family == "skew_pair":
            return fastode.nn.SkewPair(channels, channels)
        kind = fastode.nn.IESkip if family == "ie" else fastode.nn.SSP3
        return kind(reference.PreActBranch(channels, norm="layer"))

    def told(family: str, channels: int, weights: torch.dtype, maps: torch.dtype) -> str:
        x = torch.zeros(4, channels, 8, 8, dtype=maps)
        with torch.autocast("cpu", bf16, enabled=weights != maps or maps == torch.float32):
            return block(family, channels).to(weights).against("resident", *[x] * (1 + (family == "skew_pair")))

    for family, most in bounds.items():
        for weights in (bf16, torch.float32):
            assert told(family, most, weights, bf16) == ""
            assert told(family, most + 8, weights, bf16).startswith(f"with more than {most} channels it was measured")
    # This engine multiplies float32 maps in float32, whatever autocast would have.
    assert told("ie", 24, torch.float32, torch.float32) == ""
    assert told("ie", 32, torch.float32, torch.float32).startswith("with more than 24 channels it was measured")
    for name, found in (("bfloat16", bfloat16.in_words()), ("pairs", pairs.in_words())):
        assert found == [], name


def test_a_bound_on_the_batch_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(few=(Few(2.0, 0),))
    monkeypatch.setattr(measured, "_rule", Rule({"shu_osher sample float32": line}, "a test", True))
    torch.set_num_threads(2)
    block = fastode.nn.SSP2(reference.PreActBranch(4, norm="layer"))
    for batch, engine in ((1, "staged"), (8, "resident")):
        x = sample_input(batch, 4, 3, 3)
        y, engines = traced(block, x)
        assert engines == {engine} and used(block, x) == engine
        truth, run = copy.deepcopy(block).double()(x.double()).detach(), block(x).detach()
        assert compare_tensors({"y": y}, {"y": truth}, [{"y": run}], 9 * 4).ok
