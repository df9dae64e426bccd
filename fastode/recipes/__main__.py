"""``python -m fastode.recipes`` lists the recipes; ``python -m fastode.recipes run NAME`` runs one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..dispatch.engines import REFERENCE
from ..solver import SolveError
from . import RECIPES, data
from .download import SOURCES, download
from .plan import Recipe
from .runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.command is None:
        print(listing())
        return 0
    if chosen.recipe not in RECIPES:
        return _failed(f"NAME must be one of {', '.join(RECIPES)}, got {chosen.recipe!r}")
    recipe = RECIPES[chosen.recipe]
    try:
        images = _images(recipe, chosen.data, chosen.paper, chosen.download)
    except (TypeError, ValueError, OSError, ImportError) as error:
        return _failed(str(error))
    try:
        run(
            recipe,
            chosen.out or default_folder(recipe, chosen.paper, chosen.fused),
            images=images,
            paper=chosen.paper,
            fused=chosen.fused,
            epochs=chosen.epochs,
            seeds=chosen.seeds,
            device=chosen.device,
        )
    except (ValueError, OSError, ImportError, FloatingPointError, SolveError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def listing() -> str:
    """The recipes, each with its quick size."""
    lines = ["Recipes; each has a quick size, offline, whose time is that on two cores, and the paper's (--paper):", ""]
    for recipe in RECIPES.values():
        plan = recipe.plan(False, False)
        tables = ", ".join(table.name for table in plan.tables)
        lines += [
            f"{recipe.name:<13}{recipe.title}",
            f"{'':<13}{tables} of {recipe.paper}",
            f"{'':<13}quick: {plan.data}, {plan.training.epochs} epochs, {len(plan.networks)} networks. {plan.time}",
        ]
    return "\n".join([*lines, "", "python -m fastode.recipes run NAME"])


def default_folder(recipe: Recipe, paper: bool, fused: bool) -> Path:
    """Where a run goes if it is not said."""
    parts = (recipe.name, "paper" if paper else "quick", *([] if fused else [REFERENCE.name]))
    return Path("fastode-recipes") / "-".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastode.recipes", description=(__doc__ or "").replace("``", "`"))
    commands = parser.add_subparsers(dest="command", metavar="run")
    one = commands.add_parser("run", help="train, attack, and print the paper's table with ours beside it")
    one.add_argument("recipe", metavar="NAME", help="of a recipe")
    one.add_argument(
        "--data",
        help=f"{', '.join(data.OFFLINE)}, which packages ship; or a path: an .npz file in Keras' layout, a folder "
        "with a data set's own files, or one with train/CLASS/IMAGE and test/CLASS/IMAGE",
    )
    one.add_argument("--download", choices=tuple(SOURCES), help="fetch this data set into --data, or data/NAME")
    one.add_argument("--paper", action="store_true", help="the paper's size, for a GPU; wants --data")
    one.add_argument("--epochs", type=int, help="of training")
    one.add_argument("--seeds", type=int, help="how many, from 0")
    one.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    one.add_argument("--out", type=Path, help="the folder of results and checkpoints")
    blocks = one.add_mutually_exclusive_group()
    blocks.add_argument("--fused", action="store_true", default=True, help="fused blocks, as if not said")
    blocks.add_argument(f"--{REFERENCE.name}", dest="fused", action="store_false", help="plain PyTorch")
    return parser


def _images(recipe: Recipe, where: str | None, paper: bool, fetched: str | None) -> data.Images | None:
    if fetched:
        where = str(download(fetched, Path(where or f"data/{fetched}")))
    if where is None:
        if paper:
            raise ValueError(f"--paper wants --data: {recipe.name} is of {recipe.plan(True, False).data}")
        return None
    return data.OFFLINE[where]() if where in data.OFFLINE else data.load(where)


def _failed(reason: str) -> int:
    print(f"python -m fastode.recipes: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
