"""The committed table of what the CUDA programs compile to: of every one at every size, without a spill."""

from __future__ import annotations

import itertools
import json
import re

from benchmarks import cuda_kernels, programs
from benchmarks.header import RESULTS
from fastode.native import nvcc
from fastode.native.constants import TILES, WARPS
from fastode.ops.resident import card

FOLDER = RESULTS / "offline"
ARCHITECTURES = [f"sm_{each}" for each in nvcc.PREBUILT]
DTYPES = ("BFloat16", "Float16")
COUPLED = "Batch"  # how programs for batch norm in training begin, which take the first dtype alone
PAIR = ("March", "Solve")  # how programs of the skew pair begin
MOST_SHARED = 232448  # bytes that a block can have on sm_90a and sm_100
_SIZED = re.compile(r"kernel<(\w+)<Tile<(\w+), (\d+), (\d+), (\d+)> ?>, \w+>")


def recorded() -> list[cuda_kernels.Kernel]:
    return [cuda_kernels.Kernel(**row) for row in json.loads((FOLDER / "cuda.json").read_text())["results"]]


def sized() -> list[tuple[str, str, int, int, cuda_kernels.Kernel]]:
    """The rows of programs that are compiled for a size: program, dtype, channels, side, row."""
    found = [(match, row) for row in recorded() if (match := _SIZED.fullmatch(row.kernel))]
    for match, row in found:
        assert WARPS[int(match[3]), int(match[4])] == int(match[5]) == row.warps, "run make kernels"
    return [(match[1], match[2], int(match[3]), int(match[4]), row) for match, row in found]


def test_what_is_a_threads_own_is_in_registers() -> None:
    assert [row.kernel for row in recorded() if row.spills or row.stack or not row.registers] == []


def test_the_table_is_that_of_the_records() -> None:
    assert (FOLDER / "cuda.md").read_text() == cuda_kernels.markdown(recorded()), "run make kernels"


def test_every_program_has_a_row_at_every_size_for_every_architecture() -> None:
    assert {row.kernel.removeprefix("kernel<").partition("<")[0] for row in recorded()} == programs.names(), (
        "run make kernels"
    )
    found = [(program, dtype, channels, side, row.architecture) for program, dtype, channels, side, row in sized()]
    every = [
        (program, dtype, *rest)
        for program, dtype, *rest in itertools.product({each[0] for each in found}, DTYPES, TILES, ARCHITECTURES)
        if dtype == DTYPES[0] or not program.startswith(COUPLED)
    ]
    assert sorted(found) == sorted((program, dtype, *size, each) for program, dtype, size, each in every)
    for row in recorded():
        assert row.architecture in ARCHITECTURES and row.dynamic is not None


def test_the_shared_memory_is_there_and_is_what_the_package_reckons_with() -> None:
    for program, _, channels, side, row in sized():
        reckoned = card.weights_shared_bytes if program == "WeightGradients" else card.shared_bytes
        pair = program.startswith(PAIR)
        of_pair = card.solve_shared_bytes if program == "SolveBackward" else card.pair_shared_bytes
        needed = of_pair(channels, side) if pair else reckoned(channels, side, TILES[channels, side])
        assert row.dynamic is not None
        assert row.shared + row.dynamic == needed <= MOST_SHARED


def test_operands_are_loaded_for_more_than_one_product() -> None:
    for program, _, channels, side, row in sized():
        assert row.tensor_core and row.ldmatrix and row.ldmatrix < row.tensor_core, (program, channels, side)
