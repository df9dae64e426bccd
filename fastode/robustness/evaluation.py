"""The accuracy that attacks leave, each image judged by all of them, with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks, checks
from ..attacks import Queries
from ..attacks.held import adaptive_blocks, attacked
from ..attacks.report import WITHOUT_GRADIENT
from ..attacks.task import task_of
from .planned import Planned, plan

__all__ = ["Evaluation", "Row", "evaluate", "wilson"]

CLEAN, WORST = "clean", "worst of all"
_BLIND = {each.__name__ for each in WITHOUT_GRADIENT}
_Z = 1.959963984540054  # of 95 %
_SLACK = 1e-6  # images are at most this much farther than the radius by rounding
EXACT = (
    "attacked by the exact gradient of the adaptive solvers; of two networks that were measured, their usual gradient "
    'fooled more images on one: attack with solver_gradient="solver" too'
)


@dataclass(frozen=True)
class Row:
    """What is right under one attack.

    Attributes:
        name: "clean", the attack's, or "worst of all".
        eps: the radius.
        right: which images the model has right before and after [N].
        seconds: that the attack took; 0 where it did not run for this row alone.
        queries: of the attack.
    """

    name: str
    eps: float
    right: Tensor
    seconds: float = 0.0
    queries: Queries = field(default_factory=Queries)

    @property
    def accuracy(self) -> float:
        """The part of the images that is right."""
        return float(self.right.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson(int(self.right.sum()), len(self.right))


@dataclass(frozen=True)
class Evaluation:
    """What of a network's accuracy attacks leave.

    Attributes:
        norm: "linf" or "l2".
        eps: the radius of the table.
        rows: "clean", each attack, and "worst of all": right under every attack.
        curves: by the attack's name and "worst of all", a row for each radius, the smallest first; empty without radii.
        notes: what has to be said beside these numbers.
    """

    norm: str
    eps: float
    rows: tuple[Row, ...]
    curves: dict[str, tuple[Row, ...]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.rows[0].right)
        head = f"{count} images, {'maximum' if self.norm == 'linf' else 'Euclidean'} norm, radius {self.eps:.6g}"
        width = max(len(row.name) for row in self.rows)
        lines = [head, "", f"{'':{width}}  accuracy  95 % interval     seconds"]
        for row in self.rows:
            low, high = row.interval
            seconds = f"{row.seconds:9.1f}" if row.queries.forward else ""
            lines.append(f"{row.name:{width}}  {row.accuracy:8.2%}  {low:6.2%} – {high:7.2%}  {seconds}".rstrip())
        return "\n".join([*lines, *(f"\nnote: {note}" for note in self.notes)])

    def as_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts of these."""
        curves = {name: [_plain(row) for row in rows] for name, rows in self.curves.items()}
        return {
            "norm": self.norm,
            "eps": self.eps,
            "images": len(self.rows[0].right),
            "rows": [_plain(row) for row in self.rows],
            "curves": curves,
            "notes": list(self.notes),
        }


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[str | Planned],
    eps: float,
    norm: str = "linf",
    radii: Sequence[float] = (),
    batch_size: int = 100,
    seed: int = 0,
    solver_gradient: str | None = None,
    tell: Callable[[Row], object] | None = None,
) -> Evaluation:
    """Attack a network by several attacks, in eval mode, and judge each image by all of them.

    An attack fools the model at an image where its answer is wrong and the change is at most as long as the radius, in
    the norm of the evaluation, whatever norm the attack itself works in.

    Args:
        model: a module that returns logits [N, K].
        images: [N, C, H, W], in [0, 1].
        labels: their classes [N], int64.
        attacks: names, as in `plan`, or what it makes of them, with other options.
        eps: the radius of the table.
        norm: "linf" or "l2".
        radii: others, for curves; attacks that look for the least change run once for all.
        batch_size: images that are attacked together.
        seed: of each attack's random numbers.
        solver_gradient: "exact" to attack with the true derivative of adaptive solvers, as in `fastode.attacks.pgd`.
        tell: is given each attack's row as soon as it is there.

    Returns:
        The evaluation.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.
        ImportError: an attack's library is not installed.

    Source: the tables of papers 001 to 004; the worst of all is Carlini et al. 2019 (On evaluating adversarial
        robustness), Section 3.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images = torch.rand(8, 3, 2, 2)
        >>> found = evaluate(model, images, model(images).argmax(1), attacks=["fgsm", "pgd5"], eps=0.5)
        >>> [(row.name, row.accuracy) for row in found.rows]
        [('clean', 1.0), ('fgsm', 0.0), ('pgd5', 0.0), ('worst of all', 0.0)]
    """
    planned = _all_planned(attacks, norm)
    for value, what in ((eps, "eps"), *((radius, "radii") for radius in radii)):
        checks.step_size(value, what)
    checks.steps(batch_size, "batch_size")
    checks.count(seed, "seed")
    task = task_of(model, images, labels, solver_gradient=solver_gradient)
    with attacked(model, "eval", None), torch.no_grad():
        clean = torch.cat([task.logits(part).argmax(1) for part in task.images.split(batch_size)])
    right = clean == labels
    everywhere = sorted({float(eps), *map(float, radii)})
    found: dict[float, list[Row]] = {radius: [] for radius in everywhere}
    notes: dict[str, None] = {}
    for each in planned:
        for row in _judged(each, task.model, images, labels, everywhere, batch_size, seed, solver_gradient, notes):
            found[row.eps].append(row)
            if tell is not None and row.eps == eps:
                tell(row)
    if solver_gradient == "exact" and adaptive_blocks(model) and not {each.attack for each in planned} <= _BLIND:
        notes[EXACT] = None
    worst = {radius: _worst(right, radius, rows) for radius, rows in found.items()}
    table = (Row(CLEAN, 0.0, right), *found[float(eps)], worst[float(eps)])
    curves = {}
    if radii:
        for place, each in enumerate(planned):
            curves[each.name] = tuple(rows[place] for rows in found.values())
        curves[WORST] = tuple(worst.values())
        curves = {name: (Row(CLEAN, 0.0, right), *rows) for name, rows in curves.items()}
    return Evaluation(norm, float(eps), table, curves, tuple(notes))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a probability, from how often something happened.

    Args:
        right: how often.
        count: of so many times, at least one.

    Returns:
        The lower and the upper end.

    Raises:
        TypeError, ValueError: a count is none.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Example:
        >>> tuple(round(end, 4) for end in wilson(8, 10))
        (0.4902, 0.9433)
    """
    checks.steps(count, "count")
    checks.count(right, "right")
    if right > count:
        raise ValueError(f"right must be at most count, {count}, got {right}")
    part, square = right / count, _Z * _Z / count
    middle = (part + square / 2) / (1 + square)
    reach = math.sqrt(part * (1 - part) * square + square * square / 4) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _all_planned(attacks: Sequence[str | Planned], norm: str) -> list[Planned]:
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks must be some names, got {checks.what(attacks)}")
    names = [each for each in attacks if not isinstance(each, Planned)]
    made = iter(plan(names, norm) if names else ())
    found = [each if isinstance(each, Planned) else next(made) for each in attacks]
    if len({each.name for each in found}) < len(found):
        raise ValueError(f"attacks must have different names, got {', '.join(each.name for each in found)}")
    for each in found:
        if each.norm != norm:
            raise ValueError(f"attacks must be of the norm {norm!r}, got {each.name} of {each.norm!r}")
    return found


def _judged(
    each: Planned, model: nn.Module, images: Tensor, labels: Tensor, radii: Sequence[float], batch_size: int, seed: int,
    solver_gradient: str | None, notes: dict[str, None],
) -> list[Row]:  # fmt: skip
    """An attack's row for each radius."""
    rows = []
    runs = [radii] if each.is_least else [[radius] for radius in radii]
    for served in runs:
        begin = time.perf_counter()
        options = each.arguments(served[-1], seed, images.device, solver_gradient)
        report = attacks.run(each.attack, model, images, labels, batch_size=batch_size, **options)
        seconds = time.perf_counter() - begin
        notes.update(dict.fromkeys(report.notes))
        for radius in served:
            near = each.distances(report.linf, report.l2) <= radius + _SLACK
            right = report.correct & ~(report.success & near)
            rows.append(Row(each.name, radius, right, seconds, report.queries))
    return rows


def _worst(right: Tensor, radius: float, rows: Sequence[Row]) -> Row:
    for row in rows:
        right = right & row.right
    return Row(WORST, radius, right)


def _plain(row: Row) -> dict[str, Any]:
    low, high = row.interval
    return {
        "name": row.name,
        "eps": row.eps,
        "right": int(row.right.sum()),
        "accuracy": row.accuracy,
        "low": low,
        "high": high,
        "seconds": row.seconds,
        "answers": row.queries.forward,
        "gradients": row.queries.gradient,
    }
