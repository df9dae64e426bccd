"""fastode.recipes: every recipe is well formed; a tiny one runs, goes on, and comes out the same fused and not."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_cases import CLEAN, FGSM, RECIPE, TINY, digits
from torch import Tensor, nn

from fastode import attacks, nets, recipes, training
from fastode.recipes import Plan, Table, measures, runner, tables
from fastode.recipes.__main__ import listing, main
from fastode.recipes.plan import described

SIZES = [(paper, colour) for paper in (False, True) for colour in (False, True)]


def run(folder: Path, plan: Plan = TINY, **options: Any) -> recipes.runner.Results:
    return recipes.run(RECIPE, folder, images=digits(), plan=plan, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, recipes.runner.Results]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_there_are_the_eight_recipes_of_the_four_papers() -> None:
    assert list(recipes.RECIPES) == [
        "001-table1", "001-table3", "001-figure6", "002-table1", "003-table2", "003-table4", "004-table1", "004-table2",
    ]  # fmt: skip
    assert all(name in listing() for name in recipes.RECIPES)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_speaks_of_its_own_rows_and_columns_and_of_all_the_papers_rows(name: str) -> None:
    for paper, colour in SIZES:
        plan = recipes.RECIPES[name].plan(paper, colour)
        rows = [network.name for network in plan.networks]
        columns = [column for table in plan.tables for column in table.columns]
        assert len(rows) == len(set(rows)) and len(columns) == len(set(columns))
        slugs = [runner.slug(row) for row in rows]
        assert len(slugs) == len(set(slugs)), "two networks would share a checkpoint"
        for table in plan.tables:
            assert all(set(row) <= set(table.columns) for row in table.paper.values())
            if table.paper:
                compared = {network.paper or network.name for network in plan.networks}
                assert compared & set(table.paper), f"no row of {table.name} is the paper's"
                assert not paper or set(table.paper) <= compared, f"{table.name} has rows that are not run"
        for claim in plan.claims:
            assert set(claim.rows) <= set(rows) and set(claim.columns) <= set(columns)
            assert claim.table in [table.name for table in plan.tables]
        json.dumps(described(plan))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_networks_of_a_recipe_can_be_made(name: str) -> None:
    for paper, colour in ((False, False), (True, True)):
        for network in recipes.RECIPES[name].plan(paper, colour).networks:
            with torch.device("meta"):
                made = network.make(in_channels=3 if colour else 1, num_classes=10)
            assert isinstance(made, nn.Module) and any(True for _ in made.parameters())


def test_the_papers_numbers_are_where_the_papers_have_them() -> None:
    """Two numbers of each paper, by row and column, read in the texts again."""
    wanted = {
        ("001-table1", "IE-ResNet-3-18", "FGSM"): 92.27,
        ("001-table3", "IE-ResNet-1-50", "PGD-20"): 45.31,
        ("002-table1", "Neural ODE", "PGD 0.5"): 75.23,
        ("003-table2", "ODENet, Dopri5(0.01)", "PGD-1000"): 8.36,
        ("003-table4", "SONet, 64 channels", "SPSA"): 15.10,
        ("004-table1", "SSP-adap", "PGD-30"): 51.02,
        ("004-table2", "SSP-3, N = 10, K = 7", "PGD-12"): 45.58,
        ("004-table2", "SSP-adap, N = 10, K = 12", "FGSM"): 56.43,
    }
    for (name, row, column), value in wanted.items():
        assert recipes.RECIPES[name].plan(True, False).tables[0].paper[row][column] == value


def test_a_run_leaves_results_tables_plots_and_checkpoints(finished: tuple[Path, recipes.runner.Results]) -> None:
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    checkpoints = {f"{name}-seed-{seed}.pt" for name in ("res", "ssp3") for seed in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {"results.json", "table-1.csv", "table-1.png", *checkpoints}
    rows = list(csv.DictReader((folder / "table-1.csv").open()))
    assert len(rows) == 2 * 2 * 2 and rows[2] == {
        "network": "res", "column": "FGSM", "seed": "0", "value": str(results["cells"]["res"]["0"]["values"]["FGSM"]),
        "paper": "50.0",
    }  # fmt: skip
    assert all(
        len(cell["losses"]) == 2 and cell["train_seconds"] > 0
        for row in results["cells"].values()
        for cell in row.values()
    )
    naturals = [cell["values"]["natural"] for row in results["cells"].values() for cell in row.values()]
    assert min(naturals) > 80, "it does not learn to tell rows from columns"
    content = torch.load(folder / "res-seed-0.pt", weights_only=True)
    assert len(content["rows"]) == 2
    first, second = (cell["losses"] for cell in results["cells"]["ssp3"].values())
    assert first != second, "two seeds are one"


def test_what_is_printed_has_the_papers_numbers_beside_ours(finished: tuple[Path, recipes.runner.Results]) -> None:
    _, results = finished
    text = recipes.report(TINY, results)
    assert text.startswith(
        "tiny: a tiny one (nobody, 2026).\nQuick size, not the paper's: stripes; 2 epochs, 32 images attacked, 2 seeds"
    )
    head, line = next(re.findall(r"^(network.*)\n(res .*)$", text, re.MULTILINE) for _ in [0])[0]
    assert re.split(r"  +", head) == ["network", "natural, here", "FGSM, paper", "FGSM, here"]
    values = [cell["values"]["FGSM"] for cell in results["cells"]["res"].values()]
    assert re.split(r"  +", line)[2:] == ["50.00", f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"]
    assert "SSP is more robust: FGSM " in text and "of 2 seeds" in text


def test_a_run_goes_on_where_it_was_stopped(
    finished: tuple[Path, recipes.runner.Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = finished
    taken = measures.Attacked.__call__
    left = iter([True, False])

    def stops(self: Any, *arguments: Any) -> Any:
        if not next(left, False):
            raise KeyboardInterrupt
        return taken(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measures.Attacked, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    made: list[str] = []
    fit = training.Trainer.fit
    monkeypatch.setattr(
        training.Trainer, "fit", lambda self, loader: made.append(str(self.checkpoint)) or fit(self, loader)
    )
    parts = run(tmp_path)
    assert [Path(name).name for name in made] == ["ssp3-seed-0.pt", "res-seed-1.pt", "ssp3-seed-1.pt"]

    def values(results: Any) -> Any:
        return {
            name: {seed: (cell["values"], cell["losses"]) for seed, cell in row.items()}
            for name, row in results["cells"].items()
        }

    assert values(parts) == values(whole)
    made.clear()
    run(tmp_path)
    assert not made, "a finished network was trained again"


def test_fused_and_reference_give_the_same_table_within_what_seeds_change(
    finished: tuple[Path, recipes.runner.Results], tmp_path: Path
) -> None:
    _, fused = finished
    reference = run(tmp_path, fused=False)
    assert reference["settings"]["fused"] is False
    for network in TINY.networks:
        for column in ("natural", "FGSM"):
            one, other = (tables.values_of(each, network.name, column) for each in (fused, reference))
            numbers = [float(value) for value in (*one, *other)]
            noise = max(max(one) - min(one), max(other) - min(other), 100 / 32)  # or one image of the 32
            assert abs(statistics.fmean(map(float, one)) - statistics.fmean(map(float, other))) <= noise, numbers
        for seed in ("0", "1"):  # the same start and the same batches: far closer than two seeds
            one, other = (each["cells"][network.name][seed]["losses"] for each in (fused, reference))
            assert one == pytest.approx(other, rel=0.02)


def test_reference_blocks_are_reference_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(runner, "fuse", lambda model: asked.append(True))
    small = replace(TINY, networks=TINY.networks[:1])
    run(tmp_path / "a", small, seeds=1, epochs=1, fused=False)
    assert not asked
    run(tmp_path / "b", small, seeds=1, epochs=1)
    assert asked == [True]


def test_a_folder_of_another_run_is_not_gone_on_with(
    finished: tuple[Path, recipes.runner.Results], tmp_path: Path
) -> None:
    folder, _ = finished
    before = (folder / "results.json").read_text()
    for options, name in (({"fused": False}, "fused"), ({"epochs": 3}, "epochs")):
        said = f"folder must have results of this run, got {folder} of one with another {name}: name another folder"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}, or move it away$"):
            run(folder, **options)
    stronger = replace(TINY, tables=(Table("Table 1", "tiny", (CLEAN, replace(FGSM, options={"eps": 0.2}))),))
    with pytest.raises(ValueError, match="of one with another measures"):
        run(folder, stronger)
    assert (folder / "results.json").read_text() == before
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "res-seed-0.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^folder must have the results\.json of its checkpoints, got .* with res-seed-0\.pt"
    ):
        run(alone)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"^folder must have results of a recipe, got .*results\.json, which cannot be"
    ):
        run(tmp_path)


def test_more_seeds_add_to_a_run(finished: tuple[Path, recipes.runner.Results], tmp_path: Path) -> None:
    small = replace(TINY, networks=TINY.networks[:1])
    one = run(tmp_path, small, seeds=1)
    two = run(tmp_path, small, seeds=2)
    assert one["cells"]["res"]["0"] == two["cells"]["res"]["0"] and set(two["cells"]["res"]) == {"0", "1"}
    assert run(tmp_path, small, seeds=1)["settings"]["seeds"] == 2, "the table has both"


def test_a_disk_that_is_full_leaves_what_was_there(
    finished: tuple[Path, recipes.runner.Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    before = (folder / "results.json").read_text()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recipes.records.os, "replace", full)
    name = folder / "results.json"
    said = f"{name} could not be written, and what was there stays: No space left on device"
    with pytest.raises(OSError, match=f"{re.escape(said)}$"):
        run(folder, seeds=3)
    assert name.read_text() == before and not list(folder.glob("*.part*"))


def test_milestones_move_with_the_epochs(tmp_path: Path) -> None:
    plan = replace(TINY, training=replace(TINY.training, epochs=180, milestones=(80, 120, 160)))
    assert runner._changed(plan, 18, None).training.milestones == (8, 12, 16)
    for options, message in (
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"seeds": 0}, "seeds must be an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            run(tmp_path, **options)


def test_the_papers_size_wants_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^images must be given for the paper's size, which is of cifar10, got None$"):
        recipes.run(recipes.RECIPES["001-table3"], tmp_path, paper=True)
    assert main(["run", "001-table3", "--paper"]) == 2
    assert "--paper wants --data: 001-table3 is of cifar10" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a card where there is none")
def test_a_card_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^device must be 'cpu' here, got 'cuda', and torch sees no CUDA device$"):
        run(tmp_path, device="cuda")


def test_one_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match=r"^a recipe must run in one process, got one of several"):
        run(tmp_path)


def test_a_missing_library_is_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError('this attack needs foolbox: pip install "fastode[attacks]"')

    monkeypatch.setitem(measures.NEEDS, "boundary", missing)
    boundary = measures.Distances("ε =", "boundary", (1.0,))
    with pytest.raises(ImportError, match="needs foolbox"):
        run(tmp_path, replace(TINY, tables=(Table("Table 1", "tiny", (CLEAN, boundary)),)))
    assert not list(tmp_path.iterdir())


def test_the_command_runs_a_recipe_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "tiny", RECIPE)
    monkeypatch.setitem(recipes.data.OFFLINE, "stripes", digits)
    assert main(["run", "tiny", "--out", str(tmp_path / "out"), "--epochs", "1", "--seeds", "1", "--reference"]) == 0
    printed = capsys.readouterr().out
    assert "reference blocks" in printed and "Table 1: tiny (% right)" in printed
    assert main(["run", "nothing"]) == 2
    assert f"NAME must be one of {', '.join(recipes.RECIPES)}, got 'nothing'" in capsys.readouterr().err
    assert main(["run", "tiny", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert f"data must be a path that exists, got {tmp_path / 'none'}" in capsys.readouterr().err
    assert main([]) == 0 and "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ssp3", "seeds", "word"),
    [
        ((15.0, 26.0, 34.0), 3, "yes"),
        ((5.0, 16.0, 24.0), 0, "no"),
        ((15.0, 19.0, 40.0), 2, "undecided"),
        ((10.0, 20.0, 30.0), 0, "undecided"),
        ((11.0,), 1, "yes"),
        ((10.0,), 0, "no"),
        ((9.0,), 0, "no"),
    ],
)
def test_an_order_is_there_or_not_or_undecided(ssp3: tuple[float, ...], seeds: int, word: str) -> None:
    def cells(values: tuple[float, ...]) -> dict[str, Any]:
        return {str(seed): {"values": {"FGSM": value}} for seed, value in enumerate(values)}

    results = {"cells": {"res": cells((10.0, 20.0, 30.0)), "ssp3": cells(ssp3)}}
    (found,) = tables.verdicts(TINY, results)
    assert (found.seeds, found.of, found.word) == (seeds, len(ssp3), word)
    count = "1 seed" if len(ssp3) == 1 else f"{len(ssp3)} seeds"
    assert tables.said(TINY, results) == [f"SSP is more robust: FGSM {word} ({seeds} of {count})"]


def test_an_order_of_three_is_there_only_if_both_steps_are() -> None:
    assert tables._word([[1.0, 2.0], [1.1, 2.0]]) == "yes"
    assert tables._word([[1.0, -2.0], [1.1, -2.0]]) == "no"
    assert tables._word([[1.0, -2.0], [1.1, 2.5]]) == "undecided"


class Pushes:
    """An attack that moves each image by its place in the batch, in the Euclidean norm; the model is fooled by all."""

    __name__ = "pushes"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        moved = images.clone()
        moved[:, 0, 0, 0] = 0.1 * torch.arange(1, 1 + len(images))
        return moved


class Corner(nn.Module):
    """Right as long as the first pixel is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.05 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.05], 1)


def test_distances_count_what_needs_more_than_the_radius() -> None:
    measure = measures.Distances("ε =", Pushes(), (0.15, 0.35, 9.0))  # type: ignore[arg-type]
    found = measure(Corner(), torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 0, 0]), torch.Generator(), 4)
    assert found == {"ε = 0.15": 75.0, "ε = 0.35": 25.0, "ε = 9": 0.0}


class Crowd(nn.Module):
    """Has an image right where it is alone, as one that shares no steps might."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0] if len(x) == 1 else [0.0, 1.0]).expand(len(x), 2)


def test_alone_measures_each_image_as_a_batch() -> None:
    images, labels = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    for measure, right in ((CLEAN, 0.0), (measures.Alone(CLEAN), 100.0)):
        assert measure(Crowd(), images, labels, torch.Generator(), 2) == {"natural": right}
        assert measure.columns == ("natural",)
    assert described(measures.Alone(CLEAN)) != described(CLEAN)


def test_growth_is_that_of_the_layer_behind_a_normalisation() -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    body = nn.Sequential()
    body.add_module("group1", nn.Conv2d(1, 1, 1, bias=False))
    body.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    body.group1.weight.data.fill_(3.0)  # type: ignore[union-attr, operator]
    model = nn.Sequential(recipes.data.Normalized(images), body)
    growth = measures.Growth(("group1",), (1, 2), {"eps": 0.1, "steps": 2})
    found = growth(model, images, labels, torch.Generator().manual_seed(0), 3)
    assert list(found) == ["group1 ℓ1", "group1 ℓ2"]
    assert list(found.values()) == pytest.approx([3.0, 3.0], rel=1e-4)


def test_growth_leaves_out_batches_that_the_attack_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    model = nn.Sequential()
    model.add_module("group1", nn.Flatten())
    moved = torch.cat([images[:2], images[2:] + 0.1])
    monkeypatch.setattr(measures, "_attacked", lambda *_: SimpleNamespace(images=moved))
    found = measures.Growth(("group1",), (2,), {})(model, images, labels, torch.Generator(), 2)
    assert found == pytest.approx({"group1 ℓ2": 1.0})


def test_step_times_are_those_of_the_first_adaptive_block() -> None:
    torch.manual_seed(0)
    model = nets.soblock_resnet10(in_channels=1, num_classes=2, width=4)
    times = measures.StepTimes((1, 2), {"eps": 0.1}, 4)
    found = times(model, torch.rand(6, 1, 8, 8), torch.arange(6) % 2, torch.Generator().manual_seed(0), 4)
    assert list(found) == ["after PGD-1", "after PGD-2"]
    assert all(re.fullmatch(r"\[0\.000, .*1\.000\]", str(value)) for value in found.values())
    plain = times(
        nets.resnet10(in_channels=1, num_classes=2, width=4),
        torch.rand(6, 1, 8, 8),
        torch.arange(6) % 2,
        torch.Generator(),
        4,
    )
    assert set(plain.values()) == {"no adaptive steps"}


def test_attacks_that_draw_nothing_get_no_generator() -> None:
    for name in attacks.ATTACKS:
        takes = "generator" in attacks.ATTACKS[name].__kwdefaults__
        assert takes == (name not in (*measures.DRAW_NOTHING, "transfer")), "transfer hands on what it is given"
