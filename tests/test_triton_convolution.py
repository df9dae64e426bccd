"""The fused convolutions without a card: interpreted, compiled, launches counted; and compared where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_cases import name_of
from convolution_cases import CASES, CHECKS, LARGE
from test_skew import field_of, fused
from torch import Tensor, nn

from benchmarks import convolutions, kernels
from fastode import branch as reader
from fastode.dispatch.engines import BY_NAME
from fastode.dispatch.one_step import constant_table, tableau_step
from fastode.ops.engine import Call
from fastode.ops.fused import blocks
from fastode.ops.plan import Plan
from fastode.ops.schemes.implicit_euler.descent import Descent
from fastode.ops.schemes.skew_pair.pair import Pair
from fastode.ops.triton import convolution
from fastode.tableau import SSP3
from fastode.testing import assert_blocks_equal


@pytest.mark.parametrize(
    ("dtype", "each"), convolutions.DEFAULTS, ids=[f"{each.shape[1]}-{dtype}" for dtype, each in convolutions.DEFAULTS]
)
def test_compiles_for_hopper_without_spills(dtype: str, each: convolutions.Convolution) -> None:
    rows = [
        kernels.compile_offline(*wanted)
        for wanted in kernels.convolution_launches([(dtype, each)], [90])
        if "pulled" not in wanted[1] and ("two" in wanted[1] or "weight" in wanted[1])
    ]
    assert {row.kernel for row in rows} >= {"convolution_kernel", "weight_gradient_kernel"}
    assert [row for row in rows if row.spills or not row.registers] == []
    # Products run on the tensor cores; maps are read 16 bytes at a time.
    products = [row for row in rows if row.kernel in ("convolution_kernel", "weight_gradient_kernel")]
    assert {row.tensor_core for row in products} == {"wgmma.mma_async"}
    assert {row.widest for row in products} == {128}


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_pair_compiles_for_hopper_without_spills(dtype: str) -> None:
    wanted = kernels.convolution_launches([(dtype, convolutions.PAIRS[0])], [90])
    rows = [kernels.compile_offline(*each) for each in wanted if each[0].kernel.__name__ == "pair_kernel"]
    assert len(rows) == 3
    assert [row for row in rows if row.spills or not row.registers] == []
    assert {(row.tensor_core, row.widest) for row in rows} == {("wgmma.mma_async", 128)}


PAIR = Pair(2, 1, 0.0, None, (None,) * 4, (False,) * 4, None)
PAIRS_REFUSED: dict[str, tuple[Pair, Tensor, str]] = {
    "kernel": (
        PAIR, torch.zeros(2, 2, 3, 3),
        "the fused skew pair has a 3×3 kernel of stride 1 or a 4×4 kernel of stride 2, with padding 1",
    ),
    "float64": (
        PAIR, torch.zeros(2, 2, 4, 4, dtype=torch.float64), "there are no fused convolutions for torch.float64"
    ),
    "none": (PAIR, torch.zeros(2, 2, 4, 4), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS_REFUSED)
def test_why_not_a_pair(case: str) -> None:
    pair, weight, reason = PAIRS_REFUSED[case]
    assert BY_NAME["fused_convolution"].refuses(Call("skew_pair", "", pair, [weight])) == reason


def test_precision_is_what_pytorch_allows() -> None:
    for allowed, found in (("tf32", "tf32"), ("float32", "ieee")):
        with convolutions.allowed(allowed):
            assert convolution.precision(torch.float32) == found
            assert convolution.precision(torch.bfloat16) == "ieee"  # its products are exact in any case


def two_units(channels: int, norm: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(2):
        made = nn.GroupNorm(1, channels) if norm is nn.GroupNorm else norm(channels)
        layers += [made, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*layers)


# README.md of the Triton operators has these of a forward pass: launches of convolutions and others, maps moved.
FORWARD = {
    ("ie", 16, nn.GroupNorm): (6, 0, 18),
    ("ssp3", 16, nn.GroupNorm): (6, 0, 17),
    ("ie", 64, nn.GroupNorm): (6, 7, 23),
    ("ssp3", 64, nn.GroupNorm): (6, 6, 18),
    ("ssp3", 64, nn.BatchNorm2d): (6, 7, 18),
    ("ie", 64, nn.Identity): (6, 0, 18),
}


@pytest.mark.parametrize(("block", "channels", "norm"), FORWARD, ids=lambda value: getattr(value, "__name__", value))
def test_forward_launches(block: str, channels: int, norm: type[nn.Module]) -> None:
    reading = reader.read(two_units(channels, norm))
    assert reading.units is not None
    tensors = [None if t is None else t.detach().to("meta", torch.bfloat16) for t in reading.tensors]
    plan = Plan(reading.units, (False, False), None)
    x = torch.empty(128, channels, 32, 32, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with kernels.recording() as recorded:
        if block == "ie":
            blocks.ie_skip(plan, Descent(1, 0.1, 1.0, False), x, tensors)
        else:
            step = tableau_step(SSP3)
            blocks.shu_osher(plan, step.scheme, constant_table(step), x, tensors)
    products = sum(launch.kernel.__name__ == "convolution_kernel" for launch in recorded)
    moved = sum(kernels.maps_moved(launch.arguments, x) for launch in recorded)
    assert (products, len(recorded) - products, moved) == FORWARD[block, channels, norm]


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "groups": (nn.Conv2d(4, 4, 3, padding=1, groups=2), {}, "fused convolutions have no groups"),
    "even": (nn.Conv2d(4, 4, 2, padding=1, dilation=2), {}, "fused convolutions have kernels of odd sides"),
    "no convolution": (nn.GroupNorm(1, 4), {}, "a unit of the branch has no convolution"),
    "float64": (nn.Conv2d(4, 4, 1), {"dtype": torch.float64}, "there are no fused convolutions for torch.float64"),
    "none": (nn.Conv2d(4, 4, 1), {}, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_why_not(case: str) -> None:
    layer, options, reason = REFUSED[case]
    reading = reader.read(layer)
    assert reading.units is not None
    x = torch.zeros(1, 4, 3, 3, **options)
    call = Call("ie", "", Plan(reading.units, (False,), None), reading.tensors, (x,))
    assert BY_NAME["fused_convolution"].refuses(call) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_card(check: str) -> None:
    for precision in ("float32", "tf32"):
        with convolutions.allowed(precision):
            for case in CASES + LARGE:
                try:
                    CHECKS[check](case, "cuda")
                except Exception as error:
                    raise AssertionError(f"{precision}: {name_of(case)}") from error


def block_pair(channels: int, norm: type[nn.Module]) -> tuple[Plan, list[Tensor | None]]:
    reading = reader.read(two_units(channels, norm).cuda())
    assert reading.units is not None
    return Plan(reading.units, (False, False), None), reading.tensors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(64, 64, 1, 32, 32), (64, 128, 2, 32, 32), (128, 256, 2, 8, 8)])
def test_pair_on_the_card(case: tuple[int, ...], dtype: torch.dtype) -> None:
    for norm in ("group", "batch", "none"):
        field, (y, z) = field_of((*case, 0.1, "tanh", norm, 4), dtype)
        assert_blocks_equal(field.cuda(), fused(field, "fused_convolution"), (y.cuda(), z.cuda()))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [nn.GroupNorm, nn.BatchNorm2d])
def test_a_forward_pass_can_be_captured(norm: type[nn.Module]) -> None:
    step = tableau_step(SSP3)
    table = constant_table(step)
    plan, tensors = block_pair(16, norm)
    x = torch.randn(8, 16, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad():
            return blocks.shu_osher(plan, step.scheme, table, x, tensors)[0]

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(-0.75)
    graph.replay()
    assert torch.equal(captured, run())
