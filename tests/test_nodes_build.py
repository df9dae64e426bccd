"""Building the module of autograd nodes: its key, what happens where it does not compile, ahead of time."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastode.native import nodes, nvcc, operators, toolchain
from fastode.native.toolchain import BuildError, CompileError

CSRC = Path(__file__).resolve().parent.parent / "csrc"
STUB = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fastode_nodes", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_fastode_nodes() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in a moment, a cache with nothing in it, and nothing loaded."""
    root = tmp_path / "package" / "csrc"
    for name in ("cpu", "cuda", "autograd"):
        (root / name).mkdir(parents=True)
    (root / "ops.cpp").write_text("")
    (root / "autograd" / "nodes.cpp").write_text(STUB)
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    for name in ("module", "_path"):
        monkeypatch.setattr(nodes, name, None)
    monkeypatch.setattr(nodes, "_reason", nodes._reason)
    return root


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "a source": lambda root, patch: (root / "autograd" / "nodes.cpp").write_text("// changed\n" + STUB),
    "a header": lambda root, patch: (root / "autograd" / "node.h").write_text(""),
    "a header that operators share": lambda root, patch: (root / "constants.h").write_text(""),
    "torch": lambda root, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "the compiler": lambda root, patch: patch.setattr(toolchain, "compiler", lambda: (("g++",), "g++ 99")),
    "flags": lambda root, patch: patch.setenv("FASTODE_CXXFLAGS", "-DEXTRA"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_key_changes_with(part: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = nodes.recipe(root).key
    assert nodes.recipe(root).key == before
    CHANGES[part](root, monkeypatch)
    assert nodes.recipe(root).key != before


def test_an_edit_of_a_node_builds_no_operator_again_nor_the_other_way_round(root: Path) -> None:
    before = toolchain.recipe(root).key, toolchain.source_hash(root, "cpu", toolchain.AUTOGRAD), nodes.recipe(root).key
    (root / "autograd" / "nodes.cpp").write_text("// changed\n" + STUB)
    assert toolchain.recipe(root).key == before[0]
    assert nvcc.prebuilt_name(root) == f"libfastode-cuda-{before[1][:16]}-operators.so"
    after = nodes.recipe(root).key
    assert after != before[2]
    (root / "cpu" / "fast.h").write_text("")
    (root / "ops.cpp").write_text("// changed")
    assert nodes.recipe(root).key == after


def test_the_nodes_include_what_their_key_knows() -> None:
    for path in filter(Path.is_file, (CSRC / "autograd").iterdir()):
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            included = (CSRC / "autograd" / name).resolve()
            assert included.exists() and included.parent in (CSRC, CSRC / "autograd"), f"{path} includes {name}"


def test_it_is_built_once_and_loaded(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert nodes.available(root) == (False, "not built yet: they are built with the operators")
    assert nodes.load(root) == ""
    assert "building the autograd nodes (1 file, once)" in capfd.readouterr().err
    assert nodes.available(root) == (True, f"loaded from {nodes._path}")
    assert nodes.load(root) == ""
    assert capfd.readouterr().err == ""


def test_what_does_not_compile_is_not_compiled_again(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A torch whose headers have changed must not cost every process a compiler's run, nor anybody a warning."""
    (root / "autograd" / "nodes.cpp").write_text("#error not in this torch\n")
    reason = nodes.load(root)
    assert "not in this torch" in reason and nodes.module is None and not nodes.usable()
    capfd.readouterr()
    assert nodes.load(root) == reason
    assert capfd.readouterr().err == ""
    assert nodes.available(root) == (False, reason)
    with pytest.raises(CompileError, match="not in this torch"):
        nodes.find_or_build(root, again=True)
    (root / "autograd" / "nodes.cpp").write_text(STUB)
    assert nodes.load(root) == ""


def test_what_is_missing_is_said(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert nodes.load(None) == "the C++ sources are missing"
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert nodes.load(root) == ("no C++ compiler was found (CXX is '/nonexistent/compiler', which is not a program)")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError) as refused:
        nodes.recipe(root)
    assert str(refused.value) == f"Python's headers are not installed: there is no Python.h in {tmp_path}"
    shutil.rmtree(root / "autograd")
    assert nodes.load(root) == f"no sources of autograd nodes were found under {root}"
    assert not toolchain.cache_directory().exists()


def test_a_library_that_cannot_be_loaded_is_left_out(root: Path) -> None:
    (root / "autograd" / "nodes.cpp").write_text("int nothing;\n")
    assert "PyInit_fastode_nodes" in nodes.load(root)
    assert nodes.module is None


def test_a_prebuilt_library_serves_its_torch_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = root.parent
    monkeypatch.setattr(nodes, "PACKAGE", package)
    path = nodes.build_ahead(root, package)
    assert nodes.available(root) == (True, f"built ahead of time: {path}")
    assert nodes.load(root) == "" and nodes._path == path
    assert not toolchain.cache_directory().exists()
    monkeypatch.setattr(nodes, "module", None)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert nodes.available(root)[0] is False


def test_the_operators_do_without(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of the nodes, the operators are loaded as before."""
    monkeypatch.setattr(operators, "PACKAGE", root.parent)
    monkeypatch.setattr(operators, "_state", operators._State())
    monkeypatch.setattr(operators, "_open", lambda library: library)
    monkeypatch.setattr(operators.cuda_library, "load", lambda announce: "")
    (root / "autograd" / "nodes.cpp").write_text("#error not in this torch\n")
    assert operators.load(announce=False) is None
    assert nodes.module is None and "not in this torch" in nodes._reason
