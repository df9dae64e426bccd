"""The libraries of CUDA programs: which of them a call needs, and when they are built. No test here needs a card."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from block_cases import case_of, make_pair
from test_cuda_build import run_python

import fastode
from fastode import reference
from fastode.dispatch import choice
from fastode.native import cuda_library, nvcc, toolchain
from fastode.native.nvcc import PARTS, Part
from fastode.ops import engine as face
from fastode.ops.resident import card
from fastode.ops.resident.engine import Resident

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SCHEME, GRADIENTS = Part("scheme", "bfloat16"), Part("weight_gradients", "float16")


def launchers() -> list[str]:
    """The names of the launchers, in the order of their table."""
    text = (CUDA / "programs.h").read_text()
    return re.findall(r"each\(\w+, (\w+), \w+\)", text.partition("#define FASTODE_CUDA_PROGRAMS")[2])


def test_every_launcher_is_in_one_part() -> None:
    units = {path.name: path.read_text() for path in CUDA.glob("*.cu")}
    parts = {kind: nvcc.sources(CUDA.parent, Part(kind, "bfloat16"))[:-1] for kind in nvcc.KINDS}
    assert sorted(path.name for paths in parts.values() for path in paths) == sorted(units)
    defined = re.findall(r"^(?:const char\*|int) (\w+)\(Type", "".join(units.values()), re.MULTILINE)
    assert sorted(defined) == sorted(launchers())


def test_the_dtypes_have_the_numbers_of_the_device_code() -> None:
    numbered = re.search(r"enum class Type \{ (.*) \}", (CUDA / "programs.h").read_text())
    assert numbered and numbered[1].split(", ") == [f"k{name}" for name in nvcc.TYPES.values()]
    assert [f"torch.{name}" for name in nvcc.TYPES] == [str(dtype) for dtype in card.DTYPES]


@pytest.fixture(scope="module")
def libraries() -> tuple[Path, Path]:
    """This checkout's CUDA operators, and a part of their programs as a card of Hopper would have it."""
    recipes = nvcc.operators_recipe(CUDA.parent), nvcc.recipe(CUDA.parent, GRADIENTS, ["90a"])
    first, second = (toolchain.build(made, toolchain.cache_directory(), announce=False) for made in recipes)
    return first, second


@pytest.mark.nvcc
def test_the_operators_load_in_this_torch(libraries: tuple[Path, Path]) -> None:
    """In a process of its own, for they stay registered; in a torch for the CPU, they say what is missing."""
    program = """
import sys, torch
from fastode.native import cuda_library, operators
cuda_library.wanted = lambda: False  # the card's own would be registered twice
assert operators.load() is None
forward = torch.ops.fastode.resident_rk_forward.default
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key(forward.name(), "CUDA")
assert not has()
cuda_library.open_library(sys.argv[1])
assert has()
x, weight = torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16), torch.zeros(16, 16, 3, 3, dtype=torch.bfloat16)
euler = torch.ones(2, 1, 1, dtype=torch.float64)
unit = [[weight], [0, 1, 0, 1, 1, 1, 8], [0.0, 0.0, 0.0]]
try:
    forward.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, *unit, euler, False, False)
except RuntimeError as error:
    print(torch.version.cuda is None and str(error))
"""
    done = run_python(program, str(libraries[0]))
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert "a program was not launched: torch is built without CUDA" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.nvcc
def test_a_part_gives_the_operators_its_programs_and_no_others(libraries: tuple[Path, Path]) -> None:
    program = """
import ctypes, pathlib, sys
from fastode.native import cuda_library, nvcc
operators, library = map(pathlib.Path, sys.argv[1:3])
names = sys.argv[3:]
table = ctypes.CDLL(str(operators)).fastode_programs
table.restype = ctypes.c_void_p
given = lambda: [[n for n, p in zip(names, (ctypes.c_void_p * len(names)).from_address(table(i))) if p] for i in (0, 1)]
assert given() == [[], []]
cuda_library.take_programs(operators, nvcc.Part("weight_gradients", "float16"), library)
print(given())
"""
    done = run_python(program, *map(str, libraries), *launchers())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[], ['weight_gradients', 'finish_gradients', 'weight_gradients_blocks']]"


@pytest.mark.nvcc
def test_the_operators_find_torchs_cuda_through_libtorch_and_programs_bring_their_own_runtime(
    libraries: tuple[Path, Path],
) -> None:
    """So that they serve every torch: what they name must be in each, and the runtime's version is their own."""
    operators, programs = (
        set(re.findall(r"NEEDED.*\[([^\]]+)\]", subprocess.run(command, capture_output=True, text=True).stdout))
        for command in (["readelf", "-d", str(each)] for each in libraries)
    )
    assert {"libtorch.so", "libtorch_cpu.so"} <= operators
    assert not [name for name in operators | programs if "cuda" in name]
    assert programs and not [name for name in programs if "torch" in name]


# ---- which a call needs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """The programs that calls ask for, all of which are there."""
    found: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(
        cuda_library, "no_programs", lambda kinds, dtype: found.extend((kind, dtype) for kind in kinds) or ""
    )
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.lacks_programs(call) if call.inputs else "")
    monkeypatch.setitem(face.STORAGE, "cpu", face.STORAGE["cuda"])
    return found


@pytest.mark.parametrize("mode", ["forward", "input_grad", "train"])
@pytest.mark.parametrize(
    ("family", "norm", "dtype", "kind"),
    [
        ("ssp3", "layer", torch.bfloat16, "scheme"),
        ("ssp3", "batch", torch.bfloat16, "batch_scheme"),
        ("ark", "layer", torch.float16, "scheme"),
        ("ie", "layer", torch.float16, "descent"),
        ("ie", "batch", torch.bfloat16, "batch_descent"),
    ],
)
def test_a_block_asks_for_its_kind_and_a_training_step_for_the_gradients_of_weights(
    family: str, norm: str, dtype: torch.dtype, kind: str, mode: str, asked: list[tuple[str, torch.dtype]]
) -> None:
    block = make_pair(case_of(family, norm=norm, channels=16, dtype=dtype, batch=2))[1]
    block.requires_grad_(mode == "train")
    x = torch.zeros(2, 16, 8, 8, dtype=dtype, requires_grad=mode != "forward")
    assert choice.can_use(Resident.name, block, x) == (True, "")
    expected = [kind, "weight_gradients"] if mode == "train" else [kind]
    assert asked == [(each, dtype) for each in expected]


@pytest.mark.parametrize(
    ("solver", "kind"),
    [("rk4", "march"), ("dopri5", "solve")],
)
def test_a_skew_pair_asks_for_its_solutions(solver: str, kind: str, asked: list[tuple[str, torch.dtype]]) -> None:
    block = reference.SOBlock(reference.SkewPair(16, 16), solver=solver).to(torch.float16)
    fastode.fuse(block)
    x = torch.zeros(2, 16, 8, 8, dtype=torch.float16)
    assert choice.can_use(Resident.name, block, x) == (True, "")
    assert asked == [(kind, torch.float16), ("weight_gradients", torch.float16)]


def test_what_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "no_programs", lambda kinds, dtype: f"there is no {kinds[0]}")
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.lacks_programs(call))
    block = make_pair(case_of("ssp3", channels=16, dtype=torch.bfloat16, batch=2))[1]
    x = torch.zeros(2, 16, 8, 8, dtype=torch.bfloat16)
    assert choice.can_use(Resident.name, block, x) == (False, "there is no scheme")


# ---- when they are built


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Part | None]:
    """The libraries that are built from now on; none is there."""
    found: list[Part | None] = []

    def find_or_build(part: Part | None = None) -> Path:
        found.append(part)
        return Path(f"{part}.so")

    monkeypatch.setattr(cuda_library, "find_or_build", find_or_build)
    monkeypatch.setattr(cuda_library, "_path", Path("operators.so"))
    monkeypatch.setattr(cuda_library, "_parts", {})
    monkeypatch.setattr(cuda_library, "take_programs", lambda *each: None)
    monkeypatch.setattr(cuda_library, "is_built", lambda part: part in found)
    monkeypatch.setattr(cuda_library, "_check_nvcc", lambda **each: None)
    return found


def test_a_part_is_built_at_its_first_call_and_once(built: list[Part | None]) -> None:
    assert "none yet" in cuda_library.available()[1]
    for _ in range(2):
        assert cuda_library.no_programs((SCHEME.kind,), torch.bfloat16) == ""
    assert built == [SCHEME]
    assert cuda_library.available() == (True, "loaded from operators.so, with the programs scheme of bfloat16")


def test_parts_of_one_call_are_built_together(built: list[Part | None]) -> None:
    kinds = ("solve", "scheme", "weight_gradients")
    cuda_library.no_programs(("scheme",), torch.float16)
    assert cuda_library.no_programs(kinds, torch.float16) == ""
    assert built[0] == Part("scheme", "float16") and sorted(map(str, built[1:])) == [
        "solve of float16", "weight_gradients of float16",
    ]  # fmt: skip


def test_a_build_that_failed_is_told_once_and_not_tried_again(
    built: list[Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(part: Part) -> Path:
        built.append(part)
        raise toolchain.CompileError("the build failed: a test")

    monkeypatch.setattr(cuda_library, "find_or_build", fails)
    with pytest.warns(RuntimeWarning, match="without the CUDA programs scheme of bfloat16.*: the build failed: a test"):
        assert cuda_library.no_programs((SCHEME.kind,), torch.bfloat16) == "the build failed: a test"
    assert cuda_library.no_programs((SCHEME.kind,), torch.bfloat16) == "the build failed: a test"
    assert built == [SCHEME]


def test_a_traced_call_builds_nothing_and_takes_what_is_built(built: list[Part | None]) -> None:
    reasons: list[str] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        reasons.append(cuda_library.no_programs((SCHEME.kind,), x.dtype))
        return x + 1

    x: Any = torch.zeros(2, dtype=torch.bfloat16)
    torch.compile(ask, backend="eager", fullgraph=True)(x)
    assert reasons == [
        "the CUDA programs scheme of bfloat16 were not built before tracing: call the block once, or run python -m "
        "fastode build"
    ]
    assert built == [] and cuda_library._parts == {}
    built.append(SCHEME)
    torch.compiler.reset()
    torch.compile(ask, backend="eager", fullgraph=True)(x)
    assert reasons[1:] == [""] and cuda_library._parts == {SCHEME: ""}


def test_all_are_built_by_the_command(built: list[Part | None]) -> None:
    assert len(cuda_library.build_all()) == len(PARTS) + 1
    assert set(built) == {None, *PARTS}
    assert [str(part) for part in PARTS if part.kind.startswith("batch")] == [
        "batch_scheme of bfloat16", "batch_descent of bfloat16",
    ]  # fmt: skip


def test_without_a_compiler_nothing_is_built_and_that_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setattr(cuda_library, "_prebuilt", lambda part: None)
    assert not cuda_library.is_built(SCHEME)
