"""The skew pair and its fixed-step solutions on the resident engine: equal, deterministic, and nothing done in vain."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastode
from fastode import functional, reference
from fastode.native import nodes
from fastode.ops.resident import pairs
from fastode.ops.resident import rule as measured
from fastode.ops.staged import engine as staged_engine
from fastode.reference.skew import skew_field
from fastode.testing import MODES, assert_blocks_equal, sample_input

FIXED = ("euler", "midpoint", "rk4")
NORMS: dict[str, Any] = {"group": "group", "none": "none", "channel": "instance", "fixed": nn.BatchNorm2d}
ACTIVATIONS: dict[str, Any] = {
    **{name: name for name in reference.branches.ACTIVATIONS},
    "none": nn.Identity,
    "falling": lambda: nn.LeakyReLU(-0.2),
}
# (in, out, stride, height, width)
SHAPES = [
    (3, 16, 1, 7, 5), (16, 16, 1, 6, 8), (64, 64, 1, 4, 4), (1, 5, 1, 4, 3),
    (3, 8, 2, 6, 10), (32, 64, 2, 4, 8), (20, 1, 2, 6, 8),
    # Of several bands of at most 64 pixels, the last one shorter, in both halves.
    (3, 16, 1, 10, 20), (16, 16, 1, 16, 12), (32, 64, 2, 14, 20),
    # Few channels repeated over several vectors, the last one not full.
    (3, 72, 1, 5, 4), (6, 40, 2, 8, 6),
]  # fmt: skip
# Of one pixel: a norm over one value is a constant, and what its gradient has beside zero is rounding.
PIXELS = [(1, 5, 1, 1, 1), (20, 1, 2, 2, 2)]


def fused(block: nn.Module) -> nn.Module:
    """A fused copy, which refuses to run on another engine."""
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine="resident")
    return twin


def field_of(shape: tuple[int, ...], gamma: float, activation: Any, norm: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    in_channels, channels, stride = shape[:3]
    if norm == "group" and any(c > 8 and c % 8 for c in (channels, in_channels)):
        norm = "layer"
    field = reference.SkewPair(in_channels, channels, stride, gamma, activation, NORMS.get(norm, norm)).to(dtype)
    for module in field.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return field.eval()


def maps_of(shape: tuple[int, ...], batch: int = 3, **options: Any) -> tuple[Tensor, Tensor]:
    in_channels, channels, stride, height, width = shape
    y = sample_input(batch, channels, height // stride, width // stride, seed=1, **options)
    return y, sample_input(batch, in_channels, height, width, seed=2, **options)


SOLVERS = (("euler", 1), ("midpoint", 2), ("euler", 2), ("rk4", 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


# A solver meets a shape and norm with either damping, in one of the dtypes or two.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_on_every_shape(shape: tuple[int, ...], norm: str, dtype: torch.dtype) -> None:
    turn = SHAPES.index(shape) + list(NORMS).index(norm) + DTYPES.index(dtype)
    for damped, (gamma, layout) in enumerate(((0.0, "channels_last"), (0.3, "contiguous"))):
        field = field_of(shape, gamma, "tanh", norm, dtype)
        y, z = maps_of(shape, 2, dtype=dtype, layout=layout)
        assert_blocks_equal(field, fused(field), (y, z), mode=MODES)
        for solver, steps in SOLVERS[(turn + damped) % 2 :: 2]:
            block = reference.SOBlock(field, solver=solver, t1=0.8, steps=steps)
            assert_blocks_equal(block, fused(block), z)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", PIXELS, ids=str)
def test_equal_on_one_pixel(shape: tuple[int, ...], norm: str) -> None:
    field = field_of(shape, 0.3, "tanh", norm, torch.float64)
    y, z = maps_of(shape, dtype=torch.float64)
    block = reference.SOBlock(field, solver="rk4", t1=0.8)
    modes = MODES if norm in ("none", "fixed") else ("forward",)
    assert_blocks_equal(field, fused(field), (y, z), mode=modes)
    assert_blocks_equal(block, fused(block), z, mode=modes)


# In float64, where no pre-activation is within rounding of a kink (in float32 one at 2.5e-8 fell on its other side);
# norms over twelve values and more: over six they amplify rounding several times more, in every engine.
@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_with_every_activation(activation: str, gamma: float, solver: str) -> None:
    for shape in ((3, 16, 1, 5, 4), (16, 8, 2, 6, 8)):
        field = field_of(shape, gamma, ACTIVATIONS[activation], "group", torch.float64)
        y, z = maps_of(shape, dtype=torch.float64)
        assert_blocks_equal(field, fused(field), (y, z))
        block = reference.SOBlock(field, solver=solver, t1=0.7, steps=2)
        assert_blocks_equal(block, fused(block), z, mode=MODES)


# Blocks of 16 and of 32 channels, an odd number of them; rows that tiles divide, and rows laid end to end.
@pytest.mark.parametrize(
    "shape", [(48, 40, 1, 5, 7), (16, 96, 1, 4, 16), (40, 48, 2, 8, 20), (5, 20, 2, 6, 32)], ids=str
)
def test_equal_on_tiles(shape: tuple[int, ...]) -> None:
    for gamma, frozen in itertools.product((0.0, 0.3), (False, True)):
        field = field_of(shape, gamma, "silu", "layer", torch.bfloat16)
        field.weight.requires_grad_(not frozen)
        y, z = maps_of(shape, dtype=torch.bfloat16, layout="sliced")
        modes = ("input_grad",) if frozen else MODES
        assert_blocks_equal(field, fused(field), (y, z), mode=modes)
        for solver in FIXED:
            block = reference.SOBlock(field, solver=solver, t1=0.8, steps=2)
            assert_blocks_equal(block, fused(block), z, mode=modes)


class Function(nn.Module):
    """The function, or its reference, as a module of a kernel of any odd size."""

    def __init__(self, kernel: int, fuse: bool) -> None:
        super().__init__()
        weight = sample_input(20, 6, kernel, kernel, dtype=torch.bfloat16, seed=4) * 0.1
        self.weight, self.kernel, self.fuse = nn.Parameter(weight), kernel, fuse

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        pad = self.kernel // 2
        if not self.fuse:
            return skew_field(y, z, self.weight, 1, pad, 0.2, torch.tanh)
        return functional.skew_pair(y, z, self.weight, padding=pad, gamma=0.2, activation="tanh")


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_function_on_tiles(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measured, "_rule", measured.Rule({"skew_pair sample bfloat16": measured.Line()}, "a test", True)
    )
    monkeypatch.setattr(pairs, "FEWEST_UNNORMED", 1)
    given = maps_of((6, 20, 1, 9, 11), dtype=torch.bfloat16)
    twin = Function(kernel, True)
    assert "ResidentSkewFunction" in twin(*given)[0].grad_fn.name()
    assert_blocks_equal(Function(kernel, False), twin, given)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_function_with_every_odd_kernel(kernel: int) -> None:
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64)
    given = (torch.randn(2, 5, 4, 6).double(), torch.randn(2, 3, 4, 6).double(), weight)
    y, z, weight = (x.requires_grad_() for x in given)
    options: dict[str, Any] = {"padding": kernel // 2, "gamma": 0.2, "activation": "tanh"}
    found = functional.skew_pair(y, z, weight, **options)
    assert "ResidentSkewFunction" in found[0].grad_fn.name()
    torch.testing.assert_close(found, skew_field(y, z, weight, 1, kernel // 2, 0.2, torch.tanh))
    assert torch.autograd.gradcheck(lambda *x: functional.skew_pair(*x, **options), (y, z, weight), fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_gradients_are_the_references(stride: int) -> None:
    field = fused(field_of((2, 3, stride, 4, 4), 0.3, "tanh", "channel", torch.float64))
    y, z = maps_of((2, 3, stride, 4, 4), 2, dtype=torch.float64)
    inputs = (y.requires_grad_(), z.requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(lambda y, z, *_: field(y, z), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda y, z, *_: field(y, z), inputs, fast_mode=True)
    for solver in FIXED:
        solve = fastode.nn.SOBlock(field, solver=solver, steps=2)
        solve.engine = "resident"
        assert torch.autograd.gradcheck(lambda z, *_, solve=solve: solve(z), inputs[1:], fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda z, *_, solve=solve: solve(z), inputs[1:], fast_mode=True)


def test_slopes_may_be_written_over() -> None:
    for shape in ((3, 16, 1, 5, 4), (16, 32, 2, 4, 6)):
        grads = []
        field = field_of(shape, 0.0, "leaky_relu", "group", torch.float64)
        for block in (field, fused(field)):
            y, z = (x.requires_grad_() for x in maps_of(shape, dtype=torch.float64))
            dy, dz = block(y, z)
            dz.mul_(-3.0)
            grads.append(torch.autograd.grad((dy.square().sum() + dz.sum()), [y, z, *block.parameters()]))
        torch.testing.assert_close(grads[1], grads[0])


def test_slopes_are_held_as_long_as_the_graph() -> None:
    shape = (3, 16, 1, 5, 4)
    block = fused(field_of(shape, 0.0, "leaky_relu", "group", torch.float32))
    y, z = (x.requires_grad_() for x in maps_of(shape))
    dy, dz = block(y, z)
    loss = dy.square().sum() + dz.square().sum()
    first, second = (torch.autograd.grad(loss, [y, z, *block.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [slope.data_ptr() for slope in nodes.module.kept(dy)[:2]] == [dy.data_ptr(), dz.data_ptr()]
    loss.backward()
    assert nodes.module.kept(dy) == ()


def biased(bias: float, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    """A fused pair whose norms have this bias, and its inputs."""
    shape = (3, 16, 1, 5, 4)
    block = fused(field_of(shape, 0.0, "leaky_relu", "group", torch.float32)).to(dtype)
    with torch.no_grad():
        for norm in (module for module in block.modules() if isinstance(module, torch.nn.GroupNorm)):
            norm.bias.fill_(bias)
    return block, [x.to(dtype).requires_grad_() for x in maps_of(shape)]


# What is stored in bfloat16, or beside a large bias, does not say what it was made from.
@pytest.mark.parametrize(("dtype", "bias", "held"), [("float32", 0.0, 2), ("float32", 50.0, 0), ("bfloat16", 0.0, 0)])
def test_slopes_are_held_only_where_they_are_read(dtype: str, bias: float, held: int) -> None:
    block, given = biased(bias, getattr(torch, dtype))
    dy, dz = block(*given)
    assert dy.grad_fn.name() == "ResidentSkewFunctionBackward"
    assert sum(kept.data_ptr() in (dy.data_ptr(), dz.data_ptr()) for kept in nodes.module.kept(dy)) == held


# Where a norm's bias is large beside its weight, or the weight zero, a slope does not say what it was made from.
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "none"])
def test_equal_where_a_slope_tells_nothing(activation: str) -> None:
    for shape, weight, bias in itertools.product(SHAPES[:2], (0.0, -1e-3, 1.0), (0.2, 30.0)):
        field = field_of(shape, 0.0, ACTIVATIONS[activation], "group", torch.float64)
        for norm in (field.post_norm_y, field.post_norm_z):
            nn.init.constant_(norm.weight[-1:].detach(), weight)
            nn.init.constant_(norm.bias[-1:].detach(), bias)
        assert_blocks_equal(field, fused(field), maps_of(shape, dtype=torch.float64))


def test_what_the_pair_keeps_is_small() -> None:
    for shape, dtype in itertools.product(((3, 16, 1, 32, 32), (16, 32, 2, 64, 64)), (torch.float32, torch.float64)):
        block = fused(field_of(shape, 0.0, "leaky_relu", "group", dtype))
        y, z = (x.requires_grad_() for x in maps_of(shape, dtype=dtype))
        dy, _ = block(y, z)
        kept = nodes.module.kept(dy)[2:]  # after the slopes
        sizes = [x.numel() * x.element_size() for x in kept]
        assert sizes
        assert 8 * sum(sizes) < (y.numel() + z.numel()) * y.element_size()


def test_one_slope_is_enough() -> None:
    shape = (3, 8, 1, 4, 5)
    field = field_of(shape, 0.0, "tanh", "group", torch.float64)
    for which, half in itertools.product((0, 1), (0, 1)):
        grads = []
        for block in (field, fused(field)):
            inputs = [x.requires_grad_() for x in maps_of(shape, dtype=torch.float64)]
            loss = block(*inputs)[which].square().sum()
            grads.append(torch.autograd.grad(loss, [inputs[half], block.weight], allow_unused=True))
        assert [g is None for g in grads[1]] == [g is None for g in grads[0]]
        for found, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", FIXED)
def test_same_input_same_bits(solver: str, dtype: torch.dtype) -> None:
    shape = (3, 16, 1, 8, 8)
    twin = fused(reference.SOBlock(field_of(shape, 0.0, "leaky_relu", "group", dtype), solver=solver))
    x = maps_of(shape, 7, dtype=dtype)[1].requires_grad_()

    def run() -> list[Tensor]:
        y = twin(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *twin.parameters()], allow_unused=True)]

    first = run()
    for _ in range(3):
        pairs = list(zip(run(), first, strict=True))
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
        assert sum(a is not None for a, _ in pairs) > 3


def test_nothing_is_read_before_it_is_written() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN, scratch included
    try:
        assert torch.empty(3).isnan().all()
        cases = [*itertools.product(("leaky_relu", "silu"), (torch.float64,)), ("silu", torch.bfloat16)]
        for shape, (activation, dtype) in itertools.product(SHAPES, cases):
            field = field_of(shape, 0.2, activation, "group", dtype)
            y, z = maps_of(shape, dtype=dtype)
            assert_blocks_equal(field, fused(field), (y, z))
            block = reference.SOBlock(field, solver="midpoint", steps=2)
            assert_blocks_equal(block, fused(block), z)
    finally:
        torch.use_deterministic_algorithms(before)


class Noted(TorchDispatchMode):
    """What each backward of a solution was asked for: the weight's gradient, and the norms'."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if str(function) == "fastode.resident_march_backward.default":
            self.asked.append(arguments[-2:])
        return function(*arguments, **(keywords or {}))


def test_frozen_weight_skips_its_gradient() -> None:
    block = fused(reference.SOBlock(reference.SkewPair(3, 8), solver="euler"))
    block.field.weight.requires_grad_(False)
    with Noted() as noted:
        block(sample_input(2, 3, 6, 6).requires_grad_()).sum().backward()
        block.requires_grad_(False)
        block(sample_input(2, 3, 6, 6).requires_grad_()).sum().backward()
    assert noted.asked == [(False, True), (False, False)]


@pytest.mark.parametrize("solver", FIXED)
def test_compiles_without_a_graph_break(solver: str) -> None:
    block = fused(reference.SOBlock(reference.SkewPair(3, 6, stride=2, gamma=0.1, activation="tanh"), solver=solver))
    x = sample_input(2, 3, 4, 4).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    expected, found = block(x), compiled(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize(
    ("norm", "dtype", "reason"),
    [
        ("batch", torch.float32, "a batch norm of the skew pair couples the samples"),
        ("batch", torch.bfloat16, "a batch norm of the skew pair couples the samples"),
        ("none", torch.float16, "there are no CPU kernels for torch.float16"),
    ],
)
def test_named_engine_refuses_with_the_reason(norm: str, dtype: torch.dtype, reason: str) -> None:
    block = fused(reference.SOBlock(reference.SkewPair(3, 4, norm=norm).to(dtype), solver="euler"))
    with pytest.raises(ValueError, match=reason):
        block(sample_input(1, 3, 4, 4, dtype=dtype))


def test_function_of_another_geometry_can_be_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_engine, "_slower_pair", lambda *_: "")
    y, z = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    found = functional.skew_pair(y, z, weight, padding=0, activation="tanh")
    assert type(found[0].grad_fn).__name__ == "SkewPairFunctionBackward"
    torch.testing.assert_close(found, skew_field(y, z, weight, 1, 0, 0.0, torch.tanh))
