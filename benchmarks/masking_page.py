"""The page and the plot of `benchmarks.masking`, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import experiments
from .printing import markdown_table

NAME = "masking"
WORDS = """\
# Does an adaptive solver hide gradients?

Huang et al. 2020 (paper 003) ask whether the robustness of a stabilized Neural ODE comes from gradients that its
adaptive solver obscures. The gradient that torchdiffeq gives ("solver") is not the derivative of the numbers that
are returned: it leaves out how all step sizes but the first depend on the input. [`Solver`](api/fastode.md) has two
others: "constant", through no size, and "exact", through all of the step control. Here one SOBlock-ResNet10 is
trained without attacks and attacked by PGD with each of them, and with the gradients of the same parameters solved
in equal steps, or with steps of each image's own. Whatever the attack differentiates, what is counted is the
network as it was trained, dopri5 with tolerance 0.1; beside it stands the same network where each image takes its
own steps, so that the images of a batch no longer depend on each other.

"Worst" is the share of images that no attack of the table gets wrong. If a gradient were masked, its attack would
leave more images right than the others do."""


def accuracy(found: dict[str, Any], radius: float, attack: str, judge: str) -> tuple[list[int], float]:
    """Which images are right after an attack, over the batches that there are, and the mean loss."""
    start = f"{radius:.4f} {attack} "
    parts = [
        entry[judge] for key, entry in sorted(found.items()) if key.startswith(start) and key[len(start) :].isdigit()
    ]
    right = [each for part in parts for each in part["right"]]
    return right, sum(part["loss"] for part in parts) / max(len(parts), 1)


def percent(right: Sequence[int]) -> str:
    return f"{100 * sum(right) / len(right):.1f} %" if right else "–"


def table(record: experiments.Record) -> list[str]:
    """A line for each attack, and the worst of them."""
    plan, found = record["plan"], record["batches"]
    radii = plan["radii"]
    lines = []
    judges = ("as trained", "per sample")
    for name in record["attacks"]:
        cells = [name, f"{record['cosines'][name]:.2f}"]
        for radius in radii:
            for judge in judges:
                right, loss = accuracy(found, radius, name, judge)
                cells.append(f"{percent(right)} ({loss:.2f})" if right else "–")
        lines.append(cells)
    cells = ["worst", "–"]
    for radius in radii:
        for judge in judges:
            columns = [accuracy(found, radius, name, judge)[0] for name in record["attacks"]]
            whole = columns and all(len(column) == len(columns[0]) for column in columns) and columns[0]
            cells.append(percent([min(each) for each in zip(*columns, strict=True)]) if whole else "–")
    lines.append(cells)
    names = [f"{_radius(radius)}, {judge}" for radius in radii for judge in judges]
    return markdown_table(("gradient of the attack", "cosine with exact", *names), lines, left=1)


def _radius(radius: float) -> str:
    """ "8/255", or "0.3" where it is no whole number of grey values."""
    grey = 255 * radius
    return f"{round(grey)}/255" if abs(grey - round(grey)) < 1e-9 else f"{radius:g}"


def section(record: experiments.Record) -> list[str]:
    """What stands on the page for one data set."""
    plan, found = record["plan"], record.get("batches", {})
    clean = {judge: accuracy(found, 0.0, "none", judge)[0] for judge in ("as trained", "per sample")}
    count, wanted = len(clean["as trained"]), plan["images"]
    lines = [
        "",
        f"## {record['source']}",
        "",
        f"Width {plan['width']}, {plan['epochs']} epochs of Adam at {plan['rate']:g}, batches of {plan['batch']}, seed "
        f"{plan['seed']}. Without an attack {percent(clean['as trained'])} of {count} test images are",
        f"right as trained, {percent(clean['per sample'])} with steps per sample. PGD-{plan['steps']} from a random "
        "start, steps of 2.5 radius / number of steps.",
        "Accuracies, in parentheses the mean loss; the cosine is that of the image's gradient with the exact one, the",
        "median over a batch.",
        "",
        *(table(record) if found else []),
        "",
        f"Made on {experiments.made_on(record['header'])}.",
    ]
    expected = (1 + len(plan["radii"]) * len(record.get("cosines", {}))) * (wanted // plan["batch"])
    if len(found) < expected:
        lines += ["", f"**Not finished: {len(found)} of {expected} batches of attacks are recorded.**"]
    return lines


def fill(axes: Sequence[Any], records: Sequence[experiments.Record]) -> None:
    """The plot: a panel for each data set, a bar for each attack and radius."""
    for axis, record in zip(axes, records, strict=True):
        names, radii = record["attacks"], record["plan"]["radii"]
        for index, radius in enumerate(radii):
            heights = []
            for name in names:
                right, _ = accuracy(record["batches"], radius, name, "as trained")
                heights.append(100 * sum(right) / len(right) if right else 0.0)
            places = [place + 0.4 * index for place in range(len(names))]
            axis.barh(places, heights, height=0.38, label=f"radius {_radius(radius)}")
        axis.set_yticks([place + 0.2 for place in range(len(names))], names)
        axis.invert_yaxis()
        axis.set_xlabel("images right after the attack, %")
        axis.set_title(record["source"].split(",")[0])
        axis.legend()


def report(paths: Sequence[Path], pages: Path = experiments.PAGES) -> None:
    """The page and the plot from the records that there are; nothing where there are none."""
    found = [(path, experiments.load(path)) for path in paths if path.exists()]
    found = [(path, record) for path, record in found if record.get("batches")]
    if not found:
        return
    lines = [WORDS, "", f"![accuracy under each attack]({NAME}.png)"]
    for _, record in found:
        lines += section(record)
    lines += [
        "",
        "Commands: `python -m benchmarks.masking --data mnist`, and `--data cifar --file FILE.npz`; both go on where",
        "they were stopped.",
    ]
    experiments.write_page(NAME, "\n".join([*lines, ""]), pages)
    experiments.draw([path for path, _ in found], pages / f"{NAME}.png", len(found), fill)
