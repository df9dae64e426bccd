"""Building the CUDA operators: nvcc, architectures, keys, failures. No test here needs a card."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastode
from fastode import __main__ as command_line
from fastode import reference
from fastode.dispatch import choice
from fastode.native import cuda_library, nvcc, toolchain
from fastode.native.nvcc import Part
from fastode.native.toolchain import BuildError
from fastode.ops.resident import card
from fastode.ops.resident.engine import Resident

CHECKOUT = Path(__file__).resolve().parent.parent
CSRC = CHECKOUT / "csrc"
VERSION = "Cuda compilation tools, release 13.0, V13.0.88\n"
PART = Part("a", "bfloat16")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit whose nvcc says what it is and where its runtime lies, and compiles nothing."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").write_text("")
    program = home / "bin" / "nvcc"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && printf %s "{VERSION}" || echo "#$ TOP={home}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("FASTODE_CUDA_ARCHITECTURES", "FASTODE_CXXFLAGS", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sources of both libraries, laid out as csrc/ is."""
    root = tmp_path / "package" / "csrc"
    for folder in ("cpu", "cuda"):
        (root / folder).mkdir(parents=True)
    cuda = ("a.cu", "b.cu", "a.cuh", "b.h", "ops_cuda.cpp", "given.cpp")
    for name in ("constants.h", "ops.cpp", "cpu/fast.h", *(f"cuda/{each}" for each in cuda)):
        (root / name).write_text("")
    return root


def cards(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(nvcc, "capabilities", lambda: list(capabilities))


# ---- the compiler


def test_nvcc_is_cuda_homes(toolkit: Path) -> None:
    found = nvcc.find()
    assert (found.path, found.release) == (str(toolkit / "bin" / "nvcc"), (13, 0))
    assert str(found) == f"nvcc of CUDA 13.0 ({toolkit}/bin/nvcc)"


def test_a_cuda_home_without_nvcc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(BuildError) as refused:
        nvcc.find()
    assert str(refused.value) == "no nvcc was found (CUDA_HOME is '/nonexistent', which has no bin/nvcc)"


def test_then_comes_path_and_then_the_package(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    assert nvcc.find().path == str(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("PATH", "/nonexistent")
    for folder in ("cu12", "cu13"):
        shutil.copytree(toolkit, tmp_path / "site" / "nvidia" / folder)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    for torchs, own in ((None, "cu13"), ("12.8", "cu12"), ("13.0", "cu13")):
        monkeypatch.setattr(torch.version, "cuda", torchs)
        assert nvcc.find().path == str(tmp_path / "site" / "nvidia" / own / "bin" / "nvcc")


def test_without_any_nvcc_the_sentence_says_where_it_was_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(nvcc.shutil, "which", lambda *args, **keywords: None)
    monkeypatch.setattr(nvcc, "_packaged", lambda: None)
    with pytest.raises(BuildError) as refused:
        nvcc.find()
    assert str(refused.value) == (
        "no nvcc was found (CUDA_HOME is not set, and it is neither on PATH, nor in the package nvidia-cuda-nvcc, nor "
        "in /usr/local/cuda)"
    )


def test_a_toolkit_without_the_static_runtime_is_refused(toolkit: Path, root: Path) -> None:
    (toolkit / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(BuildError, match=r"^nvcc of CUDA 13\.0 .* has no libcudart_static\.a beside it \(looked in"):
        nvcc.recipe(root, PART, ["90a"])


# ---- architectures


@pytest.mark.parametrize(
    ("capability", "built"),
    [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((10, 3), "103"), ((12, 0), "120")],
)
def test_a_card_is_compiled_for_and_runs_it(
    capability: tuple[int, int], built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTODE_CUDA_ARCHITECTURES", raising=False)
    cards(monkeypatch, capability, capability)
    assert nvcc.architectures() == (built,)
    assert nvcc.runs_on(built, capability)


def test_code_runs_on_newer_cards_of_its_generation_only() -> None:
    assert nvcc.runs_on("80", (8, 9))
    assert not nvcc.runs_on("89", (8, 0))
    assert not nvcc.runs_on("80", (9, 0))
    assert nvcc.runs_on("100", (10, 3))
    assert not nvcc.runs_on("100a", (10, 3))
    assert nvcc.covers(nvcc.PREBUILT, [(8, 6), (9, 0), (10, 0)])
    assert nvcc.covers(nvcc.PREBUILT, [(7, 0), (9, 0)])  # an old card beside a new one keeps nothing from it
    assert not nvcc.covers(nvcc.PREBUILT, [(9, 0), (12, 0)])


def test_every_card_new_enough_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTODE_CUDA_ARCHITECTURES", raising=False)
    cards(monkeypatch, (12, 0), (7, 5), (9, 0))
    assert nvcc.architectures() == ("90a", "120")
    for capabilities, reason in (
        ([], "there is no card to build for, and FASTODE_CUDA_ARCHITECTURES is not set"),
        (
            [(7, 5)],
            "there are CUDA operators for cards of capability 8.0 and above, and not for a card of capability 7.5",
        ),
    ):
        cards(monkeypatch, *capabilities)
        with pytest.raises(BuildError) as refused:
            nvcc.architectures()
        assert str(refused.value) == reason


def test_the_environment_names_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch)
    monkeypatch.setenv("FASTODE_CUDA_ARCHITECTURES", "sm_80;90a, 100 80")
    assert nvcc.architectures() == ("80", "90a", "100")
    cards(monkeypatch, (12, 0))
    with pytest.raises(BuildError) as refused:
        nvcc.architectures()
    assert str(refused.value) == (
        "code for what FASTODE_CUDA_ARCHITECTURES names, 'sm_80;90a, 100 80', does not run on a card of capability 12.0"
    )
    monkeypatch.setenv("FASTODE_CUDA_ARCHITECTURES", "hopper")
    with pytest.raises(BuildError) as refused:
        nvcc.architectures()
    assert str(refused.value) == "FASTODE_CUDA_ARCHITECTURES must name architectures, like '80;90a', and is 'hopper'"


# ---- the key

CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "a kernel": lambda root, patch: (root / "cuda" / "a.cu").write_text("// changed\n"),
    "a device header": lambda root, patch: (root / "cuda" / "a.cuh").write_text("// changed\n"),
    "a header": lambda root, patch: (root / "cuda" / "b.h").write_text("// changed\n"),
    "the registration": lambda root, patch: (root / "cuda" / "ops_cuda.cpp").write_text("// changed\n"),
    "a constant": lambda root, patch: (root / "constants.h").write_text("// changed\n"),
    "a new file": lambda root, patch: (root / "cuda" / "c.cuh").write_text(""),
    "torch": lambda root, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "the compiler": lambda root, patch: patch.setattr(toolchain, "compiler", lambda: (("g++",), "g++ 99")),
    "nvcc": lambda root, patch: patch.setattr(nvcc, "find", lambda: nvcc.Nvcc("nvcc", "release 99.0", (99, 0))),
    "nvcc's flags": lambda root, patch: patch.setenv("NVCC_APPEND_FLAGS", "-DEXTRA"),
    "flags": lambda root, patch: patch.setenv("FASTODE_CXXFLAGS", "-DEXTRA"),
    "a debug build": lambda root, patch: patch.setenv("FASTODE_DEBUG", "1"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_key_changes_with(part: str, root: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "_runtime", lambda found: toolkit / "lib")
    before = nvcc.recipe(root, PART, ["90a"]).key
    assert nvcc.recipe(root, PART, ["90a"]).key == before
    CHANGES[part](root, monkeypatch)
    assert nvcc.recipe(root, PART, ["90a"]).key != before


def test_the_key_changes_with_the_architectures_and_the_part(root: Path, toolkit: Path) -> None:
    assert len({nvcc.recipe(root, PART, chosen).key for chosen in (["80"], ["90a"], ["80", "90a"])}) == 3
    parts = PART, Part("a", "float16"), Part("b", "bfloat16")
    assert len({*(nvcc.recipe(root, part, ["90a"]).key for part in parts), nvcc.operators_recipe(root).key}) == 4


def test_each_library_is_built_from_its_own_sources(root: Path, toolkit: Path) -> None:
    """An edit of a kernel must not compile the CPU's operators again, nor the other way round."""
    before = toolchain.recipe(root).key, nvcc.recipe(root, PART, ["90a"]).key
    for edited in ("cuda/a.cu", "cuda/a.cuh", "cuda/ops_cuda.cpp"):
        (root / edited).write_text(f"// {edited}\n")
    assert toolchain.recipe(root).key == before[0]
    after = nvcc.recipe(root, PART, ["90a"]).key
    assert after != before[1]
    (root / "cpu" / "fast.h").write_text("// changed\n")
    assert nvcc.recipe(root, PART, ["90a"]).key == after
    assert toolchain.recipe(root).key != before[0]


def test_neither_library_includes_the_others_sources() -> None:
    """What is included is hashed: cpu/ is no part of the CUDA library's key, nor cuda/ of the CPU's."""
    for own, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in filter(Path.is_file, (CSRC / own).rglob("*")):
            included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
            assert not [name for name in included if other in Path(name).parts], path


# ---- building


@pytest.mark.nvcc
def test_an_architecture_that_nvcc_does_not_know_is_the_reason(root: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^the build failed: nvcc fatal +: Unsupported gpu architecture 'compute_20'"):
        toolchain.build(nvcc.recipe(root, PART, ["20"]), tmp_path / "cache", announce=False)


@pytest.mark.nvcc
def test_a_broken_program_leaves_the_cpu_operators_and_one_warning(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("scheme*.cu")))
    (broken / "cuda" / "scheme.cu").write_text("__global__ void broken() { undeclared(); }\n")
    program = f"""
import pathlib, torch
from fastode.native import cuda_library, nvcc, operators
nvcc.capabilities = list
cuda_library.wanted = lambda: True
cuda_library.source_root = lambda: pathlib.Path({str(broken)!r})
assert operators.load() is None and operators.load() is None
x = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
out = torch.ops.fastode.combine([x, x], torch.tensor([1.0, 2.0], dtype=torch.float64), 0, 0.0, 0.0)
assert torch.equal(out, 3 * x)
assert cuda_library.why_not() == ""
reason = cuda_library.no_programs(("scheme",), torch.bfloat16)
assert cuda_library.no_programs(("scheme",), torch.bfloat16) == reason
print(reason)
"""
    done = run_python(program, FASTODE_CUDA_ARCHITECTURES="90a")
    assert done.returncode == 0, done.stderr
    reason = done.stdout.strip()
    assert re.fullmatch(r'the build failed: .*scheme\.cu\(1\): error: .*"undeclared".* \(all of it: .*\.log\)', reason)
    assert done.stderr.count("RuntimeWarning") == 1
    of = "the CUDA programs scheme of bfloat16"
    assert f"RuntimeWarning: fastode runs without {of}, and Triton's take their place: {reason}" in done.stderr


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)


def test_device_code_is_compiled_by_nvcc_for_every_architecture_and_the_rest_by_the_compiler(
    root: Path, toolkit: Path
) -> None:
    (root / "cuda" / "a_big.cu").write_text("// more\n")
    made = nvcc.recipe(root, PART, ["80", "90a"])
    commands = {unit.name: made.command(unit, Path("x.o")) for unit in made.sources}
    assert list(commands) == ["a_big.cu", "a.cu", "given.cpp"]
    for name in ("a.cu", "a_big.cu"):
        assert "-DFASTODE_TYPE=BFloat16" in commands[name]
        assert commands[name][0] == str(toolkit / "bin" / "nvcc")
        targets = [flag for flag in commands[name] if flag.startswith("-gencode")]
        assert targets == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    assert commands["given.cpp"][0] == toolchain.compiler()[0][0]
    (unit,) = nvcc.operators_recipe(root).sources
    assert unit.name == "ops_cuda.cpp"


# ---- ahead of time


def test_a_prebuilt_library_is_taken_for_these_sources_and_these_cards(
    root: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_library, "PACKAGE", root.parent)
    ahead, operators = root.parent / nvcc.prebuilt_name(root, PART, nvcc.PREBUILT), nvcc.prebuilt_name(root)
    assert re.fullmatch(r"libfastode-cuda-\w{16}-a-bfloat16-sm_80-sm_90a-sm_100\.so", ahead.name)
    assert re.fullmatch(r"libfastode-cuda-\w{16}-operators\.so", operators)
    for name in (ahead.name, operators):
        (root.parent / name).write_text("")
    for capability in ((8, 6), (9, 0), (10, 3)):
        cards(monkeypatch, capability)
        assert cuda_library.find_or_build(PART) == ahead and cuda_library.is_built(PART)
    assert cuda_library.find_or_build() == root.parent / operators
    assert nvcc.prebuilt(root, root.parent, Part("a", "float16")) is None
    cards(monkeypatch, (12, 0))
    assert nvcc.prebuilt(root, root.parent, PART) is None
    cards(monkeypatch, (9, 0))
    for name in ("FASTODE_CXXFLAGS", "NVCC_APPEND_FLAGS", "FASTODE_CUDA_ARCHITECTURES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "90a")
            assert nvcc.prebuilt(root, root.parent, PART) is None
    (root / "cuda" / "a.cu").write_text("// changed\n")
    assert nvcc.prebuilt(root, root.parent, PART) is None


# ---- what the package says of it


def test_without_a_card_nothing_is_built_and_the_reason_is_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "wanted", lambda: False)
    monkeypatch.setattr(cuda_library, "find_or_build", lambda announce: pytest.fail("it built"))
    assert cuda_library.load() == cuda_library.why_not() == "there is no CUDA device"
    assert cuda_library.available() == (False, "there is no CUDA device")


def test_without_nvcc_nothing_warns_and_the_reason_is_said_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_reason", "")
    monkeypatch.setattr(cuda_library, "wanted", lambda: True)
    monkeypatch.setattr(cuda_library, "_prebuilt", lambda part: None)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    cards(monkeypatch, (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = cuda_library.load()
    missing = "no nvcc was found (CUDA_HOME is '/nonexistent', which has no bin/nvcc)"
    assert reason == cuda_library.why_not(0) == f"the CUDA operators are not built: {missing}"
    block = reference.SSP2(reference.PreActBranch(16, norm="layer")).to(torch.bfloat16)
    fastode.fuse(block)
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call))
    x = torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16)
    assert choice.can_use(Resident.name, block, x) == (False, reason)
    assert command_line.main(["info"]) == 0
    lines = dict(re.findall(r"^(CUDA C\+\+|  resident +CUDA) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["CUDA C++"] == f"not ready: {missing}"
    assert lines["  resident          CUDA"].endswith(missing)


@pytest.mark.parametrize("part", ["an old card", "an old driver"])
def test_a_card_or_driver_for_which_nothing_can_be_built_does_not_warn(
    part: str, root: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_reason", "")
    monkeypatch.setattr(cuda_library, "source_root", lambda: root)
    monkeypatch.setattr(cuda_library, "_prebuilt", lambda part: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_library, "_driver_release", lambda: 12)
    cards(monkeypatch, (7, 5) if part == "an old card" else (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = cuda_library.load()
    assert ("capability 7.5" if part == "an old card" else "needs a driver of CUDA 13") in reason


def test_a_variable_that_names_no_architecture_warns(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_reason", "")
    monkeypatch.setattr(cuda_library, "wanted", lambda: True)
    monkeypatch.setattr(cuda_library, "_prebuilt", lambda part: None)
    cards(monkeypatch, (9, 0))
    monkeypatch.setenv("FASTODE_CUDA_ARCHITECTURES", "hopper")
    with pytest.warns(RuntimeWarning, match="Triton's take their place: FASTODE_CUDA_ARCHITECTURES must name"):
        assert cuda_library.load().startswith("FASTODE_CUDA_ARCHITECTURES must name")


def test_a_card_too_old_for_the_library_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_too_old", {})
    monkeypatch.setattr(cuda_library, "wanted", lambda: True)
    monkeypatch.setattr(cuda_library, "_check_nvcc", lambda: None)
    monkeypatch.setattr(cuda_library, "find_or_build", lambda announce: tmp_path)
    monkeypatch.setattr(cuda_library, "open_library", lambda path: path)
    cards(monkeypatch, (9, 0), (7, 5))
    assert cuda_library.load() == cuda_library.why_not() == cuda_library.why_not(0) == ""
    old = "there are CUDA operators for capability 8.0 and above, and the card's is 7.5"
    assert cuda_library.why_not(1) == old


def test_a_driver_older_than_the_toolkit_is_refused_before_compiling(
    root: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_library, "source_root", lambda: root)
    monkeypatch.setattr(cuda_library, "_prebuilt", lambda part: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_library, "_driver_release", lambda: 12)
    cards(monkeypatch, (9, 0))
    with pytest.raises(BuildError) as refused:
        cuda_library.build_all()
    assert str(refused.value) == (
        f"nvcc of CUDA 13.0 ({toolkit}/bin/nvcc) needs a driver of CUDA 13, and this one is of CUDA 12"
    )


def test_info_says_which_nvcc_and_for_what_or_why_not(
    toolkit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, (9, 0), (12, 0))
    for home, said in (
        (str(toolkit), f"nvcc of CUDA 13.0 ({toolkit}/bin/nvcc), for sm_90a, sm_120"),
        ("/nonexistent", "none: no nvcc was found (CUDA_HOME is '/nonexistent', which has no bin/nvcc)"),
    ):
        monkeypatch.setenv("CUDA_HOME", home)
        assert command_line.main(["info"]) == 0
        lines = dict(re.findall(r"^(nvcc|CUDA C\+\+) +(.*)$", capsys.readouterr().out, re.MULTILINE))
        assert lines["nvcc"] == said
        assert lines["CUDA C++"].startswith(("ready: ", "not ready: "))
