"""The pages agree with the records: the tables of docs/measured.md and of the README, and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    card,
    contenders,
    data,
    header,
    measure,
    networks,
    printing,
    report,
    run,
    targets,
    workloads,
)
from benchmarks.header import RESULTS
from fastode import nets, reference

CPU = torch.device("cpu")


def test_the_page_has_the_recorded_numbers() -> None:
    _, table, _ = report.between(report.PAGE.read_text())
    assert report.recorded(RESULTS), "no results are recorded"
    assert table.strip() == report.markdown().strip(), "run python -m benchmarks.report"


def test_the_readme_has_the_recorded_numbers() -> None:
    _, table, _ = report.between(report.README.read_text(), "networks")
    assert table.strip() == networks.markdown().strip(), "run python -m benchmarks.report"
    _, table, _ = report.between(report.README.read_text(), "card")
    assert table.strip() == card.markdown().strip(), "run python -m benchmarks.report"


def test_the_readme_has_a_row_for_every_network() -> None:
    assert sorted(network.name for network in networks.NETWORKS) == sorted(nets.__all__)
    assert {network.paper for network in networks.NETWORKS} == set(networks.PAPERS)
    # What a record calls a network is one that the benchmarks know, made by a function of fastode.nets.
    found = {networks.network_of(row) for _, row in networks.recorded(RESULTS)}
    assert found and found <= set(nets.__all__)


def network_record(folder: Path, device: str, ratio: float, **whole: str) -> None:
    head = {"device": device, "threads": 2, "date": "2026-01-02T03", "commit": "0123456789abcdef"}
    row = {
        "workload": "nets", "variant": "sspnet-3", "contender": "fused", "engine": "auto", "mode": "train",
        "dtype": "float32", "batch": 8, "errors": "", "ratio_to_better_eager": {"median": ratio},
    } | whole  # fmt: skip
    others = [row | {"engine": "staged"}, row | {"mode": "forward"}, row | {"mode": "pgd_step", "errors": "not equal"}]
    folder.mkdir(exist_ok=True)
    rows = [row, *others]
    name = "networks-sspnet.json" if whole else "cpu-sspnet.json"
    (folder / name).write_text(json.dumps({"header": head | {"versions": {"torch": "2"}}, "rows": rows}))


def test_a_network_has_the_ratio_that_is_recorded(tmp_path: Path) -> None:
    assert "Measured: nothing is recorded yet." in networks.markdown(tmp_path)
    network_record(tmp_path / "one", "chip", 1.875)
    text = networks.markdown(tmp_path)
    assert "| `sspnet` | 1.88 (`sspnet-3`) | not measured |" in text and "| `sonet` | not measured | not" in text
    assert "Measured: float32, 8 images; chip, 2 threads, torch 2, 2026-01-02, commit 0123456789ab." in text
    network_record(tmp_path / "two", "other", 2.5)
    assert "1.88 (`sspnet-3`, chip, 2 threads), 2.50 (`sspnet-3`, other, 2 threads)" in networks.markdown(tmp_path)
    # As a user trains it: its rows take the place of the others.
    network_record(tmp_path / "two", "other", 3.25, workload="networks", mode="attack_step", dtype="autocast")
    missing = " | ".join(["not measured"] * 3)
    assert f"| `sspnet` | {missing} | 3.25 (`sspnet-3`) |" in networks.markdown(tmp_path)
    # In its place a network that others wrote, which has no row here.
    network_record(tmp_path / "two", "other", 1.5, workload="networks", variant="preact-resnet18")
    text = networks.markdown(tmp_path)
    assert "1.50" not in text and "| `sspnet` | 1.88 (`sspnet-3`, chip" in text


def test_every_record_has_its_plot() -> None:
    parts = tuple(f"{suite}-" for suite in targets.SUITES)  # which are reported as one table, without plots
    paths = [path for path in report.recorded(RESULTS) if not path.name.startswith(parts)]
    assert paths, "no results are recorded"
    for path in paths:
        assert report.digest(path).encode() in path.with_suffix(".png").read_bytes(), "run python -m benchmarks.report"


def record(folder: Any) -> Any:
    def block() -> nn.Module:
        return reference.IESkip(reference.PreActBranch(4, norm="layer", bias=False))

    rows = measure.measure(
        workloads.Workload("ie", "k1", "4@8", block, lambda device: (data.feature_maps(2, 4, 8),)),
        "forward",
        "float32",
        CPU,
        [contenders.CONTENDERS["eager"], contenders.CONTENDERS["eager-cl"]],
        seconds=0.0,
        rounds=(2, 2),
    )
    fused = rows[1] | {"contender": "fused", "engine": "staged"}
    head = header.header(CPU, "default")
    path = folder / "machine" / "default.json"
    run.Record(path, head).add([*rows, fused])
    return path


def test_report_makes_table_and_plot_from_the_record(tmp_path: Any) -> None:
    path = record(tmp_path)
    pages = {name: tmp_path / f"{name}.md" for name in ("benchmarks", "networks")}
    for name, page in pages.items():
        page.write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    with pages["networks"].open("a") as readme_file:
        readme_file.write("<!-- card:begin -->\nold\n<!-- card:end -->\nafter\n")
    page, readme = pages.values()
    assert report.main(["--results", str(tmp_path), "--page", str(page), "--readme", str(readme)]) == 0
    for text in (page.read_text(), readme.read_text()):
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    row = json.loads(path.read_text())["rows"][2]
    assert f"{row['median_ms']:.1f}" in page.read_text() and "staged" in page.read_text()
    assert "](machine/default.json)" in page.read_text() and "](machine/default.png)" in page.read_text()
    assert report.digest(path).encode() in path.with_suffix(".png").read_bytes()
    assert not report.update(page, report.markdown(tmp_path, page))


def test_a_record_with_replays_has_their_times_and_ratios(tmp_path: Path) -> None:
    rows = json.loads(record(tmp_path).read_text())["rows"]
    assert "graph" not in "".join(report.page_table(rows)) and "graph" not in printing.line(rows[2])
    spread = {"p20": 0.02, "p80": 0.9}
    rows[0]["graph"] = {"median_ms": 0.5, "ratio_to_better_eager": 0.8, **spread}
    rows[1]["graph"] = {"median_ms": 0.4056, "ratio_to_better_eager": 1.0, **spread}
    rows[2] |= {"median_ms": 0.0406, "graph": {"median_ms": 0.037, "ratio_to_better_eager": 10.9621, **spread}}
    head, _, line = (entry.split(" | ") for entry in report.page_table(rows))
    cells = dict(zip(head, line, strict=True))
    assert (cells["fused ms"], cells["eager graph ms"], cells["graph ms"], cells["× graph"]) == (
        "0.041", "0.406", "0.037", "10.96",
    )  # fmt: skip
    assert "graph   0.037 ms × 10.96" in printing.line(rows[2])
    assert dict(zip(printing.COLUMNS, printing.cells(rows[2]), strict=True))["× graph"] == "10.96"
    # Eager's was not captured, the fused one's failed, the fused contender itself failed.
    rows[1]["graph"], rows[0]["graph"] = {"errors": "no"}, {"errors": "no"}
    rows[2]["graph"]["ratio_to_better_eager"] = None
    assert "| – | 0.037 | – |" in report.page_table(rows)[2]
    rows[2]["graph"] = {"errors": "no"}
    assert "| – | failed |  |" in report.page_table(rows)[2]
    rows[2]["errors"] = "not equal"
    widths = {len(entry.split("|")) for entry in report.page_table(rows)}
    assert widths == {len(report.PAGE_COLUMNS) + len(report.GRAPH_COLUMNS) + 2}


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must contain"):
        report.between("no markers")
