"""Experiments that are recorded once: a JSON file of what was found, and a page with a table and a plot of it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastode.recipes.records import write_json, write_text

from .header import RESULTS, ROOT, short_commit, threads

RECORDS = RESULTS / "experiments"
PAGES = ROOT / "docs"
Record = dict[str, Any]


def record_of(name: str, folder: Path = RECORDS) -> Path:
    """The file of an experiment."""
    return folder / f"{name}.json"


def load(path: Path) -> Record:
    """What was found; empty where nothing was yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, record: Record) -> None:
    """Replace the file."""
    write_json(path, record)


def made_on(head: Record) -> str:
    """The machine, versions, date and commit of a record, in words."""
    made = f"torch {head['versions']['torch']}, {head['date'][:10]}, commit {short_commit(head['commit'])}"
    return f"{head['device']}, {threads(head)}, {made}"


def write_page(name: str, text: str, folder: Path = PAGES) -> Path:
    """Replace an experiment's page."""
    path = folder / f"{name}.md"
    write_text(path, text)
    return path


def mark_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of records, by which a plot says what it was drawn from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def draw(paths: Sequence[Path], target: Path, panels: int, fill: Callable[[Sequence[Any], list[Record]], None]) -> bool:
    """Draw the plot of some records beside their page.

    Args:
        paths: of the records.
        target: the picture, which says the digest of the records that it was made from.
        panels: beside each other.
        fill: draws them, given their axes and the records.

    Returns:
        Whether it was drawn: without matplotlib there is none.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4), squeeze=False, layout="constrained")
    fill(list(axes[0]), [load(path) for path in paths])
    figure.savefig(target, dpi=110, metadata={"Description": mark_of(paths), "Software": None})
    pyplot.close(figure)
    return True


def command(name: str, about: str | None, run: Callable[[Path], None], report: Callable[[Path], None]) -> None:
    """Make an experiment, unless only the page is asked for, and the page.

    Args:
        name: of the record, and with an underscore for a hyphen of the module.
        about: what it says of itself.
        run: makes the record.
        report: writes the page and the plot from it.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name.replace('-', '_')}", description=about)
    parser.add_argument("--report", action="store_true", help="only the page and the plot, from the record")
    path = record_of(name)
    if not parser.parse_args().report:
        run(path)
    report(path)
