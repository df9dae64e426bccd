"""Arguments of the constructors that PyTorch would refuse in its own words: the error has to name ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastode
from fastode import nets, reference
from fastode.dispatch.engines import BY_NAME

SKEW = "must be at most 8 or a multiple of 8 with norm 'group', got 20"
BRANCH = "must be at most 32 or a multiple of 32 with norm 'group', got 40"
GROUPS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "channels": (lambda kind: kind.SkewPair(3, 20), f"channels {SKEW}"),
    "in_channels": (lambda kind: kind.SkewPair(20, 8), f"in_channels {SKEW}"),
    "branch in": (lambda kind: reference.PreActBranch(40, norm="group"), f"in_channels {BRANCH}"),
    "branch out": (lambda kind: reference.PreActBranch(8, 40, norm="group"), f"out_channels {BRANCH}"),
    "bottleneck in": (lambda kind: reference.BottleneckBranch(40, 8, norm="group"), f"in_channels {BRANCH}"),
    "bottleneck inner": (
        lambda kind: reference.BottleneckBranch(8, 160, norm="group"),
        f"out_channels / expansion {BRANCH}",
    ),
    "sspnet": (
        lambda kind: nets.sspnet(width=12, norm="group"),
        "width must be a number whose multiples by 1, 2, 4 are each at most 32 or a multiple of 32 with norm 'group', "
        "got 12",
    ),
    "sonet": (
        lambda kind: nets.sonet(width=6),
        "width must be a number whose multiples by 1, 2, 4, 8 are each at most 8 or a multiple of 8 with norm 'group', "
        "got 6",
    ),
    "soblock_resnet10": (
        lambda kind: nets.soblock_resnet10(width=12),
        "width must be a number whose multiples by 1 are each at most 8 or a multiple of 8 with skew_norm 'group', "
        "got 12",
    ),
}


@pytest.mark.parametrize("kind", [reference, fastode.nn], ids=["reference", "fused"])
@pytest.mark.parametrize("name", GROUPS)
def test_channels_that_groups_do_not_part(name: str, kind: Any) -> None:
    make, message = GROUPS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as refused:
        make(kind)
    assert type(refused.value) is ValueError  # the type of PyTorch's own refusal


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
def test_widths_that_fit_are_taken(norm: str) -> None:
    """Every width that the check lets through makes a network, and every other one is refused by the check."""
    makers: list[Callable[..., nn.Module]] = [
        lambda width: nets.sspnet(n=1, width=width, norm=norm),
        lambda width: nets.sspnet_mnist(n=1, width=width, norm=norm),
        lambda width: nets.ie_resnet18(width=width, norm=norm),
        lambda width: nets.resnet10(width=width, norm=norm),
        lambda width: nets.sonet(width=width, norm=norm),
        lambda width: nets.soblock_resnet10(width=width, norm=norm, skew_norm=norm),
    ]
    refusals = []
    with torch.device("meta"):
        for width in (1, 2, 3, 4, 6, 8, 9, 12, 16, 20, 32):
            for make in makers:
                try:
                    make(width)
                except ValueError as error:
                    refusals.append(str(error))
    assert all(message.startswith("width must be ") for message in refusals), refusals
    assert bool(refusals) == (norm == "group")


MADE = "a function from the number of channels to a module"


@pytest.mark.parametrize("kind", [reference, fastode.nn], ids=["reference", "fused"])
def test_functions_that_make_no_module(kind: Any) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: kind.SkewPair(3, 4, norm=lambda c: c), f"norm must be a name or {MADE}, got 4 from it"),
        (
            lambda: kind.SkewPair(3, 4, norm=nn.BatchNorm2d(3)),
            f"norm must be a name or {MADE}, got a module of type BatchNorm2d",
        ),
        (
            lambda: kind.SkewPair(3, 4, activation=nn.ReLU()),
            "activation must be a name or a function that makes a module, got a module of type ReLU",
        ),
        (
            lambda: kind.SOClassifier(3, 4, activation=lambda: None),
            "activation must be a name or a function that makes a module, got None from it",
        ),
        (
            lambda: reference.PreActBranch(3, activation=nn.Tanh()),
            "activation must be a name or a function that makes a module, got a module of type Tanh",
        ),
    ]
    for make, message in cases:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            make()


@pytest.mark.parametrize("name", ["ResBlock", "IESkip", "SSP2", "SSP3", "Midpoint", "Ark"])
def test_a_reference_block_given_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=r"^x must be a tensor, got None$"):
        getattr(reference, name)(reference.PreActBranch(4))(None)


def test_a_shortcut_given_no_tensor() -> None:
    block = reference.ResBlock(nn.Conv2d(3, 4, 1), shortcut=nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match=r"^x must be a tensor, got 3$"):
        block(3)


@pytest.mark.parametrize("question", ["why_not", "against"])
def test_a_block_asked_about_an_unknown_engine_names_those_there_are(question: str) -> None:
    block = fastode.nn.SSP2(reference.PreActBranch(4, norm="layer"))
    known = ", ".join(map(repr, BY_NAME))
    with pytest.raises(ValueError, match=f"^engine must be one of {known}, got 'fast'$"):
        getattr(block, question)("fast", torch.randn(1, 4, 2, 2))
