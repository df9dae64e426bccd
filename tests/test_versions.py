"""The oldest torch that is supported, and `make versions`: what it demands of each suite, and the page it writes."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
import versions
from conftest import NEEDS_GPU, NEEDS_PAIRS
from versions import Outcome

import fastode

ROOT = Path(__file__).resolve().parent.parent
CELLS = (
    r"\d+\.\d+\.\d+(\+\w+)?", r"\w[^|]*", r"\d+\.\d+\.\d+", r"3\.\d+\.\d+", r"\w[^|]*", r"\d+", r"\d+", r"\d+",
    r"\d{4}-\d\d-\d\d", r"[0-9a-f]{7,40}(-dirty)?",
)  # fmt: skip


@pytest.mark.parametrize("version", ["2.10.0+cu128", "2.9.1", "1.13.1"])
def test_an_older_torch_is_refused_on_import(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"^fastode needs torch 2\.11 or later, got torch {re.escape(version)}$"):
        importlib.reload(fastode)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.11.0a0+git1234", "2.14.1", "3.0.0"])
def test_a_newer_one_is_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    importlib.reload(fastode)


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    oldest = next(iter(versions.TORCH)).rsplit(".", 1)[0]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={oldest}" in dependencies
    assert f"needs torch {oldest} or later" in (ROOT / "README.md").read_text()
    (default,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make test" in versions.TORCH[default]


def test_a_report_is_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = {
        "passes": "",
        "waits": f'<skipped message="{NEEDS_GPU}"/>',
        "waits_for_another_cpu": f'<skipped message="{NEEDS_PAIRS}"/>',
        "left_out": '<skipped message="no network"/>',
        "expected_to_fail": '<skipped type="pytest.xfail" message=""/>',
        "fails": '<failure message="no"/>',
        "breaks": '<error message="no"/>',
        "breaks_after_waiting": f'<skipped message="{NEEDS_GPU}"/><error message="no"/>',
    }
    lines = [f'<testcase classname="tests.test_a" name="{name}">{inside}</testcase>' for name, inside in cases.items()]
    report.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    found = versions.read(report)
    assert (found.passed, found.gpu, found.cpu) == (1, 1, 1)
    assert [name.split("::")[1].split(" ")[0] for name in found.others] == list(cases)[3:]


def test_outcomes_must_agree_and_have_nothing_but_passes_and_waits() -> None:
    good = Outcome(100, 4, 2, ())
    assert versions.faults({"2.11.0": good, "2.14.1": good}) == []
    assert versions.faults({"2.11.0": good, "2.14.1": Outcome(99, 4, 2, ())}) == [
        "the numbers of passed and skipped tests differ: 100 and 6 on 2.11.0, 99 and 6 on 2.14.1"
    ]
    assert versions.faults({"2.11.0": Outcome(100, 4, 2, ("a::b (failure)",))}) == ["torch 2.11.0: a::b (failure)"]


def well_formed(page: str) -> bool:
    """Whether a page has a row for every release, each cell of its kind, and the same numbers of tests in all rows."""
    if not page.startswith(versions.HEADER):
        return False
    rows = [line.strip("| \n").split(" | ") for line in page.removeprefix(versions.HEADER).splitlines()]
    kinds = all(
        len(row) == len(CELLS) and all(re.fullmatch(kind, cell) for kind, cell in zip(CELLS, row, strict=True))
        for row in rows
    )
    return (
        kinds
        and [row[0].split("+")[0] for row in rows] == list(versions.TORCH)
        and len({(*r[5:8],) for r in rows}) == 1
    )


def test_the_page() -> None:
    told = {version: [f"{version}+cpu", "3.6.0", "3.11.7", "AMD EPYC"] for version in versions.TORCH}
    outcomes = {version: Outcome(100 + (version == "2.14.1"), 4, 2, ()) for version in versions.TORCH}
    rows = [versions.row(v, told[v], Outcome(100, 4, 2, ()), "2026-01-02", "0123abc") for v in versions.TORCH]
    assert well_formed(versions.HEADER + "".join(rows))
    assert not well_formed(versions.HEADER + "".join(rows[1:]))
    uneven = [versions.row(v, told[v], outcomes[v], "2026-01-02", "0123abc") for v in versions.TORCH]
    assert not well_formed(versions.HEADER + "".join(uneven))
    if versions.PAGE.exists():  # until the first run there is none
        assert well_formed(versions.PAGE.read_text())
