"""A training loop by Lightning Fabric, with checkpoints that it goes on from to the same bits."""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import checks
from . import checkpoint as checkpoints
from .batches import Batch, generators_of, seed_everything, shared
from .losses import Loss
from .progress import Bar

__all__ = ["Trainer"]

_KEPT = ("optimizer_type", "optimizer", "schedule", "generators", "rows", "seed")  # of a checkpoint, beside the weights
PRECISIONS = ("32-true", "bf16-mixed")
Row = dict[str, float]


class Trainer:
    """Trains a network on batches of images and labels: Lightning Fabric's loop and nothing more.

    Started by `torchrun` (or `fabric run`), every process takes every n-th batch of the loader, and gradients are
    averaged: as one process with batches n times as large. At the start of each epoch the global generators of torch,
    Python and NumPy are seeded by `seed` and the epoch.

    Args:
        model: is moved to the device, and trained in training mode.
        loss: a function of (model, images, labels) that returns a `Loss`; bind its keywords by functools.partial, and
            the generators among them are kept in the checkpoint.
        epochs: how often the loader is gone through.
        optimizer: of the model's parameters, or a function of them that makes one.
        schedule: a torch.optim.lr_scheduler of the optimizer, or a function of it that makes one, which takes a step
            after each epoch; None for a constant rate.
        accelerator: "cpu", "cuda", or another one of Fabric's.
        precision: "32-true" for dtypes as they are, or "bf16-mixed" for autocast around the loss.
        accumulate: batches whose mean gradient makes one step of the optimizer.
        checkpoint: a file, written after each epoch; training goes on from it where it exists. None for none.
        log: a CSV file, a row for each epoch; None for none.
        evaluate: a function of the model, in eval mode, that returns numbers by name, after each epoch and in every
            process; None for none.
        seed: of everything that is drawn from the global generators.
        progress: whether a progress bar is shown; None where standard error is a terminal.

    Attributes:
        fabric: Lightning Fabric's object, for its device and processes.

    Raises:
        ImportError: Lightning Fabric is not installed.
        TypeError, ValueError: an argument is none of what it may be.

    Example:
        >>> from fastode import training
        >>> from functools import partial
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> trainer = Trainer(model, training.natural, epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1))
        >>> rows = trainer.fit([(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))])
        >>> list(rows[1])
        ['epoch', 'loss', 'accuracy', 'seconds']
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor, Tensor], Loss],
        *,
        epochs: int,
        optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        accelerator: str = "cpu",
        precision: str = "32-true",
        accumulate: int = 1,
        checkpoint: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        checks.module("model", model)
        for name, function in (("loss", loss), ("evaluate", evaluate)):
            if not callable(function) and not (function is None and name == "evaluate"):
                raise TypeError(f"{name} must be a function, got {checks.what(function)}")
        checks.steps(epochs, "epochs")
        checks.one_of("precision", precision, PRECISIONS)
        checks.steps(accumulate, "accumulate")
        checks.count(seed, "seed")
        if progress is not None:
            checks.flag("progress", progress)
        self.checkpoint, self.log = _file("checkpoint", checkpoint), _file("log", log)
        self.model, self.loss, self.evaluate = model, loss, evaluate
        self.epochs, self.accumulate, self.seed = epochs, accumulate, seed
        self.fabric = _fabric(accelerator, precision)
        self.fabric.to_device(model)
        self.optimizer = _optimizer(optimizer, model)
        self.schedule = _schedule(schedule, self.optimizer)
        self.last: Row = {}  # of the last evaluation, for the bar
        self.bar = self.fabric.is_global_zero and (sys.stderr.isatty() if progress is None else progress)

    def fit(self, loader: Iterable[Batch]) -> list[Row]:
        """Train to the last epoch, from the checkpoint where it exists.

        Args:
            loader: a DataLoader, or any batches that can be gone through once an epoch: images [N, C, H, W] and labels
                [N], int64.

        Returns:
            Of each epoch, those before the checkpoint included: "epoch" (from 1), the mean "loss" over its images and
            what the loss logs, what `evaluate` returns (as "evaluate_accuracy" where the loss logs "accuracy" too),
            and "seconds" of training.

        Raises:
            TypeError, ValueError: the loader has no batches, or the checkpoint is of another network or run.
            FloatingPointError: the loss is not finite; the checkpoint is that of the epoch before.
            OSError: a checkpoint could not be written; the one before it stands.
        """
        batches = shared(loader, self.fabric.global_rank, self.fabric.world_size)
        generators = generators_of(loader, self.loss, self.evaluate)
        rows = self._resumed(generators)
        self._send_state()
        mode = self.model.training
        try:
            for epoch in range(len(rows), self.epochs):
                rows.append(self._epoch(batches, epoch))
                if self.schedule is not None:
                    self.schedule.step()
                self._write(rows, generators)
        finally:
            self.model.train(mode)
        return rows

    def _epoch(self, batches: Iterable[Batch], epoch: int) -> Row:
        """Train for one epoch.

        Args:
            batches: of this process.
            epoch: from 0.
        """
        begin = time.perf_counter()
        seed_everything(self.seed, epoch)  # the same order of the data in all processes
        stream = iter(batches)
        seed_everything(self.seed, epoch, self.fabric.global_rank)
        means = _Means()
        bar = Bar(self.bar, f"epoch {epoch + 1}/{self.epochs}", _length(batches), self.last)
        self.model.train()
        try:
            while group := list(islice(stream, self.accumulate)):
                self._step(group, means)
                bar.update(len(group), means.own)
        finally:
            bar.close()
        if not means.count:
            raise ValueError(f"loader must have a batch for each of {self.fabric.world_size} processes, got none")
        row = {"epoch": epoch + 1, **means.row(self.fabric.world_size)}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"loss must be finite, got a mean of {row['loss']} in epoch {epoch + 1}")
        seconds = time.perf_counter() - begin
        found = self._evaluated()
        self.last = {f"last {name}": value for name, value in found.items()}
        return {
            **row,
            **{f"evaluate_{name}" if name in row else name: found[name] for name in found},
            "seconds": seconds,
        }

    def _step(self, group: list[Batch], means: _Means) -> None:
        """One step of the optimizer, by the mean gradient of some batches."""
        total = sum(len(labels) for _, labels in group)
        for batch in group:
            images, labels = self.fabric.to_device(batch)
            with self.fabric.autocast():
                found = self.loss(self.model, images, labels)
            if not isinstance(found, Loss):
                raise TypeError(f"loss must return a fastode.training.Loss, got {checks.what(found)}")
            means.add({"loss": found.value.detach(), **found.log}, len(labels))
            self.fabric.backward(found.value * (len(labels) / total))
        self._average_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _average_gradients(self) -> None:
        """Give all processes the mean of their gradients, in one message for each dtype.

        The model is not wrapped in DistributedDataParallel: attacks ask it many times between two steps, and a loss may
        take gradients of its own.
        """
        if self.fabric.world_size == 1:
            return
        for gradients in _by_dtype(each.grad for each in self.model.parameters() if each.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.fabric.world_size
            for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def _send_state(self) -> None:
        """Give all processes the first one's parameters and buffers."""
        if self.fabric.world_size > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.data, 0)

    def _evaluated(self) -> Row:
        if self.evaluate is None:
            return {}
        self.model.eval()
        with self.fabric.autocast():
            return {name: float(value) for name, value in self.evaluate(self.model).items()}

    def _resumed(self, generators: list[torch.Generator]) -> list[Row]:
        """The rows of the epochs that the checkpoint has behind it, whose state everything takes."""
        if self.checkpoint is None:
            return []
        found = self.fabric.broadcast(self.checkpoint.exists())  # the first process may write it before others look
        if not found:
            self._write([], generators)  # a disk that is full is found before the first epoch
            return []
        wanted = f"checkpoint {self.checkpoint} must be one of this run"
        content = checkpoints.load_weights(self.model, self.checkpoint)
        if missing := [name for name in _KEPT if name not in content]:
            raise ValueError(f"{wanted}, got one without {', '.join(missing)}")
        if content["seed"] != self.seed:
            raise ValueError(f"{wanted}, with seed {self.seed}, got one with seed {content['seed']}")
        if (content["schedule"] is None) != (self.schedule is None):
            raise ValueError(f"{wanted}, {'without' if self.schedule is None else 'with'} a schedule, got the opposite")
        if len(content["generators"]) != len(generators):
            counts = len(generators), len(content["generators"])
            raise ValueError(f"{wanted}, with {counts[0]} generators of its own, got one with {counts[1]}")
        kind = type(self.optimizer).__name__
        if content["optimizer_type"] != kind:
            raise ValueError(f"{wanted}, with optimizer {kind}, got one with {content['optimizer_type']}")
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{wanted}, got one whose optimizer is another: {error}") from error
        if self.schedule is not None:
            self.schedule.load_state_dict(content["schedule"])
        for generator, state in zip(generators, content["generators"], strict=True):
            generator.set_state(state)
        return list(content["rows"])

    def _write(self, rows: list[Row], generators: list[torch.Generator]) -> None:
        """Write the checkpoint and the log, in the first process."""
        if self.fabric.is_global_zero:
            if self.checkpoint is not None:
                state = {
                    "model": self.model.state_dict(),
                    "optimizer_type": type(self.optimizer).__name__,
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": None if self.schedule is None else self.schedule.state_dict(),
                    "generators": [generator.get_state() for generator in generators],
                    "rows": rows,
                    "seed": self.seed,
                }
                checkpoints.write(self.checkpoint, state)
            if self.log is not None and rows:
                checkpoints.replace(self.log, "log", lambda file: file.write(_table(rows).encode()))
        self.fabric.barrier()


class _Means:
    """Sums over the images of an epoch, kept on the device: reading a number would wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double() * count
        self.count += count

    def own(self) -> Row:
        """The means over the images of this process."""
        return {name: float(value) / self.count for name, value in self.sums.items()}

    def row(self, world: int) -> Row:
        """The means over the images of all processes."""
        sums = torch.stack([*self.sums.values(), torch.full_like(self.sums["loss"], self.count)])
        if world > 1:
            torch.distributed.all_reduce(sums)
        return dict(zip(self.sums, (sums[:-1] / sums[-1]).tolist(), strict=True))


def _fabric(accelerator: str, precision: str) -> Any:
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError(f'Trainer needs lightning-fabric: pip install "fastode[training]" ({error})') from error
    world = int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1
    devices = int(os.environ["LOCAL_WORLD_SIZE"]) if world > 1 else 1
    settings: dict[str, Any] = {"accelerator": accelerator, "precision": precision}
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(devices=devices, num_nodes=world // devices, strategy=strategy, **settings)
    if os.environ.get("LT_CLI_USED") != "1":  # `fabric run` has done it
        fabric.launch()
    return fabric


def _optimizer(optimizer: Any, model: nn.Module) -> Optimizer:
    made = optimizer if isinstance(optimizer, Optimizer) or not callable(optimizer) else optimizer(model.parameters())
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or a function of parameters, got {checks.what(made)}"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"optimizer must be one that takes steps without a closure, got {type(made).__name__}")
    own = set(map(id, model.parameters()))
    if not all(id(each) in own for group in made.param_groups for each in group["params"]):
        raise ValueError("optimizer must be of the model's parameters, got some that are not")
    return made


def _schedule(schedule: Any, optimizer: Optimizer) -> LRScheduler | None:
    made = schedule(optimizer) if callable(schedule) and not isinstance(schedule, LRScheduler) else schedule
    if made is not None and not isinstance(made, LRScheduler):
        raise TypeError(
            f"schedule must be an LRScheduler, a function of the optimizer or None, got {checks.what(made)}"
        )
    if isinstance(made, ReduceLROnPlateau):
        raise ValueError("schedule must be one that takes steps without a measure, got ReduceLROnPlateau")
    if made is not None and made.optimizer is not optimizer:
        raise ValueError("schedule must be of the trainer's optimizer, got one of another")
    return made


def _file(name: str, path: Any) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path or None, got {checks.what(path)}")
    found = Path(path)
    if found.is_dir() or not found.parent.is_dir():
        raise ValueError(f"{name} must be a file in a folder that exists, got {path}")
    return found


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _by_dtype(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        found.setdefault(gradient.dtype, []).append(gradient)
    return list(found.values())


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
