"""Attacks by the names of a command line: "pgd20" is PGD with 20 steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..attacks import ATTACKS
from ..attacks.balls import NORMS
from ..attacks.borrowed import art_attacks, foolbox_itself

# Those that look for the least change, whose images are judged by their distance afterwards.
_LEAST = ("cw_l2", "cw_linf", "boundary")
_BOTH_NORMS = ("pgd", "apgd")
_LIBRARIES: dict[str, Callable[[], Any]] = {
    "cw_l2": art_attacks,
    "cw_linf": art_attacks,
    "apgd": art_attacks,
    "boundary": foolbox_itself,
}
# "transfer" is none of them: it needs another model.
NAMES = ("fgsm", "pgd", "bim", "di2_fgsm", "spsa", "cw", "cw_l2", "cw_linf", "boundary", "apgd")


@dataclass(frozen=True)
class Planned:
    """An attack that is to be run.

    Attributes:
        name: as it was asked for.
        attack: that of `fastode.attacks`.
        norm: "linf" or "l2", in which its images are judged.
        options: its arguments but for the radius and what is drawn.
    """

    name: str
    attack: str
    norm: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_least(self) -> bool:
        """Whether it looks for the least change: one run then answers for every radius."""
        return self.attack in _LEAST

    def arguments(self, eps: float, seed: int, device: torch.device, solver_gradient: str | None) -> dict[str, Any]:
        """All its arguments but model, images and labels.

        Args:
            eps: the radius.
            seed: of a generator of its own.
            device: the generator's.
            solver_gradient: as in `fastode.attacks.pgd`, for attacks that take a gradient.
        """
        taken = inspect.signature(ATTACKS[self.attack]).parameters
        found = dict(self.options)
        if not self.is_least:
            found["eps"] = eps
        if "generator" in taken:
            found["generator"] = torch.Generator(device).manual_seed(seed)
        if "solver_gradient" in taken and solver_gradient is not None:
            found["solver_gradient"] = solver_gradient
        return found

    def distances(self, linf: Tensor, l2: Tensor) -> Tensor:
        """How far its images are in the norm that they are judged in [N]."""
        return linf if self.norm == "linf" else l2


def plan(names: Sequence[str], norm: str = "linf") -> tuple[Planned, ...]:
    """The attacks of some names, of which the libraries are there.

    Args:
        names: each an attack of `fastode.attacks` ("cw" is that of the norm), and behind it, where it takes steps, how
            many: "pgd20".
        norm: "linf" or "l2", in which all of them are judged.

    Returns:
        The attacks.

    Raises:
        TypeError, ValueError: a name is none of these, or its attack has another norm.
        ImportError: an attack's library is not installed.

    Example:
        >>> plan(["pgd20"])
        (Planned(name='pgd20', attack='pgd', norm='linf', options={'norm': 'linf', 'steps': 20}),)
    """
    checks.one_of("norm", norm, NORMS)
    if isinstance(names, str) or not names:
        raise ValueError(f"attacks must be some names, got {checks.what(names)}")
    found = tuple(_planned(name, norm) for name in names)
    if len({each.name for each in found}) < len(found):
        raise ValueError(f"attacks must be different ones, got {', '.join(names)}")
    for each in found:
        if each.attack in _LIBRARIES:
            _LIBRARIES[each.attack]()
    return found


def _planned(text: Any, norm: str) -> Planned:
    known = [name for name in NAMES if isinstance(text, str) and text.startswith(name)]
    kind = max(known, key=len, default="")
    rest = text[len(kind) :] if kind else ""
    if not kind or (rest and not rest.isdecimal()):
        wanted = f"one of {', '.join(NAMES)}, and behind it how many steps"
        raise ValueError(f"attacks must be each {wanted}, got {text!r}")
    attack = f"cw_{norm}" if kind == "cw" else kind
    options: dict[str, Any] = {"norm": norm} if attack in _BOTH_NORMS else {}
    if norm == "l2" and attack not in (*_BOTH_NORMS, *_LEAST):
        raise ValueError(f"attacks must be of norm 'l2', got {text!r}, which is of the maximum norm")
    if rest:
        if "steps" not in inspect.signature(ATTACKS[attack]).parameters:
            raise ValueError(f"attacks must be without a number of steps where they have none, got {text!r}")
        checks.steps(int(rest), f"steps of {kind}")
        options["steps"] = int(rest)
    elif attack == "pgd":
        options["steps"] = 20
    return Planned(text, attack, norm, options)
