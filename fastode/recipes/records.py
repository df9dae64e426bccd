"""Files are replaced whole, so that a run that is stopped, or a disk that is full, leaves what was there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["replaced", "write_json", "write_text"]


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file; who reads it meanwhile finds the old one or the new one, never a part.

    Args:
        path: of the file, whose folder is made.
        write: makes the new one at the path that it is given.

    Raises:
        OSError: it could not be written; the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path} could not be written, and what was there stays: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's text."""
    replaced(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
