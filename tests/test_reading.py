"""Blocks that nobody told of: their forwards are read, the readings proven, and all else is refused with the reason."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import foreign_networks as theirs
import pytest
import torch
from foreign_networks import DropPath, PreActBasic, Stages, engine_of
from torch import Tensor, nn
from torch.nn import functional as F

import fastode
from benchmarks.foreign import BasicBlock, Bottleneck, PreActResNet, ResNet
from fastode import reference
from fastode.dispatch.choice import recording
from fastode.dispatch.registry import _twins
from fastode.foreign import prove, twin
from fastode.foreign.reading import read_forward
from fastode.testing import assert_blocks_equal, sample_input
from fastode.testing.compare import Mode

pytestmark = pytest.mark.usefixtures("few_are_enough")

NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[type[nn.Module]]]] = {
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2), 4), [reference.ResBlock] * 8),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3), 2), [reference.ResBlock] * 16),
    "preact-resnet": (
        lambda: PreActResNet((2, 2), 4),
        [reference.ResBlock, reference.ResBlock, reference.Chain, reference.ResBlock],
    ),
    "timm-style": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), PreActBasic(4, 4), PreActBasic(4, 6, 2)),
        [reference.ResBlock, reference.Chain],
    ),
    "schemes": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), *map(Stages, theirs.SCHEMES.values())),
        [reference.ShuOsher] * len(theirs.SCHEMES),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_read_and_equal_themselves(name: str) -> None:
    make, meanings = NETWORKS[name]
    plain = make()
    kinds, state = [type(part) for part in plain.modules()], list(plain.state_dict())
    fused = copy.deepcopy(plain)
    report = fastode.fuse(fused, engine="staged", read=True)
    assert [row.meaning for row in report.rows] == [_twins[kind] for kind in meanings]
    assert all(row.engines == ("staged",) for row in report.rows) and list(fused.state_dict()) == state
    # Odd before each convolution of stride 2, or PyTorch's own may end the process (docs/pytorch-faults.md, 4).
    x = sample_input(2, 3, *((36, 36) if name.startswith("resnet") else (7, 5)))
    for training in (True, False):
        assert_blocks_equal(plain.train(training), fused.train(training), x)
    with recording() as used:
        fused(x)
    assert set(used.values()) == {"staged"} and len(used) == len(meanings)
    fastode.unfuse(fused)
    assert [type(part) for part in fused.modules()] == kinds
    assert not any("_fastode_proven" in part.__dict__ for part in fused.modules())


@pytest.mark.parametrize("name", theirs.REFUSED)
def test_what_is_none_of_ours_is_refused(name: str) -> None:
    make, reason = theirs.REFUSED[name]
    block = make()
    attributes, state = dict(block.__dict__), {key: value.clone() for key, value in block.state_dict().items()}
    before = torch.get_rng_state(), random.getstate()
    (row,) = fastode.fuse(block, read=True).rows
    assert (row.name, row.reference, row.fused, row.engines) == ("", type(block), None, ("reference",))
    assert row.reason == reason
    assert type(block) is row.reference and block.__dict__ == attributes
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_layer_that_is_made_at_the_first_call_is_refused_before_it() -> None:
    block = theirs.Around(lambda b, x: x + b.part(b.branch(x)), nn.LazyConv2d(4, 1))
    assert [row.reason for row in fastode.fuse(block, read=True).rows] == [
        "it has parameters that are made at its first call: call it before it is fused."
    ]
    block(torch.randn(2, 4, 5, 5))
    assert fastode.fuse(block, read=True).rows[0].meaning is fastode.nn.ResBlock


class Dropping(nn.Module):
    """A residual block with dropout, as wide ResNets have it."""

    def __init__(self, p: float, by_function: bool) -> None:
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.drop, self.by_function = nn.Dropout(p), by_function

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.norm(x)))
        y = F.dropout(y, self.drop.p, training=self.training) if self.by_function else self.drop(y)
        return x + self.last(F.relu(y))


@pytest.mark.parametrize("by_function", [False, True])
def test_dropout_is_followed_where_it_drops_nothing(by_function: bool) -> None:
    plain = Dropping(0.3, by_function)
    fused = nn.Sequential(copy.deepcopy(plain))
    block, x = fused[0], sample_input(3, 4, 6, 5)
    (row,) = fastode.fuse(fused, example=x, read=True).rows
    name = "dropout" if by_function else "drop"
    drawn = f"its forward draws random numbers in training ({name})."
    assert row.engines == ("reference",) and drawn in row.reason
    assert block.why_not("staged", x) == drawn and engine_of(block, x) == "reference"  # type: ignore[operator]
    torch.manual_seed(3)
    with_its_own = block(x)
    torch.manual_seed(3)
    assert torch.equal(with_its_own, plain(x))
    block.load_state_dict(plain.state_dict())
    block.engine = "staged"  # type: ignore[assignment]
    assert_blocks_equal(plain.eval(), block.eval(), x)
    assert engine_of(block, x) == "staged"
    plain.train().drop.p = block.train().drop.p = 0.0  # type: ignore[union-attr]
    if by_function:  # whose arguments are part of the program
        with pytest.raises(ValueError, match="fuse it again"):
            block(x)
        return
    assert_blocks_equal(plain, block, x)
    assert engine_of(block, x) == "staged"
    block.drop.p = 0.5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="draws random numbers in training"):
        block(x)


def assert_read(plain: nn.Module, modes: tuple[Mode, ...] = ("train",)) -> Any:
    """A block is read as a residual block and equals itself; the fused one."""
    fused = nn.Sequential(copy.deepcopy(plain))
    (row,) = fastode.fuse(fused, engine="staged", read=True).rows
    assert row.meaning is fastode.nn.ResBlock, row.reason
    x = sample_input(2, 4, 5, 6)
    assert_blocks_equal(plain, fused[0], x, mode=modes)
    assert engine_of(fused[0], x) == "staged"
    return fused[0]


@pytest.mark.parametrize("summed", [False, True], ids=["a chain", "a sum"])
def test_x_times_its_sigmoid_is_silu(summed: bool) -> None:
    """Written out, by a module, and as a function of its own with a backward of its own."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx: Any, y_bar: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            gate = torch.sigmoid(x)
            return y_bar * (gate * (1 + x * (1 - gate)))

    ways: list[Callable[[Tensor], Tensor]] = [
        *(lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid().mul(x), Swish.apply),  # type: ignore[list-item]
        lambda x: gate(x) * x,
    ]
    gate = nn.Sigmoid()
    for swish in ways:

        def forward(block: Any, x: Tensor, swish: Callable[[Tensor], Tensor] = swish) -> Tensor:
            return swish(x + block.conv(x)) if summed else x + block.conv(swish(x))

        assert_read(theirs.Around(forward))


def test_zeros_around_a_map_are_padding_of_the_convolution_behind() -> None:
    def forward(block: Any, x: Tensor) -> Tensor:
        y = F.relu(block.norm(x))
        return x + block.part(F.pad(y, (1, 1, 1, 1)))

    plain = theirs.Around(forward, nn.Conv2d(4, 4, 3))
    block, x = assert_read(plain, ("train", "input_grad")), sample_input(2, 4, 5, 6)
    block.load_state_dict(plain.state_dict())  # it was called once more
    # Of the same tensors, whichever they come to be, and not of other settings.
    new = nn.Parameter(torch.randn(4, 4, 3, 3))
    plain.part.weight, block.part.weight = new, nn.Parameter(new.detach().clone())
    assert_blocks_equal(plain.double(), block.double(), x.double())
    assert engine_of(block, x.double()) == "staged" and block.part.padding == (0, 0)
    block.part.padding = (1, 1)
    with pytest.raises(ValueError, match="which is no convolution without padding"):
        block(x.double())


def test_an_activation_that_is_made_at_each_call_is_followed() -> None:
    assert_read(theirs.Around(lambda b, x: nn.ReLU(inplace=True)(x + b.conv(nn.LeakyReLU(0.2)(x)))))


def coefficients(name: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    found: Any = read_forward(Stages(theirs.SCHEMES[name]))[0]
    return found.tableau.alpha, found.tableau.beta


def test_the_schemes_that_are_read() -> None:
    assert coefficients("heun") == (((1.0,), (1.0, 0.0)), ((1.0,), (0.5, 0.5)))
    assert coefficients("ssp2") == (((1.0,), (0.5, 0.5)), ((1.0,), (0.0, 0.5)))
    alpha, beta = coefficients("ssp3")
    assert alpha == (((1.0,), (0.75, 0.25), (1 / 3, 0.0, 2 / 3))) and beta == ((1.0,), (0.0, 0.25), (0.0, 0.0, 2 / 3))
    assert coefficients("scaled") == (((0.9,),), ((-0.3,),))


class Various(nn.Module):
    """Activations as functions and methods, a step, an Identity, layers in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.last, self.hand, self.step = nn.Conv2d(4, 4, 1), nn.Identity(), 0.25

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        y = F.leaky_relu(self.inner(x), 0.2)
        y = F.gelu(self.last(F.softplus(y, beta=2.0)), approximate="tanh").tanh()
        return F.elu(self.hand(torch.add(x, self.last(y.sigmoid()), alpha=self.step)), alpha=0.5)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.InstanceNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_functions_methods_and_modules_inside_are_followed() -> None:
    plain = Various()
    fused = copy.deepcopy(plain)
    report = fastode.fuse(fused, engine="staged", read=True)
    assert [(row.name, row.engines) for row in report.rows] == [("", ("staged",))]
    assert_blocks_equal(plain, fused, sample_input(2, 4, 5, 6))
    block: Any = twin.meaning_of(fused).block
    inner = [f"inner_layers_{i}" for i in range(3)]
    assert list(block.branch._modules) == [
        *inner,
        "leaky_relu",
        "softplus",
        "last",
        "gelu",
        "tanh",
        "sigmoid",
        "last_2",
    ]
    assert block.step_size == 0.25


def test_by_default_nothing_is_read() -> None:
    model = ResNet(BasicBlock, (1,), 4)
    assert fastode.fuse(model).rows == () and type(model.layer1[0]) is BasicBlock
    with pytest.raises(TypeError, match=r"^read must be True or False, got 1$"):
        fastode.fuse(model, read=1)  # type: ignore[arg-type]


def zero_last_norm(block: BasicBlock) -> BasicBlock:
    nn.init.zeros_(block.bn2.weight)  # as networks are trained from: the branch then adds nothing
    return block


def without(index: int) -> Callable[[Any], None]:
    def spoil(found: Any) -> None:
        kept = [layer for i, layer in enumerate(found.branch) if i != index]
        found.branch = nn.Sequential(*kept)

    return spoil


def other_step(found: Any) -> None:
    found.step_size = 1 + 1e-9


def other_activation(found: Any) -> None:
    found.post_activation = nn.LeakyReLU(1e-9)


def swapped_norms(found: Any) -> None:
    names = list(found.branch._modules)
    first, second = found.branch[1], found.branch[4]
    found.branch = nn.Sequential(
        OrderedDict(zip(names, [found.branch[0], second, *found.branch[2:4], first], strict=True))
    )


@pytest.mark.parametrize("training", ["train", "eval"])
@pytest.mark.parametrize(
    ("spoil", "differs"),
    [
        (without(1), "buffer bn1"),
        (without(2), ""),
        (without(4), ""),
        (other_step, ""),
        (other_activation, ""),
        (swapped_norms, ""),
    ],
)
def test_a_wrong_reading_is_not_proven(
    spoil: Callable[[Any], None], differs: str, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misread(block: nn.Module) -> tuple[nn.Module, str]:
        found, program = read_forward(block)
        if block.training == (training == "train"):
            spoil(found)
        return found, program

    for module in (twin, prove):
        monkeypatch.setattr(module, "read_forward", misread)
    block = zero_last_norm(BasicBlock(4, 4))
    (row,) = fastode.fuse(block, read=True).rows
    assert type(block) is BasicBlock and row.fused is None
    assert row.reason.startswith("its forward is not what was read of it: the ")
    assert f" differs in {training} mode on an input [2, 4, 6, 8], " in row.reason


def test_a_block_whose_last_norm_is_zero_is_proven() -> None:
    block = zero_last_norm(BasicBlock(4, 4))
    assert fastode.fuse(block, read=True).rows[0].meaning is fastode.nn.ResBlock
    assert not block.bn2.weight.any()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_stay_proven(clone: Callable[[Any], Any]) -> None:
    block = BasicBlock(4, 4).eval()
    fastode.fuse(block, engine="staged", read=True)
    x = torch.randn(2, 4, 5, 5)
    other = clone(block)
    assert engine_of(other, x) == "staged" and torch.equal(other(x), block(x))


def test_a_forward_that_does_something_else_later_is_seen() -> None:
    plain = Various()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine="auto", read=True)
    x = torch.randn(2, 4, 6, 6)
    assert engine_of(fused, x) == "resident"
    plain.step = fused.step = 0.5
    assert torch.equal(fused(x), plain(x)) and engine_of(fused, x) == "reference"
    why = "its forward does something else now than when its reading was proven: fuse it again."
    assert fused.why_not("staged", x) == why  # type: ignore[operator]
    assert fastode.fuse(fused).rows[0].reason == f"resident, staged: {why}"
    fastode.fuse(fused, read=True)
    assert engine_of(fused, x) == "resident"
    assert_blocks_equal(plain, fused, x)
    fused.last = nn.Conv2d(4, 4, 3, padding=1)
    assert engine_of(fused, x) == "resident"


def test_stochastic_depth_that_is_turned_on_later() -> None:
    block = PreActBasic(4, 4)
    block.drop_path = DropPath(0.0)
    fastode.fuse(block, read=True)
    x = torch.randn(2, 4, 6, 6)
    assert engine_of(block, x) == "resident"
    block.drop_path.drop_prob = 0.9
    assert engine_of(block, x) == "reference"
    assert engine_of(block.eval(), x) == "resident"


def test_the_forward_is_traced_once_for_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BasicBlock(4, 4)
    fastode.fuse(block, read=True)
    traced = []
    monkeypatch.setattr(twin, "read_forward", lambda block: traced.append(block.training) or read_forward(block))
    for training in (False, True) * 3:
        block.train(training)
        block(torch.randn(2, 4, 5, 5))
    assert traced == [False]


@pytest.mark.parametrize("where", ["bn1", "downsample"])
def test_a_hook_inside_keeps_a_block_unfused(where: str) -> None:
    block = BasicBlock(16, 32, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32)))
    calls: list[str] = []
    handle = block.get_submodule(where).register_forward_hook(lambda *_: calls.append(where))
    fastode.fuse(block, read=True)
    assert calls == []
    x = torch.randn(2, 16, 6, 6)
    assert engine_of(block, x) == "reference" and calls == [where]
    handle.remove()
    assert engine_of(block, x) == "resident" and calls == [where]


def test_what_is_known_is_not_read_nor_what_is_inside_of_it() -> None:
    asked: list[str] = []

    def filter(name: str, block: nn.Module) -> bool:
        asked.append(name)
        return name != "2"

    model = nn.Sequential(
        reference.ResBlock(Stages(theirs.heun)), BasicBlock(4, 4), PreActBasic(4, 4), Outer(BasicBlock(4, 4))
    )
    rows = fastode.fuse(model, read=True, filter=filter).rows
    assert asked == ["0", "1", "2", "3", "3.inner"]
    assert [(row.name, row.meaning) for row in rows] == [
        ("0", None),
        ("1", fastode.nn.ResBlock),
        ("2", None),
        ("3", None),
        ("3.inner", fastode.nn.ResBlock),
    ]
    assert rows[2].reason == "left out by the filter"
    assert rows[3].reason == "its forward applies different chains at its stages."
    assert type(model[0].branch) is Stages


class Outer(nn.Module):
    """Two residual blocks, one inside the other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_failing_example_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(BasicBlock(4, 4), nn.Linear(5, 5))
    attributes = [dict(part.__dict__) for part in model.modules()]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fastode.fuse(model, read=True, example=torch.randn(2, 4, 4, 4))
    assert type(model[0]) is BasicBlock
    assert [dict(part.__dict__) for part in model.modules()] == attributes


def test_the_network_itself_is_no_block() -> None:
    assert fastode.fuse(ResNet(BasicBlock, (), 4), read=True).rows == ()
