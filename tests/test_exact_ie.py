"""The exact implicit Euler block: what it solves, its gradient, its fused twin, and that IE-Skip approaches it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import nets, reference
from fastode.dispatch.engines import BY_NAME, REFERENCE
from fastode.reference import ExactIE, IESkip, PreActBranch
from fastode.reference.implicit import Sets, gmres
from fastode.testing import MODES, assert_blocks_equal, sample_input

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TIGHT = 1e-11
# Forced in turn: every engine that has the block.
ENGINES = [name for name, engine in BY_NAME.items() if "exact_ie" in vars(type(engine))]


def branch_of(
    norm: str = "layer", channels: int = 4, activation: type[nn.Module] = nn.Tanh, seed: int = 0
) -> nn.Module:
    """Norm, activation, convolution, twice; small enough that y = x + f(y) has a solution."""
    torch.manual_seed(0)
    branch = PreActBranch(channels, norm=norm, bias=True)
    for index, module in enumerate(branch):
        if isinstance(module, nn.ReLU):
            branch[index] = activation()
    return branch.double()


def block_of(norm: str = "layer", tol: float = TIGHT, **options: Any) -> ExactIE:
    return ExactIE(branch_of(norm, **options), tol=tol, max_iterations=30).double()


def input_of(batch: int = 3, channels: int = 4, size: int = 5, dtype: torch.dtype = F64) -> Tensor:
    return sample_input(batch, channels, size, size, dtype=dtype)


def fused(block: nn.Module, engine: str = "auto") -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=engine)
    return twin


def matrix_of(branch: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of a branch over all entries of x."""
    flat = torch.autograd.functional.jacobian(branch, x)
    return flat.reshape(x.numel(), x.numel())


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_a_linear_branch_is_solved_as_a_dense_system_is(engine: str) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    block = fused(ExactIE(nn.Sequential(conv), tol=TIGHT), engine)
    x = input_of(2, 2, 4).requires_grad_()
    y = block(x)
    one = x[:1].detach()
    system = torch.eye(one.numel(), dtype=F64) - matrix_of(conv, one)
    bias = conv(torch.zeros_like(one))
    exact = torch.linalg.solve(system, (x.detach() + bias).flatten(1).T).T.reshape(x.shape).detach()
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
    bar = torch.randn_like(y)
    y.backward(bar)
    adjoint = torch.linalg.solve(system.T, bar.flatten(1).T).T.reshape(x.shape)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, adjoint, rtol=1e-9, atol=1e-9)
    # w̄ = (∂f/∂w)ᵀ λ at y
    wanted = torch.autograd.grad(conv(exact), [conv.weight, conv.bias], adjoint)
    found = block.get_submodule("branch.0")
    for tensor, gradient in zip((found.weight, found.bias), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_it_solves_its_equation(norm: str) -> None:
    block, x = block_of(norm), input_of()
    y = block(x)
    residual = (y - x - block.branch(y)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert float(residual.detach().max()) < 10 * TIGHT


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_its_gradient_is_the_finite_difference(norm: str, engine: str) -> None:
    block, x = fused(block_of(norm), engine), input_of()
    bar = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    tensors = [x.requires_grad_(), *block.parameters()]
    found = torch.autograd.grad((block(x) * bar).sum(), tensors)
    step = 1e-5
    for index, (tensor, gradient) in enumerate(zip(tensors, found, strict=True)):
        direction = torch.randn(tensor.shape, dtype=F64, generator=torch.Generator().manual_seed(index))
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
                sums.append(float((block(x) * bar).sum()))
                tensor.sub_(sign * step * direction)
        difference = (sums[0] - sums[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_its_gradient_has_a_gradient(engine: str) -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1)).double()
    block = fused(ExactIE(branch, tol=1e-12, max_iterations=30), engine)
    x = input_of(1, 2, 3).requires_grad_()
    weight = block.get_submodule("branch.0").weight

    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(block, {"branch.0.weight": w}, (x,))

    assert torch.autograd.gradgradcheck(call, (x, weight.detach().clone().requires_grad_()), atol=1e-5)


def test_a_third_derivative_is_refused() -> None:
    block, x = block_of("none"), input_of().requires_grad_()
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^ExactIE has second derivatives, and no third ones$"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


NORMS = ("layer", "group", "instance", "batch", "none")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_twin_equals_it(norm: str, dtype: torch.dtype, engine: str) -> None:
    block = block_of(norm, tol=1e-4 if dtype == F32 else TIGHT, channels=8, activation=nn.LeakyReLU).to(dtype)
    assert_blocks_equal(block, fused(block, engine), input_of(3, 8, 7, dtype), mode=MODES)


BRANCHES = {
    "bottleneck": lambda: reference.BottleneckBranch(16, norm="layer"),
    "norm_last": lambda: nn.Sequential(nn.Conv2d(16, 16, 1), nn.Softplus(), nn.GroupNorm(4, 16, affine=False)),
    "grouped": lambda: nn.Sequential(nn.ELU(), nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4), nn.SiLU()),
    "eval": lambda: PreActBranch(16, norm="batch").eval(),
    "running": lambda: nn.Sequential(nn.InstanceNorm2d(16, track_running_stats=True), nn.Tanh(), nn.Conv2d(16, 16, 1)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BRANCHES)
def test_the_twin_equals_it_on_other_branches(name: str, engine: str) -> None:
    torch.manual_seed(0)
    branch = BRANCHES[name]()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.mul_(0.5 if parameter.dim() == 4 else 1)
    block = ExactIE(branch, tol=TIGHT, max_iterations=30).double().train(branch.training)
    x = input_of(2, 16, 6).contiguous(memory_format=torch.channels_last)
    assert_blocks_equal(block, fused(block, engine), x)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_twin_equals_it_under_autocast(engine: str) -> None:
    block = block_of("layer", tol=1e-2, channels=8).float()
    assert_blocks_equal(block, fused(block, engine), input_of(3, 8, 7, F32), autocast=BF16)


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_a_sample_is_the_same_in_any_batch(engine: str) -> None:
    block = fused(block_of("layer", tol=1e-3), engine)
    x = input_of(4) * torch.tensor([0.1, 1.0, 3.0, 0.0], dtype=F64).view(4, 1, 1, 1)
    with torch.no_grad():
        whole = block(x)
        alone = torch.cat([block(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-9)


def test_gmres_solves_each_set_to_what_it_wants_and_says_how_far_it_came() -> None:
    torch.manual_seed(0)
    matrices = torch.eye(12, dtype=F64) + 0.2 * torch.randn(4, 12, 12, dtype=F64)
    b = torch.randn(4, 12, dtype=F64)
    b[3] = 0
    rest = torch.tensor([1e-1, 1e-4, 1e-10, 1e-3], dtype=F64)
    v, shares, begun, products = gmres(lambda v: (matrices @ v[:, :, None])[:, :, 0], b, Sets(b, False), rest, 1)
    found = (b - (matrices @ v[:, :, None])[:, :, 0]).norm(dim=1)
    sizes = b.norm(dim=1)
    assert bool((found <= rest * sizes + 1e-12).all()) and begun == 1 and 3 < products <= 12
    torch.testing.assert_close(torch.tensor(shares, dtype=F64) * sizes, found, rtol=1e-3, atol=1e-12)
    assert shares[0] > 1e-3 and not v[3].any()  # no more columns than are wanted
    _, whole, _, _ = gmres(lambda v: v @ matrices[0].T, b, Sets(b, True), rest[:1], 1)
    assert len(whole) == 1 and whole[0] <= 1e-1


def test_gmres_on_a_singular_system_comes_as_near_as_it_can() -> None:
    b = torch.tensor([[1.0, 1.0, 0.0]], dtype=F64)
    scale = torch.tensor([2.0, 0.0, 1.0], dtype=F64)
    v, shares, _, _ = gmres(lambda v: scale * v, b, Sets(b, False), torch.tensor([1e-6], dtype=F64), 3)
    assert bool(torch.isfinite(v).all()) and shares[0] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_running_statistics_are_updated_once_by_those_at_the_solution(engine: str) -> None:
    block = block_of("batch")
    plain, x = copy.deepcopy(block.branch), input_of()
    twin = fused(block, engine)
    y = twin(x)
    with torch.no_grad():
        plain(y)
    for (name, found), wanted in zip(twin.get_submodule("branch").named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8, msg=name)


def test_more_and_smaller_steps_of_ie_skip_approach_it() -> None:
    """Paper 001, Section 6.1."""
    exact, x = block_of("layer"), input_of()
    with torch.no_grad():
        y = exact(x)
        off = {}
        for size in (0.1, 0.05):
            for time in (1.0, 4.0, 16.0, 64.0):  # K γ
                skip = IESkip(exact.branch, steps=round(time / size), step_size=size)
                off[size, time] = float((skip(x) - y).norm() / y.norm())
    for size in (0.1, 0.05):
        times = [off[size, time] for time in (1.0, 4.0, 16.0, 64.0)]
        assert times == sorted(times, reverse=True) and times[-1] < 1e-3 * times[0]


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_what_its_solves_came_to_is_recorded(engine: str) -> None:
    block = fused(block_of("layer", tol=1e-6), engine)
    x = input_of().requires_grad_()
    with fastode.record_steps() as log:
        block(x).sum().backward()
        block.max_iterations = 1
        block(x)
    assert not log
    solution, gradient, short = log.implicit
    assert solution.what == "solution" and solution.converged and len(solution.residuals) == 3
    assert 1 < solution.iterations < 20 and solution.products >= solution.iterations
    assert gradient.what == "gradient" and gradient.converged and gradient.products > 1
    assert not short.converged and short.iterations == 1 and max(short.residuals) > 1e-6
    lines = str(log).splitlines()
    assert len(lines) == 4 and "converged" in lines[0] and " no " in lines[3] and "ExactIE on PreActBranch" in lines[1]


def test_a_branch_without_a_solution_is_reported() -> None:
    class Away(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 + x.square()  # y = x + y + 1 + y² has none

    block = ExactIE(Away())
    with fastode.record_steps() as log:
        y = block(torch.zeros(1, 1, 2, 2))
    assert bool(torch.isfinite(y).all()) and not log.implicit[0].converged


@pytest.mark.parametrize("engine", [REFERENCE.name, *ENGINES])
def test_it_runs_without_a_graph_in_inference_mode_and_on_nothing(engine: str) -> None:
    block, x = fused(block_of("layer"), engine), input_of()
    y = block(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x), y)
    with torch.inference_mode():
        torch.testing.assert_close(block(x).clone(), y)
    assert block.get_submodule("branch").training
    empty = fused(block_of("layer"))(x[:0])
    assert empty.shape == (0, 4, 5, 5)


def test_frozen_parameters_get_no_gradient() -> None:
    block = fused(block_of("layer")).requires_grad_(False)
    x = input_of().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in block.parameters())


def test_a_compiler_traces_around_it() -> None:
    block, x = fused(block_of("layer")), input_of()
    unread = fused(ExactIE(nn.Sequential(branch_of("layer"), nn.Mish()).double(), tol=TIGHT))
    for each in (block, unread):
        compiled = torch.compile(nn.Sequential(each, nn.Tanh()), backend="eager", fullgraph=each is block)
        torch.testing.assert_close(compiled(x), each(x).tanh())


def test_it_cannot_be_exported() -> None:
    with pytest.raises(Exception, match="ExactIE cannot be exported, because its forward takes as many steps as"):
        torch.export.export(block_of("layer"), (input_of(),))


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    branch = branch_of()
    refusals: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "tol must be a finite number > 0, got 0", {"tol": 0}),
        (ValueError, "tol must be a finite number > 0, got nan", {"tol": float("nan")}),
        (TypeError, "tol must be a finite number > 0, got 'small'", {"tol": "small"}),
        (ValueError, "max_iterations must be an int >= 1, got 0", {"max_iterations": 0}),
        (TypeError, "max_iterations must be an int >= 1, got 2.0", {"max_iterations": 2.0}),
    ]
    for kind, message, options in refusals:
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            ExactIE(branch, **options)
    with pytest.raises(TypeError, match=r"^branch must be an nn\.Module, got None$"):
        ExactIE(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^exact must be True or False, got 1$"):
        nets.ie_resnet18(exact=1)  # type: ignore[arg-type]
    for block in (ExactIE(branch), fused(ExactIE(branch))):
        with pytest.raises(TypeError, match=r"^x must be a tensor"):
            block(None)


def test_engines_that_lack_it_say_so() -> None:
    twin = fused(block_of("layer"))
    for name, engine in BY_NAME.items():
        reason = twin.why_not(name, input_of())
        assert (reason == "") == (engine is REFERENCE or name in ENGINES), name
    report = fastode.fuse(copy.deepcopy(twin), example=input_of())
    assert report.rows[0].engines == tuple(ENGINES[:1])


def test_a_network_of_ie_skips_gives_its_parameters_to_the_exact_one() -> None:
    skips, exact = nets.ie_resnet18(width=8), nets.ie_resnet18(width=8, exact=True)
    kinds = [type(module) for module in exact.modules()]
    assert ExactIE in kinds and IESkip not in kinds
    exact.load_state_dict(skips.state_dict())
    images = sample_input(2, 3, 16, 16)
    with torch.no_grad():
        far = (skips(images) - exact(images)).norm()
        for module in skips.modules():
            if isinstance(module, IESkip):
                module.steps = 200
        assert (skips(images) - exact(images)).norm() < 0.2 * far
    fastode.fuse(exact)
    nn.functional.cross_entropy(exact(images), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in exact.parameters())


def test_ie_skip_and_it_share_a_branch() -> None:
    skip = IESkip(branch_of())
    exact = ExactIE(skip.branch)
    exact(input_of()).sum().backward()
    assert all(p.grad is not None for p in skip.parameters())
    assert list(exact.state_dict()) == list(skip.state_dict())
