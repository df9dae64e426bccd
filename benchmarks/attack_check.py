"""`python -m benchmarks.attack_check`: our attacks beside those of foolbox, ART and torchattacks.

One small network is trained on photographs' patches; then each of our attacks and its counterpart make images for it.
Where both are deterministic they are compared by their pixels, else by how many images they fool. `--speed` times
PGD-20 on networks of papers 001 and 004 against the sum of its input gradients, and against torchattacks on both eager
layouts, in turns.
The record is benchmarks/results/experiments/attacks.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import attacks, nets

from . import data, experiments, header, timing
from .printing import markdown_table

NAME = "attacks"
LIBRARIES = ("foolbox", "adversarial-robustness-toolbox", "torchattacks")
EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
COUNT, CLASSES = 64, 4
# Of a pixel, float32 in [0, 1]: STEPS roundings of it. A sign that rounding turned moves one by up to 2 EPS.
ROUNDING = 1e-6
SEEDS = 8  # of the attacks that draw, whose medians are compared
RANDOM = ("pgd linf, random start", "di2-fgsm", "spsa")
SPEED_BATCH, SPEED_STEPS, ROUNDS = 128, 20, 5
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ie-resnet-1-18-w16": partial(nets.ie_resnet18, steps=1, step_size=0.1, width=16),
    "sspnet-3": partial(nets.sspnet, "ssp3", n=6),
}


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that tells patches' contrast in four, with its images and classes."""
    torch.manual_seed(0)
    patches = data.images(COUNT * 4)
    low, high = patches.amin(), patches.amax()
    images = (patches - low) / (high - low)
    contrast = images.std((1, 2, 3))
    labels = (contrast.argsort().argsort() * CLASSES) // len(images)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Tanh(), nn.Conv2d(16, 16, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), images[:COUNT].contiguous(), labels[:COUNT]


Attack = Callable[[], Tensor]


def ours(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Attack]:
    """Our attacks, by the name of the comparison."""
    pgd: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE, "steps": STEPS, "random_start": False}
    random: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE, "steps": STEPS}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(torch.initial_seed())

    return {
        "fgsm": lambda: attacks.fgsm(model, x, y, eps=EPS),
        "pgd linf": lambda: attacks.pgd(model, x, y, **pgd),
        "pgd l2": lambda: attacks.pgd(model, x, y, **{**pgd, "eps": 0.5, "step_size": 0.1, "norm": "l2"}),
        "mi-fgsm": lambda: attacks.bim(model, x, y, eps=EPS, step_size=STEP_SIZE, steps=STEPS, momentum=1.0),
        "pgd linf, random start": lambda: attacks.pgd(model, x, y, **random, generator=seeded()),
        "di2-fgsm": lambda: attacks.di2_fgsm(model, x, y, **random, generator=seeded()),
        "spsa": lambda: attacks.spsa(model, x, y, eps=EPS, steps=STEPS, samples=32, generator=seeded()),
    }


def theirs(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Attack]]:
    """The libraries' attacks, by the name of the comparison and of the library."""
    import foolbox
    import torchattacks
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    seen = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), x.shape[1:], CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )

    def of_foolbox(name: str, eps: float = EPS, **options: Any) -> Attack:
        return lambda: getattr(foolbox.attacks, name)(**options)(seen, x, y, epsilons=eps)[1]

    def of_art(name: str, **options: Any) -> Attack:
        attack = getattr(evasion, name)(classifier, **options)
        return lambda: torch.from_numpy(attack.generate(x=x.numpy(), y=y.numpy()))

    def of_torchattacks(name: str, **options: Any) -> Attack:
        return lambda: getattr(torchattacks, name)(model, **options)(x, y)

    steps: dict[str, Any] = {"eps": EPS, "alpha": STEP_SIZE, "steps": STEPS}
    art: dict[str, Any] = {"max_iter": STEPS, "batch_size": COUNT, "verbose": False}
    walk = {"abs_stepsize": STEP_SIZE, "steps": STEPS}
    return {
        "fgsm": {
            "foolbox": of_foolbox("LinfFastGradientAttack"),
            "art": of_art("FastGradientMethod", eps=EPS, batch_size=COUNT),
            "torchattacks": of_torchattacks("FGSM", eps=EPS),
        },
        "pgd linf": {
            "foolbox": of_foolbox("LinfProjectedGradientDescentAttack", random_start=False, **walk),
            "art": of_art("ProjectedGradientDescentPyTorch", eps=EPS, eps_step=STEP_SIZE, **art),
            "torchattacks": of_torchattacks("PGD", random_start=False, **steps),
        },
        "pgd l2": {
            "foolbox": of_foolbox(
                "L2ProjectedGradientDescentAttack", 0.5, random_start=False, abs_stepsize=0.1, steps=STEPS
            ),
            "torchattacks": of_torchattacks("PGDL2", eps=0.5, alpha=0.1, steps=STEPS, random_start=False),
        },
        "mi-fgsm": {"torchattacks": of_torchattacks("MIFGSM", decay=1.0, **steps)},
        "pgd linf, random start": {
            "foolbox": of_foolbox("LinfProjectedGradientDescentAttack", **walk),
            "torchattacks": of_torchattacks("PGD", **steps),
        },
        "di2-fgsm": {"torchattacks": of_torchattacks("DIFGSM", **steps)},
        "spsa": {"torchattacks": of_torchattacks("SPSA", eps=EPS, nb_iter=STEPS, nb_sample=32, max_batch_size=32)},
    }


def compared() -> list[dict[str, Any]]:
    """A row for each attack and library: how many pixels agree, how many images each fools, and its loss.

    Of attacks that draw, medians over seeds of the latter two, and the range of the losses.
    """
    model, x, y = problem()
    others = theirs(model, x, y)

    def made(name: str, attack: Attack) -> list[Tensor]:
        found = []
        for seed in range(SEEDS if name in RANDOM else 1):
            torch.manual_seed(seed)
            found.append(attack().detach())
        return found

    def judged(found: Sequence[Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            logits = [model(images) for images in found]
        losses = [round(float(F.cross_entropy(each, y)), 4) for each in logits]
        fooled = [int((each.argmax(1) != y).sum()) for each in logits]
        return {
            "fooled": statistics.median(fooled),
            "loss": round(statistics.median(losses), 4),
            "losses": [min(losses), max(losses)],
        }

    rows = []
    for name, attack in ours(model, x, y).items():
        own = made(name, attack)
        for library, other in others[name].items():
            found = made(name, other)
            row: dict[str, Any] = {"attack": name, "library": library, "here": judged(own), "there": judged(found)}
            if name not in RANDOM:
                difference = (own[0] - found[0]).abs()
                row["same_pixels"] = round(float((difference <= ROUNDING).double().mean()), 6)
                row["largest_difference"] = float(difference.max())
            rows.append(row)
    return rows


def timed(name: str, steps: int, batch: int, threads: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """PGD by us on the fused network, its input gradients alone, and torchattacks on both eager layouts.

    Args:
        name: of the network.
        steps: of PGD. What an attack does once weighs the more, the fewer they are.
        batch: of images.
        threads: one is timed by its processor time, more by the wall's.
        rounds: of turns.
    """
    try:
        import torchattacks
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install --no-deps torchattacks") from error

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    patches = data.images(batch)
    images = ((patches - patches.amin()) / (patches.amax() - patches.amin())).contiguous()
    labels = data.labels(batch)
    last = images.contiguous(memory_format=torch.channels_last)
    channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fused = fused.to(memory_format=torch.channels_last)

    def gradients() -> None:
        for _ in range(steps):
            leaf = last.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(fused(leaf), labels), leaf)

    def rival(model: nn.Module, x: Tensor) -> Callable[[], object]:
        attack = torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps)
        return lambda: attack(x, labels)

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: attacks.pgd(fused, last, labels, eps=EPS, step_size=STEP_SIZE, steps=steps),
        "gradients": gradients,
        "torchattacks eager": rival(plain, images),
        "torchattacks eager-cl": rival(channels_last, last),
    }
    clock: Callable[[timing.Run, int], float] = timing.processor_time if threads == 1 else timing.Clock()
    times = timing.interleave(runs, clock, seconds=0.0, rounds=(rounds, rounds), warm=1)
    if times.errors:
        raise SystemExit(str(times.errors))
    better = min((name for name in runs if "torchattacks" in name), key=lambda name: times.spread(name).median)
    overhead, faster = times.ratio("gradients", "ours"), times.ratio("ours", better)
    return {
        "network": name,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "seconds": {name: round(times.spread(name).median, 3) for name in runs},
        "over_gradients": [round(value, 4) for value in (overhead.median, overhead.p20, overhead.p80)],
        "times_as_fast": [round(value, 3) for value in (faster.median, faster.p20, faster.p80)],
        "than": better,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a markdown table."""
    head = ("attack", "library", "same pixels", f"fooled of {COUNT}, here", "there", "loss here", "there")

    def loss(found: dict[str, Any]) -> str:
        least, most = found["losses"]
        return f"{found['loss']}" if least == most else f"{found['loss']} ({least}–{most})"

    cells = [
        [
            row["attack"], row["library"], f"{row['same_pixels']:.4%}" if "same_pixels" in row else "–",
            str(row["here"]["fooled"]), str(row["there"]["fooled"]), loss(row["here"]), loss(row["there"]),
        ]
        for row in rows
    ]  # fmt: skip
    return "\n".join(markdown_table(head, cells))


def in_words(found: dict[str, Any]) -> str:
    """What was timed, in two lines."""
    share, faster = found["over_gradients"], found["times_as_fast"]
    return (
        f"{found['network']}, PGD-{found['steps']} of {found['batch']} images: {faster[0]:.2f} ({faster[1]:.2f}–"
        f"{faster[2]:.2f}) times as fast as {found['than']}; {100 * (share[0] - 1):+.1f} % "
        f"({100 * (share[1] - 1):+.1f} to {100 * (share[2] - 1):+.1f}) beside the sum of its input gradients\n"
        f"  seconds: {found['seconds']}"
    )


def _header() -> dict[str, Any]:
    made = header.header(torch.device("cpu"), NAME)
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            made["versions"][name] = metadata.version(name)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, or time, and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack_check", description=__doc__)
    parser.add_argument("--speed", action="store_true", help="time PGD instead")
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), help="of what is timed")
    parser.add_argument("--steps", type=int, default=SPEED_STEPS, help="of the PGD that is timed")
    parser.add_argument("--batch", type=int, default=SPEED_BATCH, help="of the PGD that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="while it is timed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of turns; of fewer nothing is recorded")
    arguments = parser.parse_args(argv)
    path = experiments.record_of(NAME)
    record = experiments.load(path)
    if arguments.speed:
        for name in arguments.only:
            found = timed(name, arguments.steps, arguments.batch, arguments.threads, arguments.rounds)
            print(in_words(found), flush=True)
            head = _header()
            record.setdefault("speed", {}).setdefault(head["device"], {})[name] = found | {"header": head}
        whole = (arguments.steps, arguments.batch, arguments.rounds) == (SPEED_STEPS, SPEED_BATCH, ROUNDS)
        if not whole:
            print("not recorded: fewer steps, images or rounds than the record has")
            return
    else:
        record["comparison"] = {"header": _header(), "rows": compared()}
        print(table(record["comparison"]["rows"]))
    experiments.save(path, record)


if __name__ == "__main__":
    main()
