"""Attacks of kept libraries behind the signature of ours: C&W and APGD of ART, Boundary of foolbox."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .. import checks
from .balls import NORMS, ball_of
from .borrowed import Unit, art_attacks, borrowed, check_search, foolbox_itself, generated, reach_of, searched
from .task import task_of

__all__ = ["apgd", "boundary", "cw_l2", "cw_linf"]

_DIRECTIONS = 1000  # noise images that are tried as Boundary's start


def cw_l2(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    steps: int = 50,
    step_size: float = 0.01,
    confidence: float = 0.0,
    constant: float = 10.0,
    searches: int = 5,
    targets: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    solver_gradient: str | None = None,
) -> Tensor:
    """C&W in the Euclidean norm: the least change that fools the model, by ART's CarliniL2Method.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the largest distance that counts: an image that needs more comes back as it was; None for any.
        steps: of the optimization (Li, He & Lin: 50), each with a line search.
        step_size: the first one, in the space of the hyperbolic tangent.
        confidence: κ ≥ 0, by which the wrong class has to lead.
        constant: c, the weight of the hinge on logits at first (Li, He & Lin: 10).
        searches: how often c is changed by bisection.
        targets: the classes [N] that the model is to take the images for; None where any wrong one will do.
        bounds: the least and the largest value of a pixel, two numbers.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: accepted as by every attack; this one draws nothing.
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W]; those that are fooled already, or could not be, as they were.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        ImportError: the library is not installed.

    Source: Carlini & Wagner 2017, Section VI.A; Li, He & Lin 2020, Section 5.1.

    Example:
        >>> cw_l2(nn.Flatten(), torch.zeros(1, 3, 2, 2), torch.tensor([0]), confidence=-1.0)
        Traceback (most recent call last):
        ValueError: confidence must be at least 0, got -1.0
    """
    check_search(eps, steps, step_size, confidence, constant)
    checks.steps(searches, "searches")
    task = task_of(model, images, labels, targets, bounds, mode, solver_gradient, generator)
    evasion = art_attacks()

    def run(unit: Unit, x: Tensor, classes: Tensor) -> Tensor:
        attack = evasion.CarliniL2Method(
            unit.classifier(), confidence=confidence, targeted=targets is not None, learning_rate=step_size,
            binary_search_steps=searches, max_iter=steps, initial_const=constant, batch_size=len(x), verbose=False,
        )  # fmt: skip
        return generated(attack, x, classes)

    return searched(task, run, "l2", eps, mode, solver_gradient, generator)


def cw_linf(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    steps: int = 100,
    step_size: float = 0.01,
    confidence: float = 0.0,
    constant: float = 1e-5,
    bounds: tuple[float, float] = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    solver_gradient: str | None = None,
) -> Tensor:
    """C&W in the maximum norm: the least change that fools the model, by ART's CarliniLInfMethod.

    It has no targets: ART 1.20.1 takes an image that misses its target for a success.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the largest distance that counts, as in `cw_l2` (Huang et al.: 0.031).
        steps: of Adam for each constant (Huang et al.: 100).
        step_size: Adam's learning rate, in the space of the hyperbolic tangent.
        confidence: κ ≥ 0, by which the wrong class has to lead.
        constant: c at first; it doubles up to 20. ART's derivative leaves it out, so that all c find the same but those
            too small for the search to go on; from 10 on one is tried, in the least time.
        bounds: the least and the largest value of a pixel, two numbers.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: accepted as by every attack; this one draws nothing.
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W]; those that are fooled already, or could not be, as they were. ART takes them one by one.
        Where the images of a batch share a solver's steps, attack one at a time: they are judged in their batch.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        ImportError: the library is not installed.

    Source: Carlini & Wagner 2017, Section VI.C; Huang et al. (paper 003), Section 5.1.

    Example:
        >>> cw_linf(nn.Flatten(), torch.zeros(1, 3, 2, 2), torch.tensor([0]), steps=0)
        Traceback (most recent call last):
        ValueError: steps must be an int >= 1, got 0
    """
    check_search(eps, steps, step_size, confidence, constant)
    task = task_of(model, images, labels, None, bounds, mode, solver_gradient, generator)
    evasion = art_attacks()

    def run(unit: Unit, x: Tensor, classes: Tensor) -> Tensor:
        attack = evasion.CarliniLInfMethod(
            unit.classifier(), confidence=confidence, learning_rate=step_size, max_iter=steps, initial_const=constant,
            verbose=False,
        )  # fmt: skip
        return generated(attack, x, classes)

    return searched(task, run, "linf", eps, mode, solver_gradient, generator)


def boundary(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    steps: int = 1000,
    step_size: float = 0.1,
    source_step: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The boundary attack: from noise that fools the model towards the image, by decisions alone, by foolbox.

    A step asks once, every tenth twice; finding the start asks more.

    Args:
        model: a module that returns logits [N, K]; only the largest counts.
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the largest Euclidean distance that counts, as in `cw_l2`.
        steps: of the walk ("Towards Natural Robustness": 1,000).
        step_size: the first orthogonal step, relative to the distance (the same paper: 0.1).
        source_step: the first step towards the image, likewise.
        bounds: the least and the largest value of a pixel, two numbers.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: of the noise and the steps.

    Returns:
        Images [N, C, H, W]; those that are fooled already, or have no start in 1,000 images of noise, as they were.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        ImportError: the library is not installed.

    Source: Brendel et al. 2018, Section 2; paper 002, Section 4.2.2 (Figure 3).

    Example:
        >>> boundary(nn.Flatten(), torch.zeros(1, 3, 2, 2), torch.tensor([0]), step_size=0.0)
        Traceback (most recent call last):
        ValueError: step_size must be a finite number > 0, got 0.0
    """
    check_search(eps, steps, step_size)
    checks.step_size(source_step, "source_step")
    task = task_of(model, images, labels, None, bounds, mode, None, generator)
    foolbox = foolbox_itself()

    def run(unit: Unit, x: Tensor, classes: Tensor) -> Tensor:
        seen = foolbox.PyTorchModel(unit, bounds=(0, 1), device=x.device)
        first = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=50, directions=_DIRECTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some images have no start: they are left out
            starts = first.run(seen, x, foolbox.criteria.Misclassification(classes))
        with torch.no_grad():
            able = (unit(starts).argmax(1) != classes).nonzero().squeeze(1)
        if len(able):
            walk = foolbox.attacks.BoundaryAttack(steps=steps, spherical_step=step_size, source_step=source_step)
            criterion = foolbox.criteria.Misclassification(classes[able])
            x = x.index_copy(0, able, walk.run(seen, x[able], criterion, starting_points=starts[able]))
        return x

    return searched(task, run, "l2", eps, mode, None, generator)


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    steps: int = 100,
    norm: str = "linf",
    restarts: int = 1,
    loss: str = "ce",
    targets: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    mode: str = "eval",
    generator: torch.Generator | None = None,
    solver_gradient: str | None = None,
) -> Tensor:
    """Auto-PGD: projected gradient descent that halves its steps where they do not help, by ART.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        eps: the radius, in units of the images.
        step_size: the first one; None for 2 eps, as its authors.
        steps: gradient steps of each start.
        norm: "linf" or "l2".
        restarts: random starts, on what is not fooled yet.
        loss: "ce", or "dlr", the difference of logits ratio, for three classes or more and without targets.
        targets: the classes [N] that the model is to take the images for, with loss "ce"; None where any wrong one
            will do.
        bounds: the least and the largest value of a pixel, two numbers.
        mode: the model's while it is attacked: "eval", "train", or "keep".
        generator: of the starts.
        solver_gradient: as in `pgd`.

    Returns:
        Images [N, C, H, W] within the radius and the bounds; those that are fooled already as they were.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        ImportError: the library is not installed.

    Source: Croce & Hein 2020, Algorithm 1 and eq. 6.

    Example:
        >>> apgd(nn.Flatten(), torch.zeros(1, 3, 2, 2), torch.tensor([0]), eps=0.1, loss="hinge")
        Traceback (most recent call last):
        ValueError: loss must be one of 'ce', 'dlr', got 'hinge'
    """
    checks.steps(steps)
    checks.steps(restarts, "restarts")
    checks.one_of("loss", loss, ("ce", "dlr"))
    checks.one_of("norm", norm, NORMS)
    if loss == "dlr" and targets is not None:
        raise ValueError("targets must be None with loss 'dlr', which has no form for them here")
    task = task_of(model, images, labels, targets, bounds, mode, solver_gradient, generator)
    reach = reach_of(task)
    checks.step_size(eps, "eps")
    ball = ball_of(task, norm, eps, step_size, 2.0)
    evasion = art_attacks()

    def run(unit: Unit, x: Tensor, classes: Tensor) -> Tensor:
        if loss == "dlr" and unit.classes < 3:
            raise ValueError(f"loss must be 'ce' with fewer than 3 classes, got 'dlr' with {unit.classes}")
        names = {"ce": "cross_entropy", "dlr": "difference_logits_ratio"}
        attack = evasion.AutoProjectedGradientDescent(
            unit.classifier(), norm={"linf": "inf", "l2": 2}[norm], eps=eps / reach,
            eps_step=float(ball.step_size) / reach, max_iter=steps, targeted=targets is not None,
            nb_random_init=restarts, batch_size=len(x), loss_type=names[loss], verbose=False,
        )  # fmt: skip
        return generated(attack, x, classes)

    return borrowed(task, run, mode, solver_gradient, generator, ball.clipped)
