"""The pages say what is so: their examples run, their links lead somewhere, the files and commands they name exist."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastode.ops.resident import rule as measured

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),  # which has copies
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "fastode").rglob("README.md")),
]
# Its examples show faults of PyTorch, one of which ends the process; test_pytorch_faults.py runs them.
SHOWS_FAULTS = DOCS / "pytorch-faults.md"
# What a page says can be made smaller, to see within seconds that all of it runs.
SMALLER = {"docs/tutorial.md": ("EPOCHS, IMAGES = 20, 100", "EPOCHS, IMAGES = 1, 8")}
MOST_LINES = 149  # of the README
FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|md|h|cpp|json)")
SOURCE = re.compile(r"(?:[\w.-]+/)*([\w-]+\.(?:py|h|cpp|cu|cuh))")

# What an example of `fuse` measures: a share, a gain, and what follows from them.
MEASURED = ((r"\b\d+ %", "N %"), (r"\babout \d+(\.\d)?x", "about Nx"), (r"(?m)(?<=^what would help most: ).*", "..."))

Block = tuple[int, str, str]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page: line number, language, and what stands in them."""
    found: list[Block] = []
    start, language, lines = 0, "", []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            if start:
                found.append((start, language, "\n".join(lines) + "\n"))
                start = 0
            else:
                start, language, lines = number, line[3:].strip(), []
        elif start:
            lines.append(line)
    assert not start, f"the block that begins on line {start} has no end"
    return found


def unmeasured(text: str) -> str:
    """A report of `fuse` without the figures that no two runs have alike; any other output as it is."""
    if not re.search(r"^of one forward, ", text, re.MULTILINE):
        return text
    for pattern, word in MEASURED:
        text = re.sub(pattern, word, text)
    return re.sub(r" {2,}", "  ", text)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def with_python() -> list[Path]:
    found = [page for page in PAGES if any(language == "python" for _, language, _ in blocks(page.read_text()))]
    return [page for page in found if page != SHOWS_FAULTS]


def test_the_readme_is_short_and_has_both_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    shell = "".join(body for _, language, body in blocks(text) if language == "sh")
    assert {"make test", "make bench"} <= {" ".join(line.split()[:2]) for line in shell.splitlines()}
    assert {"test", "bench", "docs"} <= commands()


def test_the_readme_says_in_its_first_lines_which_cards_are_measured() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    records = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*/*.json")]
    heads = [found["header"] for found in records if isinstance(found, dict) and "header" in found]
    cards = {head["device"] for head in heads if head.get("device_type") == "cuda"}
    assert cards == {"NVIDIA H100 80GB HBM3"}, "say in the README which cards are measured"
    assert "Measured on CPUs and on one card, an NVIDIA H100" in first


def test_the_examples_are_found() -> None:
    assert {"README.md", "docs/use.md", "docs/equality.md", "docs/choice.md", "docs/tutorial.md"} <= set(
        map(name_of, with_python())
    )


@pytest.mark.parametrize("page", with_python(), ids=name_of)
def test_examples_run(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for what an example writes
    monkeypatch.setattr(measured, "_has_wide_registers", True)  # as where the pages' outputs are from
    names: dict[str, Any] = {"__name__": "__page__"}
    printed, text = "", page.read_text()
    if name_of(page) in SMALLER:
        large, small = SMALLER[name_of(page)]
        assert text.count(large) == 1
        text = text.replace(large, small)
    for line, language, body in blocks(text):
        if language == "python":
            # In front of it as many empty lines as on the page, so that a traceback names the line there.
            exec(compile("\n" * line + body, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "output":
            assert unmeasured(body) == unmeasured(printed), (
                f"line {line} shows another output than the example before it has"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page.read_text())
    for address, anchor in re.findall(r"\]\((?!https?:)([^()\s#]*)(?:#([^()\s]*))?\)", text):
        target = (page.parent / address).resolve() if address else page
        assert target.exists(), f"{name_of(page)} links to {address}, which is not there"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to #{anchor}, which is no heading"


def sources() -> set[str]:
    """The names of all source files, without their folders."""
    found = {"setup.py"}
    for folder in ("fastode", "csrc", "benchmarks", "tests", "docs"):
        found |= {path.name for path in (ROOT / folder).rglob("*")}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_and_commands_exist(page: Path) -> None:
    text, known = page.read_text(), sources()
    for code in re.findall(r"`([^`\n]+)`", prose(text)):
        if FILE.fullmatch(code) and code.split("/")[0] in {"fastode", "csrc", "benchmarks", "tests", "docs"}:
            made = code.startswith("docs/_build/") or code == "docs/versions.md"  # by make docs, and make versions
            assert made or (ROOT / code).exists(), f"{name_of(page)} names {code}, which is not there"
        elif match := SOURCE.fullmatch(code):
            assert match[1] in known, f"{name_of(page)} names {code}, and there is no such file"
    for command in re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"`([^`\n]+)`", text))):
        assert command in commands(), f"{name_of(page)} names make {command}, which is no target"


def test_every_included_file_exists_and_has_one_page() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    shown = conf["shown"]()
    assert all(path.is_file() for path in shown)
    readmes = {page for page in PAGES if page.name == "README.md"}
    assert readmes <= set(shown), "a README that no page shows"


def test_the_configuration_loads_and_its_requirements_are_installed_by_setup() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name.split(".")[0].replace("_", "-") for name in (*conf["extensions"], conf["html_theme"])}
    assert needed == {"myst-parser", "sphinx", "furo"} == set(project["optional-dependencies"]["docs"])
    makefile = (ROOT / "Makefile").read_text()
    assert "extras=test,bench,lint,docs" in makefile and "--fail-on-warning" in makefile
    assert "docs/_build/" in (ROOT / ".gitignore").read_text().split()


def test_links_fit_the_page_that_shows_a_file() -> None:
    rewritten = runpy.run_path(str(DOCS / "conf.py"))["rewritten"]
    text = "[a](docs/use.md#x) [b](benchmarks/README.md) [c](LICENSE) [d](fastode/ops) [e](https://x.y) ![f](LICENSE)"
    found = rewritten(text, ROOT / "README.md", DOCS / "index.md")
    assert found == "[a](use.md#x) [b](benchmarks.md) [c](path:../LICENSE) d [e](https://x.y) ![f](../LICENSE)"
    found = rewritten("[a](../README.md)", ROOT / "fastode/ops/triton/README.md", DOCS / "operators/triton.md")
    assert found == "[a](index.md)"
    page = DOCS / "operators" / "skew_pair.md"
    shown = rewritten(page.read_text(), page, page)
    assert shown.startswith("# ") and "{include}" not in shown


def test_docstrings_are_put_as_they_are_meant() -> None:
    plain = runpy.run_path(str(DOCS / "conf.py"))["plain"]
    docstring = ["One line.", "", "Returns:", "    The report: rows,", "    in order.", "", "Source: Li,", "    eq. 1."]
    expected = ["One line.", "", ":returns: The report: rows, in order.", "", "Source: Li, eq. 1."]
    assert plain([*docstring, "", "Example:", "    >>> 1"]) == [*expected, "", "Example:", "    >>> 1"]


def test_a_block_without_an_end_is_seen() -> None:
    assert blocks("```python\nx\n```\n```text\ny\n```") == [(1, "python", "x\n"), (4, "text", "y\n")]
    with pytest.raises(AssertionError, match="line 4 has no end"):
        blocks("```python\nx\n```\n```python\n")


def test_only_what_was_measured_may_differ_from_a_page() -> None:
    report = (
        "0  SSP2  resident  {}  about {}x  a why\nof one forward, {} of the time is fused\nwhat would help most: {}"
    )
    page = report.format("12 %", "1.6", "90 %", "this")
    assert unmeasured(page) == unmeasured(report.format("9 %  ", "12", "8 %", "that")) != page
    assert unmeasured(page) != unmeasured(page.replace("resident", "staged"))
    assert unmeasured(page) != unmeasured(page.replace("12 %", "")) != unmeasured(page.replace("a why", ""))
    assert unmeasured("12 %  about 1.6x") == "12 %  about 1.6x"


def test_every_public_module_has_a_page_of_its_own() -> None:
    import fastode

    modules = [name for name in fastode.__all__ if type(getattr(fastode, name)).__name__ == "module"]
    pages = {path.stem: path.read_text() for path in (DOCS / "api").glob("*.md")}
    for name in [*modules, "testing"]:
        assert f".. automodule:: fastode.{name}" in pages[name]
    listed = list(itertools.chain.from_iterable(text.splitlines() for text in pages.values()))
    assert ".. automodule:: fastode" in listed
