"""One runner for every recipe: train each network, measure it, and write what came out."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from .. import checks
from ..fusion.swap import fuse
from ..training import Trainer
from .data import OFFLINE, Batches, Images, Normalized
from .plan import Network, Plan, Recipe, Training, described
from .plots import draw
from .records import write_json, write_text
from .tables import Results, csv_text, heading, said, terminal

__all__ = ["run"]

Say = Callable[[str], Any]


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    images: Images | None = None,
    paper: bool = False,
    fused: bool = True,
    epochs: int | None = None,
    seeds: int | None = None,
    device: str = "cpu",
    say: Say = print,
    plan: Plan | None = None,
) -> Results:
    """Run a recipe, or go on with it: networks whose results are in the folder are not trained again.

    Written are results.json, after each measurement; for each table a CSV file and a plot (with matplotlib), after each
    network; and of each network and seed a checkpoint, after each epoch.

    Args:
        recipe: of `RECIPES`.
        folder: where everything goes.
        images: that it runs on; None for those that packages ship, which the paper's size has not.
        paper: the paper's size, in place of the quick one.
        fused: False to run the reference blocks.
        epochs: of training; None for the plan's.
        seeds: how many, from 0; None for the plan's.
        device: "cpu" or "cuda".
        say: what to do with a line about progress.
        plan: another one than the recipe's.

    Returns:
        What is in results.json.

    Raises:
        TypeError, ValueError: an argument is none of what it may be, or the folder has results of another run.
        OSError: something could not be written; what was there stays.
        ImportError: a library is missing that an attack, the trainer or the images need.
    """
    if images is None:
        images = _shipped((plan or recipe.plan(paper, False)).data)
    plan = plan or recipe.plan(paper, images.channels > 1)
    plan = _changed(plan, epochs, seeds)
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("a recipe must run in one process, got one of several that torchrun started")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' here, got 'cuda', and torch sees no CUDA device")
    for table in plan.tables:
        for measure in table.measures:
            measure.ready()
    one = _Run(recipe, plan, images, Path(folder), fused, device, say)
    one.start(paper)
    for seed in range(plan.seeds):
        for network in plan.networks:
            one.row(network, seed)
    say(report(plan, one.results))
    return one.results


def settings_of(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What of a recipe makes its results what they are, in JSON's words."""
    unsaid = dataclasses.replace(plan, seeds=0, tables=(), claims=(), time="", note="")
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "citation": recipe.paper,
        "epochs": plan.training.epochs,
        "plan": described(unsaid),
        "measures": [described(measure) for table in plan.tables for measure in table.measures],
    }


def report(plan: Plan, results: Results) -> str:
    """The heading, the tables, whether the paper's orders are in them, and the time."""
    parts = [heading(plan, results), *(terminal(table, plan, results) for table in plan.tables)]
    claims = [f"- {line}" for line in said(plan, results)]
    orders = ["\n".join(["The paper's orders:", *claims])] if claims else []
    return "\n\n".join([*parts, *orders, times(results)])


def times(results: Results) -> str:
    """How long training and measuring took, all networks and seeds together."""
    cells = [cell for row in results["cells"].values() for cell in row.values()]
    trained, measured = (sum(cell[name] for cell in cells) for name in ("train_seconds", "measure_seconds"))
    return f"Time: {trained:.0f} s of training, {measured:.0f} s of attacks and other measurements."


def _shipped(name: str) -> Images:
    if name not in OFFLINE:
        raise ValueError(f"images must be given for the paper's size, which is of {name}, got None")
    return OFFLINE[name]()


def _changed(plan: Plan, epochs: int | None, seeds: int | None) -> Plan:
    """A plan with other numbers of epochs and seeds; where the rate falls moves along."""
    if seeds is not None:
        checks.steps(seeds, "seeds")
        plan = dataclasses.replace(plan, seeds=seeds)
    if epochs is not None:
        checks.steps(epochs, "epochs")
        old = plan.training
        milestones = tuple(max(1, round(each * epochs / old.epochs)) for each in old.milestones)
        plan = dataclasses.replace(plan, training=dataclasses.replace(old, epochs=epochs, milestones=milestones))
    return plan


class _Run:
    """A recipe that runs.

    Attributes:
        results: what is in results.json.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, images: Images, folder: Path, fused: bool, device: str, say: Say
    ) -> None:
        self.recipe, self.plan, self.images, self.folder = recipe, plan, images, folder
        self.fused, self.device, self.say = fused, device, say
        self.results: Results = {}

    def start(self, paper: bool) -> None:
        """Take what an earlier run of the same kind has left, or begin."""
        settings = {
            **settings_of(self.recipe, self.plan),
            "paper": paper,
            "fused": self.fused,
            "device": self.device,
            "data": self.images.source,
            "images": min(self.plan.images, len(self.images.test[0])),
        }
        path = self.folder / "results.json"
        if path.exists():
            try:
                self.results = json.loads(path.read_text())
                found = self.results["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"folder must have results of a recipe, got {path}, which cannot be read: {error}"
                ) from None
            binding = settings.keys() - {"title", "citation"}
            other = next((name for name in settings if name in binding and found.get(name) != settings[name]), None)
            if other is not None:
                raise ValueError(
                    f"folder must have results of this run, got {self.folder} of one with another {other}: "
                    "name another folder, or move it away"
                )
        else:
            left = sorted(each.name for each in self.folder.glob("*.pt"))
            if left:  # which could be of other settings, and would be gone on with
                raise ValueError(
                    f"folder must have the results.json of its checkpoints, got {self.folder} with {left[0]} alone: "
                    "name another folder, or move it away"
                )
            self.results = {"cells": {}}
        seeds = max([self.plan.seeds, *(len(row) for row in self.results["cells"].values())])
        self.results["settings"] = {**settings, "seeds": seeds}
        self.save()

    def save(self) -> None:
        """Write what was found, so that it need not be found again."""
        write_json(self.folder / "results.json", self.results)

    def show(self) -> None:
        """Write the tables and plots of what there is."""
        for table in self.plan.tables:
            path = self.folder / f"{slug(table.name)}.csv"
            write_text(path, csv_text(table, self.plan, self.results))
            draw(table, self.plan, self.results, path.with_suffix(".png"))

    def row(self, network: Network, seed: int) -> None:
        """Train and measure one network, as far as that is not done."""
        measures = [measure for table in self.plan.tables for measure in table.measures]
        cell = (
            self.results["cells"]
            .setdefault(network.name, {})
            .setdefault(str(seed), {"values": {}, "train_seconds": 0.0, "measure_seconds": 0.0, "losses": []})
        )
        left = [measure for measure in measures if not set(measure.columns) <= set(cell["values"])]
        if not left:
            self.say(f"{network.name}, seed {seed}: done before")
            return
        processor = time.process_time() - cell.get("processor_seconds", 0.0)
        model = self.trained(network, seed, cell)
        pixels, classes = (part[: self.plan.images].to(self.device) for part in self.images.test)
        model.eval().requires_grad_(False)
        for measure in left:
            begin = time.monotonic()
            generator = torch.Generator().manual_seed(seed)
            cell["values"].update(measure(model, pixels, classes, generator, self.plan.batch))
            cell["measure_seconds"] += time.monotonic() - begin
            cell["processor_seconds"] = time.process_time() - processor
            self.save()
        self.show()
        shown = (
            f"{name} {value if isinstance(value, str) else f'{value:.2f}'}" for name, value in cell["values"].items()
        )
        self.say(f"{network.name}, seed {seed}: {', '.join(shown)}")

    def trained(self, network: Network, seed: int, cell: dict[str, Any]) -> nn.Module:
        """The network, trained to the last epoch, from the checkpoint where there is one."""
        plan, images = self.plan, self.images
        torch.manual_seed(seed)
        body = network.make(in_channels=images.channels, num_classes=images.classes)
        model = nn.Sequential(Normalized(images.train[0]), body)
        if self.fused:
            fuse(model)
        path = self.folder / f"{slug(network.name)}-seed-{seed}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            model,
            network.loss or plan.training.loss,
            epochs=plan.training.epochs,
            optimizer=plan.training.optimizer,
            schedule=_schedule(plan.training),
            accelerator=self.device,
            checkpoint=path,
            seed=seed,
        )
        count = plan.training.images
        pixels, classes = (part[:count] for part in images.train)
        rows = trainer.fit(Batches(pixels, classes, plan.training.batch, augment=plan.training.augment))
        cell["train_seconds"] = sum(row["seconds"] for row in rows)
        cell["losses"] = [round(row["loss"], 4) for row in rows]
        self.save()
        return model


def _schedule(training: Training) -> Callable[..., MultiStepLR] | None:
    if not training.milestones:
        return None
    return partial(MultiStepLR, milestones=list(training.milestones), gamma=training.factor)


def slug(name: str) -> str:
    """A name as a part of a file's: "table-1"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
