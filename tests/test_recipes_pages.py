"""The recorded recipes and their pages: a record has both kinds of blocks, and every page is that of its records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from recipe_cases import RECIPE, TINY, digits

from benchmarks import experiments, recipes, recipes_page
from benchmarks.recipes_cifar10 import CIFAR10
from fastode.recipes import RECIPES, Network, Recipe, data
from fastode.recipes.plan import described

SMALL = replace(TINY, networks=TINY.networks[:1], training=replace(TINY.training, epochs=1), seeds=1, claims=())


def test_a_record_has_both_runs_and_its_page_says_how_far_they_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.OFFLINE, "stripes", digits)
    recipe, path = replace(RECIPE, plan=lambda paper, colour: SMALL), tmp_path / "record.json"
    for blocks in recipes_page.BLOCKS:
        recipes.record(recipe, blocks, tmp_path / "work", path)
    found = experiments.load(path)
    assert (found["fused"]["settings"]["fused"], found["reference"]["settings"]["fused"]) == (True, False)
    times = recipes.timed(recipe, digits(), rounds=1)
    assert list(times) == ["res"] and list(times["res"]) == ["training", "FGSM"]
    assert all(0 < low <= middle <= high for middle, low, high in times["res"].values())
    experiments.save(path, {**found, "times": {"networks": times, "rounds": 1}})
    text = "\n".join(recipes_page.section(recipe, path, tmp_path))
    assert "## tiny: a tiny one" in text and "| res |" in text and "one seed (0)" in text
    assert "With the reference blocks the means differ by" in text and "changed since" not in text
    assert f"res {times['res']['FGSM'][0]:.2f} (FGSM) and {times['res']['training'][0]:.2f} (training)" in text
    assert experiments.mark_of([path]).encode() in (tmp_path / "recipe-tiny-table-1.png").read_bytes()
    other = replace(SMALL, networks=(Network("res", SMALL.networks[0].make.func),))  # type: ignore[attr-defined]
    text = "\n".join(recipes_page.section(replace(RECIPE, plan=lambda paper, colour: other), path, tmp_path))
    assert "**The recipe has changed since: these numbers are of an earlier form.**" in text


def test_a_recipe_without_a_record_says_so(tmp_path: Path) -> None:
    recipes_page.report(tmp_path, tmp_path)
    text = (tmp_path / "recipes.md").read_text()
    assert text.count("| not recorded |") == len(RECIPES) == 8
    assert "Not recorded yet. `python -m fastode.recipes run 003-table4`" in (tmp_path / "paper-003.md").read_text()


def test_every_recipe_has_a_paper_with_a_page() -> None:
    assert {name[:3] for name in RECIPES} == set(recipes_page.PAPERS)
    assert all(isinstance(recipe, Recipe) for number in recipes_page.PAPERS for recipe in recipes_page.of_paper(number))


def test_the_pages_are_those_of_the_records(tmp_path: Path) -> None:
    recipes_page.report(tmp_path)
    for page in tmp_path.glob("*.md"):
        assert page.read_text() == (experiments.PAGES / page.name).read_text(), (
            f"{page.name}: python -m benchmarks.recipes"
        )
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == {picture.name for picture in experiments.PAGES.glob("recipe-*.png")}
    for recipe in (*RECIPES.values(), *CIFAR10.values()):
        path = recipes_page.record_of(recipe.name)
        if path.exists():
            mark = experiments.mark_of([path]).encode()
            pictures = [each for each in recipes_page.pictures(recipe, experiments.PAGES) if each.name in drawn]
            assert pictures and all(mark in picture.read_bytes() for picture in pictures)


@pytest.mark.parametrize("name", CIFAR10)
def test_the_recipes_on_cifar10_are_the_quick_ones_with_the_papers_width(name: str) -> None:
    plan, quick = CIFAR10[name].plan(False, True), RECIPES[name].plan(False, True)
    assert plan.tables == quick.tables and described(plan.training.loss) == described(quick.training.loss)
    assert {network.name for network in plan.networks} <= {network.name for network in quick.networks}
    assert all(network.make.keywords["width"] == 16 for network in plan.networks)  # type: ignore[attr-defined]
    rows = {network.paper or network.name for network in plan.networks}
    assert rows <= set(plan.tables[0].paper), "the paper has no such row"


def test_other_recipes_have_no_form_for_cifar10(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.main(["004-table1", "--cifar10", "a.npz"])
    assert "--cifar10 is for 001-table3 and 004-table2, got 004-table1" in capsys.readouterr().err
