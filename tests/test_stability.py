"""fastode.stability: each measurement against the matrix, the number or the solution that it stands for."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference, stability, tableau


def branch(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return reference.PreActBranch(2, norm="batch").double()


def dense(function: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of each sample [N, n, n], formed."""
    n = x[0].numel()
    matrix = [
        torch.autograd.functional.jacobian(lambda a: function(a[None]).flatten(), sample).reshape(-1, n) for sample in x
    ]
    return torch.stack(matrix)


@pytest.mark.parametrize("matrix", ["J", "I + J", "I - J"])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_singular_values_are_those_of_the_matrix(matrix: str, end: str) -> None:
    f = branch().eval()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    jacobian = 0.7 * dense(f, x)
    eye = torch.eye(18, dtype=torch.float64)
    formed = {"J": jacobian, "I + J": eye + jacobian, "I - J": eye - jacobian}[matrix]
    values = torch.linalg.svdvals(formed)
    f.train()
    found = stability.singular_value(f, x, matrix=matrix, end=end, scale=0.7, tolerance=1e-9)
    wanted = values[:, 0] if end == "largest" else values[:, -1]
    torch.testing.assert_close(found.value, wanted, rtol=1e-8, atol=1e-8)
    assert f.training, "its mode is put back"
    assert f[0].num_batches_tracked.item() == 0


def test_a_residual_bounds_the_error_of_a_value_that_has_not_converged() -> None:
    f = branch().eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    values = torch.linalg.svdvals(torch.eye(32, dtype=torch.float64) - dense(f, x))
    for end in ("largest", "smallest"):
        found = stability.singular_value(f, x, matrix="I - J", end=end, steps=4, tolerance=1e-12)
        assert found.steps == 4
        assert (found.residual > 0).all()
        nearest = (values - found.value[:, None]).abs().amin(1)
        assert (nearest <= found.residual + 1e-12).all()


def test_a_matrix_with_an_invariant_subspace_has_all_its_values() -> None:
    """Lanczos ends early in it: from there on other directions have to be taken."""
    f = nn.Linear(6, 6, bias=False).double()
    f.weight.data.zero_()
    x = torch.ones(2, 6, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    for end in ("largest", "smallest"):
        torch.testing.assert_close(stability.singular_value(f, x, matrix="I - J", end=end, tolerance=1e-9).value, one)
    assert stability.singular_value(f, x).value.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["ResBlock", "IESkip", "SSP2", "SSP3", "Midpoint"])
def test_fused_blocks_are_as_stable_as_their_references(kind: str) -> None:
    block = getattr(reference, kind)(branch())
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Tanh(), block).eval()
    wanted = torch.linalg.svdvals(dense(block, torch.tanh(x)))[:, 0]
    (plain,) = stability.c_stability(model, x, tolerance=1e-9)
    fastode.fuse(model)
    assert type(model[1]) is getattr(fastode.nn, kind)
    (fused,) = stability.c_stability(model, x, tolerance=1e-9)
    torch.testing.assert_close(plain.constant, wanted, rtol=1e-7, atol=0)
    torch.testing.assert_close(fused.constant, wanted, rtol=1e-7, atol=0)
    assert fused.name == "1"
    assert torch.equal(fused.is_stable, wanted <= 1)


def test_c_bounds_what_a_small_perturbation_becomes() -> None:
    model = nn.Sequential(reference.ResBlock(branch(1)), reference.IESkip(branch(2))).eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    found = stability.c_stability(model, x, tolerance=1e-9)
    for _ in range(20):
        given = x
        for block, result in zip(model, found, strict=True):
            move = 1e-6 * torch.randn_like(given)
            ratio = (block(given + move) - block(given)).flatten(1).norm(dim=1) / move.flatten(1).norm(dim=1)
            assert (ratio <= result.constant * (1 + 1e-4)).all()
            given = block(given).detach()


def test_theorem_1_has_the_points_and_matrices_of_the_paper() -> None:
    resnet = nn.Sequential(*[reference.ResBlock(branch(seed), step_size=0.5) for seed in (1, 2)]).eval()
    ie = nn.Sequential(reference.IESkip(branch(3)), reference.ExactIE(branch(4))).eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    found = stability.theorem1(resnet, ie, x, tolerance=1e-9)
    eye = torch.eye(18, dtype=torch.float64)
    explicit = [torch.linalg.svdvals(eye + 0.5 * dense(resnet[0].branch, x))[:, 0]]
    explicit.append(torch.linalg.svdvals(eye + 0.5 * dense(resnet[1].branch, resnet[0](x).detach()))[:, 0])
    first = ie[0](x).detach()
    implicit = [torch.linalg.svdvals(eye - dense(ie[0].branch, first))[:, -1]]
    implicit.append(torch.linalg.svdvals(eye - dense(ie[1].branch, ie[1](first).detach()))[:, -1])
    torch.testing.assert_close(found.explicit, torch.stack(explicit), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.implicit, torch.stack(implicit), rtol=1e-7, atol=0)
    assert found.explicit_probability == (torch.stack(explicit) <= 1).all(0).double().mean().item()
    assert found.implicit_probability == (torch.stack(implicit) >= 1).all(0).double().mean().item()


def test_probabilities_count_samples_whose_blocks_all_hold() -> None:
    explicit = torch.tensor([[0.9, 0.9, 1.1, 1.1], [0.9, 1.1, 0.9, 1.1]])
    found = stability.Comparison(explicit, explicit, explicit, explicit)
    assert (found.explicit_probability, found.implicit_probability) == (0.25, 0.25)


@pytest.mark.parametrize("norm", [1, 2])
def test_growth_ratio_is_equation_17(norm: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), reference.SSP2(branch()).float(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x, moved = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    found = stability.growth_ratio(model, x, moved, norm=norm)
    a, b = x, moved
    for name, layer in model.named_children():
        after_a, after_b = layer(a), layer(b)
        wanted = [
            sum(abs(d) ** norm for d in (p - q).flatten().tolist()) ** (1 / norm)
            / sum(abs(d) ** norm for d in (r - s).flatten().tolist()) ** (1 / norm)
            for p, q, r, s in zip(after_a, after_b, a, b, strict=True)
        ]
        torch.testing.assert_close(found[name], torch.tensor(wanted), rtol=1e-4, atol=0)
        a, b = after_a, after_b


LEMMA = {"EULER": 2.0, "MIDPOINT": 9 / 4, "SSP2": 7 / 4, "SSP3": 29 / 18}


class _Noise(nn.Module):
    """F with the premises of Lemma 3: the variance of its argument, and no covariance with anything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x) * x.std()


@pytest.mark.parametrize(("scheme", "ratio"), LEMMA.items())
def test_variances_are_those_of_lemma_3(scheme: str, ratio: float) -> None:
    table = getattr(tableau, scheme)
    assert stability.predicted_variance(table) == pytest.approx(ratio, abs=1e-14)
    torch.manual_seed(0)
    found = stability.variance(reference.ShuOsher(_Noise(), table), torch.randn(200, 1, 32, 32))
    # The deviation of such a ratio of 204,800 numbers is about 0.008.
    assert found.ratio == pytest.approx(ratio, abs=0.04)
    assert found.branch_ratio == pytest.approx(1.0, abs=0.02)
    assert found.correlation == pytest.approx(0.0, abs=0.02)


def exact_burgers(x: Tensor, time: float, mean: float) -> Tensor:
    """u = u₀(x − u t) by Newton's method; before the shock."""
    u = mean + torch.sin(2 * math.pi * x)
    for _ in range(100):
        phase = 2 * math.pi * (x - u * time)
        u = u - (u - mean - phase.sin()) / (1 + 2 * math.pi * time * phase.cos())
    return u


def test_burgers_converges_by_ssp3_and_not_by_euler() -> None:
    errors = {}
    for name in ("EULER", "SSP3"):
        for cells in (50, 100):
            found = stability.burgers(getattr(tableau, name), cells=cells, time=0.08)
            wanted = exact_burgers(found.x, 0.08, 0.5)
            errors[name, cells] = (found.end - wanted).abs().mean().item()
    assert errors["SSP3", 50] / errors["SSP3", 100] > 6
    assert errors["EULER", 50] > 5 * errors["SSP3", 50]
    assert errors["EULER", 100] > 10 * errors["SSP3", 100]


def test_burgers_by_euler_has_more_variation_than_it_began_with() -> None:
    plain, preserving = (stability.burgers(scheme) for scheme in (tableau.EULER, tableau.SSP3))
    start = plain.total_variation[0]
    assert preserving.total_variation.max() <= start * 1.01
    assert plain.total_variation.max() > start * 1.05


def test_the_linear_skew_flow_is_that_of_the_matrix_exponential() -> None:
    torch.manual_seed(0)
    pair = reference.SkewPair(2, 3, stride=2, norm="none").double()
    y, z = torch.zeros(2, 3, 2, 2, dtype=torch.float64), torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    found = stability.skew_orthogonality(pair, y, z, time=3.0)
    assert max(found.norm, found.angle, found.inverse) < 1e-12
    linear = reference.SkewLinear(4, 3).double()
    flat = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    assert max(vars(stability.skew_orthogonality(linear, *flat)).values()) < 1e-12


def test_the_exponential_of_products_is_the_dense_one_and_a_flow_that_grows_is_found() -> None:
    from fastode.stability.flows import _exponential

    torch.manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64)
    v = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(_exponential(lambda x: x @ a.T, v, 2.0), v @ torch.matrix_exp(2 * a).T)


def test_lyapunov_exponents_are_eigenvalues_of_a_linear_field_and_not_positive_for_skew_pairs() -> None:
    field = nn.Linear(3, 3, bias=False).double()
    field.weight.data.copy_(torch.diag(torch.tensor([0.4, -0.1, -2.0])))
    found = stability.lyapunov_exponent(field, torch.ones(2, 3, dtype=torch.float64), time=40.0, steps=200)
    torch.testing.assert_close(found, torch.full((2,), 0.4, dtype=torch.float64), rtol=0, atol=0.05)
    torch.manual_seed(0)
    pair = reference.SkewPair(1, 1, gamma=0.5, activation="softplus", norm="none").double()
    state = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    wanted = stability.lyapunov_exponent(pair, *state, time=10.0, steps=40)
    assert (wanted < 0).all()


X = torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stability.singular_value(nn.Tanh(), X.int()), TypeError,
         "x must be of dtype float32 or float64, got int32"),
        (lambda: stability.singular_value(nn.Tanh(), X[:0]), ValueError,
         "x must be a tensor [N, ...] with at least one sample, got shape [0, 2, 3, 3]"),
        (lambda: stability.singular_value(nn.Tanh(), X / 0), ValueError,
         "x must be finite, got infinite or NaN values"),
        (lambda: stability.singular_value(nn.Flatten(), X, matrix="I + J"), ValueError,
         "function must keep the shape [1, 2, 3, 3], got an output of [1, 18]"),
        (lambda: stability.singular_value(nn.Tanh(), X, matrix="J + I"), ValueError,
         "matrix must be one of 'J', 'I + J', 'I - J', got 'J + I'"),
        (lambda: stability.c_stability(nn.Sequential(nn.Tanh()), X), ValueError,
         "model must have a block of type ResBlock, IESkip, ExactIE, ShuOsher, Ark, SOBlock, ODEBlock, got none in "
         "Sequential"),
        (lambda: stability.c_stability(nn.Sequential(nn.Tanh()), X, blocks=["1"]), ValueError,
         "blocks must be names of modules of model, got '1'"),
        (lambda: stability.growth_ratio(nn.Sequential(nn.Tanh()), X, X, norm=3), ValueError,
         "norm must be 1 or 2, got 3"),
        (lambda: stability.growth_ratio(nn.Sequential(nn.Tanh()), X, X[:, :1]), ValueError,
         "perturbed must be of the shape and dtype of x, [1, 2, 3, 3], got [1, 1, 3, 3]"),
        (lambda: stability.growth_ratio(nn.Sequential(nn.Tanh()), X, X.clone()), ValueError,
         "perturbed must differ from x in some sample, got the same values"),
        (lambda: stability.variance(reference.ResBlock(nn.Tanh()), X), ValueError,
         "x must have a variance above zero, got one number everywhere"),
        (lambda: stability.burgers(cells=4), ValueError, "cells must be at least 8, got 4"),
        (lambda: stability.lyapunov_exponent(nn.Tanh()), TypeError, "state must be one tensor or more, got none"),
        (lambda: stability.lyapunov_exponent(nn.Flatten(), X), ValueError,
         "field must return slopes of shapes [[1, 2, 3, 3]], got [[1, 18]]"),
        (lambda: stability.skew_orthogonality(nn.Tanh(), X, X), TypeError,
         "field must be a SkewPair or a SkewLinear, got an object of type Tanh"),
    ],
)  # fmt: skip
def test_refusals(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message


def figures() -> list[object]:
    values = torch.tensor([0.5, 1.5])
    measured = stability.Variance(2.0, 1.0, 0.0)
    return [
        lambda: stability.plot_c_stability([stability.BlockStability("a", values, values)]),
        lambda: stability.plot_theorem1(stability.Comparison(values[None], values[None], values[None], values[None])),
        lambda: stability.plot_growth({"net": {"0": values, "1": values}}),
        lambda: stability.plot_variance({"SSP2": measured}, {"SSP2": 1.75}),
        lambda: stability.plot_burgers({"SSP3": stability.burgers(cells=8)}),
        lambda: stability.plot_lyapunov({"pair": values}),
        lambda: stability.plot_orthogonality({1.0: stability.Orthogonality(1e-9, 1e-9, 1e-9)}),
    ]


@pytest.mark.parametrize("draw", figures())
def test_figures_are_drawn(draw: object, tmp_path: object) -> None:
    axes = draw()  # type: ignore[operator]
    assert axes.has_data()


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "fastode\[plots\]"'):
        stability.plot_growth({})
