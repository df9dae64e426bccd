"""The recorded experiments: they run at a tiny size, go on where they were stopped, and make their pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks import data, exact_ie, experiments, masking, masking_page, reversible
from fastode.recipes.data import Images
from fastode.reference import SOBlock

TINY = masking.Plan("mnist", width=8, epochs=2, batch=4, images=8, radii=(0.05, 0.2), steps=2)


def images() -> Images:
    """Patches of the two photographs, made small, pixels in [0, 1]."""
    x = data.images(24)[:, :, ::4, ::4]
    x = (x - x.min()) / (x.max() - x.min())
    return Images((x[:16], data.labels(16)), (x[16:], data.labels(24)[16:]), "photographs, small")


def run(folder: Path) -> experiments.Record:
    masking.run(TINY, images(), folder / "record.json", folder / "work" / "state.pt")
    return experiments.load(folder / "record.json")


class Stopped(Exception):
    pass


def test_masking_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    batches = 1 + len(TINY.radii) * len(masking.ATTACKS)
    assert len(whole["batches"]) == 2 * batches and len(whole["losses"]) == TINY.epochs
    saves, save = iter(range(100)), experiments.save

    def stops(path: Path, record: experiments.Record) -> None:
        save(path, record)
        if next(saves) == 7:
            raise Stopped

    monkeypatch.setattr(experiments, "save", stops)
    with pytest.raises(Stopped):
        run(tmp_path / "parts")
    done = experiments.load(tmp_path / "parts" / "record.json")
    assert 0 < len(done["batches"]) < len(whole["batches"])
    monkeypatch.setattr(experiments, "save", save)
    parts = run(tmp_path / "parts")
    assert {**parts, "header": None} == {**whole, "header": None}


def test_a_record_of_another_plan_is_not_gone_on_with(tmp_path: Path) -> None:
    experiments.save(tmp_path / "record.json", {"plan": {"data": "other"}})
    with pytest.raises(ValueError, match=r"^the record record\.json must be of this plan, got one of"):
        run(tmp_path)


def test_an_attack_stays_within_its_radius_and_raises_the_loss() -> None:
    found = images()
    model = masking.network(TINY, found).eval().requires_grad_(False)
    x, y = found.test
    moved = masking.pgd(model, x, y, 0.1, 5, seed=0)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6 and 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert nn.functional.cross_entropy(model(moved), y) > nn.functional.cross_entropy(model(x), y)


def test_a_network_is_solved_otherwise_only_inside_the_context() -> None:
    model = masking.network(TINY, images())
    (block,) = [module for module in model.modules() if isinstance(module, SOBlock)]
    for solver in (*masking.ATTACKS.values(), *masking.JUDGES.values()):
        with masking.solved_by(model, solver):
            assert block.settings == solver
        assert block.settings == masking.TRAINED


def test_the_exact_gradient_has_the_cosine_one_with_itself() -> None:
    found = images()
    model = masking.network(TINY, found).eval().requires_grad_(False)
    cosines = masking.cosines(model, *found.test)
    assert list(cosines) == list(masking.ATTACKS) and cosines["exact"] == pytest.approx(1, abs=1e-3)


def test_the_page_of_masking_has_its_table_and_says_what_is_missing(tmp_path: Path) -> None:
    record = run(tmp_path)
    path = tmp_path / "record.json"
    text = "\n".join(masking_page.section(record))
    assert "Not finished" not in text and all(f"| {name} |" in text for name in (*masking.ATTACKS, "worst"))
    columns = [masking_page.accuracy(record["batches"], 0.2, name, "as trained")[0] for name in masking.ATTACKS]
    worst = sum(min(each) for each in zip(*columns, strict=True)) / TINY.images
    assert f"{100 * worst:.1f} %" in text.split("| worst |")[1]
    masking_page.report([path], tmp_path)
    assert (tmp_path / "masking.md").read_text().count("## ") == 1 and (tmp_path / "masking.png").exists()
    del record["batches"][next(iter(record["batches"]))]
    assert "Not finished" in "\n".join(masking_page.section(record))


def test_ie_skip_approaches_the_exact_block_in_the_experiment(tmp_path: Path) -> None:
    exact_ie.run(tmp_path / "record.json", most=16, shapes=[(8, 4)])
    found = experiments.load(tmp_path / "record.json")["shapes"]["8@4"]
    for distances in found["distance"].values():
        assert distances == sorted(distances, reverse=True)
    at_last = [distances[-1] for distances in found["distance"].values()]
    assert at_last == sorted(at_last, reverse=True) and found["exact"] <= exact_ie.TOLERANCE
    exact_ie.report(tmp_path / "record.json", tmp_path)
    assert "8@4" in (tmp_path / "exact-ie.md").read_text() and (tmp_path / "exact-ie.png").exists()


def test_a_fused_chain_does_not_grow_with_depth_in_the_experiment(tmp_path: Path) -> None:
    reversible.run(tmp_path / "record.json", depths=[1, 4], batch=2, networks=[])
    record = experiments.load(tmp_path / "record.json")
    one, four = record["chains"]
    assert four["reference"] > 2 * one["reference"] and four["fused"] < 1.3 * one["fused"] < 1.3 * one["reference"]
    reversible.report(tmp_path / "record.json", tmp_path)
    assert "# What a reversible chain keeps" in (tmp_path / "reversible.md").read_text()


RECORDED = {
    "reversible": ([experiments.record_of("reversible")], lambda paths, pages: reversible.report(*paths, pages)),
    "exact-ie": ([experiments.record_of("exact-ie")], lambda paths, pages: exact_ie.report(*paths, pages)),
    "masking": ([experiments.record_of(f"masking-{name}") for name in masking.PLANS], masking_page.report),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_page_is_that_of_its_record(name: str, tmp_path: Path) -> None:
    known, report = RECORDED[name]
    paths, page = [path for path in known if path.exists()], experiments.PAGES / f"{name}.md"
    assert page.exists() == bool(paths)
    if paths:
        report(paths, tmp_path)
        assert (tmp_path / f"{name}.md").read_text() == page.read_text()
        assert experiments.mark_of(paths).encode() in (experiments.PAGES / f"{name}.png").read_bytes()
