"""The command line: `python -m fastode info`."""

from __future__ import annotations

import re

import pytest
import torch

import fastode
from fastode.__main__ import main
from fastode.native import operators, toolchain


def test_info_prints_versions_engines_and_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert fastode.__version__ in lines["fastode"]
    assert torch.__version__ in lines["torch"]
    assert str(torch.get_num_threads()) in lines["threads"]
    assert str(toolchain.cache_directory()) in lines["cache"]
    assert re.fullmatch(r"nodes +in C\+\+: (built|loaded) .+\.so", lines["nodes"])
    table = printed.split("\nengines\n")[1].split("\n\n")[0].splitlines()
    cells = [re.fullmatch(r"  (\w+) +(\w+) +(yes|no) +(\S.*)", line) for line in table]
    engines = {(cell[1], cell[2]): (cell[3], cell[4]) for cell in cells if cell}
    assert len(engines) == len(table)
    assert engines.pop(("reference", "any")) == ("yes", "plain PyTorch, on any device")
    assert {("resident", "CPU"), ("staged", "CPU"), ("staged", "CUDA"), ("fused_convolution", "CUDA")} <= set(engines)
    for (engine, device), (usable, reason) in engines.items():
        if device == "CPU":  # the operators of this checkout load: test_build.py demands it
            assert usable == "yes" and re.fullmatch(r"\S+: (built|loaded) .+\.so", reason), engine
        elif not torch.cuda.is_available():
            assert (usable, reason) == ("no", "there is no CUDA device"), engine


def test_info_says_why_there_are_no_operators(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_state", operators._State(reason="no C++ compiler was found (a test)"))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "not ready: no C++ compiler was found (a test)" in printed
    assert "none: no C++ compiler was found (CXX is '/nonexistent/compiler', which is not a program)" in printed


@pytest.mark.parametrize("arguments", [["inof"], []])
def test_a_wrong_command_is_refused_with_the_right_ones(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert "{info,build}" in capsys.readouterr().err


def test_build_reports_a_missing_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    monkeypatch.setenv("FASTODE_CXXFLAGS", "-DNEVER_BUILT")
    assert main(["build", "--no-load"]) == 1
    assert "no C++ compiler was found" in capsys.readouterr().err
