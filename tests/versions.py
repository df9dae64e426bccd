"""The whole test suite on each supported release of torch: `make versions`, before each release of fastode.

Every release of torch gets an environment of its own in .venvs/, made once. The suites must pass, run the same number
of tests, and leave out nothing but what needs a GPU, or instructions that this CPU has not. The outcome is written to
docs/versions.md.
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
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
NEEDS_GPU = "needs a CUDA device"
NEEDS_CPU = "needs a CPU with"
TORCH = {
    "2.11.0": "the oldest supported, and common on GPU machines",
    "2.13.0": "what `make test` installs",
    "2.14.1": "the newest tried",
}
ASK = """
import json, platform, torch, triton
from benchmarks.header import device_name
print(json.dumps([torch.__version__, triton.__version__, platform.python_version(), device_name(torch.device("cpu"))]))
"""
HEADER = """# Releases of torch

The whole test suite on each supported release of torch, on a CPU, by `make versions`. Left out are tests that need a
GPU, and those of instructions that the CPU has not.

| torch | what it is | Triton | Python | CPU | passed | need a GPU | need another CPU | date | commit |
| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- | --- |
"""


@dataclass(frozen=True)
class Outcome:
    """What one suite did: how many tests passed, need a GPU, need another CPU, and the names of all others."""

    passed: int
    gpu: int
    cpu: int
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
    passed, needs, others = 0, {NEEDS_GPU: 0, NEEDS_CPU: 0}, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        marks = [child for child in case if child.tag in ("failure", "error", "skipped")]
        left_out = all(mark.tag == "skipped" for mark in marks)
        reason = next((need for need in needs if all(need in mark.get("message", "") for mark in marks)), None)
        if not marks:
            passed += 1
        elif left_out and reason is not None:
            needs[reason] += 1
        else:
            others.append(f"{case.get('classname')}::{case.get('name')} ({marks[0].tag})")
    return Outcome(passed, needs[NEEDS_GPU], needs[NEEDS_CPU], tuple(others))


def run(python: Path) -> Outcome:
    """Build the operators, run the suite, and read its report."""
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    subprocess.run([python, "-m", "fastode", "build"], check=True, cwd=ROOT)
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    outcome = read(report)
    if done.returncode and not outcome.others:
        return replace(outcome, others=(f"pytest ended with {done.returncode}",))
    return outcome


def faults(outcomes: dict[str, Outcome]) -> list[str]:
    """Why the outcomes are not those of one suite that passes everywhere, a sentence each; none if they are."""
    found = [f"torch {version}: {name}" for version, outcome in outcomes.items() for name in outcome.others]
    counts = {version: (outcome.passed, outcome.gpu + outcome.cpu) for version, outcome in outcomes.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{passed} and {skipped} on {version}" for version, (passed, skipped) in counts.items())
        found.append(f"the numbers of passed and skipped tests differ: {told}")
    return found


def row(version: str, told: list[str], outcome: Outcome, date: str, commit: str) -> str:
    """One line of the page; `told` is what the environment says of torch, Triton, Python and the CPU."""
    cells = [told[0], TORCH.get(version, ""), *told[1:], outcome.passed, outcome.gpu, outcome.cpu, date, commit]
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
        asked = subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True, cwd=ROOT)
        rows.append(row(version, json.loads(asked.stdout), outcome, datetime.date.today().isoformat(), commit))
        left_out = f"{outcome.gpu} need a GPU, {outcome.cpu} another CPU"
        print(f"torch {version}: {outcome.passed} passed, {left_out}, {len(outcome.others)} others")
    found = faults(outcomes)
    if not found and set(outcomes) == set(TORCH):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(HEADER + "".join(rows))
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
