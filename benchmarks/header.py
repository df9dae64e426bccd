"""The head of a results file: the device, the versions, the commit and the date of the measurement."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastode.native.toolchain import kernel_features

from . import data

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "torchdiffeq", "torchode")


def device_name(device: torch.device) -> str:
    """The model name of the card or the processor, and whether this one has no more than AVX2: models share names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    features = kernel_features()
    narrow = " (AVX2)" if "avx2" in features and "avx512f" not in features else ""
    return _model_name() + narrow


def _model_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def folder_name(device: torch.device) -> str:
    """A folder's name for the device: its model name, and for a CPU the number of threads in use.

    Example:
        >>> folder_name(torch.device("cpu")).endswith("threads")
        True
    """
    words = re.sub(r"\((R|TM)\)", "", device_name(device), flags=re.IGNORECASE).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return slug if device.type == "cuda" else f"{slug}-{torch.get_num_threads()}-threads"


def commit() -> str:
    """The commit of this checkout, with "-dirty" where tracked files differ from it; "" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # A run writes results itself; they do not make its commit dirty.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def header(device: torch.device, suite: str) -> dict[str, Any]:
    """What stands at the head of a results file, before the measured rates are added."""
    return {
        "suite": suite,
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else _capability(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "data": data.source(),
    }


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def short_commit(commit: str) -> str:
    """A commit as pages name it.

    Example:
        >>> short_commit("c53d2f804322ed8d470282478da728e30c705331")
        'c53d2f804322'
    """
    name, _, dirty = commit.partition("-")
    return f"{name[:12]}{' with changes' if dirty else ''}"


def threads(head: dict[str, Any]) -> str:
    """The threads of a record's head, in words.

    Example:
        >>> threads({"threads": 2})
        '2 threads'
    """
    return "1 thread" if head["threads"] == 1 else f"{head['threads']} threads"
