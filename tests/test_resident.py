"""The resident engine: equal on its own shapes, deterministic, safe among threads; and it fills what it returns."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastode
from benchmarks.memory import peak_bytes
from fastode import branch, reference
from fastode.native import nodes
from fastode.ops.engine import no_operators
from fastode.ops.plan import Plan
from fastode.ops.rerun import Rerun
from fastode.ops.resident.functions import LESS_MEMORY, ResidentShuOsherFunction
from fastode.ops.schemes.runge_kutta.stages import Scheme
from fastode.tableau import Tableau
from fastode.testing import MODES, Judge, assert_blocks_equal, sample_input

SHAPES = [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4), (3, 5, 7), (24, 9, 3), (20, 2, 1)]
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda c: nn.GroupNorm(1, c),
    "channel": lambda c: nn.GroupNorm(c, c),
    "batch": nn.BatchNorm2d,
    "none": lambda c: nn.Identity(),
}


def preactivation(channels: int, norm: str, activation: nn.Module | None = None) -> nn.Sequential:
    act = nn.Softplus() if activation is None else activation
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [NORMS[norm](channels), act, nn.Conv2d(channels, channels, 3, padding=1)]
    return randomized(nn.Sequential(*layers))


def bottleneck(channels: int) -> nn.Sequential:
    inner = channels // 2
    return randomized(
        nn.Sequential(
            nn.GroupNorm(1, channels), nn.ReLU(), nn.Conv2d(channels, inner, 1, bias=False),
            nn.GroupNorm(1, inner), nn.ReLU(), nn.Conv2d(inner, inner, (3, 5), padding=(1, 2), bias=False),
            nn.GroupNorm(1, inner), nn.ReLU(), nn.Conv2d(inner, channels, 1, bias=False),
            nn.GroupNorm(1, channels),
        )
    )  # fmt: skip


def randomized(branch: nn.Sequential) -> nn.Sequential:
    torch.manual_seed(11)
    with torch.no_grad():
        for module in branch:
            if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
    return branch


def fused(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin)
    twin.engine = "resident"
    return twin


def nchw(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def window(x: Tensor) -> Tensor:
    """Planes whose rows are apart, in contiguous memory."""
    n, c, h, w = x.shape
    return torch.randn(n, c, h + 1, w + 3, dtype=x.dtype)[:, :, 1:, 2 : 2 + w].copy_(x)


def blocks(branch: nn.Module) -> Iterator[nn.Module]:
    yield reference.IESkip(copy.deepcopy(branch), 1, 0.1)
    yield reference.IESkip(copy.deepcopy(branch), 3, 0.1, theta=0.5)
    yield reference.IESkip(copy.deepcopy(branch), 2, 0.1, detach=True)
    yield reference.SSP3(copy.deepcopy(branch))
    yield reference.Ark(copy.deepcopy(branch), learn_a21=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_on_its_shapes(shape: tuple[int, int, int], norm: str, dtype: torch.dtype) -> None:
    # Two samples of the papers' maps, on which the reference takes long, and five of the small ones.
    x = sample_input(2 if shape in SHAPES[:4] else 5, *shape, dtype=dtype)
    for block in blocks(preactivation(shape[0], norm)):
        block.to(dtype)
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [7, 14, 15, 22])
def test_equal_where_seven_pixels_are_a_tile(width: int, dtype: torch.dtype) -> None:
    x = sample_input(3, 32, 3, width, dtype=dtype)
    block = reference.SSP3(preactivation(32, "batch")).to(dtype)
    assert_blocks_equal(block, fused(block), x)


def test_equal_on_a_bottleneck_that_ends_in_a_norm() -> None:
    x = sample_input(3, 48, 10, 6)
    for block in blocks(bottleneck(48)):
        assert_blocks_equal(block, fused(block), x, mode=MODES)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_variance_of_a_mean_far_from_zero(norm: str) -> None:
    x = sample_input(4, 16, 16, 16, dtype=torch.float32) + 1000.0
    for block in blocks(preactivation(16, norm)):
        assert_blocks_equal(block, fused(block), x)


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = block(x)
    found = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    return [y.detach(), *found]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_same_input_same_bits(norm: str) -> None:
    x = sample_input(7, 32, 8, 8, dtype=torch.float32)
    for block in blocks(preactivation(32, norm)):
        twin = fused(block)
        first = gradients(twin, x)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(gradients(twin, x), first, strict=True))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("channels", [16, 96])  # several parts for each thread, and one: there is room for no more sums
def test_same_input_same_bits_whoever_takes_the_samples(channels: int, norm: str) -> None:
    """More threads than cores, so that some are held up and others take what is theirs."""
    x = sample_input(31, channels, 12, 12, dtype=torch.float32)
    strided = reference.ResBlock(
        nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1), nn.BatchNorm2d(channels)),
        shortcut=nn.Conv2d(channels, channels, 1, 2),
    )
    for block in (*blocks(preactivation(channels, norm)), strided):
        twin = fused(block)
        torch.set_num_threads(1)
        y, bar, *_ = gradients(twin, x)
        torch.set_num_threads(3)
        first = gradients(twin, x)
        assert torch.equal(first[0], y) and torch.equal(first[1], bar)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(gradients(twin, x), first, strict=True))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_python_threads_do_not_disturb_each_other(norm: str) -> None:
    inputs = [sample_input(3, 16, 8, 8, dtype=torch.float32, seed=seed) for seed in range(4)]
    twins = [fused(reference.SSP3(preactivation(16, norm))) for _ in inputs]
    alone = [gradients(twin, x) for twin, x in zip(twins, inputs, strict=True)]
    found: list[list[list[Tensor]]] = [[] for _ in inputs]

    def work(index: int) -> None:
        for _ in range(5):
            found[index].append(gradients(twins[index], inputs[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, runs in zip(alone, found, strict=True):
        assert len(runs) == 5
        for run in runs:
            assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


def one_step(branch: nn.Module) -> nn.Module:
    return reference.IESkip(branch, 1, 0.1)


@pytest.mark.parametrize("less", [False, True], ids=["all", "less"])
@pytest.mark.parametrize(
    ("scheme", "norm", "frozen", "all_of_it", "less_of_it"),  # the maps that are kept, and that a backward needs
    [
        pytest.param(one_step, "layer", False, (6, 9), (4, 7), id="ie-layer"),
        pytest.param(one_step, "batch", False, (6, 10), (3, 7), id="ie-batch"),
        pytest.param(one_step, "batch", True, (6, 10), (6, 10), id="ie-batch-frozen"),
        pytest.param(reference.SSP3, "layer", False, (5, 7), (3, 5), id="ssp3-layer"),
        pytest.param(reference.SSP3, "batch", False, (5, 7), (3, 5), id="ssp3-batch"),
        pytest.param(reference.SSP3, "layer", True, (5, 7), (5, 7), id="ssp3-layer-frozen"),
        pytest.param(reference.SSP3, "batch", True, (5, 7), (5, 7), id="ssp3-batch-frozen"),
    ],
)
def test_what_forward_keeps_and_backward_needs(
    scheme: Callable[..., nn.Module], norm: str, frozen: bool, all_of_it: tuple[int, int], less_of_it: tuple[int, int],
    less: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(LESS_MEMORY, str(int(less)))
    maps, most = less_of_it if less else all_of_it
    x = channels_last(sample_input(64, 16, 16, 16, dtype=torch.float32)).requires_grad_()
    twin = fused(scheme(preactivation(16, norm))).requires_grad_(not frozen)
    size, bar = x.numel() * x.element_size(), torch.ones_like(x)
    y = twin(x)
    kept = nodes.module.kept(y)
    assert sum(piece.numel() for piece in kept) * x.element_size() // size == maps
    y.backward(bar, retain_graph=True)
    del kept
    assert not nodes.module.kept(y)
    x.grad = None  # the maps are the result and the input's gradient, in which the backward works, beside what is kept
    assert peak_bytes(lambda: twin(x).backward(bar)) < (most + 0.5) * size
    with nodes.left_out():  # autograd Functions keep the same
        y = twin(x)
        assert sum(piece.numel() for piece in y.grad_fn.kept) * x.element_size() // size == maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_equal_with_less_memory(norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LESS_MEMORY, "1")
    x = sample_input(3, 24, 6, 5, dtype=dtype)
    for block in blocks(preactivation(24, norm)):
        block.to(dtype)
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize("scheme", [lambda b: reference.IESkip(b, 1, 0.1), reference.SSP3], ids=["ie", "ssp3"])
def test_a_checkpoint_holds_nothing_beside_its_input(scheme: Callable[..., nn.Module]) -> None:
    x = channels_last(sample_input(4, 16, 8, 8, dtype=torch.float32)).requires_grad_()
    twin = fused(scheme(preactivation(16, "layer")))
    asked = [x, *twin.parameters()]
    expected = torch.autograd.grad(twin(x).square().sum(), asked)
    y = checkpoint(twin, x, use_reentrant=False)
    assert not y.grad_fn.kept
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), asked), expected))


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New tensors are filled with NaN, scratch included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES[3:6], ids=str)
def test_nothing_is_read_before_it_is_written(shape: tuple[int, int, int], norm: str, filled_memory: None) -> None:
    x = sample_input(5, *shape)
    for block in blocks(preactivation(shape[0], norm)):
        assert_blocks_equal(block, fused(block), x)


@pytest.mark.parametrize(
    ("branch", "shape", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), (8, 4, 4), "convolutions without groups and dilation only"),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2), (8, 4, 4), "convolutions without groups and dilation only"),
    ],
)
def test_named_engine_refuses_with_the_reason(branch: nn.Module, shape: tuple[int, int, int], reason: str) -> None:
    twin = fused(reference.SSP2(nn.Sequential(nn.ReLU(), branch)))
    with pytest.raises(ValueError, match=reason):
        twin(torch.zeros(1, *shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_in_a_row(shape: tuple[int, int, int]) -> None:
    channels, inner = shape[0], shape[0] + 20
    branch = randomized(
        nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1), nn.Conv2d(inner, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1),
        )
    )  # fmt: skip
    block = reference.SSP2(branch)
    judge, x = Judge(block, sample_input(3, *shape)), channels_last(sample_input(3, *shape))
    twin = fused(block)
    comparison = judge.compare(twin, x, quick=True)
    assert comparison.ok, comparison.describe()
    block.eval()
    assert_blocks_equal(block, fused(block), x, mode="forward")


def part_of_a_larger_one(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    larger = torch.randn(n + 1, c + 32, h + 2, w + 1, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    return larger[1:, 16 : 16 + c, 1 : 1 + h, :w].copy_(x)


class Inside(torch.autograd.Function):
    """The same values inside a larger tensor, and the same for the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return part_of_a_larger_one(x)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> Tensor:
        return part_of_a_larger_one(x_bar)


def placed_step(twin: nn.Module, x: Tensor, y_bar: Tensor) -> list[Tensor]:
    leaf = x.requires_grad_()
    y = twin(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *twin.parameters()], y_bar)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 9, 8), (32, 6, 32), (24, 7, 5), (4, 5, 3), (2, 3, 4)], ids=str)
def test_the_same_bits_from_every_layout(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, y_bar = (sample_input(5, *shape, seed=seed, dtype=dtype) for seed in (1, 2))
    twin = fused(reference.SSP3(preactivation(shape[0], "layer")).to(dtype))
    expected = placed_step(twin, channels_last(x), channels_last(y_bar))
    for place in (nchw, window):
        for place_bar in (nchw, window):
            found = placed_step(twin, place(x), place_bar(y_bar))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("shape", [(16, 9, 8), (32, 8, 8), (24, 7, 5)], ids=str)
def test_equal_wherever_the_tensors_lie(shape: tuple[int, int, int], norm: str) -> None:
    x, y_bar = (sample_input(5, *shape, seed=seed) for seed in (1, 2))
    for block in blocks(preactivation(shape[0], norm)):
        twin = fused(block)
        first, *others = (
            placed_step(twin, place(x.clone()), place_bar(y_bar))
            for place in (nchw, channels_last)
            for place_bar in (nchw, channels_last)
        )
        for found in others:
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
        judge, twin = Judge(block, x), fused(block)
        whole = judge.compare(twin, quick=True)
        assert whole.ok, whole.describe()
        twin.register_forward_pre_hook(lambda _, inputs: Inside.apply(*inputs))
        twin.register_forward_hook(lambda _, inputs, y: Inside.apply(y))
        inside = judge.compare(twin, quick=True)
        assert inside.ok, inside.describe()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_finds_what_the_first_found(norm: str, frozen: bool) -> None:
    x = sample_input(5, 16, 6, 7, dtype=torch.float32).requires_grad_()
    for block in blocks(preactivation(16, norm)):
        twin = fused(block).requires_grad_(not frozen)
        y, asked = twin(channels_last(x)).square().sum(), [x] if frozen else [x, *twin.parameters()]
        first, second, third = (torch.autograd.grad(y, asked, retain_graph=True) for _ in range(3))
        assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))


# Before the sigmoid. F(x) is a map of its own up to about -0.5, where too much of a point would stand for it.
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("b10", [-4.0, -1.0, -0.5, -0.2, 0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Softplus()], ids=["relu", "leaky", "softplus"])
def test_arks_first_step_of_any_length(activation: nn.Module, b10: float, norm: str) -> None:
    block = reference.Ark(preactivation(16, norm, activation), b10=b10, learn_a21=True)
    for seed in range(2):
        assert_blocks_equal(block, fused(block), sample_input(5, 16, 9, 8, seed=seed))


# Rows u_k, then F(u_k). In the second table stage 1 has nothing of F(u_0) and stage 2 nothing of F(u_1); in the third
# no point stands for F(u_0), of which stage 3 has the most, and one does for F(u_1) that has F(u_0) in it too.
TABLES = [
    (((1.0,), (0.4, 0.6), (0.2, 0.3, 0.5)), ((0.5,), (0.1, 0.4), (0.2, 0.1, 0.3))),
    (((1.0,), (0.4, 0.6), (0.2, 0.3, 0.5)), ((0.0,), (0.5, 0.0), (0.2, 0.1, 0.3))),
    (((1.0,), (0.4, 0.6), (0.2, 0.3, 0.5)), ((0.3,), (0.2, 0.7), (-0.4, -0.5, 0.3))),
]


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("rows", TABLES)
def test_the_gradient_of_any_schemes_coefficients(rows: tuple, activation: str, norm: str) -> None:
    padded = [[[*row, *[0.0] * (3 - len(row))] for row in part] for part in rows]
    scheme = Scheme(*(tuple(tuple(k for k, entry in enumerate(row) if entry) for row in part) for part in rows))
    module = reference.PreActBranch(5, norm=norm, activation=activation).double()
    x = sample_input(3, 5, 4, 6, dtype=torch.float64)
    cotangent = sample_input(3, 5, 4, 6, dtype=torch.float64, seed=1)
    reading = branch.read(module)
    assert reading.units is not None and not no_operators()
    plan = Plan(reading.units, tuple(False for _ in reading.units), None)

    tables = [torch.tensor(padded, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    points, images = [x], []
    for i in range(3):
        images.append(module(points[-1]))
        points.append(sum(tables[0][0, i, k] * points[k] + tables[0][1, i, k] * images[k] for k in range(i + 1)))
    points[-1].backward(cotangent)
    y, *_ = ResidentShuOsherFunction.apply(
        plan, scheme, Rerun(nn.Identity, 2, reading.tensors), x, tables[1], *reading.tensors
    )
    y.backward(cotangent)
    torch.testing.assert_close(y, points[-1])
    torch.testing.assert_close(tables[1].grad, tables[0].grad)


def test_running_statistics_do_not_see_an_evaluation_that_no_coefficient_asks_for() -> None:
    """As in the reference, which does not evaluate it."""
    unused = Tableau("unused", order=1, alpha=((1.0,), (0.5, 0.5)), beta=((0.5,), (0.3, 0.0)))
    branch = preactivation(8, "batch")
    plain, twin = reference.ShuOsher(branch, unused), fastode.nn.ShuOsher(copy.deepcopy(branch), unused)
    twin.engine = "resident"
    assert_blocks_equal(plain, twin, sample_input(3, 8, 6, 6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_gradient_has_its_weights_memory_format(layout: torch.memory_format, kernel: int) -> None:
    """Or autograd copies it where it is accumulated."""
    conv = nn.Conv2d(24, 24, kernel, padding=kernel // 2)
    plain = reference.SSP3(nn.Sequential(nn.ReLU(), conv)).double().to(memory_format=layout)
    twin = fused(plain)
    x = sample_input(2, 24, 5, 4, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(block(x).square().sum(), block.branch[1].weight)[0] for block in (twin, plain)
    )
    torch.testing.assert_close(found, expected)
    weight = twin.branch[1].weight
    assert weight.is_contiguous(memory_format=layout) and found.stride() == weight.stride()
