"""The papers' training losses: functions of (model, images, labels) that return a loss and what to log; and a trainer.

Lightning Fabric, which the trainer runs on, is imported when one is made.
"""

from .checkpoint import load_weights
from .losses import Loss, adversarial, natural, trades, uniform_noise
from .trainer import Trainer
from .yopo import yopo

__all__ = ["Loss", "Trainer", "adversarial", "load_weights", "natural", "trades", "uniform_noise", "yopo"]
