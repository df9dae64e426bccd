"""Calls and parts that are left to PyTorch, beside those that an engine runs."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastode
from fastode import Solver, reference
from fastode.branch.snapshot import KEY
from fastode.native import nodes
from fastode.reference import PreActBranch, TimeConv2d
from fastode.testing import sample_input

WITH_AND_WITHOUT_NODES = pytest.mark.parametrize("in_cpp", [True, False], ids=["nodes", "functions"])


def _nodes(in_cpp: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if in_cpp else nodes.left_out()


# ---- calls of one block: some of an engine, some left to PyTorch


@WITH_AND_WITHOUT_NODES
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [reference.ResBlock, reference.SSP3, reference.IESkip])
def test_running_statistics_have_the_versions_of_pytorch(
    kind: Callable[..., nn.Module], momentum: float | None, in_cpp: bool
) -> None:
    """PyTorch's norms do not raise those of mean and variance, which graphs of other calls have saved."""
    block = kind(PreActBranch(8))
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    plain = copy.deepcopy(block)
    fastode.fuse(block, engine="resident")
    x = sample_input(3, 8, 5, 4, seed=1)
    found = []
    with _nodes(in_cpp):
        for each in (block, plain):
            before = {name: buffer._version for name, buffer in each.named_buffers()}
            each(x), each(x)
            found.append({name for name, buffer in each.named_buffers() if buffer._version > before[name]})
    assert found[0] == found[1] == {name for name in before if name.endswith("num_batches_tracked")}


@WITH_AND_WITHOUT_NODES
@pytest.mark.parametrize("kind", [reference.ResBlock, reference.SSP3])
def test_calls_of_several_sizes_before_one_backward(kind: Callable[..., nn.Module], in_cpp: bool) -> None:
    block = kind(PreActBranch(8)).double()
    plain = copy.deepcopy(block)
    fastode.fuse(block)
    small, large = (sample_input(2, 8, side, side, dtype=torch.float64, seed=side) for side in (3, 6))
    sums = []
    with _nodes(in_cpp):
        for each in (block, plain):
            loss = torch.zeros((), dtype=torch.float64)
            for x, engine in ((small, "reference"), (large, "resident"), (small, "reference"), (large, "resident")):
                each.engine = engine  # which "auto" chooses by the size
                loss = loss + each(x).square().sum()
            with torch.no_grad():
                each(large)
            loss.backward()
            sums.append([loss.detach(), *(p.grad for p in each.parameters()), *each.buffers()])
    torch.testing.assert_close(*sums)


def test_blocks_share_a_norm() -> None:
    norm = nn.BatchNorm2d(8)
    blocks = [kind(nn.Sequential(norm, nn.Tanh(), nn.Conv2d(8, 8, 1))) for kind in (reference.ResBlock, reference.SSP2)]
    model, x = nn.Sequential(*blocks).double(), sample_input(3, 8, 5, 4, dtype=torch.float64, seed=1)
    plain = copy.deepcopy(model)
    fastode.fuse(model[0], engine="reference")
    fastode.fuse(model[1], engine="resident")
    for each in (model, plain):
        each(x).square().sum().backward()
    found, expected = ([*(p.grad for p in each.parameters()), *each.buffers()] for each in (model, plain))
    torch.testing.assert_close(found, expected)


# ---- a block whose branch is a block

BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: reference.Chain(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "block": lambda: reference.ResBlock(nn.Conv2d(8, 8, 3, padding=1), 0.1, None, nn.Sigmoid()),
}
AROUND = ("SSP3", "IESkip", "ResBlock", "Ark", "ExactIE", "ODEBlock")


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", AROUND)
def test_a_branch_that_is_a_block_itself(kind: str, branch: str) -> None:
    block = getattr(reference, kind)(BRANCHES[branch]()).double()
    plain = copy.deepcopy(block)
    fastode.fuse(block)
    x = sample_input(2, 8, 5, 4, dtype=torch.float64, seed=1)
    for _ in range(3):
        torch.testing.assert_close(block(x), plain(x))
    inner = next(module for module in block.children())
    torch.testing.assert_close(inner(x), next(plain.children())(x))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(twin(x), plain(x))
    fastode.unfuse(block)
    assert all(KEY not in module.__dict__ for module in block.modules())


def test_a_field_that_sees_the_time_is_no_branch_of_a_block_without_it() -> None:
    field, x = nn.Sequential(TimeConv2d(8, 8, padding=1), nn.Tanh()), sample_input(2, 8, 5, 4, seed=1)
    solution, step = reference.ODEBlock(field, Solver("euler", steps=2)), reference.SSP3(field)
    fastode.fuse(solution, engine="resident"), fastode.fuse(step)
    solution(x)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        step(x)


# ---- norms of another dtype than the maps, and devices without kernels


def _pre_activated(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1))


KEPT_IN_FLOAT: dict[str, Callable[[], nn.Module]] = {
    "lead of a chain": lambda: reference.Chain(nn.BatchNorm2d(8), nn.ReLU(), reference.ResBlock(PreActBranch(8))),
    "tail": lambda: reference.Chain(nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "post-activation": lambda: reference.ResBlock(PreActBranch(8), 1.0, nn.BatchNorm2d(8), nn.ReLU()),
    "scheme": lambda: reference.SSP3(nn.Sequential(nn.BatchNorm2d(8), nn.Tanh())),
    "IE-Skip": lambda: reference.IESkip(nn.Sequential(nn.GroupNorm(2, 8), nn.Tanh())),
    "solution": lambda: reference.ODEBlock(nn.Sequential(nn.GroupNorm(2, 8), nn.Tanh())),
    "reversible": lambda: reference.RevBlock(*(_pre_activated(nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KEPT_IN_FLOAT)
def test_norms_may_be_kept_in_float32(kind: str, dtype: torch.dtype, training: bool) -> None:
    block = KEPT_IN_FLOAT[kind]().to(dtype).train(training)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.float()
    plain, x = copy.deepcopy(block), sample_input(2, 16 if kind == "reversible" else 8, 5, 4, dtype=dtype, seed=1)
    fastode.fuse(block)
    found, expected = ([each(x), each(x), *each.buffers()] for each in (block, plain))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("engine", ["auto", "staged", "resident"])
def test_norms_of_a_dtype_that_pytorch_refuses(engine: str) -> None:
    block, x = reference.SSP2(nn.GroupNorm(2, 8)), sample_input(2, 8, 5, 4, dtype=torch.float64)
    fastode.fuse(block, engine=engine)
    with pytest.raises((RuntimeError, ValueError), match=r"mixed dtype|not of the input's dtype"):
        block(x)
    with pytest.raises(TypeError, match=r"^x must be of the parameters' dtype float32, got float64$"):
        fastode.nn.SSP2(_pre_activated(nn.GroupNorm(2, 8)))(x)


def test_a_reversible_block_on_meta() -> None:
    block = reference.RevBlock(*(_pre_activated(nn.BatchNorm2d(8)) for _ in range(2))).to("meta")
    fastode.fuse(block)
    x = torch.empty(2, 16, 5, 4, device="meta", requires_grad=True)
    y = block(x)
    assert y.grad_fn is not None and y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


# ---- batch norms that do not count


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counters", ["none", "one"])
@pytest.mark.parametrize("kind", ["SSP3", "IESkip", "PolyBlock", "ResBlock", "ODEBlock"])
def test_batch_norms_without_a_counter(kind: str, counters: str, momentum: float | None, compiled: bool) -> None:
    branch = _pre_activated(nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Tanh())
    block = getattr(reference, kind)(branch).double()
    for norm in (branch[0], branch[3]):
        norm.momentum = momentum
    branch[0].num_batches_tracked = None
    if counters == "none":
        branch[3].num_batches_tracked = None
    plain, x = copy.deepcopy(block), sample_input(3, 8, 5, 4, dtype=torch.float64, seed=1)
    fastode.fuse(block)
    call = torch.compile(block, backend="aot_eager") if compiled else block
    for _ in range(2):
        torch.testing.assert_close(call(x), plain(x))
    torch.testing.assert_close(dict(block.named_buffers()), dict(plain.named_buffers()))


# ---- inputs without a batch, and how results lie in memory


@pytest.mark.parametrize("kind", ["SSP3", "IESkip", "Ark", "ResBlock", "ExactIE", "ODEBlock"])
def test_a_sample_without_a_batch(kind: str) -> None:
    """Where there is no norm, PyTorch takes it."""
    branch = nn.Sequential(nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1))
    branch[1].weight.data.mul_(0.1)
    block, x = getattr(reference, kind)(branch), sample_input(2, 8, 5, 4, seed=1)[0]
    plain = copy.deepcopy(block)
    fastode.fuse(block)
    for _ in range(2):
        torch.testing.assert_close(block(x), plain(x))
    with pytest.raises((RuntimeError, ValueError), match=r"channels|got shape"):
        block(x[:7])


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_solution_by_error_is_contiguous(per_sample: bool) -> None:
    block = reference.ODEBlock(_pre_activated(nn.Tanh()), Solver("dopri5", per_sample=per_sample))
    x = sample_input(2, 8, 5, 4, layout="contiguous", seed=1)
    plain = copy.deepcopy(block)
    fastode.fuse(block, engine="resident")
    for layout in (torch.contiguous_format, torch.channels_last):
        each = x.to(memory_format=layout)
        assert block(each).stride() == plain(each).stride() == x.stride()
