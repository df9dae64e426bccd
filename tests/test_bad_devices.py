"""A block of which one tensor is on another device is refused before anything runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch.engines import ENGINES
from fastode.testing import sample_input

C = 4


def branch(channels: int = C, **options: Any) -> nn.Module:
    return reference.PreActBranch(C, channels, norm="batch", **options)


def field() -> nn.Module:
    return reference.SkewPair(C, C, norm="group")


def linear() -> nn.Module:
    return reference.SkewLinear(C, 3, released=True)


def head() -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 3)


MAP, ROW = sample_input(2, C, 4, 4), torch.linspace(-1, 1, 2 * C).view(2, C)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "implicit skip": (lambda: reference.IESkip(branch()), (MAP,)),
    "exact implicit step": (lambda: reference.ExactIE(branch()), (MAP,)),
    "scheme": (lambda: reference.SSP3(branch()), (MAP,)),
    "block that changes the shape": (
        lambda: reference.ResBlock(branch(2 * C, stride=2), shortcut=nn.Conv2d(C, 2 * C, 1, stride=2)),
        (MAP,),
    ),
    "chain": (lambda: reference.Chain(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), *head()), (MAP,)),
    "head": (lambda: reference.Chain(*head()), (MAP,)),
    "pair": (field, (MAP, MAP)),
    "pair by equal steps": (lambda: reference.SOBlock(field(), solver="rk4", steps=2), (MAP,)),
    "pair by error": (lambda: reference.SOBlock(field()), (MAP,)),
    "linear": (linear, (ROW[:, :3], ROW)),
    "linear by equal steps": (lambda: reference.SOBlock(linear(), solver="rk4", steps=2), (ROW,)),
    "linear by error": (lambda: reference.SOBlock(linear()), (ROW,)),
    "single map by equal steps": (lambda: reference.ODEBlock(branch(), solver="rk4", steps=2), (MAP,)),
    "single map by error": (lambda: reference.ODEBlock(branch()), (MAP,)),
}


def moved(block: nn.Module, name: str) -> nn.Module:
    """The block with one parameter or buffer on another device: of the type meta, which every machine has."""
    *path, last = name.split(".")
    owner = block.get_submodule(".".join(path))
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(owner._parameters[last].detach().to("meta"))
    else:
        owner._buffers[last] = owner._buffers[last].to("meta")
    return block


@pytest.mark.parametrize("engine", ["auto", *[engine.name for engine in ENGINES]])
@pytest.mark.parametrize("name", BLOCKS)
def test_one_tensor_on_another_device(name: str, engine: str) -> None:
    make, inputs = BLOCKS[name]
    torch.manual_seed(0)
    block = make().eval()  # so that running statistics are read
    fastode.fuse(block, engine=engine)
    if engine != "auto" and block.why_not(engine, *inputs):
        return
    block(*inputs)  # the refusal is that of a call of which an earlier one is known, too
    # A solution by the reference calls its field, whose first argument is y.
    arguments = "y" if len(inputs) == 2 else "[xy]" if engine == "reference" else "x"
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    names = [each for each, _ in tensors if not each.endswith("num_batches_tracked")]
    assert names
    for each in names:
        for other in (moved(copy.deepcopy(block), each), moved(block, each)):
            with pytest.raises(ValueError, match=f"^{arguments} must be on the parameters' device meta, got cpu$"):
                other(*inputs)
        block = make().eval()
        fastode.fuse(block, engine=engine)
        block(*inputs)


def test_a_head_elsewhere_is_refused_before_the_layers_in_front_of_it_run() -> None:
    block = BLOCKS["chain"][0]().train()
    fastode.fuse(block)
    with pytest.raises(ValueError, match="must be on the parameters' device meta, got cpu"):
        moved(block, "5.weight")(MAP)
    assert int(block[1].num_batches_tracked) == 0
