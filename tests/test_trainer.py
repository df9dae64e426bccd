"""fastode.training.Trainer: its steps against a plain loop, resuming to the same bits, processes, files, refusals."""

from __future__ import annotations

import csv
import errno
import multiprocessing
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from fastode import attacks, training
from fastode.training import Trainer, batches, checkpoint

IMAGES = torch.rand(22, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(22) % 3
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=1e-3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8, 3)).double()


def loader(batch: int = 4, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch, **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in model.state_dict().values()]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(map(torch.equal, weights(first), weights(second)))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_those_of_a_plain_loop(accumulate: int) -> None:
    """With batches gathered, a step is by the mean over all their images; the last ones are fewer."""
    model, other = network().eval(), network()
    other[2].p = 0.0
    model[2].p = 0.0
    rows = Trainer(
        model, training.natural, epochs=3, optimizer=SGD, schedule=partial(MultiStepLR, milestones=[1]),
        accumulate=accumulate,
    ).fit(loader())  # fmt: skip
    assert not model.training  # as it came
    optimizer, losses = SGD(other.parameters()), []
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 if epoch < 1 else 0.02
        total = 0.0
        for x, y in zip(IMAGES.split(4 * accumulate), LABELS.split(4 * accumulate), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / 22)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-12)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def resumable(
    epochs: int, folder: Path, name: str, kind: Callable[..., Any], **options: Any
) -> tuple[Trainer, list[dict[str, float]]]:
    """Everything that draws: dropout, the order of the data by two generators, noise by one of its own, an attack."""
    noise = partial(training.uniform_noise, eps=0.1, generator=torch.Generator().manual_seed(7))
    trainer = Trainer(
        network(), noise, epochs=epochs, optimizer=kind, checkpoint=folder / f"{name}.pt", log=folder / f"{name}.csv",
        evaluate=lambda model: {"robust_accuracy": torch.rand(()) + random.random()}, seed=5, **options,
    )  # fmt: skip
    order = torch.Generator().manual_seed(8)
    data = TensorDataset(IMAGES, LABELS)
    return trainer, trainer.fit(loader(sampler=RandomSampler(data, generator=order)))


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        (partial(torch.optim.Adam, lr=0.05), partial(CosineAnnealingLR, T_max=5)),
        (SGD, partial(MultiStepLR, milestones=[2, 4])),
    ],
)
def test_resumes_to_the_same_bits(kind: Any, schedule: Any, tmp_path: Path) -> None:
    whole, rows = resumable(5, tmp_path, "whole", kind, schedule=schedule)
    resumable(3, tmp_path, "parts", kind, schedule=schedule)
    torch.rand(3), random.random()  # what other code draws meanwhile
    parts, again = resumable(5, tmp_path, "parts", kind, schedule=schedule)
    assert same(whole.model, parts.model)
    assert len(rows) == 5
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert len({row["robust_accuracy"] for row in rows}) == 5
    assert resumable(5, tmp_path, "parts", kind, schedule=schedule)[1] == again  # nothing is left to do
    with open(tmp_path / "parts.csv") as file:
        read = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in read] == again


def test_what_is_drawn_is_by_the_seed() -> None:
    """Two runs are the same; another seed, and the next epoch, are not."""

    def run(seed: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> training.Loss:
            seen.append(torch.cat([y, torch.randint(1000, (3,))]))
            return training.natural(model, x, y)

        Trainer(network(), loss, epochs=2, optimizer=SGD, seed=seed).fit(loader(11, shuffle=True))
        return seen

    first, again, other = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0][:11], other[0][:11]) and not torch.equal(first[0][11:], other[0][11:])
    assert not torch.equal(first[0][:11], first[2][:11]) and not torch.equal(first[0][11:], first[2][11:])
    assert torch.cat([each[:11] for each in first[:2]]).sort().values.equal(LABELS.sort().values)


class Shuffled:
    """Batches of one, whose order is drawn when the first is taken."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place in torch.randperm(len(LABELS)):
            yield IMAGES[place : place + 1], place[None]


@pytest.mark.parametrize("data", [Shuffled(), DataLoader(TensorDataset(IMAGES, torch.arange(22)), shuffle=True)])
def test_processes_take_different_batches_of_one_order(data: Any) -> None:
    """22 batches make 4 turns of 5 processes; what a process draws between two batches does not change the order."""
    seen = []
    for rank in range(5):
        torch.manual_seed(0)
        stream = iter(batches.shared(data, rank, 5))
        torch.manual_seed(rank)
        seen.append([label.item() for _, label in stream])
    assert [len(each) for each in seen] == [4] * 5 and len({place for each in seen for place in each}) == 20
    torch.manual_seed(0)
    order = [label.item() for _, label in batches.shared(data, 0, 1)]
    assert [seen[place % 5][place // 5] for place in range(20)] == order[:20]


def one_process(rank: int, world: int, folder: str) -> None:
    """What one of two processes does, as torchrun would start it; the group meets at a file, not at a port."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)):
        os.environ[name] = str(value)
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    where = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    trained(Path(folder), world)
    torch.save(torch.rand(3), f"{folder}/drawn-{rank}.pt")
    torch.distributed.destroy_process_group()


def trained(folder: Path, world: int) -> None:
    """Adversarial training with twice the batch where there is one process; processes start from other weights."""
    model = network()
    model[2].p = 0.0
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        nn.init.ones_(model[0].weight)
    attack = partial(attacks.pgd, eps=0.1, steps=2, random_start=False, early_stop=True)
    loss = partial(training.trades, attack=attack)
    data = loader(8 // world, shuffle=True, drop_last=True)
    rows = Trainer(model, loss, epochs=2, optimizer=SGD, checkpoint=folder / f"{world}.pt").fit(data)
    assert [row["epoch"] for row in rows] == [1, 2]


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # clean: a fork of this process could not run a backward pass
    context.set_forkserver_preload(["fastode.training", "lightning_fabric"])
    processes = [context.Process(target=one_process, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    trained(tmp_path, 1)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    drawn = [torch.load(tmp_path / f"drawn-{rank}.pt") for rank in range(2)]
    assert not torch.equal(*drawn)  # noise is each process's own, though the order of the data is the same
    one, two = (checkpoint.read(tmp_path / f"{world}.pt") for world in (1, 2))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-9, atol=1e-12)
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert other == pytest.approx({**row, "seconds": other["seconds"]}, rel=1e-9)


def test_bf16_is_autocast_around_the_loss() -> None:
    seen = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> training.Loss:
        seen.append(model[0](x).dtype)
        return training.natural(model, x, y)

    model = network().float()
    rows = Trainer(model, loss, epochs=2, optimizer=SGD, precision="bf16-mixed").fit([(IMAGES.float(), LABELS)])
    assert seen == [torch.bfloat16] * 2 and model[0].weight.dtype == torch.float32
    assert rows[1]["loss"] < rows[0]["loss"]


def test_names_that_the_loss_logs_are_told_from_those_of_evaluate() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"accuracy": 0.25, "robust": 0.125}

    rows = Trainer(network(), training.natural, epochs=2, optimizer=SGD, evaluate=evaluate).fit(loader())
    assert list(rows[0]) == ["epoch", "loss", "accuracy", "evaluate_accuracy", "robust", "seconds"]
    assert rows[1]["evaluate_accuracy"] == 0.25


def test_a_bar_shows_robust_accuracy_and_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"epochs": 2, "optimizer": SGD, "evaluate": lambda model: {"pgd": 0.5}}
    loss = partial(training.trades, attack=lambda model, x, y: x)
    Trainer(network(), loss, **options).fit(loader())
    assert capsys.readouterr() == ("", "")
    Trainer(network(), loss, progress=True, **options).fit(loader())
    shown = capsys.readouterr().err
    assert "epoch 2/2: 100%" in shown and "6/6" in shown
    assert "robust_accuracy=" in shown and "last pgd=0.5" in shown


def test_a_checkpoint_holds_what_can_be_read_without_running_anything(tmp_path: Path) -> None:
    resumable(1, tmp_path, "a", SGD, schedule=partial(MultiStepLR, milestones=[1]))
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert sorted(found) == ["generators", "model", "optimizer", "optimizer_type", "rows", "schedule", "seed"]
    other = network()
    rest = training.load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other[0].weight, found["model"]["0.weight"]) and len(rest["rows"]) == 1
    torch.save(found["model"], tmp_path / "alone.pt")
    assert training.load_weights(network(), tmp_path / "alone.pt") == {}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the writer's error is the system's."""
    resumable(1, tmp_path, "a", SGD)
    before = (tmp_path / "a.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"^checkpoint must be a file .*a\.pt: .*; the one before it stands$"
        ) as caught:
            resumable(2, tmp_path, "a", SGD)
        with pytest.raises(OSError, match=r"; there is none from before$"):
            resumable(2, tmp_path, "b", SGD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.EFBIG
    assert (tmp_path / "a.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.pt"]


def test_a_full_disk_is_found_before_the_first_epoch(tmp_path: Path) -> None:
    asked = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> training.Loss:
        asked.append(1)
        return training.natural(model, x, y)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer(network(), loss, epochs=1, optimizer=SGD, checkpoint=tmp_path / "a.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="must be a file that can be written"):
            trainer.fit(loader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not asked


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> training.Loss:
        found = training.natural(model, x, y)
        return training.Loss(found.value * (torch.nan if evaluated else 1), found.log)

    evaluated: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(1)
        return {}

    path = tmp_path / "a.pt"
    trainer = Trainer(network(), loss, epochs=3, optimizer=SGD, checkpoint=path, evaluate=evaluate)
    with pytest.raises(FloatingPointError, match=r"^loss must be finite, got a mean of nan in epoch 2$"):
        trainer.fit(loader())
    assert len(checkpoint.read(path)["rows"]) == 1


def make(**options: Any) -> Trainer:
    return Trainer(network(), **{"loss": training.natural, "epochs": 1, "optimizer": SGD, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss must be a function, got 3"),
        ({"epochs": 0}, ValueError, "epochs must be an int >= 1, got 0"),
        ({"optimizer": "sgd"}, TypeError,
         "optimizer must be a torch.optim.Optimizer or a function of parameters, got 'sgd'"),
        ({"optimizer": SGD(nn.Linear(1, 1).parameters())}, ValueError,
         "optimizer must be of the model's parameters, got some that are not"),
        ({"optimizer": torch.optim.LBFGS}, ValueError,
         "optimizer must be one that takes steps without a closure, got LBFGS"),
        ({"schedule": 3}, TypeError, "schedule must be an LRScheduler, a function of the optimizer or None, got 3"),
        ({"schedule": ReduceLROnPlateau}, ValueError,
         "schedule must be one that takes steps without a measure, got ReduceLROnPlateau"),
        ({"schedule": MultiStepLR(SGD(network().parameters()), [1])}, ValueError,
         "schedule must be of the trainer's optimizer, got one of another"),
        ({"precision": "half"}, ValueError, "precision must be one of '32-true', 'bf16-mixed', got 'half'"),
        ({"accumulate": 0}, ValueError, "accumulate must be an int >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0, got -1"),
        ({"evaluate": 1}, TypeError, "evaluate must be a function, got 1"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        ({"checkpoint": 1}, TypeError, "checkpoint must be a path or None, got 1"),
        ({"log": "no/such/folder/a.csv"}, ValueError,
         "log must be a file in a folder that exists, got no/such/folder/a.csv"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make(**options)
    assert str(caught.value) == message


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(IMAGES, LABELS, strict=True)


def test_a_loader_of_a_stream_trains_as_its_batches_do() -> None:
    stream = DataLoader(Stream(), batch_size=4)
    found = make(epochs=2).fit(stream)
    wanted = make(epochs=2).fit([(images, labels) for images, labels in stream])
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]


def test_loaders_and_losses_that_are_none_are_refused() -> None:
    for wrong in (3, iter([(IMAGES, LABELS)]), IMAGES):
        with pytest.raises(TypeError, match=r"^loader must be a DataLoader or batches"):
            make().fit(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^loader must have a batch for each of 1 processes, got none$"):
        make().fit([])
    with pytest.raises(TypeError, match=r"^loss must return a fastode.training.Loss, got a tensor"):
        make(loss=lambda model, x, y: model(x).sum()).fit(loader())


def test_a_checkpoint_of_another_network_or_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    make(checkpoint=path).fit(loader())
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    before = weights(other)
    with pytest.raises(ValueError, match=r"^checkpoint must be one of this network, got a\.pt, where 0\.bias is more"):
        Trainer(other, training.natural, epochs=1, optimizer=SGD, checkpoint=path).fit(loader())
    assert all(map(torch.equal, before, weights(other)))
    wanted = f"checkpoint {path} must be one of this run"
    for options, message in (
        ({"seed": 1}, f"{wanted}, with seed 1, got one with seed 0"),
        ({"schedule": partial(MultiStepLR, milestones=[1])}, f"{wanted}, with a schedule, got the opposite"),
        ({"optimizer": torch.optim.Adam}, f"{wanted}, with optimizer Adam, got one with SGD"),
        ({"optimizer": lambda parameters: SGD([{"params": [each]} for each in parameters])},
         f"{wanted}, got one whose optimizer is another: loaded state dict has a different number of parameter groups"),
        ({"loss": partial(training.uniform_noise, eps=0.1, generator=torch.Generator())},
         f"{wanted}, with 1 generators of its own, got one with 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            make(checkpoint=path, **options).fit(loader())
        assert str(caught.value) == message
    torch.save(network().state_dict(), path)
    with pytest.raises(
        ValueError, match=r"got one without optimizer_type, optimizer, schedule, generators, rows, seed$"
    ):
        make(checkpoint=path).fit(loader())
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"^checkpoint must be a file of tensors and plain values, got a\.pt: "):
        make(checkpoint=path).fit(loader())


def test_state_that_is_no_plain_value_is_refused_before_training(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

    model = nn.Sequential(nn.Flatten(), Odd(16, 3)).double()
    path = tmp_path / "a.pt"
    with pytest.raises(TypeError) as caught:
        Trainer(model, training.natural, epochs=1, optimizer=SGD, checkpoint=path).fit(loader())
    where = "checkpoint['model']['1._extra_state']"
    assert str(caught.value) == f"{where} must be a tensor or a plain value, got an object of type object"
    assert not path.exists()


def test_without_the_extra_one_sentence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(
        ImportError, match=r'^Trainer needs lightning-fabric: pip install "fastode\[training\]" \(.*\)$'
    ):
        make()
