"""What an attack makes larger: a number for each sample, from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .task import Task

LOSSES = ("ce", "margin", "kl")


@dataclass(frozen=True)
class Objective:
    """What is made larger: a loss for the labels, or its negative for the targets.

    Attributes:
        loss: "ce", the cross-entropy; "margin", max over j of z_j - z_y, at most `confidence` (C&W's hinge); "kl", the
            divergence of the answer from the one to the unchanged image.
        classes: labels or targets [N].
        sign: 1, or -1 with targets.
        confidence: κ of the margin.
        clean: log-probabilities of the unchanged images [N, K], of "kl".

    Source: Carlini & Wagner 2017, Section V (f₆); Zhang et al. 2019 (TRADES), eq. 3.
    """

    loss: str
    classes: Tensor
    sign: int
    confidence: float = math.inf
    clean: Tensor | None = None

    def at(self, rows: Tensor) -> Objective:
        """The part of some samples [n]."""
        clean = None if self.clean is None else self.clean[rows]
        return replace(self, classes=self.classes[rows], clean=clean)

    def __call__(self, logits: Tensor) -> Tensor:
        """The loss of each sample [n], in float32 or better."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.loss == "kl":
            assert self.clean is not None
            return F.kl_div(F.log_softmax(logits, 1), self.clean, reduction="none", log_target=True).sum(1)
        if self.loss == "ce":
            return self.sign * F.cross_entropy(logits, self.classes, reduction="none")
        own = logits.gather(1, self.classes[:, None]).squeeze(1)
        others = logits.scatter(1, self.classes[:, None], -math.inf).amax(1)
        return (self.sign * (others - own)).clamp(max=self.confidence)


def check_loss(loss: Any, task: Task, confidence: Any) -> None:
    """Refuse a loss that is not known, or has no meaning with targets."""
    checks.one_of("loss", loss, LOSSES)
    if loss == "kl" and task.targets is not None:
        raise ValueError("targets must be None with loss 'kl', which knows no classes")
    if confidence != math.inf:
        checks.step_size(confidence, "confidence")


def objective_of(loss: str, task: Task, confidence: float = math.inf) -> Objective:
    """The objective of an attack; "kl" asks the model for its answer to the unchanged images.

    Args:
        loss: its name.
        task: what is attacked.
        confidence: κ of the margin.
    """
    clean = None
    if loss == "kl":
        with torch.no_grad():
            clean = F.log_softmax(task.logits(task.images).float(), 1)
    classes, sign = (task.labels, 1) if task.targets is None else (task.targets, -1)
    return Objective(loss, classes, sign, confidence, clean)
