"""Under autocast(bfloat16) the resident engine gives the reference's results, in the dtypes of the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_cases import DIVISOR, FAMILIES, case_of, make_branch, make_input, name_of, possible, seed_of
from pairwise import Case, all_pairs, covering, pairs_of
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch import choice
from fastode.ops.resident import bfloat16, rule
from fastode.ops.resident import chain as resident_chain
from fastode.testing import MODES, assert_blocks_equal, sample_input

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ENGINE = "resident"
# Maps of fewer pixels than a tile has, of some samples together in a tile's rows, and laid end to end.
FACTORS: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "norm": ("batch", "batch_eval", "batch_bare", "group", "layer", "instance", "instance_input", "none"),
    "activation": ("relu", "tanh", "softplus", "gelu"),
    "convolution": ("3x3", "1x1", "3x5"),
    "shape": ("two_layers", "norm_last", "convolution_first", "no_convolution"),
    "dtype": (F32, BF16),  # of the input; parameters are float32
    "size": ((3, 5), (4, 8), (5, 20), (17, 9)),
    "channels": (3, 8, 16, 20),
    "layout": ("contiguous", "channels_last"),
    "batch": (1, 5),
    "mode": ("train", "input_grad", "forward"),
}
DESIGN = covering(FACTORS, seed=4, possible=possible)


def test_the_design_covers_every_pair() -> None:
    covered = set().union(*(pairs_of(case) for case in DESIGN))
    assert covered == all_pairs(FACTORS)


def pair_of(case: Case) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed_of(case))
    branch = make_branch({**case, "dtype": F32})
    plain = FAMILIES[case["family"]](reference, branch, case)
    fused = FAMILIES[case["family"]](fastode.nn, copy.deepcopy(branch), case)
    fused.engine = ENGINE
    for block in (plain, fused):
        block.train(branch.training)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("case", DESIGN, ids=name_of)
def test_equal(case: Case) -> None:
    case = {**case_of(), **case}
    plain, fused = pair_of(case)
    assert case["channels"] in DIVISOR
    assert_blocks_equal(plain, fused, make_input(case), mode=case["mode"], autocast=BF16)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_gradient_has_the_parameters_dtype_and_every_result_the_inputs(dtype: torch.dtype) -> None:
    for family in FAMILIES:
        case = {**case_of(family, norm="batch", channels=16, size=(4, 8)), "dtype": dtype}
        plain, fused = pair_of(case)
        found = []
        for block in (plain, fused):
            x = make_input(case).requires_grad_()
            with torch.autocast("cpu", BF16):
                y = block(x)
            y.float().square().sum().backward()
            assert x.grad is not None
            found.append([y.dtype, x.grad.dtype, *[p.grad.dtype for p in block.parameters() if p.grad is not None]])
        assert found[0] == found[1] == [dtype, dtype, *[F32] * (len(found[0]) - 2)]


@pytest.mark.parametrize("engine", [ENGINE, "staged"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["a scheme", "a stem of a float32 image"])
def test_a_backward_that_is_differentiated_runs_the_forwards_autocast(engine: str, dtype: torch.dtype) -> None:
    if dtype == BF16:
        plain, fused = pair_of({**case_of("ssp2", channels=8, size=(4, 8)), "dtype": BF16})
    else:
        torch.manual_seed(2)
        plain = reference.Chain(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh())
        fastode.fuse(fused := copy.deepcopy(plain))
    fused.engine = engine
    x = sample_input(2, 8, 4, 8, dtype=dtype)
    found = []
    for block in (plain, fused):
        for inside in (True, False):  # the forward, and the other way round the backward
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", BF16, enabled=inside):
                y = (block if inside else copy.deepcopy(block).to(dtype))(leaf)
            with torch.autocast("cpu", BF16, enabled=not inside):
                (slope,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
                (second,) = torch.autograd.grad(slope.float().square().sum(), leaf)
            found.append(second)
    for one, other in zip(found[:2], found[2:], strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(other.float(), one.float(), rtol=0.02, atol=0.02 * one.abs().max().item())


def test_bfloat16_maps_are_those_of_bfloat16_parameters() -> None:
    """Parameters that are bfloat16 numbers give the same bits, whichever dtype they are stored in."""
    _, fused = pair_of({**case_of("ssp3", channels=16, size=(4, 8)), "dtype": BF16})
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(parameter.bfloat16())
    x = sample_input(3, 16, 4, 8, dtype=BF16)
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            found = fused(x)
        assert torch.equal(fused.bfloat16()(x), found)


# Every mode with every norm, and with every pair of channels, stride and size.
PAIRS = [(16, 24, 1, (5, 20)), (3, 24, 1, (4, 8)), (24, 40, 2, (8, 12)), (8, 16, 2, (2, 6))]
PAIR_NORMS = ("group", "layer", "none")
SKEW = [(*pair, PAIR_NORMS[(i + j) % 3], mode) for i, pair in enumerate(PAIRS) for j, mode in enumerate(MODES)]


@pytest.mark.parametrize(("in_channels", "channels", "stride", "size", "norm", "mode"), SKEW, ids=str)
def test_skew_pairs_and_their_solutions(
    in_channels: int, channels: int, stride: int, size: tuple[int, int], norm: str, mode: str
) -> None:
    torch.manual_seed(3)
    field = reference.SkewPair(in_channels, channels, stride, 0.2, "softplus", norm)
    z = sample_input(3, in_channels, *size, dtype=BF16)
    y = sample_input(3, channels, size[0] // stride, size[1] // stride, dtype=BF16, seed=1)
    blocks: list[tuple[nn.Module, Any]] = [(field, (y, z))]
    solvers: list[dict[str, Any]] = [{"solver": "rk4"}, {"solver": "dopri5", "rtol": 2.0, "atol": 2.0}]
    blocks += [(reference.SOBlock(field, **solver), z) for solver in solvers]
    for block, inputs in blocks:
        twin = copy.deepcopy(block)
        fastode.fuse(twin)
        twin.engine = ENGINE
        assert_blocks_equal(block, twin, inputs, mode=mode, autocast=BF16)


def test_a_network_whose_stem_makes_its_maps_bfloat16() -> None:
    torch.manual_seed(2)
    branches = [reference.PreActBranch(16, norm=norm, activation="softplus") for norm in ("batch", "layer", "group")]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), reference.SSP3(branches[0]), reference.IESkip(branches[1]),
        reference.ResBlock(branches[2]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    x, twin = sample_input(3, 3, 8, 9, dtype=F32), copy.deepcopy(net)
    with torch.autocast("cpu", BF16), choice.recording() as used:
        fastode.fuse(twin)
        copy.deepcopy(twin)(x)  # which moves running statistics
    assert list(used.values()) == [ENGINE] * 3
    assert_blocks_equal(net, twin, x, autocast=BF16)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_chain_of_float32_maps_has_the_references_dtypes_and_gradients(activation: str) -> None:
    """A stem, whose convolution alone reads the image, and a block behind it that changes the shape."""
    torch.manual_seed(4)
    layer = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    branch = nn.Sequential(nn.Conv2d(20, 24, 3, 2, 1), nn.BatchNorm2d(24), layer(), nn.Conv2d(24, 24, 3, 1, 1))
    block = reference.ResBlock(branch, 0.5, nn.Conv2d(20, 24, 1, 2, bias=False), layer())
    stem = [nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(2, 20), layer()]
    chains = [
        reference.Chain(*stem),
        reference.Chain(*stem, block),
        reference.ResBlock(nn.Conv2d(3, 8, 3, 2, 1), 1.0, nn.Conv2d(3, 8, 1, 2), layer()),
    ]
    for plain in chains:
        fused = copy.deepcopy(plain)
        fastode.fuse(fused, engine=ENGINE)
        x = sample_input(3, 3, 9, 8, dtype=F32)
        assert_blocks_equal(plain, fused, x, mode=("train", "input_grad"), autocast=BF16)
        found = []
        for module in (plain, fused):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", BF16):
                y = module(leaf)
            y.float().square().sum().backward()
            assert leaf.grad is not None
            found.append([y.dtype, leaf.grad.dtype, *[p.grad.dtype for p in module.parameters() if p.grad is not None]])
        assert found[0] == found[1] and found[0][:3] == [BF16, F32, F32]


def test_which_chains_it_refuses_and_auto_leaves_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    def border(channels: int, widest: int, norm: str = "layer") -> Any:
        branch = reference.PreActBranch(channels, widest, norm=norm, stride=2)
        return fastode.nn.ResBlock(branch, 1.0, nn.Conv2d(channels, widest, 1, 2))

    def maps(channels: int, samples: int = 8 * torch.get_num_threads(), dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(samples, channels, 8, 8, dtype=dtype)

    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", True)
    slow = "it was measured to be slower than plain PyTorch"
    few = "with fewer than 4 samples for each thread and more than 128 channels"
    with torch.autocast("cpu", BF16):
        assert border(16, 32).why_not(ENGINE, maps(16, dtype=F32)) == (
            "under autocast it takes float32 maps that convolutions alone read"
        )
        assert border(16, 128).why_not(ENGINE, maps(16)) == "" == border(16, 128).against(ENGINE, maps(16))
        rows = {
            "with fewer than 16 channels": (8, 32, maps(8)),
            "with more than 320 channels": (64, 336, maps(64, 16 * torch.get_num_threads())),
            "with fewer than 8 samples for each thread": (64, 176, maps(64, 8 * torch.get_num_threads() - 1)),
            few: (64, 129, maps(64, 4 * torch.get_num_threads() - 1)),
        }
        for why, (channels, widest, x) in rows.items():
            assert border(channels, widest).against(ENGINE, x) == f"on bfloat16 maps {why} {slow}"
        many = 16 * torch.get_num_threads()
        for norm, x in (("batch", maps(128)), ("layer", maps(128, many)), ("batch", maps(128, many))):
            assert border(128, 256, norm).against(ENGINE, x) == ""
        large = torch.zeros(many, 256, 18, 18, dtype=BF16)
        assert border(256, 256).against(ENGINE, large) == (
            f"on bfloat16 maps with a feature map of one sample of more than 256 KB {slow}"
        )
    coupled = {
        "with more than 256 channels": (128, 272, maps(128)),
        "with a feature map of one sample of more than 32 KB": (256, 256, maps(256)),
        "with fewer than 8 samples for each thread": (128, 256, maps(128, 8 * torch.get_num_threads() - 1)),
    }
    for why, (channels, widest, x) in coupled.items():  # whose weights PyTorch has no need to cast
        block = border(channels, widest, "batch").to(BF16)
        assert block.against(ENGINE, x) == f"on bfloat16 maps {why} {slow}"
    assert border(128, 256, "batch").to(BF16).against(ENGINE, maps(128)) == ""
    wide = border(64, 176).to(BF16).against(ENGINE, maps(64))
    assert wide == f"on bfloat16 maps with more than 160 channels {slow}"
    with torch.autocast("cpu", BF16):
        monkeypatch.setattr(rule, "_products", False)
        monkeypatch.setattr(rule, "_has_wide_registers", True)
        assert border(16, 32).against(ENGINE, maps(16)) == (
            "on bfloat16 maps it was measured on CPUs that multiply them, and not on this kind"
        )
        monkeypatch.setattr(rule, "_tiles", True)
        for norm in ("layer", "batch"):
            assert border(256, 512, norm).against(ENGINE, maps(256)) == ""
            assert border(128, 128, norm).against(ENGINE, maps(128, torch.get_num_threads())) == ""
            assert (
                border(8, 32, norm).against(ENGINE, maps(8)) == f"on bfloat16 maps with fewer than 16 channels {slow}"
            )
            assert border(256, 256, norm).against(ENGINE, maps(256, 4)) == (
                f"on bfloat16 maps with fewer than 8 samples for each thread and more than 255 channels {slow}"
            )


def test_which_chains_of_few_samples_auto_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_tiles", False), ("_products", True), ("threads", lambda: 4)):
        monkeypatch.setattr(rule, name, value)

    def against(widest: int, samples: int, size: int = 8, *, last: bool = True, dtype: torch.dtype = BF16) -> str:
        conv = nn.Conv2d(64, widest, 3, padding=1, bias=False).to(dtype)
        chain = fastode.nn.Chain(conv, nn.BatchNorm2d(widest).to(dtype), nn.ReLU())
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(samples, 64, size, size, dtype=BF16).contiguous(memory_format=layout)
        with torch.autocast("cpu", BF16, enabled=dtype == F32):
            return chain.against(ENGINE, x)[len("on bfloat16 maps ") :].partition(" it was")[0]

    idle, few = "with fewer samples than threads", "with fewer than {} samples for each thread"
    assert against(128, 2) == against(96, 2, 16) == against(128, 2, last=False) == ""
    assert against(128, 1) == against(129, 2) == against(128, 2, 16) == idle
    assert against(128, 4, last=False) == against(256, 4) == against(320, 8) == ""
    assert against(320, 4) == against(320, 4, last=False) == few.format(8)
    assert against(256, 4, dtype=F32) == "" == against(128, 2, dtype=F32)
    assert against(257, 4, dtype=F32) == against(256, 4, last=False, dtype=F32) == few.format(8)


def test_which_chains_of_few_channels_auto_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", True)
    samples = 4 * torch.get_num_threads()

    def against(channels: int, *layers: nn.Module, size: int = 8) -> str:
        chain = fastode.nn.Chain(*layers).to(BF16)
        found = str(chain.against(ENGINE, torch.zeros(samples, channels, size, size, dtype=BF16)))
        return found.removeprefix("on bfloat16 maps ").removesuffix(" it was measured to be slower than plain PyTorch")

    def stem(channels: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, 16, kernel, stride, kernel // 2), nn.BatchNorm2d(16), nn.ReLU()]

    few = "with fewer than 16 channels"
    for channels in (1, 3):
        assert against(channels, *stem(channels)) == ""
        assert against(channels, *stem(channels), size=64) == ""
    assert against(3, *stem(3), size=65) == f"{few} and more than 4096 pixels"
    assert against(4, *stem(4)) == against(3, *stem(3, 5)) == against(3, *stem(3, 1, 2)) == few
    assert against(3, nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()) == few
    several = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)]
    assert against(8, *several) == few and against(8, *several, nn.BatchNorm2d(16)) == ""
    monkeypatch.setattr(rule, "_tiles", True)
    assert against(3, *stem(3)) == against(8, *several, nn.BatchNorm2d(16)) == few


def leave_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the bounds decide of blocks all of whose convolutions are filtered, too (tests/test_small_calls.py)."""
    for line in ("FILTERED", "FILTERED_CONTIGUOUS"):
        monkeypatch.setattr(bfloat16, line, 0)


def test_which_single_evaluations_auto_leaves_on_bfloat16_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch's convolutions are faster, and nothing beside them makes up for that."""
    leave_filtered(monkeypatch)
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", True)
    uneven = "with {} channels and more of widths that are no multiple of 16 and do not divide 32"

    def against(channels: int, width: int, norm: str) -> set[str]:
        x = torch.zeros(4 * torch.get_num_threads(), channels, 8, width, dtype=BF16)
        found = set()
        for make in (fastode.nn.ResBlock, lambda branch: fastode.nn.Chain(*branch)):
            reason = str(make(reference.PreActBranch(channels, norm=norm)).to(BF16).against(ENGINE, x))
            found.add(
                reason.removeprefix("on bfloat16 maps ").removesuffix(
                    " it was measured to be slower than plain PyTorch"
                )
            )
        return found

    for width in (8, 32, 48):
        assert against(128, width, "batch") == against(64, width, "none") == {""}
    assert against(128, 14, "batch") == {uneven.format(128)} and against(64, 28, "batch") == {""}
    assert against(32, 28, "none") == {uneven.format(32)} and against(16, 28, "none") == {""}
    assert against(160, 8, "layer") == {""} and against(176, 8, "layer") == {"with more than 160 channels"}
    for block in (fastode.nn.IESkip, fastode.nn.ResBlock):
        fused = block(reference.PreActBranch(16, norm="none"))
        with torch.autocast("cpu", BF16):
            assert "it was measured to be slower than plain PyTorch" in fused.against(
                "staged", torch.zeros(2, 16, 8, 8)
            )


def test_the_choice_is_made_anew_for_another_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", True)
    monkeypatch.setattr(resident_chain, "MOST_ALONE", 0)
    chain = fastode.nn.Chain(nn.Conv2d(16, 16, 3, padding=1), nn.GELU()).to(BF16)
    x, engines = torch.zeros(4, 16, 8, 8, dtype=BF16), []
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        with choice.recording() as used:
            chain(x.contiguous(memory_format=layout))
        engines += used.values()
    assert engines == ["reference", ENGINE, "reference"]


def test_what_it_refuses_and_what_auto_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def scheme(channels: int) -> Any:
        return fastode.nn.SSP3(reference.PreActBranch(channels, norm="layer"))

    def maps(channels: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(2, channels, 8, 8, dtype=dtype)

    slow, beyond = "it was measured to be slower than plain PyTorch", "with more than {} channels"
    leave_filtered(monkeypatch)
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_rule", rule.Rule({}, "", False))
    with torch.autocast("cpu", BF16):
        for channels, dtype in ((16, F32), (16, BF16), (128, BF16)):
            block, x = scheme(channels), maps(channels, dtype)
            assert block.why_not(ENGINE, x) == "" == block.against(ENGINE, x)
        why = "multiplying float32 maps in float32, where autocast has bfloat16, "
        assert scheme(80).against(ENGINE, maps(80, F32)) == f"{why}{beyond.format(64)} {slow}"
        odd = torch.zeros(2, 64, 8, 7)
        assert scheme(64).against(ENGINE, odd) == f"{why}with 64 channels and more and an odd side {slow}"
        assert scheme(64).against(ENGINE, odd[..., :6]) == scheme(63).against(ENGINE, odd[:, :63]) == ""
        assert scheme(160).against(ENGINE, maps(160, BF16)) == f"under autocast {beyond.format(128)} {slow}"
        monkeypatch.setattr(rule, "_products", True)
        for channels, samples, left in (
            (128, 16, ""),
            (128, 2, ""),
            (160, 16, f"under autocast {beyond.format(128)}"),
        ):
            one = fastode.nn.ResBlock(reference.PreActBranch(channels, norm="batch"))
            x = maps(channels, BF16)[:1].expand(samples * torch.get_num_threads() // 2, -1, -1, -1)
            assert one.against(ENGINE, x) == (left and f"{left} {slow}")
        assert scheme(16).against("staged", maps(16, BF16)) == f"under autocast {slow}"
        skip = fastode.nn.IESkip(reference.PreActBranch(160))
        assert skip.against("staged", maps(160, BF16)) == f"under autocast {beyond.format(128)} {slow}"
        monkeypatch.setattr(rule, "_tiles", True)
        assert scheme(16).against(ENGINE, maps(16, F32)) == f"{why}it is expected to be slower than plain PyTorch"
        assert scheme(8).why_not(ENGINE, maps(8, F64)) == "its parameters are not of the input's dtype"
        assert scheme(8).double().why_not(ENGINE, maps(8, F64)) == ""
        few = "with fewer than 16 channels"
        for tiles, norm, channels, why in (
            (True, "group", 3, few),
            (True, "none", 96, beyond.format(64)),
            (True, "none", 16, ""),
            (False, "group", 3, ""),
            (False, "group", 128, ""),
            (False, "group", 136, beyond.format(128)),
            (False, "none", 3, f"without norms {few}"),
            (False, "none", 16, ""),
        ):
            monkeypatch.setattr(rule, "_tiles", tiles)
            pair, y = fastode.nn.SkewPair(channels, 16, norm=norm), (maps(16, BF16), maps(channels, BF16))
            assert pair.against(ENGINE, *y) == (why and f"under autocast {why} {slow}")
            assert pair.against("staged", *y) == f"for pairs {slow}"
        solve = fastode.nn.SOBlock(reference.SkewPair(96, 96), solver="rk4")
        assert solve.against("staged", maps(96, BF16)) == f"under autocast {beyond.format(64)} {slow}"
        assert solve.why_not(ENGINE, maps(96, F32)) == "" == solve.against(ENGINE, maps(96, F32))
        assert fastode.nn.SkewPair(16, 16).why_not(ENGINE, maps(16, F32), maps(16, F32)) == (
            "it lowers the convolutions of states in bfloat16 alone, and not of float32, as autocast asks"
        )
        monkeypatch.setattr(rule, "_tiles", True)
        why = "multiplying float32 maps in float32, where autocast has bfloat16, it is expected to be slower than"
        assert solve.against(ENGINE, maps(96, F32)) == f"{why} plain PyTorch"
    assert scheme(16).against("staged", maps(16, F32)) == ""
    monkeypatch.setattr(rule, "_tiles", False)
    monkeypatch.setattr(rule, "_products", False)  # as on a CPU that multiplies bfloat16 in float32: not measured
    pair = fastode.nn.SkewPair(40, 40, norm="none").to(BF16)
    assert pair.against(ENGINE, maps(40, BF16), maps(40, BF16)) == ""
    with torch.autocast("cpu", BF16):
        assert pair.float().against(ENGINE, maps(40, BF16), maps(40, BF16)) == ""
        pair = fastode.nn.SkewPair(96, 96)
        assert pair.against(ENGINE, maps(96, BF16), maps(96, BF16)) == f"under autocast {beyond.format(64)} {slow}"
