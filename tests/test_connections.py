"""PolyNet's, FractalNet's and RevNet's blocks: their formulas, their twins, and what a reversible chain keeps."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.tableau import LinearTable, polynet
from fastode.testing import MODES, assert_blocks_equal, sample_input

F64 = torch.float64


def branch(channels: int = 4, norm: str = "batch", **more: Any) -> nn.Module:
    return reference.PreActBranch(channels, norm=norm, **more)


def test_polyblock_is_its_formula() -> None:
    torch.manual_seed(0)
    f = branch(norm="layer").double()
    x = sample_input(2, 4, 3, 5, dtype=F64)
    for step in (1.0, 0.5):
        block = reference.PolyBlock(f, step)
        assert torch.allclose(block(x), x + step * f(x) + step * f(step * f(x)), rtol=1e-14, atol=1e-14)
        assert (block.step_size, str(block).splitlines()[1].strip()) == (step, f"step_size={step}")


def test_polynet_is_two_terms_of_the_implicit_euler_steps_series() -> None:
    """(I − h A)⁻¹ = I + h A + (h A)² + …, off by (h A)³: a tenth of the step is a thousandth of the error."""
    a = torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    linear = nn.Conv2d(4, 4, 1, bias=False).double()
    linear.weight.data = a[:, :, None, None].clone()
    x = sample_input(1, 4, 1, 1, dtype=F64)
    errors = []
    for step in (1e-2, 1e-3):
        exact = torch.linalg.solve(torch.eye(4, dtype=F64) - step * a, x[0, :, 0, 0])
        errors.append((reference.PolyBlock(linear, step)(x)[0, :, 0, 0] - exact).norm().item())
    assert 900 < errors[0] / errors[1] < 1100


# Rows without a point, rows of one term whose coefficient is not one, an image that comes back later.
TABLE = LinearTable(
    "table",
    alpha=((0.0,), (0.0, 0.5), (0.75, 0.0, 0.0), (0.0, -0.5, 0.0, 2.0)),
    beta=((0.5,), (0.0, 0.0), (0.25, 0.0, 0.0), (0.0, 0.3, 0.0, 0.7)),
)  # fmt: skip


@pytest.mark.parametrize("engine", ["resident", "staged"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_rows_need_not_sum_to_one(engine: str, norm: str) -> None:
    torch.manual_seed(0)
    plain = reference.ShuOsher(branch(8, norm), TABLE)
    fused = fastode.nn.ShuOsher(copy.deepcopy(plain.branch), TABLE)
    fused.engine = engine
    assert_blocks_equal(plain, fused, sample_input(3, 8, 7, 6), mode=MODES)


def test_tables_are_refused() -> None:
    for alpha, beta, message in (
        (((0.0,),), ((0.0,),), "alpha and beta must have a coefficient in every row, got only zeros in row 1"),
        (((1.0,),), ((1.0, 1.0),), "beta must be rows of lengths [1], got rows of lengths [2]"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            LinearTable("table", alpha, beta)


def test_a_table_is_no_tableau() -> None:
    with pytest.raises(ValueError, match=r"^alpha must be rows that sum to one, got row 1 = \(0.0,\)$"):
        fastode.tableau.Tableau("polynet", polynet().alpha, polynet().beta, order=1)


def test_fractal_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = reference.FractalBlock(lambda first: nn.Sequential(nn.Conv2d(3 if first else 5, 5, 1), nn.ReLU(True)), 3)
    block.double()
    x = sample_input(2, 3, 4, 4, dtype=F64)
    before = x.clone()

    def second_column(f: Any, x: Tensor) -> Tensor:
        return 0.5 * f.second.unit(f.first.unit(x)) + 0.5 * f.unit(x)

    wanted = 0.5 * second_column(block.second, second_column(block.first, x)) + 0.5 * block.unit(x)
    assert torch.equal(block(x), wanted) and torch.equal(x, before)
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    assert sorted(module.in_channels for module in convolutions) == [3, 3, 3, 5, 5, 5, 5]
    assert "columns=3" in str(block)


def chain(blocks: int, channels: int = 8, norm: str = "batch", **more: Any) -> reference.RevSequence:
    make = (reference.RevBlock(*(branch(channels // 2, norm, **more) for _ in range(2))) for _ in range(blocks))
    return reference.RevSequence(*make)


def test_rev_block_is_its_formula_and_its_own_inverse() -> None:
    torch.manual_seed(0)
    block = reference.RevBlock(branch(norm="layer"), branch(norm="layer")).double()
    x = sample_input(2, 8, 3, 5, dtype=F64)
    y = block(x)
    assert torch.equal(y[:, :4], x[:, :4] + block.f(x[:, 4:]))
    assert torch.equal(y[:, 4:], x[:, 4:] + block.g(y[:, :4]))
    x2 = y[:, 4:] - block.g(y[:, :4])
    assert torch.allclose(torch.cat([y[:, :4] - block.f(x2), x2], 1), x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_a_reversible_chain_equals_its_reference(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = chain(3, norm=norm, activation="relu" if dtype is F64 else "tanh").to(dtype)
    fused = copy.deepcopy(plain)
    report = fastode.fuse(fused)
    assert type(fused) is fastode.nn.RevSequence and len(report.rows) == 4
    assert_blocks_equal(plain, fused, sample_input(2, 8, 5, 4, dtype=dtype), mode=("train", "input_grad"))


def test_gradcheck_of_a_chain_with_a_shared_and_a_frozen_branch() -> None:
    torch.manual_seed(0)
    f, g = (branch(2, "layer", activation="tanh").double() for _ in range(2))
    g[0].requires_grad_(False)
    fused = fastode.nn.RevSequence(*(fastode.nn.RevBlock(*pair) for pair in ((f, g), (g, f))))
    values = [p for p in fused.parameters() if p.requires_grad]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return fused(x)

    x = sample_input(2, 4, 3, 3, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
    fused(x.detach()).sum().backward()
    assert all(p.grad is not None for p in values) and g[0].weight.grad is None


def test_the_tensors_of_a_functional_call_are_those_of_its_backward() -> None:
    torch.manual_seed(0)
    plain = chain(2)
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(2, 8, 4, 4)
    grads = []
    for block in (plain, fused):
        given = {name: (2 * p.detach()).requires_grad_() for name, p in block.named_parameters()}
        y = torch.func.functional_call(block, given, (x,))
        grads.append(torch.autograd.grad(y.square().sum(), list(given.values())))
    for wanted, found in zip(*grads, strict=True):
        assert torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max() + 1))


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Of maps that a forward keeps for its backward: each memory once, without the parameters and the input."""
    own = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers(), x)}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    assert y.requires_grad
    return sum(found.values())


def test_a_fused_chain_keeps_one_map_however_deep_it_is() -> None:
    x = sample_input(2, 8, 6, 6)
    plain = [kept_bytes(chain(depth), x) for depth in (1, 8)]
    fused = []
    for depth in (1, 8):
        block = chain(depth)
        fastode.fuse(block)
        fused.append(kept_bytes(block, x))
    assert fused == [x.nbytes, x.nbytes] and plain[1] > 7 * plain[0] > 7 * 3 * x.nbytes


def test_random_numbers_and_autocast_are_those_of_the_forward() -> None:
    torch.manual_seed(0)
    plain = reference.RevBlock(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5)), nn.Sequential(nn.Conv2d(2, 2, 1)))
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(2, 4, 8, 8)
    for lower in (False, True):
        grads = []
        for block in (plain, fused):
            block.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, lower):
                y = block(x)
            torch.rand(3)
            y.square().sum().backward()
            grads.append([p.grad.clone() for p in block.parameters()] + [torch.rand(1)])
        for wanted, found in zip(*grads, strict=True):
            assert torch.allclose(wanted, found, rtol=2e-2 if lower else 1e-4, atol=1e-2 if lower else 1e-5)
        assert torch.equal(grads[0][-1], grads[1][-1])


def test_hooks_and_no_grad_run_plainly_and_a_changed_mode_is_refused() -> None:
    block = chain(2, norm="batch")
    fastode.fuse(block)
    x = sample_input(2, 8, 4, 4)
    with torch.no_grad():
        assert not block(x).requires_grad
    assert type(block(x).grad_fn).__name__ == "_ChainBackward"
    y = block(x)
    block.eval()
    with pytest.raises(RuntimeError, match=r"^g of a RevBlock must be in the mode of its forward when backward makes"):
        y.sum().backward()
    seen: list[int] = []
    handle = block[1].f[0].register_forward_hook(lambda *_: seen.append(1))
    block(x).sum().backward()
    assert seen == [1]
    handle.remove()
    y = block(x.requires_grad_()).sum()
    with pytest.raises(RuntimeError, match=r"^gradients of gradients need maps that a reversible chain does not keep"):
        torch.autograd.grad(y, x, create_graph=True)


def test_what_is_no_reversible_block_is_refused() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: reference.RevSequence(), ValueError, "blocks must be at least one RevBlock, got none"),
        (lambda: reference.RevSequence(nn.Tanh()), TypeError, "blocks must be RevBlocks, got an object of type Tanh"),
        (lambda: reference.RevBlock(nn.Tanh(), 3), TypeError, "g must be an nn.Module, got 3"),
        (
            lambda: chain(1)(torch.zeros(1, 7, 2, 2)), ValueError,
            "x must have an even number of channels at dim 1, got a tensor of shape [1, 7, 2, 2]",
        ),
        (lambda: reference.FractalBlock(nn.Tanh(), 2), TypeError, "make_unit must be a function from a bool"),
        (lambda: reference.FractalBlock(lambda first: nn.Tanh(), 0), ValueError, "columns must be an int >= 1, got 0"),
    ]  # fmt: skip
    for make, kind, message in cases:
        with pytest.raises(kind) as raised:
            make()
        assert str(raised.value).startswith(message)


def test_slices_and_state_dicts() -> None:
    block = chain(3)
    assert type(block[1:]) is nn.Sequential and block[1:][0] is block[1]
    names = list(block.state_dict())
    fastode.fuse(block)
    assert list(block.state_dict()) == names
    fastode.unfuse(block)
    assert type(block) is reference.RevSequence and type(block[0]) is reference.RevBlock
    assert F.mse_loss(block(torch.ones(1, 8, 4, 4)), torch.zeros(1, 8, 4, 4)).isfinite()
