"""The committed table of what the Triton kernels compile to: of all that is launched, without a spill."""

from __future__ import annotations

import json

from benchmarks import kernels
from benchmarks.convolutions import CONVOLUTIONS, PAIRS
from benchmarks.header import RESULTS

FOLDER = RESULTS / "offline"


def recorded() -> list[kernels.Compiled]:
    return [kernels.Compiled(**row) for row in json.loads((FOLDER / "kernels.json").read_text())["results"]]


def test_nothing_spills() -> None:
    assert [row for row in recorded() if row.spills or not row.registers] == []


def test_the_table_is_that_of_the_records() -> None:
    assert (FOLDER / "kernels.md").read_text() == kernels.markdown(recorded()), "run make kernels"


def test_every_launch_has_a_row() -> None:
    wanted = kernels.launches(kernels.MAPS, kernels.DTYPES)
    wanted += kernels.convolution_launches((dtype, each) for each in (*CONVOLUTIONS, *PAIRS) for dtype in each.dtypes)
    launched = {(launch.kernel.__name__, name, architecture, launch.warps) for launch, name, architecture in wanted}
    found = {(row.kernel, row.configuration, row.architecture, row.warps) for row in recorded()}
    assert found == launched, "run make kernels"
