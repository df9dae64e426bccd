"""What of a network's accuracy attacks leave: `evaluate`, and the command `python -m fastode.robustness`."""

from .data import read_images
from .evaluation import Evaluation, Row, evaluate, wilson
from .planned import Planned, plan
from .plots import plot_accuracy

__all__ = ["Evaluation", "Planned", "Row", "evaluate", "plan", "plot_accuracy", "read_images", "wilson"]
