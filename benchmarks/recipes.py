"""`python -m benchmarks.recipes NAME`: run a recipe's quick size, record it, and write the papers' pages.

`--blocks reference` runs the reference blocks, to see how far their table is; `--times` only times both, in turns, by
processor time; `--cifar10 PATH` runs a recipe's form for 10,000 images of CIFAR-10 on those. A run that is stopped goes
on with the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastode
from fastode.recipes import RECIPES, Images, load, run
from fastode.recipes.data import OFFLINE, Normalized
from fastode.recipes.measures import Clean
from fastode.recipes.plan import Recipe, TrainingLoss

from . import experiments, header, timing
from .recipes_cifar10 import CIFAR10
from .recipes_page import BLOCKS, quick_plan, record_of, report

ROUNDS = 7
WORK = header.ROOT / "build" / "recipes"


def record(
    recipe: Recipe, blocks: str, work: Path = WORK, path: Path | None = None, images: Images | None = None
) -> Path:
    """Run a recipe and add its results to its record.

    Args:
        recipe: its quick size.
        blocks: "fused" or "reference".
        work: the folder of checkpoints.
        path: of the record; None for its own.
        images: that it runs on; None for its own.

    Returns:
        The record's file.
    """
    path = path or record_of(recipe.name)
    head = header.header(torch.device("cpu"), f"recipe {recipe.name}")  # of the code that runs, not of a later state
    results = run(recipe, work / f"{recipe.name}-{blocks}", fused=blocks == BLOCKS[0], images=images)
    experiments.save(path, {**experiments.load(path), blocks: results, f"{blocks} header": head})
    return path


def timed(recipe: Recipe, images: Images | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """How many times as fast the fused networks of a recipe are as the reference ones, by processor time and in turns.

    Args:
        recipe: its quick size.
        images: that it runs on; None for its own.
        rounds: of turns.

    Returns:
        By the network's name, for a step of training and for the first attack on as many images, the median ratio and
        its 20th and 80th percentile.
    """
    plan = quick_plan(recipe)
    images = images or OFFLINE[plan.data]()
    x, y = (part[: plan.training.batch] for part in images.train)
    attack = next(each for table in plan.tables for each in table.measures if not isinstance(each, Clean))
    found: dict[str, Any] = {}
    for network in plan.networks:
        runs: dict[str, dict[str, Callable[[], object]]] = {"training": {}, attack.columns[0]: {}}
        for blocks in BLOCKS:
            torch.manual_seed(0)
            body = network.make(in_channels=images.channels, num_classes=images.classes)
            model = nn.Sequential(Normalized(x), body)
            if blocks == BLOCKS[0]:
                fastode.fuse(model)
            step = partial(_step, model, network.loss or plan.training.loss, plan.training.optimizer, x, y)
            runs["training"][blocks] = step
            runs[attack.columns[0]][blocks] = partial(attack, model, x, y, torch.Generator().manual_seed(0), len(x))
        found[network.name] = {}
        for what, contenders in runs.items():
            times = timing.interleave(contenders, timing.processor_time, seconds=0.0, rounds=(rounds, rounds), warm=1)
            if times.errors:
                raise RuntimeError(f"{network.name}, {what}: {times.errors}")
            ratio = times.ratio(*BLOCKS)
            found[network.name][what] = [round(value, 3) for value in (ratio.median, ratio.p20, ratio.p80)]
    return found


def _step(
    model: nn.Module, loss: TrainingLoss, make: Callable[..., torch.optim.Optimizer], x: Tensor, y: Tensor
) -> None:
    """A step of training, with an optimizer that is new each time: making it takes little beside the step."""
    model.train()
    optimizer = make(model.parameters())
    optimizer.zero_grad()
    loss(model, x, y).value.backward()
    optimizer.step()


def main(argv: Sequence[str] | None = None) -> None:
    """Run and record the named recipes, and write the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *RECIPES], help="of recipes; none: the pages")
    parser.add_argument("--blocks", choices=BLOCKS, default=BLOCKS[0])
    parser.add_argument("--times", action="store_true", help="only time fused and reference blocks, in turns")
    parser.add_argument("--cifar10", metavar="PATH", help=f"of 10,000 images, for {' and '.join(CIFAR10)}")
    arguments = parser.parse_args(argv)
    if arguments.cifar10 and not set(arguments.names) <= set(CIFAR10):
        parser.error(f"--cifar10 is for {' and '.join(CIFAR10)}, got {' and '.join(arguments.names)}")
    for name in arguments.names:
        if arguments.cifar10:
            record(CIFAR10[name], arguments.blocks, images=load(arguments.cifar10))
        elif arguments.times:
            torch.set_num_threads(1)
            path, head = record_of(name), header.header(torch.device("cpu"), f"recipe {name}")
            times = {"networks": timed(RECIPES[name]), "rounds": ROUNDS, "header": head}
            experiments.save(path, {**experiments.load(path), "times": times})
        else:
            record(RECIPES[name], arguments.blocks)
    report()


if __name__ == "__main__":
    main()
