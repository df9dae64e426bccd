"""Schemes as data: measured orders of convergence, the SSP property, and what a tableau refuses."""

import dataclasses
import functools
import math

import pytest
import torch

from fastode import tableau
from fastode.tableau import Butcher, Tableau

SCHEMES = [
    tableau.EULER,
    tableau.SSP2,
    tableau.SSP3,
    tableau.MIDPOINT,
    tableau.ark(),
    tableau.ark(a21=-2.0, b10=0.3),
]
SOLVERS = [tableau.EULER_RK, tableau.MIDPOINT_RK, tableau.RK4_38]


def slope(u):
    """A soft spring with friction: nonlinear, smooth, coupled."""
    return torch.stack((u[1], u[0] ** 3 / 6 - u[0] - 0.3 * u[1]))


def shu_osher_step(scheme, f, u, step):
    points = [u]
    for alphas, betas in zip(scheme.alpha, scheme.beta, strict=True):
        points.append(sum(a * p + step * b * f(p) for a, b, p in zip(alphas, betas, points, strict=True)))
    return points[-1]


def butcher_step(scheme, f, u, step):
    slopes = []
    for row in scheme.a:
        slopes.append(f(u + step * sum(a * k for a, k in zip(row, slopes, strict=True))))
    return u + step * sum(b * k for b, k in zip(scheme.b, slopes, strict=True))


@functools.cache
def end(scheme, steps):
    """u(1) in `steps` equal steps."""
    advance = butcher_step if isinstance(scheme, Butcher) else shu_osher_step
    u = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for _ in range(steps):
        u = advance(scheme, slope, u, 1.0 / steps)
    return u


def error(scheme, steps):
    return (end(scheme, steps) - end(tableau.RK4_38, 400)).norm().item()


@pytest.mark.parametrize("scheme", SCHEMES + SOLVERS, ids=lambda scheme: f"{type(scheme).__name__}-{scheme.name}")
def test_measured_order_is_the_stated_one(scheme):
    measured = math.log2(error(scheme, 20) / error(scheme, 40))
    assert round(measured) == scheme.order


@pytest.mark.parametrize("scheme", SCHEMES + SOLVERS, ids=lambda scheme: f"{type(scheme).__name__}-{scheme.name}")
def test_an_order_above_the_true_one_is_refused(scheme):
    with pytest.raises(ValueError, match="order must be at most"):
        dataclasses.replace(scheme, order=scheme.order + 1)


def test_ssp_schemes_are_convex_combinations_of_euler_steps():
    for scheme in (tableau.EULER, tableau.SSP2, tableau.SSP3):
        assert all(a >= 0 and b >= 0 for rows in (scheme.alpha, scheme.beta) for row in rows for a in row for b in row)
        assert all(math.fsum(row) == 1 for row in scheme.alpha)
        assert scheme.ssp_coefficient == 1.0
    assert tableau.euler(0.5).ssp_coefficient == 2.0


def test_schemes_without_the_ssp_property_say_so():
    assert tableau.MIDPOINT.ssp_coefficient == 0.0
    assert tableau.ark().ssp_coefficient == 0.0
    # With a small α₂₁ every coefficient of Ark is non-negative.
    assert tableau.ark(a21=-3.0, b10=1.0).ssp_coefficient > 0.0


def test_a_norm_that_euler_keeps_is_kept_by_ssp_schemes_and_not_by_the_midpoint():
    def turn(u):
        """An Euler step turns u by a right angle, one way for long vectors and the other way for short ones."""
        turned = torch.stack((-u[1], u[0]))
        return (turned if u.norm() > 0.8 else -turned) - u

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for scheme in (tableau.EULER, tableau.SSP2, tableau.SSP3):
        assert shu_osher_step(scheme, turn, start, 1.0).norm() <= 1
    assert shu_osher_step(tableau.MIDPOINT, turn, start, 1.0).norm() > 1


def test_rows_may_be_lists_and_are_kept_as_tuples_of_floats():
    scheme = Tableau("heun", alpha=[[1], [0.5, 0.5]], beta=[[1], [0, 0.5]], order=2)
    assert (scheme.alpha, scheme.beta) == (tableau.SSP2.alpha, tableau.SSP2.beta)
    assert hash(scheme) == hash(dataclasses.replace(scheme))
    assert isinstance(scheme.alpha[0][0], float)


def test_a_tableau_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tableau.SSP2.order = 3


def test_stages_and_nodes():
    assert [scheme.stages for scheme in SCHEMES] == [1, 2, 3, 2, 2, 2]
    assert [scheme.stages for scheme in SOLVERS] == [1, 2, 4]
    assert tableau.RK4_38.nodes == (0.0, 1 / 3, 1 - 1 / 3, 1.0)


HEUN = {"name": "heun", "alpha": ((1.0,), (0.5, 0.5)), "beta": ((1.0,), (0.0, 0.5)), "order": 2}
HEUN_RK = {"name": "heun", "a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2}

REFUSALS = [
    (Tableau, HEUN, {"name": 3}, TypeError, "name must be a string, got an object of type int"),
    (Tableau, HEUN, {"alpha": None}, TypeError, "alpha must be rows of numbers, got None"),
    (Tableau, HEUN, {"beta": (1.0, 2.0)}, TypeError, "beta must be rows of numbers, got (1.0, 2.0)"),
    (Tableau, HEUN, {"beta": (("1",),)}, TypeError, "every entry of beta must be a finite number, got '1'"),
    (Tableau, HEUN, {"alpha": ((math.nan,),)}, ValueError, "every entry of alpha must be a finite number, got nan"),
    (Tableau, HEUN, {"alpha": ()}, ValueError, "alpha must be rows of lengths [1], got rows of lengths []"),
    (
        Tableau,
        HEUN,
        {"alpha": ((1.0,), (1.0,))},
        ValueError,
        "alpha must be rows of lengths [1, 2], got rows of lengths [1, 1]",
    ),
    (Tableau, HEUN, {"beta": ((1.0,),)}, ValueError, "beta must be rows of lengths [1, 2], got rows of lengths [1]"),
    (
        Tableau,
        HEUN,
        {"alpha": ((1.0,), (0.5, 0.6))},
        ValueError,
        "alpha must be rows that sum to one, got row 2 = (0.5, 0.6)",
    ),
    (Tableau, HEUN, {"order": 2.0}, TypeError, "order must be an int >= 1, got 2.0"),
    (Tableau, HEUN, {"order": 0}, ValueError, "order must be an int >= 1, got 0"),
    (Tableau, HEUN, {"order": 3}, ValueError, "order must be at most 2 with these coefficients, got 3"),
    (Butcher, HEUN_RK, {"a": ((1.0,),)}, ValueError, "a must be rows of lengths [0], got rows of lengths [1]"),
    (Butcher, HEUN_RK, {"b": 1.0}, TypeError, "b must be rows of numbers, got (1.0,)"),
    (Butcher, HEUN_RK, {"b": (1.0,)}, ValueError, "b must be 2 weights, one for each row of a, got 1"),
    (Butcher, HEUN_RK, {"b": (0.5, 0.6)}, ValueError, "b must be weights that sum to one, got (0.5, 0.6)"),
    (Butcher, HEUN_RK, {"order": 3}, ValueError, "order must be at most 2 with these coefficients, got 3"),
    (tableau.euler, {}, {"step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
    (tableau.ark, {}, {"a21": math.inf}, ValueError, "a21 must be a finite number, got inf"),
    (tableau.ark, {}, {"b10": None}, TypeError, "b10 must be a finite number, got None"),
    (tableau.ark, {}, {"b10": -1e6}, ValueError, "b10 must be a number whose sigmoid is above zero, got -1000000.0"),
]


@pytest.mark.parametrize(("make", "arguments", "change", "kind", "message"), REFUSALS)
def test_refusals(make, arguments, change, kind, message):
    with pytest.raises(kind) as refused:
        make(**{**arguments, **change})
    assert type(refused.value) is kind
    assert str(refused.value) == message
