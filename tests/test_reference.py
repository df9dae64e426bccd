"""The reference blocks against the papers' equations, written a second time in closed form."""

import pytest
import torch
from reference_cases import assert_same, make_branch, make_input, no_statistics, outputs_and_gradients
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastode import tableau
from fastode.reference import SSP2, SSP3, Ark, IESkip, Midpoint, ResBlock, ShuOsher, plain_norms
from fastode.tableau import Tableau

NORMS = ["layer", "instance", "none", no_statistics]
IE_SETTINGS = [(1, 0.1, 1.0), (3, 0.05, 1.0), (2, 0.1, 0.5), (1, 0.1, 0.0)]


def adjoint_of_ie(f, parameters, x, cotangent, steps, gamma, theta):
    """IE-Skip and its adjoint by the closed form: J and its transpose through torch.func, no graph through a step."""

    def call(values, point):
        return torch.func.functional_call(f, values, (point,))

    def at(point):
        return call(parameters, point)

    s = at(x)
    y, visited = x + s, []
    for _ in range(steps):
        value, pull = torch.func.vjp(at, y)
        e = y - x - (1 - theta) * s - theta * value
        visited.append((y, e))
        y = y - gamma * 2 * (e - theta * pull(e)[0])
    out, y_bar = y, cotangent
    x_bar, s_bar = torch.zeros_like(x), torch.zeros_like(x)
    w_bar = {name: torch.zeros_like(w) for name, w in parameters.items()}
    for y, e in reversed(visited):
        c = -gamma * y_bar
        e_bar = 2 * (c - theta * torch.func.jvp(at, (y,), (c,))[1])

        def phi(values, point, e=e, c=c, e_bar=e_bar):
            value, tangent = torch.func.jvp(lambda p: call(values, p), (point,), (c,))
            return (-theta * e_bar * value).sum() - 2 * theta * (e * tangent).sum()

        w_phi, y_phi = torch.func.grad(phi, argnums=(0, 1))(parameters, y)
        y_bar = y_bar + e_bar + y_phi
        w_bar = {name: w_bar[name] + w_phi[name] for name in w_bar}
        x_bar, s_bar = x_bar - e_bar, s_bar - (1 - theta) * e_bar
    w_branch, x_branch = torch.func.vjp(call, parameters, x)[1](s_bar + y_bar)
    gradients = {f"gradient of branch.{name}": w_bar[name] + w_branch[name] for name in w_bar}
    return {"y": out, "gradient of x": x_bar + y_bar + x_branch, **gradients}


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm if isinstance(norm, str) else norm.__name__)
@pytest.mark.parametrize(("steps", "gamma", "theta"), IE_SETTINGS)
def test_ie_skip_and_its_gradients_are_the_closed_form(norm, steps, gamma, theta):
    # The gradient of a bias that a norm of its own channel follows is zero, and has no relative error.
    branch, x, cotangent = make_branch(norm, bias=norm in ("layer", "none")), make_input(), make_input(1)
    found = outputs_and_gradients(IESkip(branch, steps, gamma, theta), x, cotangent)
    parameters = {name: p.detach() for name, p in branch.named_parameters()}
    # PyTorch's reverse derivative of the forward derivative of a training batch norm is wrong, as its third one is.
    with plain_norms():
        assert_same(found, lambda x: adjoint_of_ie(branch, parameters, x, cotangent, steps, gamma, theta), x)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_ie_skip_passes_gradcheck(norm):
    block, x = IESkip(make_branch(norm), steps=2, theta=0.7), make_input().requires_grad_()
    assert gradcheck(block, (x,), fast_mode=True)
    with plain_norms():
        assert gradgradcheck(block, (x,), fast_mode=True)


def test_detached_ie_skip_has_the_backward_of_the_residual_block():
    branch, x, cotangent = make_branch(), make_input(), make_input(1)
    detached = outputs_and_gradients(IESkip(branch, steps=2, detach=True), x, cotangent)
    value = detached.pop("y")
    assert_same({"y": value}, lambda x: {"y": IESkip(branch, steps=2)(x)}, x)

    def residual(x):
        return {name: g for name, g in outputs_and_gradients(ResBlock(branch), x, cotangent).items() if name != "y"}

    assert_same(detached, residual, x)


def test_ie_skip_goes_downhill():
    branch, x = make_branch(), make_input()
    ys = [IESkip(branch, steps=steps, step_size=0.05)(x) for steps in (1, 2, 4, 8)]
    norms = [(y - x - branch(y)).norm().item() for y in ys]
    assert norms == sorted(norms, reverse=True)


def test_res_block_is_an_euler_step():
    branch, x = make_branch(), make_input()
    block = ResBlock(branch, step_size=0.3)
    assert_same({"y": block(x)}, lambda x: {"y": x + 0.3 * branch(x)}, x)
    assert torch.equal(block(x), ShuOsher(branch, tableau.euler(0.3))(x))


def test_res_block_with_a_shortcut_that_changes_the_shape():
    torch.manual_seed(0)
    branch, shortcut = make_branch(out_channels=6, stride=2), nn.Conv2d(3, 6, 1, stride=2).double()
    block, x = ResBlock(branch, 0.5, shortcut), make_input()
    assert_same({"y": block(x)}, lambda x: {"y": shortcut(x) + 0.5 * branch(x)}, x)


def test_runge_kutta_blocks_are_the_papers_equations():
    f, x = make_branch(), make_input()

    def ssp2(x):
        u = x + f(x)
        return {"y": x / 2 + (u + f(u)) / 2}

    def ssp3(x):
        u = x + f(x)
        u = 3 / 4 * x + (u + f(u)) / 4
        return {"y": x / 3 + 2 / 3 * (u + f(u))}

    assert_same({"y": SSP2(f)(x)}, ssp2, x)
    assert_same({"y": SSP3(f)(x)}, ssp3, x)
    assert_same({"y": Midpoint(f)(x)}, lambda x: {"y": x + f(x + f(x) / 2)}, x)


@pytest.mark.parametrize("learn", [(False, True), (True, False), (True, True), (False, False)])
def test_ark_is_equation_15(learn):
    f, x = make_branch(), make_input()
    block = Ark(f, -0.4, 0.7, *learn).double()
    a21, b10 = block.a21.detach().sigmoid(), block.b10.detach().sigmoid()

    def equation(x):
        u = x + b10 * f(x)
        b20 = 1 - 1 / (2 * b10) - a21 * b10
        return {"y": (1 - a21) * x + b20 * f(x) + a21 * u + f(u) / (2 * b10)}

    assert_same({"y": block(x)}, equation, x)
    learned = {name for name, _ in block.named_parameters() if not name.startswith("branch")}
    assert learned == {name for name, is_learned in zip(("a21", "b10"), learn, strict=True) if is_learned}
    assert {"a21", "b10"} <= set(block.state_dict())


def test_ark_coefficients_are_those_of_its_tableau_and_are_differentiable():
    block = Ark(make_branch(), 0.25, 1.0, learn_a21=True).double()
    alpha, beta = block.coefficients()
    scheme = tableau.ark(0.25, 1.0)
    rows = [[[1.0, 0.0], list(scheme.alpha[1])], [[*scheme.beta[0], 0.0], list(scheme.beta[1])]]
    found = {"alpha": alpha.detach(), "beta": beta.detach()}
    assert_same(found, lambda _: dict(zip(found, torch.tensor(rows, dtype=torch.float64), strict=True)), torch.ones(1))
    x = make_input()

    def output(a21, b10):
        return torch.func.functional_call(block, {"a21": a21, "b10": b10}, (x,))

    assert gradcheck(output, (block.a21, block.b10), fast_mode=True)


def test_shu_osher_evaluates_no_slope_that_no_stage_uses():
    scheme = Tableau(
        "late", alpha=((1.0,), (0.5, 0.5), (0.0, 0.0, 1.0)), beta=((0.5,), (0.0, 0.0), (0.0, 0.0, 0.5)), order=1
    )
    f, x = make_branch(), make_input()
    calls = []
    f.register_forward_hook(lambda *_: calls.append(1))
    y = ShuOsher(f, scheme)(x)
    assert len(calls) == 2

    def late(x):
        u = x / 2 + (x + f(x) / 2) / 2
        return {"y": u + f(u) / 2}

    assert_same({"y": y}, late, x)
