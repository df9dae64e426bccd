"""The papers' experiments as recipes: each trains networks, attacks them, and puts the paper's numbers beside ours.

`python -m fastode.recipes` lists them, and `python -m fastode.recipes run NAME` runs one; so does `run`.
"""

from . import implicit_euler, natural, stabilized, strong_stability
from .data import Images, digits, load, photographs, small_digits
from .plan import Claim, Measure, Network, Plan, Recipe, Table, Training
from .runner import report, run

RECIPES = {
    recipe.name: recipe
    for recipe in (
        implicit_euler.TABLE1,
        implicit_euler.TABLE3,
        implicit_euler.FIGURE6,
        natural.TABLE1,
        stabilized.TABLE2,
        stabilized.TABLE4,
        strong_stability.TABLE1,
        strong_stability.TABLE2,
    )
}

__all__ = [
    "RECIPES",
    "Claim",
    "Images",
    "Measure",
    "Network",
    "Plan",
    "Recipe",
    "Table",
    "Training",
    "digits",
    "load",
    "photographs",
    "report",
    "run",
    "small_digits",
]
