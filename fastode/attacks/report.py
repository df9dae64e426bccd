"""What an attack came to: its images, whom they fool, how far they are, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import choice
from ..dispatch.engines import is_reference
from .blind import spsa, transfer
from .gradient import bim, di2_fgsm, fgsm, pgd
from .held import adaptive_blocks, attacked
from .libraries import apgd, boundary, cw_l2, cw_linf
from .task import Queries, Task, counted, task_of

__all__ = ["ATTACKS", "Report", "run"]

ATTACKS: Mapping[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (fgsm, pgd, bim, di2_fgsm, spsa, transfer, cw_l2, cw_linf, boundary, apgd)
}

WITHOUT_GRADIENT = (spsa, boundary)

MASKED = (
    "an adaptive solver's usual gradient is not that of the numbers it returns, and may hide what an attack needs: "
    'attack with solver_gradient="exact" too before you claim robustness'
)
FUSED = (
    "fused blocks hide their graph from checks for obfuscated gradients, as AutoAttack's: run those once on an unfused "
    "model (fastode.unfuse) before you claim robustness"
)


@dataclass(frozen=True)
class Report:
    """What an attack came to.

    Attributes:
        attack: its name.
        images: the attacked images [N, C, H, W].
        correct: which images the model had right before [N].
        success: of which the model is wrong afterwards, or with targets takes them for these [N].
        linf: the largest change of a pixel of each image [N].
        l2: the Euclidean length of each image's change [N].
        queries: of the attack, all images together; judging them before and after does not count.
        notes: what has to be said beside these numbers.
    """

    attack: str
    images: Tensor
    correct: Tensor
    success: Tensor
    linf: Tensor
    l2: Tensor
    queries: Queries
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The part of the images that the model has right before the attack."""
        return float(self.correct.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """The part of the images that the model has right before, and that do not fool it after."""
        return float((self.correct & ~self.success).double().mean())

    def __str__(self) -> str:
        count = len(self.success)
        lines = [
            f"{self.attack}: {self.accuracy:.2%} right before, {self.robust_accuracy:.2%} after, of {count} images",
            f"largest distances: {self.linf.max():.6g} (maximum norm), {self.l2.max():.6g} (Euclidean)",
            f"queries for each image: {self.queries.forward / count:.1f} answers, "
            f"{self.queries.gradient / count:.1f} gradients",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def run(
    attack: str | Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int | None = None,
    **options: Any,
) -> Report:
    """Attack a model and report what came of it.

    Args:
        attack: the name of an attack of this module, or a function of the same signature.
        model: a module that returns logits [N, K].
        images: [N, C, H, W], within the bounds.
        labels: their classes [N], int64.
        batch_size: images that are attacked together; None for all.
        options: the attack's other arguments.

    Returns:
        The report.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the model returns no logits.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> report = run("fgsm", model, images, model(images).argmax(1), eps=0.5)
        >>> report.accuracy, report.robust_accuracy, report.queries
        (1.0, 0.0, Queries(forward=4, gradient=4))
    """
    if isinstance(attack, str):
        checks.one_of("attack", attack, tuple(ATTACKS))
        function = ATTACKS[attack]
    elif callable(attack):
        function = attack
    else:
        raise TypeError(f"attack must be a name or a function, got {checks.what(attack)}")
    targets, mode = options.get("targets"), options.get("mode", "eval")
    task = task_of(model, images, labels, targets, options.get("bounds", (0.0, 1.0)), mode)
    if batch_size is not None:
        checks.steps(batch_size, "batch_size")
    parts, queries, fused = [], Queries(), False
    for rows in torch.arange(len(images), device=images.device).split(batch_size or len(images)):
        part = task.at(rows)
        if targets is not None:
            options["targets"] = part.targets
        with choice.recording() as used:
            clean = _logits(part, part.images, mode)
        fused = fused or any(not is_reference(engine) for engine in used.values())
        with counted() as found:
            moved = function(model, part.images, part.labels, **options)
        queries.forward, queries.gradient = queries.forward + found.forward, queries.gradient + found.gradient
        parts.append((moved, clean.argmax(1) == part.labels, part.fooled(_logits(part, moved, mode))))
    moved, correct, success = (torch.cat(each) for each in zip(*parts, strict=True))
    delta = (moved - task.images).flatten(1)
    name = attack if isinstance(attack, str) else getattr(attack, "__name__", type(attack).__name__)
    asked = options.get("source", model)  # whose gradient it was, if any
    blocks = [] if function in WITHOUT_GRADIENT else adaptive_blocks(asked)
    exact = {options.get("solver_gradient") or block.gradient for block in blocks} <= {"exact"}
    notes = [note for note, due in ((MASKED, not exact), (FUSED, fused)) if due]
    return Report(name, moved, correct, success, delta.abs().amax(1), delta.norm(dim=1), queries, tuple(notes))


def _logits(task: Task, x: Tensor, mode: str) -> Tensor:
    with attacked(task.model, mode, None), torch.no_grad():
        return task.logits(x)
