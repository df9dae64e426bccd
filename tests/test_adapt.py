"""Blocks of other people's classes, told what they are by adapters: fused in place, with what own blocks guarantee."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_networks import PreActBasic, engine_of
from torch import Tensor, nn

import fastode
from benchmarks.foreign import BasicBlock, Bottleneck, ResNet
from fastode import reference
from fastode.dispatch import known
from fastode.dispatch.registry import _twins
from fastode.ops.resident import rule
from fastode.testing import MODES, assert_blocks_equal, sample_input

pytestmark = pytest.mark.usefixtures("few_are_enough")

OUR = "Ark, Chain, ExactIE, IESkip, Midpoint, PolyBlock, ResBlock, SSP2, SSP3, ShuOsher"


def basic(block: BasicBlock) -> nn.Module:
    branch = nn.Sequential(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
    return reference.ResBlock(branch, 1.0, block.downsample, post_activation=block.relu)


def bottleneck(block: Bottleneck) -> nn.Module:
    b = block
    branch = nn.Sequential(b.conv1, b.bn1, b.relu, b.conv2, b.bn2, b.relu, b.conv3, b.bn3)
    return reference.ResBlock(branch, 1.0, block.downsample, post_activation=block.relu)


def preact(block: PreActBasic) -> nn.Module | str:
    if not isinstance(block.drop_path, nn.Identity):
        return "it has stochastic depth."
    first, then = [block.norm1, block.act1], [block.conv1, block.norm2, block.act2, block.conv2]
    if block.downsample is None:
        return reference.ResBlock(nn.Sequential(*first, *then))
    return reference.Chain(*first, reference.ResBlock(nn.Sequential(*then), 1.0, block.downsample))


@pytest.fixture(autouse=True)
def _registered() -> None:
    fastode.adapt(BasicBlock)(basic)
    fastode.adapt(Bottleneck)(bottleneck)
    fastode.adapt(PreActBasic)(preact)


def projecting(block: Any = BasicBlock, width: int = 4) -> Any:
    downsample = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
    return block(width, 2 * width // block.expansion, 2, downsample)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: BasicBlock(4, 4),
    "basic, projecting": projecting,
    "bottleneck": lambda: Bottleneck(8, 2),
    "bottleneck, projecting": lambda: projecting(Bottleneck),
    "preact": lambda: PreActBasic(4, 4),
    "preact, projecting": lambda: PreActBasic(4, 6, 2),
}


@pytest.mark.parametrize("engine", ["resident", "staged"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_adapted_block_equals_theirs(name: str, training: bool, engine: str) -> None:
    plain = BLOCKS[name]().train(training)
    fused = copy.deepcopy(plain)
    (row,) = fastode.fuse(fused, engine=engine).rows
    assert (row.reference, row.engines) == (type(plain), (engine,)) and type(fused) is row.fused is not type(plain)
    channels = next(p for p in plain.parameters() if p.dim() == 4).shape[1]
    assert_blocks_equal(plain, fused, sample_input(2, channels, 6, 5))


def test_a_network_of_theirs_equals_itself() -> None:
    plain = ResNet(BasicBlock, (1, 2), 16)
    fused = copy.deepcopy(plain)
    x = sample_input(2, 3, 16, 16)
    report = fastode.fuse(fused, example=x)
    assert [(row.name, row.engines) for row in report.rows] == [
        (name, ("resident",)) for name in ("layer1.0", "layer2.0", "layer2.1")
    ]
    assert_blocks_equal(plain, fused, x, mode=MODES)


@pytest.mark.parametrize("name", ["basic, projecting", "preact"])
def test_bfloat16_and_autocast(name: str) -> None:
    for dtype, autocast in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        plain = BLOCKS[name]().to(dtype)
        fused = copy.deepcopy(plain)
        fastode.fuse(fused, engine="staged")
        # Under autocast what comes from a convolution is lowered already.
        x = sample_input(2, 4, 6, 5, dtype=torch.bfloat16)
        assert_blocks_equal(plain, fused, x, autocast=autocast)


def test_under_autocast_a_block_that_adds_two_dtypes_runs_as_theirs() -> None:
    plain: nn.Module = BasicBlock(4, 4)
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(2, 4, 6, 5)
    assert_blocks_equal(plain, fused, x, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert engine_of(fused, x) == "reference" and fused(x).dtype == plain(x).dtype == torch.bfloat16


def test_everything_but_the_class_stays() -> None:
    block = projecting().double().eval()
    block.bn1.requires_grad_(False)
    attributes, parts = dict(block.__dict__), [dict(part.__dict__) for part in block.modules()]
    tensors, names = list(block.state_dict(keep_vars=True).values()), list(block.state_dict())
    calls: list[str] = []
    handle = block.register_forward_hook(lambda *_: calls.append("forward"))
    fastode.fuse(block)
    assert isinstance(block, BasicBlock) and type(block).__name__ == "BasicBlock" and type(block) is not BasicBlock
    assert list(block.state_dict()) == names and not block.training and not block.bn1.weight.requires_grad
    assert all(a is b for a, b in zip(block.state_dict(keep_vars=True).values(), tensors, strict=True))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert engine_of(block, x) == "resident" and calls == ["forward"]
    block(x).sum().backward()
    assert block.bn1.weight.grad is None and block.conv1.weight.grad is not None
    handle.remove()
    (row,) = fastode.unfuse(block).rows
    assert (row.reference, row.fused, row.reason) == (BasicBlock, None, "runs as the reference again")
    assert type(block) is BasicBlock and block.__dict__ == attributes
    assert [dict(part.__dict__) for part in block.modules()] == parts


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_fused_block_are_fused(clone: Callable[[Any], Any]) -> None:
    block = nn.Sequential(BasicBlock(4, 4)).eval()
    fastode.fuse(block, engine="staged")
    x = torch.randn(2, 4, 5, 5)
    expected = block(x)
    other = clone(block)
    assert type(other[0]) is type(block[0]) and other[0].conv1.weight is not block[0].conv1.weight
    assert engine_of(other[0], x) == "staged" and torch.equal(other(x), expected)
    fastode.unfuse(other)
    assert type(other[0]) is BasicBlock and type(block[0]) is not BasicBlock


@pytest.mark.parametrize("where", ["bn1", "downsample", "downsample.0"])
def test_a_hook_inside_keeps_a_block_unfused(where: str) -> None:
    block = projecting(width=16)
    fastode.fuse(block)
    x = torch.randn(2, 16, 6, 6)
    assert engine_of(block, x) == "resident"
    calls: list[str] = []
    handle = block.get_submodule(where).register_forward_hook(lambda *_: calls.append(where))
    assert engine_of(block, x) == "reference" and calls == [where]
    kind = type(block.get_submodule(where)).__name__
    why = f"{where} ({kind}) has hooks or a replaced forward, which a fused block would not call."
    assert block.why_not("resident", x) == why
    block.engine = "staged"
    with pytest.raises(ValueError, match=re.escape(why)):
        block(x)
    block.engine = "auto"
    handle.remove()
    assert engine_of(block, x) == "resident" and calls == [where]


def test_what_changes_between_calls_is_seen() -> None:
    plain = projecting()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine="staged")
    x = sample_input(
        2, 4, 6, 5
    )  # one odd side, or PyTorch's own convolution may end the process (pytorch-faults.md, 4)
    assert_blocks_equal(plain, fused, x)
    fused(x)
    plain.load_state_dict(fused.state_dict())
    for block in (plain, fused):
        torch.manual_seed(1)
        block.conv2 = nn.Conv2d(8, 8, 1)
        block.relu = nn.Tanh()
        block.bn2.eval()
        block.downsample[1] = nn.GroupNorm(2, 8)
        block.conv1.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    assert_blocks_equal(plain, fused, x)


def test_a_call_that_auto_leaves_is_asked_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "threads", lambda: 1000)
    block, x = BasicBlock(16, 16).eval(), torch.randn(2, 16, 5, 5)
    expected = block(x)
    fastode.fuse(block)
    assert torch.equal(block(x), expected) and engine_of(block, x) == "reference"
    calls: list[int] = []
    handle = block.bn1.register_forward_hook(lambda *_: calls.append(1))
    assert engine_of(block, x) == "reference" and calls == [1]
    handle.remove()
    monkeypatch.setattr(rule, "threads", lambda: 1)
    known.forget()  # what was chosen under another rule: outside tests a process has one
    assert engine_of(block, torch.randn(3, 16, 5, 5)) == "resident"
    engines = [engine_of(block, x) for _ in range(100)]
    assert engines[0] == "reference" and engines[-1] == "resident"
    block.bn1.weight.data.mul_(2)
    fastode.unfuse(block)
    assert not torch.equal(block(x), expected)


def test_the_adapter_is_asked_once_for_each_mode() -> None:
    asked = []

    @fastode.adapt(BasicBlock)
    def counting(block: BasicBlock) -> nn.Module:
        asked.append(block.training)
        return basic(block)

    block = BasicBlock(4, 4)
    fastode.fuse(block)
    for training in (True, False) * 3:
        block.train(training)
        block(torch.randn(2, 4, 5, 5))
    assert asked == [True, False]


def test_the_adapter_is_asked_again_where_a_list_has_changed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.steps = nn.Conv2d(3, 3, 1), [0.5]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.steps[0] * self.conv(x)

    fastode.adapt(Scaled)(lambda block: reference.ResBlock(block.conv, block.steps[0]))
    block = Scaled()
    fastode.fuse(block, engine="staged")
    x = torch.randn(2, 3, 4, 4)
    for step in (0.5, 2.0):
        block.steps[0] = step
        torch.testing.assert_close(block(x), x + step * block.conv(x))
    assert KEY_OF_OTHERS.isdisjoint(block.conv.__dict__)


KEY_OF_OTHERS = {"_fastode_known"}


def test_parameters_given_for_one_call() -> None:
    plain = projecting().eval()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine="staged")
    x = torch.randn(2, 4, 6, 5)
    other = {name: torch.rand_like(p).requires_grad_() for name, p in plain.named_parameters()}
    results = []
    for block in (plain, fused):
        y = torch.func.functional_call(block, other, x)
        results.append([y, *torch.autograd.grad(y.square().mean(), list(other.values()))])
    torch.testing.assert_close(results[1], results[0])


def test_gradients_of_gradients() -> None:
    plain: nn.Module = projecting().double().eval()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine="staged")
    x = sample_input(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for block in (plain, fused):
        leaf = x.clone().requires_grad_()
        (bar,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(bar.square().sum(), [leaf, *block.parameters()], allow_unused=True))
    torch.testing.assert_close(results[1], results[0])


def test_torch_compile_traces_their_own_forward() -> None:
    plain = ResNet(BasicBlock, (1,), 4).eval()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = torch.randn(2, 3, 16, 16)
    for compiled in (torch.compile(fused, backend="eager", fullgraph=True), torch.export.export(fused, (x,)).module()):
        torch.testing.assert_close(compiled(x), plain(x))
    assert engine_of(fused.layer1[0], torch.randn(2, 4, 5, 5)) == "resident"


@pytest.mark.parametrize("x", [torch.randn(4, 5, 5), torch.randn(0, 4, 5, 5)])
def test_other_inputs_run_as_theirs(x: Tensor) -> None:
    plain = Stem().eval()
    fused = copy.deepcopy(plain)
    fastode.adapt(Stem)(lambda block: reference.ResBlock(nn.Sequential(block.conv)))
    fastode.fuse(fused)
    assert engine_of(fused, x) == "reference"
    assert torch.equal(fused(x), plain(x))
    assert torch.equal(fused(torch.ones(1, 4, 3, 3), 2.0), plain(torch.ones(1, 4, 3, 3), 2.0))
    assert torch.equal(fused(x=torch.ones(1, 4, 3, 3)), plain(torch.ones(1, 4, 3, 3)))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.conv(x)


def test_an_adapter_can_give_a_reason() -> None:
    model = nn.Sequential(PreActBasic(4, 4, drop_path=0.5), PreActBasic(4, 6, 2)).eval()
    rows = fastode.fuse(model, example=sample_input(2, 4, 6, 6)).rows
    assert [(row.engines, row.reason) for row in rows] == [
        (("reference",), "resident, staged: it has stochastic depth."),
        (("resident",), ""),
    ]


def test_the_report_says_what_a_block_is() -> None:
    model = nn.Sequential(BasicBlock(4, 4), PreActBasic(4, 6, 2))
    assert str(fastode.fuse(model)).splitlines() == [
        "block  type         twin                    engines                      why",
        "0      BasicBlock   as fastode.nn.ResBlock  resident, staged, reference",
        "1      PreActBasic  as fastode.nn.Chain     resident, staged, reference",
        "2 fused, 0 as the reference",
    ]


class Own(BasicBlock):
    pass


class HasEngine(Stem):
    def against(self) -> None: ...


def test_what_has_no_twin_is_left_alone() -> None:
    replaced, named = BasicBlock(4, 4), BasicBlock(4, 4)
    replaced.forward = torch.sin  # type: ignore[method-assign]
    named.engine = nn.ReLU()
    model = nn.Sequential(Own(4, 4), replaced, named)
    assert [(row.fused, row.reason) for row in fastode.fuse(model).rows] == [
        (None, "Own is a subclass of BasicBlock, and no twin is registered for it"),
        (None, "its forward was replaced on this very module"),
        (None, "it has 'engine' of its own, which its twin needs"),
    ]
    assert [type(block) for block in model] == [Own, BasicBlock, BasicBlock]
    assert isinstance(named.engine, nn.ReLU)


WHAT = "what the adapter of BasicBlock returns must be"
WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "nothing": (
        lambda block: None,
        TypeError,
        f"{WHAT} a block of fastode.reference ({OUR}) or a reason, got None",
    ),
    "a module": (
        lambda block: block.conv1,
        TypeError,
        f"{WHAT} a block of fastode.reference ({OUR}) or a reason, got an object of type Conv2d",
    ),
    "a copy": (
        lambda block: basic(copy.deepcopy(block)),
        ValueError,
        f"{WHAT} made of the block's own parameters and buffers, got branch.0.weight, which is none of them",
    ),
    "a part": (
        lambda block: reference.ResBlock(nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2)),
        ValueError,
        f"{WHAT} made of all of the block's parameters and buffers, got a block without bn2.weight",
    ),
    "its own": (
        lambda block: block.add_module("inner", basic(block)) or block.inner,
        ValueError,
        f"{WHAT} a new block, got the block's own module inner",
    ),
    "raises": (lambda block: block.conv3, AttributeError, "'BasicBlock' object has no attribute 'conv3'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_an_error_and_nothing_is_swapped(name: str) -> None:
    adapter, error, message = WRONG[name]
    fastode.adapt(BasicBlock)(adapter)
    model = nn.Sequential(PreActBasic(4, 4), BasicBlock(4, 4))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fastode.fuse(model)
    assert [type(block) for block in model] == [PreActBasic, BasicBlock]
    assert all("engine" not in block.__dict__ and "_fastode_known" not in block.__dict__ for block in model)


def test_wrong_arguments_are_refused() -> None:
    for kind, error, message in (
        (3, TypeError, "kind must be a subclass of nn.Module, got 3"),
        (reference.SSP2, ValueError, "kind must be a class that has no twin, got SSP2"),
        (fastode.nn.SSP2, ValueError, "kind must be a class that has no twin, got SSP2"),
        (_twins[BasicBlock], ValueError, "kind must be a class that has no twin, got BasicBlock"),
        (HasEngine, ValueError, "kind must be a class without 'against', which its twin has, got HasEngine"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            fastode.adapt(kind)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^adapter must be a function of a Stem, got an object of type ReLU$"):
        fastode.adapt(Stem)(nn.ReLU())
