"""Under autocast(bfloat16) a fused block works in the reference's dtypes and gives its results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_cases import FAMILIES, case_of, make_input, make_pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastode.testing import MODES, assert_blocks_equal

NORMS = ["layer", "group", "batch", "batch_eval", "instance_input", "none"]


class Dtypes(TorchDispatchMode):
    """Notes the dtypes at every convolution and at the entry of every norm, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[tuple[torch.dtype, ...]] = []
        self.norms: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "aten::convolution":
            self.convolutions.append((args[0].dtype, args[1].dtype, result.dtype))
        elif name in ("aten::native_group_norm", "aten::native_batch_norm"):
            self.norms.append(args[0].dtype)
        elif name == "fastode::norm_act":
            # Several terms are combined first: u is what the norm sees.
            self.norms.append(args[0][0].dtype if len(args[0]) == 1 else result[0].dtype)
        return result


def dtypes_of(block: nn.Module, x: torch.Tensor) -> Dtypes:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Dtypes() as seen:
        copy.deepcopy(block)(x)
    return seen


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_intermediate_dtypes(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, dtype=torch.float32, channels=8)
    plain, fused = make_pair(case)
    expected, found = (dtypes_of(block, make_input(case)) for block in (plain, fused))
    evaluations = {"ie": 2, "res": 1, "ssp2": 2, "ssp3": 3, "midpoint": 2, "poly": 2, "ark": 2, "custom": 4}[family]
    lower = (torch.bfloat16,) * 3
    forward = [seen for seen in expected.convolutions if seen == lower]
    assert len(forward) >= 2 * evaluations
    assert set(found.convolutions) == set(expected.convolutions) == {lower}
    if norm not in ("none", "batch_eval") and family != "ie":
        # Instance norm is a batch norm of the reshaped map; the inner gradient of IE-Skip evaluates no norm anew.
        assert found.norms == expected.norms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results(family: str, norm: str) -> None:
    case = case_of(family, norm=norm, dtype=torch.float32, channels=8)
    plain, fused = make_pair(case)
    assert_blocks_equal(plain, fused, make_input(case), mode=MODES, autocast=torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_that_is_lower_already(family: str) -> None:
    # What a block meets behind a convolution under autocast: a bfloat16 map and float32 parameters.
    case = case_of(family, dtype=torch.float32, channels=8)
    plain, fused = make_pair(case)
    x = make_input(case).bfloat16()
    assert_blocks_equal(plain, fused, x, autocast=torch.bfloat16)


def test_autocast_is_left_as_it_was() -> None:
    case = case_of("ie", dtype=torch.float32)
    plain, fused = make_pair(case)
    x = make_input(case)
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
        assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            assert_blocks_equal(plain, fused, x)
    assert not torch.is_autocast_enabled("cpu")
    # The forward's autocast is the backward's, wherever backward is called.
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x.requires_grad_())
    inside, outside = [], []
    with torch.autocast("cpu", torch.bfloat16):
        inside.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
    outside.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(inside[0], outside[0])
