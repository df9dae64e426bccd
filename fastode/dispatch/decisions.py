"""What trials on CUDA cards have decided, in memory and in a readable file.

The file is decisions.json in FASTODE_CACHE: by card and versions, a decision for each kind of call. Deleting an entry,
or the file, has the trial made again. A file of the same form in the package, if there is one, is asked after it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..native.toolchain import cache_directory, source_hash, source_root

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "decisions.json"


@dataclass(frozen=True)
class Decision:
    """The engine that a call takes, the times of all that ran, and why others may not be taken."""

    engine: str
    milliseconds: dict[str, float]
    refused: dict[str, str]
    date: str


_memory: dict[str, Decision] = {}
_told: set[str] = set()


def remembered(index: int | None, key: str) -> Decision | None:
    """What this process knows; costs nothing."""
    return _memory.get(f"{index} {key}")


def remember(index: int | None, key: str, decision: Decision) -> None:
    """Keep a decision, here and in the file."""
    _memory[f"{index} {key}"] = decision
    try:
        _save(card(index), key, decision)
    except OSError as error:
        _tell(f"fastode cannot keep what its trials decide in {path()}, and will make them again: {error}")


def look_up(index: int | None, key: str, engines: Sequence[str] | None = None) -> Decision | None:
    """What the files know; a decision for an engine that cannot run is none.

    Args:
        index: of the card.
        key: of the call.
        engines: those that can run it; what is found is then kept in memory. None takes any, and keeps nothing.
    """
    for file in (path(), PACKAGE / NAME):
        entry = _load(file).get(card(index), {}).get(key)
        if entry is None:
            continue
        try:
            found = Decision(**entry)
        except TypeError:
            _tell(f"fastode does not understand the decision for {key!r} in {file}, and will make it again")
            continue
        if engines is None:
            return found
        if found.engine in engines:
            _memory[f"{index} {key}"] = found
            return found
    return None


def path() -> Path:
    """The user's file."""
    return cache_directory() / NAME


def entries(index: int | None) -> dict[str, Any]:
    """The decisions of the user's file for a card, by kind of call."""
    return _load(path()).get(card(index), {})


def count() -> int:
    """How many decisions the user's file holds, for any card."""
    return sum(len(entries) for entries in _load(path()).values())


def card(index: int | None) -> str:
    """The card and everything else that a decision depends on, in words."""
    return f"{_device_name(index)}, {versions()}"


def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "no card"


@functools.cache
def versions() -> str:
    """torch, Triton, and the source of this project's operators."""
    digest = hashlib.sha256()
    for file in sorted((PACKAGE / "ops").rglob("*.py")):
        digest.update(file.read_bytes())
    root = source_root(PACKAGE)
    digest.update(source_hash(root).encode() if root is not None else b"")
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}, operators {digest.hexdigest()[:12]}"


def _load(file: Path) -> dict[str, dict[str, Any]]:
    """A file's decisions by card; none, with a warning, where it cannot be understood."""
    try:
        found = json.loads(file.read_text())
        if not (isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values())):
            raise ValueError("it is not an object of objects")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _tell(f"fastode cannot read the decisions in {file} ({error}); its trials are made again and replace the file")
        return {}
    return found


def _save(card_: str, key: str, decision: Decision) -> None:
    """Add a decision to the file as it is now; whoever reads it meanwhile finds the old one or the new one, whole."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        found = _load(file)
        found.setdefault(card_, {})[key] = asdict(decision)
        handle, beside = tempfile.mkstemp(prefix=f"{NAME}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as part:
                part.write(json.dumps(found, indent=1, sort_keys=True) + "\n")
            os.replace(beside, file)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """So that of two processes neither drops what the other adds."""
    try:
        import fcntl
    except ImportError:  # Windows: a decision may be dropped there, and is then made again
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(message: str) -> None:
    """Warn once in a process."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
