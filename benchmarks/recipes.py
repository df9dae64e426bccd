"""`python -m benchmarks.recipes NAME`: run a recipe's quick size, record it, and write the papers' pages.

`--blocks reference` runs the reference blocks, whose table stands beside as a check and for its time. A run that is
stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastode.recipes import RECIPES, run
from fastode.recipes.plan import Recipe

from . import experiments, header
from .recipes_page import BLOCKS, record_of, report

WORK = header.ROOT / "build" / "recipes"


def record(recipe: Recipe, blocks: str, work: Path = WORK, path: Path | None = None) -> Path:
    """Run a recipe and add its results to its record.

    Args:
        recipe: its quick size.
        blocks: "fused" or "reference".
        work: the folder of checkpoints.
        path: of the record; None for its own.

    Returns:
        The record's file.
    """
    path = path or record_of(recipe.name)
    head = header.header(torch.device("cpu"), f"recipe {recipe.name}")  # of the code that runs, not of a later state
    results = run(recipe, work / f"{recipe.name}-{blocks}", fused=blocks == BLOCKS[0])
    experiments.save(path, {**experiments.load(path), blocks: results, f"{blocks} header": head})
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run and record the named recipes, and write the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *RECIPES], help="of recipes; none: the pages")
    parser.add_argument("--blocks", choices=BLOCKS, default=BLOCKS[0])
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        record(RECIPES[name], arguments.blocks)
    report()


if __name__ == "__main__":
    main()
