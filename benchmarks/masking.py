"""`python -m benchmarks.masking`: do the gradients of an adaptive solver hide what an attack needs?

A SOBlock network is trained without attacks, with dopri5 at tolerance 0.1, and then attacked by PGD-20, whose gradients
are those of the network itself with each of `Solver`'s derivatives, or of the same parameters solved otherwise. What
counts is always the network as it was trained. Everything that is done is on disk, so the same command goes on where
one was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import Solver, nets
from fastode.recipes.data import Images, Normalized, digits, load
from fastode.reference import SOBlock

from . import experiments, header
from .masking_page import report

NAME = "masking"
TOLERANCE = 0.1
TRAINED = Solver("dopri5", TOLERANCE, TOLERANCE)
# What the attack differentiates: the trained network, or its parameters solved in another way.
ATTACKS: dict[str, Solver] = {
    "solver": TRAINED,
    "constant": Solver("dopri5", TOLERANCE, TOLERANCE, gradient="constant"),
    "exact": Solver("dopri5", TOLERANCE, TOLERANCE, gradient="exact"),
    "euler, 4 steps": Solver("euler", steps=4),
    "midpoint, 4 steps": Solver("midpoint", steps=4),
    "rk4, 4 steps": Solver("rk4", steps=4),
    "per sample, constant": Solver("dopri5", TOLERANCE, TOLERANCE, gradient="constant", per_sample=True),
    "per sample, exact": Solver("dopri5", TOLERANCE, TOLERANCE, gradient="exact", per_sample=True),
}
# How the network that is attacked is solved: as it was trained, or with steps of each image's own.
JUDGES: dict[str, Solver] = {
    "as trained": TRAINED,
    "per sample": Solver("dopri5", TOLERANCE, TOLERANCE, per_sample=True),
}


@dataclass(frozen=True)
class Plan:
    """What is trained and attacked.

    Attributes:
        data: "mnist" or "cifar".
        width: of SOBlock-ResNet10.
        epochs: of natural training.
        batch: images of a training step and of an attack; the images of a batch share their steps.
        images: of the test set that are attacked, a multiple of the batch.
        radii: of the attacks in the maximum norm, of pixels in [0, 1].
        steps: of PGD.
        rate: the learning rate of Adam.
        seed: of everything that is drawn.
    """

    data: str
    width: int = 16
    epochs: int = 6
    batch: int = 100
    images: int = 500
    radii: tuple[float, ...] = (2 / 255, 8 / 255)
    steps: int = 20
    rate: float = 1e-3
    seed: int = 0


PLANS = {"mnist": Plan("mnist", radii=(0.1, 0.3)), "cifar": Plan("cifar")}


def network(plan: Plan, images: Images) -> nn.Module:
    """SOBlock-ResNet10 behind its normalisation, fused."""
    torch.manual_seed(plan.seed)
    pixels, classes = images.train
    body = nets.soblock_resnet10(
        in_channels=pixels.shape[1], num_classes=int(classes.max()) + 1, width=plan.width, solver=TRAINED
    )
    model = nn.Sequential(Normalized(pixels), body)
    fastode.fuse(model)
    return model


@contextmanager
def solved_by(model: nn.Module, solver: Solver) -> Iterator[nn.Module]:
    """A context in which the model's SOBlocks are solved by another solver."""
    blocks = [module for module in model.modules() if isinstance(module, SOBlock)]

    def set_all(settings: Solver) -> None:
        for block in blocks:
            block.solver = settings.method
            for name, value in asdict(settings).items():
                if name != "method":
                    setattr(block, name, value)

    set_all(solver)
    try:
        yield model
    finally:
        set_all(TRAINED)


def train(model: nn.Module, plan: Plan, images: Images, checkpoint: Path, record: experiments.Record) -> None:
    """Natural training, from the last epoch that is on disk."""
    optimizer = torch.optim.Adam(model.parameters(), plan.rate)
    done = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["epochs"]
    x, y = images.train
    for epoch in range(done, plan.epochs):
        start, losses = time.monotonic(), []
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(plan.seed + 1 + epoch))
        model.train()
        for index in order.split(plan.batch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        beside = checkpoint.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}, beside)
        beside.replace(checkpoint)
        record["losses"] = [*record.get("losses", [])[:epoch], round(sum(losses) / len(losses), 4)]
        print(f"epoch {epoch + 1}: loss {record['losses'][-1]}, {time.monotonic() - start:.0f} s", flush=True)


def pgd(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int, seed: int) -> Tensor:
    """Projected gradient descent on the cross-entropy from a random start (Madry et al. 2018), pixels in [0, 1].

    Args:
        model: whose gradients it takes.
        x: images.
        y: their classes.
        radius: in the maximum norm.
        steps: each of 2.5 radius / steps.
        seed: of the start.

    Returns:
        Images within the radius.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = (x + radius * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        moved = leaf.detach() + 2.5 * radius / steps * gradient.sign()
        moved = torch.max(torch.min(moved, x + radius), x - radius).clamp(0, 1)
    return moved


def judged(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """For each judge which images the network has right, and the mean loss."""
    found = {}
    with torch.no_grad():
        for name, solver in JUDGES.items():
            with solved_by(model, solver):
                logits = model(x)
            right = (logits.argmax(1) == y).int().tolist()
            found[name] = {"right": right, "loss": round(float(F.cross_entropy(logits, y)), 5)}
    return found


def cosines(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The cosine of each attack's gradient with the exact one, the median over the images of a batch."""
    gradients = {}
    for name, solver in ATTACKS.items():
        leaf = x.detach().requires_grad_()
        with solved_by(model, solver):
            gradients[name] = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0].flatten(1)
    exact = gradients["exact"]
    return {
        name: round(float(F.cosine_similarity(gradient, exact).median()), 4) for name, gradient in gradients.items()
    }


def attack(model: nn.Module, plan: Plan, images: Images, path: Path, record: experiments.Record) -> None:
    """Every attack at every radius on every batch that is not on disk yet."""
    model.eval().requires_grad_(False)
    x, y = images.test
    batches = range(plan.images // plan.batch)

    def part(batch: int) -> tuple[Tensor, Tensor]:
        index = slice(batch * plan.batch, (batch + 1) * plan.batch)
        return x[index], y[index]

    if "cosines" not in record:
        record["cosines"] = cosines(model, *part(0))
        experiments.save(path, record)
    found = record.setdefault("batches", {})
    for batch in batches:
        pixels, classes = part(batch)
        for radius in (0.0, *plan.radii):
            for name, solver in ATTACKS.items() if radius else {"none": TRAINED}.items():
                key = f"{radius:.4f} {name} {batch}"
                if key in found:
                    continue
                start, moved = time.monotonic(), pixels
                if radius:
                    with solved_by(model, solver):
                        moved = pgd(model, pixels, classes, radius, plan.steps, plan.seed + batch)
                found[key] = judged(model, moved, classes)
                experiments.save(path, record)
                right = found[key]["as trained"]["right"]
                print(f"{key}: {sum(right)} of {len(right)} right, {time.monotonic() - start:.0f} s", flush=True)


def run(plan: Plan, images: Images, path: Path, checkpoint: Path) -> None:
    """Train and attack, from where an earlier run of the same plan stopped.

    Args:
        plan: what.
        images: of its data.
        path: of the record.
        checkpoint: of the training.

    Raises:
        ValueError: the record is of another plan.
    """
    record = experiments.load(path)
    wanted = {**asdict(plan), "radii": list(plan.radii)}
    if record and record["plan"] != wanted:
        raise ValueError(f"the record {path.name} must be of this plan, got one of {record['plan']}; move it away")
    if not record:
        record = {
            "plan": wanted,
            "attacks": list(ATTACKS),
            "source": images.source,
            "header": header.header(torch.device("cpu"), NAME),
        }
    model = network(plan, images)
    train(model, plan, images, checkpoint, record)
    experiments.save(path, record)
    attack(model, plan, images, path, record)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the experiment on one data set, or go on with it, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masking", description=__doc__)
    parser.add_argument("--data", choices=tuple(PLANS), default="mnist")
    parser.add_argument("--file", type=Path, help="of cifar: x_train, y_train, x_test, y_test as Keras has them, .npz")
    parser.add_argument("--work", type=Path, default=header.ROOT / "build" / NAME, help="where the checkpoint goes")
    parser.add_argument("--report", action="store_true", help="only the page and the plot, from the records")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        if arguments.data == "cifar" and arguments.file is None:
            parser.error("cifar needs --file")
        images = digits() if arguments.data == "mnist" else load(arguments.file)
        path = experiments.record_of(f"{NAME}-{arguments.data}")
        run(PLANS[arguments.data], images, path, arguments.work / f"{arguments.data}.pt")
    report([experiments.record_of(f"{NAME}-{data}") for data in PLANS])


if __name__ == "__main__":
    main()
