"""The whole test suite on each supported release of torch: `make versions`, before each release of fastode.

Every release of torch gets an environment of its own in .venvs/, made once. The suites must pass, run the same number
of tests, and leave out nothing but what needs a GPU. The outcome is written to docs/versions.md.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
NEEDS_GPU = "needs a CUDA device"
TORCH = {
    "2.11.0": "the oldest supported, and common on GPU machines",
    "2.13.0": "what `make test` installs",
    "2.14.1": "the newest tried",
}
ASK = """
import json, platform, torch, triton
print(json.dumps([torch.__version__, triton.__version__, platform.python_version()]))
"""
HEADER = """# Releases of torch

The whole test suite on each supported release of torch, on a CPU, by `make versions`. The skipped tests are those that
need a GPU.

| torch | what it is | Triton | Python | passed | skipped | date | commit |
| --- | --- | --- | --- | ---: | ---: | --- | --- |
"""


@dataclass(frozen=True)
class Outcome:
    """What one suite did: how many tests passed, how many wait for a GPU, and the names of all others."""

    passed: int
    skipped: int
    others: tuple[str, ...]


def environment(version: str) -> Path:
    """The Python of the release's environment, made if there is none, and brought up to other requirements."""
    folder = ROOT / ".venvs" / f"torch-{version}"
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [f"torch=={version}", *project["dependencies"], *extras["test"], *extras["bench"]]
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        print(f"setting up {folder} (once; gigabytes, if pip finds a CUDA build)", flush=True)
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        if subprocess.run([python, "-c", "import triton"], capture_output=True).returncode:  # a build for CPUs
            subprocess.run([python, "-m", "pip", "install", "--quiet", *extras["triton"]], check=True)
        stamp.write_text(json.dumps(wanted))
    return python


def read(report: Path) -> Outcome:
    """The outcome that a JUnit report of pytest tells."""
    passed, skipped, others = 0, 0, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        marks = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if not marks:
            passed += 1
        elif all(mark.tag == "skipped" and NEEDS_GPU in mark.get("message", "") for mark in marks):
            skipped += 1
        else:
            others.append(f"{case.get('classname')}::{case.get('name')} ({marks[0].tag})")
    return Outcome(passed, skipped, tuple(others))


def run(python: Path) -> Outcome:
    """Build the operators, run the suite, and read its report."""
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    subprocess.run([python, "-m", "fastode", "build"], check=True, cwd=ROOT)
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    outcome = read(report)
    if done.returncode and not outcome.others:
        return Outcome(outcome.passed, outcome.skipped, (f"pytest ended with {done.returncode}",))
    return outcome


def faults(outcomes: dict[str, Outcome]) -> list[str]:
    """Why the outcomes are not those of one suite that passes everywhere, a sentence each; none if they are."""
    found = [f"torch {version}: {name}" for version, outcome in outcomes.items() for name in outcome.others]
    counts = {version: (outcome.passed, outcome.skipped) for version, outcome in outcomes.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{passed} and {skipped} on {version}" for version, (passed, skipped) in counts.items())
        found.append(f"the numbers of passed and skipped tests differ: {told}")
    return found


def row(version: str, told: list[str], outcome: Outcome, date: str, commit: str) -> str:
    """One line of the page; `told` is what the environment says of torch, Triton and Python."""
    cells = [told[0], TORCH.get(version, ""), *told[1:], outcome.passed, outcome.skipped, date, commit]
    return f"| {' | '.join(map(str, cells))} |\n"


def main(versions: list[str]) -> int:
    """Run the named releases, or all; only a run of all that finds no fault writes the page."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    rows, outcomes = [], {}
    for version in versions or TORCH:
        python = environment(version)
        outcomes[version] = outcome = run(python)
        told = json.loads(subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout)
        rows.append(row(version, told, outcome, datetime.date.today().isoformat(), commit))
        print(f"torch {version}: {outcome.passed} passed, {outcome.skipped} skipped, {len(outcome.others)} others")
    found = faults(outcomes)
    if not found and set(outcomes) == set(TORCH):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(HEADER + "".join(rows))
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
