"""Building the operators: keys, cache, lock, failures, and what happens without a compiler."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastode.dispatch import decisions
from fastode.native import cuda, cuda_library, operators, toolchain
from fastode.native.toolchain import BuildError

CHECKOUT = Path(__file__).resolve().parent.parent
STUB = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sources that compile in a fraction of a second, laid out as csrc/ is."""
    root = tmp_path / "package" / "csrc"
    (root / "cpu").mkdir(parents=True)
    (root / "ops.cpp").write_text('#include "cpu/answer.h"\n' + STUB)
    (root / "cpu" / "answer.h").write_text("#define ANSWER 42\n")
    (root / "cpu" / "other.cpp").write_text("int other() { return 0; }\n")
    (root / "cuda").mkdir()
    (root / "cuda" / "kernel.cuh").write_text("")
    return root


@pytest.fixture
def compiler_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes down each of its runs, and takes its time to link."""
    log, script = tmp_path / "runs", tmp_path / "c++"
    real = shutil.which("g++") or shutil.which("clang++")
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *-shared*) sleep 0.5;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


@pytest.fixture
def package(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stub in the place of the installed package, with nothing built or decided yet."""
    monkeypatch.setattr(operators, "PACKAGE", root.parent)
    monkeypatch.setattr(operators, "_state", operators._State())
    monkeypatch.setattr(cuda_library, "_reason", cuda_library._reason)  # put back, for a failed load writes it
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTODE_CXXFLAGS", raising=False)
    return root.parent


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables, timeout=120)


# ---- the key

CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "a source's content": lambda root, patch: (root / "ops.cpp").write_text("// changed\n" + STUB),
    "a header's content": lambda root, patch: (root / "cpu" / "answer.h").write_text("#define ANSWER 43\n"),
    "a file's name": lambda root, patch: (root / "cpu" / "other.cpp").rename(root / "cpu" / "another.cpp"),
    "a new header": lambda root, patch: (root / "cpu" / "new.h").write_text(""),
    "a source in a language of its own": lambda root, patch: (root / "kernel.asm").write_text(""),
    "torch": lambda root, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "python": lambda root, patch: patch.setattr(platform, "python_version", lambda: "3.99.0"),
    "the compiler": lambda root, patch: patch.setattr(toolchain, "compiler", lambda: (("g++",), "g++ 99")),
    "flags": lambda root, patch: patch.setenv("FASTODE_CXXFLAGS", "-DEXTRA"),
    "CPU features": lambda root, patch: patch.setattr(toolchain, "cpu_features", lambda: ("avx2",)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_key_changes_with(part: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = toolchain.recipe(root).key
    assert toolchain.recipe(root).key == before
    CHANGES[part](root, monkeypatch)
    assert toolchain.recipe(root).key != before


def test_the_key_changes_with_the_instruction_set(root: Path) -> None:
    assert toolchain.recipe(root, ("-msse4.2",)).key != toolchain.recipe(root).key


def test_the_key_does_not_depend_on_where_the_sources_lie_or_on_what_was_compiled(root: Path, tmp_path: Path) -> None:
    before = toolchain.recipe(root).key
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    (moved / "cpu" / "other.o").write_text("")
    assert toolchain.recipe(moved).key == before


@pytest.mark.parametrize("edited", ["csrc/cuda/kernel.cuh", "csrc/cpu/answer.h", "fastode/ops/triton/kernel.py"])
def test_an_edit_of_a_kernel_makes_old_decisions_stale(
    edited: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package" / "fastode"
    (package / "ops" / "triton").mkdir(parents=True)
    (package / "ops" / "triton" / "kernel.py").write_text("# as it was\n")
    monkeypatch.setattr(decisions, "PACKAGE", package)
    versions = decisions.versions.__wrapped__
    before = versions()
    assert versions() == before
    (root.parent / edited).write_text("// changed\n")
    assert versions() != before


# ---- what C++ and Python agree on


def test_python_reads_the_constants_that_cpp_compiles(tmp_path: Path) -> None:
    found = toolchain.constants(CHECKOUT / "csrc")
    assert {"kGroupNorm", "kSilu", "kMostTerms", "kMostChannels", "kConvBias"} <= set(found)
    lines = [f'  std::printf("{name} %lld\\n", static_cast<long long>({name}));\n' for name in found]
    program = f"using namespace fastode;\nusing namespace fastode::resident;\nint main() {{\n{''.join(lines)}}}\n"
    (tmp_path / "say.cpp").write_text('#include <cstdio>\n#include "constants.h"\n' + program)
    command, _ = toolchain.compiler()
    said = tmp_path / "say"
    subprocess.run([*command, f"-I{CHECKOUT / 'csrc'}", str(tmp_path / "say.cpp"), "-o", str(said)], check=True)
    output = subprocess.run([said], capture_output=True, text=True, check=True).stdout
    assert {name: int(value) for name, value in map(str.split, output.splitlines())} == found
    stated = (CHECKOUT / "csrc" / "constants.h").read_text().count(" = ")
    assert len(found) == stated - 1  # but for the one in the comment that says how they are written


def test_no_constant_is_stated_twice() -> None:
    """Two copies of an enumeration, or of a limit, can come apart."""
    text = "\n".join(path.read_text() for path in (CHECKOUT / "csrc").rglob("*") if path.is_file())
    for name in toolchain.constants(CHECKOUT / "csrc"):
        assert len(re.findall(rf"\b{name} = |constexpr \w+ {name}\b", text)) == 1, name


def test_a_macro_means_one_thing() -> None:
    defined: dict[str, set[str]] = {}
    for path in (CHECKOUT / "csrc").rglob("*"):
        for name in re.findall(r"#define (\w+)", path.read_text() if path.is_file() else ""):
            defined.setdefault(name, set()).add(path.name)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


def test_every_schema_stands_in_one_file() -> None:
    """Where no compiler is, the operators are defined from its text."""
    elsewhere = [path.name for path in (CHECKOUT / "csrc").rglob("*.cpp") if "m.def(" in path.read_text()]
    assert elsewhere == ["ops.cpp"]
    implemented = {
        name
        for path in (CHECKOUT / "csrc").rglob("*.cpp")
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    assert implemented == {schema.split("(")[0] for schema in cuda.schemas(CHECKOUT / "csrc" / "ops.cpp")}


# ---- building


def test_a_build_is_made_once_and_again_when_the_sources_change(
    root: Path, tmp_path: Path, compiler_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = toolchain.build(toolchain.recipe(root), tmp_path / "cache")
    assert answer(library) == 42
    begun, *compiled = capsys.readouterr().err.splitlines()
    assert begun == f"fastode: building the C++ operators (2 files, once) into {tmp_path / 'cache'}"
    assert [re.sub(r"\d+ s", "0 s", line) for line in compiled] == [
        f"fastode: compiled {count} of 2 files in 0 s" for count in (1, 2)
    ]
    assert compiler_log.read_text().count("-shared") == 1
    assert toolchain.build(toolchain.recipe(root), tmp_path / "cache") == library
    assert compiler_log.read_text().count("-shared") == 1
    assert capsys.readouterr().err == ""
    (root / "cpu" / "answer.h").write_text("#define ANSWER 43\n")
    assert answer(toolchain.build(toolchain.recipe(root), tmp_path / "cache")) == 43


def test_many_files_are_counted_in_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    progress = toolchain.Progress(22)
    for _ in range(22):
        progress.advance()
    progress.close()
    assert re.findall(r"compiled (\d+) of 22", capsys.readouterr().err) == ["6", "11", "17", "22"]


def test_a_terminal_sees_a_bar_that_fills_and_ends_its_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    made = toolchain.recipe(root)
    toolchain.build(made, tmp_path / "cache")
    _, drawn = capsys.readouterr().err.split("\n", 1)
    empty, *rest = drawn.removeprefix("\r").split("\r")
    assert empty == f"fastode: [{'.' * 30}] 0 of 2 files, 0 s"
    assert [re.sub(r"\d+ s", "0 s", bar) for bar in rest] == [
        f"fastode: [{'#' * 15}{'.' * 15}] 1 of 2 files, 0 s",
        f"fastode: [{'#' * 30}] 2 of 2 files, 0 s\n",
    ]


def test_only_what_this_instruction_set_can_run_is_compiled() -> None:
    """Maps are stored in bfloat16 where there are products of it: AMX tiles or dot products."""
    command, _ = toolchain.compiler()
    units = [unit for unit in toolchain.sources(CHECKOUT / "csrc") if unit.stem.endswith("_bf16")]
    assert len(units) == 3
    for unit, level in itertools.product(units, toolchain.levels()):
        flags = (*toolchain.FLAGS, *level.flags, *toolchain.recipe(CHECKOUT / "csrc").compile_flags)
        machine = [flag for flag in flags if flag not in toolchain.NATIVE]
        text = subprocess.run([*command, *machine, "-E", unit], capture_output=True, text=True, check=True).stdout
        assert ("resident/conv.h" in text) == (level.name in ("amx", "bf16")), (unit.name, level.name)


def test_two_processes_at_once_make_one_build(root: Path, tmp_path: Path, compiler_log: Path) -> None:
    cache = tmp_path / "cache"
    program = (
        "import sys, pathlib; from fastode.native import toolchain as t; "
        "print('ready', flush=True); sys.stdin.readline(); "
        f"print(t.build(t.recipe(pathlib.Path({str(root)!r})), pathlib.Path({str(cache)!r})))"
    )
    command, variables = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    pipe = subprocess.PIPE
    builders = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables) for _ in range(2)
    ]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
    outputs = [builder.communicate(timeout=60) for builder in builders]
    libraries = {out.strip() for out, _ in outputs}
    assert len(libraries) == 1
    assert answer(Path(libraries.pop())) == 42
    assert compiler_log.read_text().count("-shared") == 1
    assert sum("fastode: building" in error for _, error in outputs) == 1


def test_a_failed_build_names_the_error_and_leaves_no_library(root: Path, tmp_path: Path) -> None:
    (root / "cpu" / "other.cpp").write_text("int other() { return undeclared; }\n")
    made = toolchain.recipe(root)
    with pytest.raises(BuildError, match=r"other\.cpp:1:\d+: error: .*undeclared.*\(all of it: .*\.log\)"):
        toolchain.build(made, tmp_path / "cache", announce=False)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".log"]
    assert "undeclared" in (tmp_path / "cache" / f"{made.key}.log").read_text()


@pytest.mark.parametrize("refused", [False, True])
def test_the_common_header_reaches_all_units_compiled_or_not(
    refused: bool, root: Path, tmp_path: Path, compiler_log: Path
) -> None:
    if refused:
        script = Path(os.environ["CXX"])
        script.write_text(script.read_text().replace("case", 'case "$*" in *c++-header*) exit 1;; esac\ncase', 1))
    (root / "cpu" / toolchain.COMMON).write_text("#define ANSWER 42\n")
    (root / "ops.cpp").write_text(STUB)
    made = toolchain.recipe(root)
    library = toolchain.build(made, tmp_path / "cache", announce=False)
    assert answer(library) == 42
    assert compiler_log.read_text().count("c++-header") == 1
    assert sorted(path.name for path in library.parent.iterdir()) == [library.name, "recipe.json"]


def test_what_a_killed_build_left_is_swept_away(root: Path, tmp_path: Path) -> None:
    made = toolchain.recipe(root)
    left_over = tmp_path / "cache" / f"{made.key}.half"
    left_over.mkdir(parents=True)
    (left_over / "ops.cpp.o").write_text("half")
    library = toolchain.build(made, tmp_path / "cache", announce=False)
    assert answer(library) == 42
    assert not left_over.exists()


def test_a_cache_that_cannot_be_written_is_a_reason(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"the cache directory .*file/cache cannot be used"):
        toolchain.build(toolchain.recipe(root), tmp_path / "file" / "cache", announce=False)


def test_the_lock_times_out_and_names_its_holder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = toolchain.recipe(root)
    lock = tmp_path / f"{made.key}.lock"
    monkeypatch.setenv("FASTODE_LOCK_TIMEOUT", "0.2")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with (
        toolchain.locked(lock, timeout=0.0),
        pytest.raises(BuildError, match=rf"^{holder} has held the build lock .* for more than 0\.2 s$"),
    ):
        toolchain.build(made, tmp_path, announce=False)
    with toolchain.locked(lock, timeout=0.0):  # free again, and not by luck: the holder's name is gone as well
        assert holder in lock.read_text()
    assert lock.read_text() == ""


# ---- ahead of time


def test_a_prebuilt_library_comes_first_and_only_from_these_sources(package: Path) -> None:
    libraries = toolchain.build_ahead(package / "csrc", package)
    assert [answer(library) for library in libraries] == [42] * len(toolchain.levels())
    best = operators.prebuilt()
    assert best in libraries
    assert operators.find_or_build() == best
    assert not toolchain.cache_directory().exists()
    assert operators.available() == (True, f"built ahead of time: {best}")
    (package / "csrc" / "cpu" / "answer.h").write_text("#define ANSWER 43\n")
    assert operators.prebuilt() is None
    assert answer(operators.find_or_build(announce=False)) == 43


def test_the_best_prebuilt_library_that_the_cpu_can_run_is_opened(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    levels = toolchain.levels()
    assert [level.name for level in levels] == ["amx", "bf16", "avx512", "avx2"]
    for level in levels:
        (package / toolchain.prebuilt_name(package / "csrc", level)).write_text("")
    for level in levels:
        monkeypatch.setattr(operators, "cpu_features", lambda level=level: tuple(level.features))
        assert operators.prebuilt() == package / toolchain.prebuilt_name(package / "csrc", level)
    monkeypatch.setattr(operators, "cpu_features", lambda: tuple(levels[-1].features - {"avx2"}))
    assert operators.prebuilt() is None


def test_each_level_has_the_instructions_that_its_name_says(root: Path) -> None:
    macros = {"amx": "__AMX_BF16__", "bf16": "__AVX512BF16__", "avx512": "__AVX512BW__", "avx2": "__AVX2__"}
    command, _ = toolchain.compiler()
    for level in toolchain.levels():
        line = [*command, *level.flags, "-dM", "-E", "-x", "c++", os.devnull]
        defined = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        assert {name for name, macro in macros.items() if macro in defined} == {
            better.name for better in toolchain.levels() if better.features <= level.features
        } - {"generic"}


def test_a_wheel_carries_the_sources_and_needs_no_compiler(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("fastode", "csrc"):
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(CHECKOUT / name, checkout)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    environment = {**os.environ, "CXX": "/nonexistent/compiler", "CC": "/nonexistent/compiler"}
    subprocess.run([*command, checkout], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "fastode" / "py.typed").exists()
    shipped = tmp_path / "site" / "fastode" / "csrc"
    assert toolchain.source_hash(shipped) == toolchain.source_hash(CHECKOUT / "csrc")


# ---- what the package does with it


def test_the_operators_of_this_checkout_load() -> None:
    """Without this a machine on which nothing builds would compare the reference with itself and be green."""
    assert operators.load() is None
    assert operators.loaded()
    assert operators.available()[0]


def test_a_failed_load_warns_once_and_is_not_tried_again(package: Path, compiler_log: Path) -> None:
    (package / "csrc" / "ops.cpp").write_text("#error not today\n")
    with pytest.warns(RuntimeWarning, match="runs its reference blocks.*not today") as caught:
        reason = operators.load(announce=False)
    assert reason is not None
    assert len(caught) == 1
    runs = compiler_log.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operators.load() == reason
    assert compiler_log.read_text() == runs
    assert operators.available() == (False, reason)
    assert not operators.loaded()


def test_neither_asking_nor_tracing_compiles(
    package: Path, compiler_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable, reason = operators.available()
    assert not usable
    assert "not built yet" in reason
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "before tracing" in str(operators.load())
    assert "-shared" not in compiler_log.read_text()
    assert not toolchain.cache_directory().exists()


def test_import_neither_compiles_nor_imports_triton(tmp_path: Path) -> None:
    program = "import sys, torch; assert 'triton' not in sys.modules; import fastode; print('triton' in sys.modules)"
    done = run_python(program, FASTODE_CACHE=str(tmp_path / "cache"), CXX="/nonexistent/compiler")
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_there_is_one_warning_and_the_reference_runs(tmp_path: Path) -> None:
    program = """
import torch, fastode
from fastode import nn, reference
torch.manual_seed(0)
model = torch.nn.Sequential(*(reference.SSP3(reference.PreActBranch(4)) for _ in range(2)))
x = torch.randn(2, 4, 5, 5)
expected = model(x)
report = str(fastode.fuse(model))
nn.SSP3(reference.PreActBranch(4))
assert torch.equal(model(x), expected)
assert 'no C++ compiler was found' in report, report
"""
    done = run_python(program, CXX="/nonexistent/compiler", FASTODE_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "no C++ compiler was found (CXX is '/nonexistent/compiler', which is not a program)" in done.stderr
