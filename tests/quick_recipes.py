"""`make recipes`: run the two fastest recipes by their command, each on one core, and look at their tables.

They are the quick size, for one seed, on scikit-learn's digits, which are installed for the tests.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastode.recipes import RECIPES

FASTEST = ("001-table1", "004-table1")
LEARNED = 60.0  # percent of the images as they are; chance is 10


def started(name: str, folder: Path) -> subprocess.Popen[str]:
    """The command of a recipe, running."""
    command = [sys.executable, "-m", "fastode.recipes", "run", name]
    command += ["--data", "small-digits", "--seeds", "1", "--out", str(folder / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def wrong(name: str, folder: Path) -> str:
    """What is wrong with what a recipe has written; "" if nothing is."""
    plan, results = RECIPES[name].plan(False, False), json.loads((folder / name / "results.json").read_text())
    for network in plan.networks:
        values = results["cells"][network.name]["0"]["values"]
        for table in plan.tables:
            if missing := [column for column in table.columns if not 0 <= values.get(column, -1) <= 100]:
                return f"{network.name} has no percentage for {missing}"
        if values["natural"] < LEARNED:
            return f"{network.name} has {values['natural']:.2f} % of the images right, at least {LEARNED:.0f} wanted"
    lines = list(csv.reader((folder / name / "table-1.csv").read_text().splitlines()))
    wanted = 1 + len(plan.networks) * len(plan.tables[0].columns)
    return "" if len(lines) == wanted else f"table-1.csv has {len(lines)} lines, {wanted} wanted"


def main() -> int:
    """Run both; the result is the exit status."""
    failed, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        running = {name: started(name, folder) for name in FASTEST}
        for name, process in running.items():
            printed, _ = process.communicate()
            reason = f"exit status {process.returncode}" if process.returncode else wrong(name, folder)
            failed += bool(reason)
            print(f"{printed}\n{name}: {reason}" if reason else printed[printed.index(f"{name}: ") :])
    print(f"{len(FASTEST)} recipes, {time.monotonic() - begin:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
