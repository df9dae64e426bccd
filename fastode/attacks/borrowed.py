"""How an attack of a library runs: on a model of images in [0, 1], which hides the one that is attacked.

What a library sets on it does not reach the other. Both libraries are imported when one of their attacks is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .gradient import finite
from .held import attacked
from .task import Task, gradient_counted

Run = Callable[["Unit", Tensor, Tensor], Tensor]  # the model, images in [0, 1], classes: attacked images


class Unit(nn.Module):
    """A model of images in [0, 1], float32, which counts what it is asked; it holds the other one out of sight."""

    def __init__(self, task: Task, classes: int) -> None:
        super().__init__()
        self.hidden, self.classes, self.shape = [task], classes, tuple(task.images.shape[1:])
        self.device_type = "gpu" if task.images.is_cuda else "cpu"
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        task = self.hidden[0]
        if x.requires_grad and torch.is_grad_enabled():
            gradient_counted(len(x))
        x = (x * (task.high - task.low) + task.low).to(task.images.dtype)
        if not task.images.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        return task.logits(x).float()

    def classifier(self) -> Any:
        """This model as ART sees it."""
        from art.estimators.classification import PyTorchClassifier

        return PyTorchClassifier(
            self, nn.CrossEntropyLoss(), self.shape, self.classes, clip_values=(0.0, 1.0), device_type=self.device_type
        )


def borrowed(
    task: Task, run: Run, mode: str, solver_gradient: str | None, generator: torch.Generator | None,
    kept: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Attack what is not fooled yet.

    Args:
        task: what is attacked.
        run: the attack, on images in [0, 1].
        mode: the model's.
        solver_gradient: as in `pgd`.
        generator: from which the library's random numbers come.
        kept: of the attacked images [N, C, H, W], those that are returned.
    """
    reach = reach_of(task)
    with attacked(task.model, mode, solver_gradient), _seeded(generator, task.images):
        with torch.no_grad():
            logits = task.logits(task.images)
        rows = (~task.fooled(logits)).nonzero().squeeze(1)
        moved = task.images.clone()
        if len(rows):
            part = task.at(rows)
            unit = Unit(part, logits.shape[1])
            x = ((part.images - task.low) / reach).float().clamp(0, 1)
            found = run(unit, x.contiguous(), part.labels if part.targets is None else part.targets)
            found = (found.to(part.images) * reach + task.low).clamp(task.low, task.high)
            moved[rows] = found
        moved = kept(moved)
    return finite(moved, task.images)


def searched(
    task: Task, run: Run, norm: str, eps: Any, mode: str, solver_gradient: str | None,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """An attack that looks for the least change: what does not fool, or is farther than eps, comes back as it was."""

    def kept(moved: Tensor) -> Tensor:
        with torch.no_grad():
            able = task.fooled(task.logits(moved))
        if eps is not None:
            delta = (moved - task.images).flatten(1)
            far = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
            able &= far <= eps
        return torch.where(able.view(-1, 1, 1, 1), moved, task.images)

    return borrowed(task, run, mode, solver_gradient, generator, kept)


def reach_of(task: Task) -> float:
    """How far the bounds are apart, which must be two numbers: a distance would differ by channel otherwise."""
    if task.low.numel() > 1 or task.high.numel() > 1:
        raise ValueError("bounds must be two numbers here; put the normalisation into the model, got some per channel")
    return float(task.high - task.low)


def check_search(eps: Any, steps: Any, step_size: Any, confidence: Any = 0.0, constant: Any = 1.0) -> None:
    if eps is not None:
        checks.step_size(eps, "eps")
    checks.steps(steps)
    checks.step_size(step_size)
    checks.step_size(constant, "constant")
    checks.finite("confidence", confidence)
    if confidence < 0:
        raise ValueError(f"confidence must be at least 0, got {confidence}")


def generated(attack: Any, x: Tensor, classes: Tensor) -> Tensor:
    made = attack.generate(x=x.cpu().numpy(), y=classes.cpu().numpy())
    return torch.from_numpy(made).to(x.device)


@contextmanager
def _seeded(generator: torch.Generator | None, images: Tensor) -> Iterator[None]:
    """NumPy's and PyTorch's global random numbers, which the libraries draw, come from a generator meanwhile."""
    import numpy  # only here: this module is imported without it

    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    before = numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        numpy.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            numpy.random.set_state(before)  # noqa: NPY002


def art_attacks() -> Any:
    try:
        from art.attacks import evasion
    except ImportError as error:
        raise _missing("adversarial-robustness-toolbox", error) from error
    return evasion


def foolbox_itself() -> Any:
    try:
        import foolbox
    except ImportError as error:
        raise _missing("foolbox", error) from error
    return foolbox


def _missing(library: str, error: ImportError) -> ImportError:
    return ImportError(f'this attack needs {library}: pip install "fastode[attacks]" ({error})')
