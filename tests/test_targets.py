"""What was asked and what was reached: figures, shares of ceilings, means, and files that agree with the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, targets
from benchmarks.header import RESULTS


def ratio(median: float, ceiling: float, memory: float = 0.3) -> dict[str, Any]:
    return {"median": median, "p20": median - 0.1, "p80": median + 0.1, "ceiling": ceiling, "memory": memory}


def row(shape: str = "16@32", mode: str = "train", **changes: Any) -> dict[str, Any]:
    return {
        "workload": "ssp3",
        "variant": "",
        "shape": shape,
        "mode": mode,
        "dtype": "float32",
        "contender": "fused",
        "engine": "auto",
        "errors": "",
        "fraction_of_matmul": 0.8,
        "ratio_to_better_eager": ratio(2.6, 5.0),
        "ratio_to_best_compiled": ratio(1.5, 2.0, 0.6),
        "ratio_to_vjp_compile": None,
    } | changes


def named(rows: list[dict[str, Any]]) -> dict[tuple[str, str], targets.Line]:
    return {(line.shape, line.against): line for line in targets.lines(rows)}


def test_the_figure_is_asked_or_three_quarters_of_the_ceiling() -> None:
    found = named([row(), row("64@8", ratio_to_better_eager=ratio(1.25, 1.6))])
    assert found["16@32", targets.EAGER].asked == 2.5 and found["16@32", targets.EAGER].ok
    assert found["64@8", targets.EAGER].asked == pytest.approx(1.2) and found["64@8", targets.EAGER].ok
    assert found["16@32", targets.COMPILED].asked == 1.5 and found["16@32", targets.COMPILED].ok
    assert not named([row(ratio_to_better_eager=ratio(2.4, 5.0))])["16@32", targets.EAGER].ok


def test_less_memory_is_better_and_has_no_ceiling() -> None:
    found = named([row()])
    assert found["16@32", targets.MEMORY_EAGER].ok and found["16@32", targets.MEMORY_EAGER].reached == 0.3
    assert not found["16@32", targets.MEMORY_COMPILED].ok
    assert targets.MEMORY_EAGER not in {line.against for line in targets.lines([row(mode="forward")])}


def test_ie_skip_is_compared_with_the_closed_form_compiled() -> None:
    ie = row(workload="ie", variant="k1", ratio_to_vjp_compile=ratio(1.1, 9.0), ratio_to_best_compiled=ratio(9.0, 9.0))
    line = named([ie])["16@32", targets.COMPILED]
    assert (line.family, line.asked, line.reached, line.ok) == ("ie k1", 2.0, 1.1, False)


def test_a_variant_or_a_shape_may_be_asked_for_a_figure_of_its_own() -> None:
    def figure(**changes: Any) -> dict[str, float]:
        return {line.against: line.figure for line in targets.lines([row(**changes)])}

    best = {"ratio_to_best_other": ratio(3.1, 20.0)}
    assert figure(workload="solve", variant="dopri5", shape="64@32", mode="forward") == {targets.EAGER: 3.2}
    assert figure(workload="solve", variant="dopri5", shape="3-64@32", mode="forward") == {targets.EAGER: 4.0}
    assert figure(workload="solve", variant="per-sample", shape="64@32", **best) == {targets.OTHER: 3.0}
    assert figure(workload="nets", variant="sonet-32", shape="3@32") == {targets.EAGER: 3.0}
    assert figure(workload="nets", variant="sonet-32", shape="3@32", mode="pgd_step") == {}


def test_only_the_engine_that_the_project_chose_counts() -> None:
    assert not targets.lines([row(engine="staged"), row(contender="eager", engine=None)])


def test_a_row_that_failed_reaches_nothing() -> None:
    (line, *_) = targets.lines([row(errors="not equal: output")])
    assert not line.ok and line.reached is None and "not equal: output" in "".join(targets.lines_table([line]))
    rival = row(contender="compile", engine=None, errors="graph break: x")
    found = named([row(ratio_to_best_compiled=None), rival])
    assert not found["16@32", targets.COMPILED].ok and "graph break" in found["16@32", targets.COMPILED].note
    assert ("16@32", targets.COMPILED) not in named([row(ratio_to_best_compiled=None)])


def test_networks_and_convolutions_are_asked_for_their_figure() -> None:
    network = row(workload="nets", variant="sspnet-3", shape="3@32", ratio_to_better_eager=ratio(1.9, 2.0))
    assert [(line.asked, line.ok) for line in targets.lines([network])] == [(2.2, False)]
    bare = row(workload="conv", mode="forward", fraction_of_matmul=1.04)
    assert [(line.asked, line.reached, line.ok) for line in targets.lines([bare])] == [(1.0, 1.04, True)]


def test_means_are_geometric_and_asked_of_the_mean_ceiling() -> None:
    rows = [row(ratio_to_better_eager=ratio(4.0, 8.0)), row("64@8", ratio_to_better_eager=ratio(1.0, 2.0))]
    found = {line.against: line for line in targets.means(targets.lines(rows))}
    mean = found[targets.EAGER]
    assert (mean.shape, mean.reached, mean.ceiling) == ("2", pytest.approx(2.0), pytest.approx(4.0))
    assert mean.asked == 2.5 and not mean.ok
    failed = targets.means(targets.lines([*rows, row("32@16", errors="no speed")]))
    assert {line.reached for line in failed if line.against == targets.EAGER} == {None}


def test_the_files_agree_with_the_records() -> None:
    folders = {path.parent for each in ("cpu-*", "networks-*") for path in RESULTS.glob(f"*/{each}.json")}
    assert {path.parent for path in RESULTS.glob("*/targets.md")} == folders
    for folder in folders:
        text = (folder / "targets.md").read_text()
        assert text == "\n".join(targets.lines_of(folder)) + "\n", "run python -m benchmarks.report"


def test_parts_are_merged_and_a_changed_record_shows(tmp_path: Path) -> None:
    head = {"suite": "cpu-ssp3", "device": "chip", "threads": 2, "commit": "0123456789abcdef", "date": "2026-01-02"}
    folder = tmp_path / "chip"
    folder.mkdir()
    for name, rows in (("ssp3", [row(), row("64@8")]), ("ssp2", [row(workload="ssp2")])):
        record = {"header": head | {"versions": {"torch": "2"}}, "rows": rows}
        (folder / f"cpu-{name}.json").write_text(json.dumps(record))
    (written,) = targets.write(tmp_path)
    text = written.read_text()
    assert "| ssp3 | 64@8 | training step | better eager | 2.50 | 2.60 |" in text and "| ssp2 | 16@32 |" in text
    assert "0123456789 (2026-01-02)" in text
    page = report.markdown(tmp_path, tmp_path / "page.md")
    assert "| ssp3 | training step | better eager | 2 | 2.50 | 2.60 |" in page and "(chip/targets.md)" in page
    changed = json.loads((folder / "cpu-ssp3.json").read_text())
    changed["rows"][0]["ratio_to_better_eager"]["median"] = 2.0
    (folder / "cpu-ssp3.json").write_text(json.dumps(changed))
    assert "\n".join(targets.lines_of(folder)) + "\n" != text
