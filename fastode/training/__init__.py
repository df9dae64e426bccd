"""The papers' training losses: functions of (model, images, labels) that return a loss and what to log."""

from .losses import Loss, adversarial, natural, trades, uniform_noise

__all__ = ["Loss", "adversarial", "natural", "trades", "uniform_noise"]
