"""Debug builds: scratch that is filled with NaN and lies between guard words, which are looked at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastode.native import operators, toolchain

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "cpu/resident/arena.h"

using fastode::resident::Arena;

int main(int, char** words) {
  const int which = std::atoi(words[1]), offset = std::atoi(words[2]);
  Arena count(nullptr);
  const auto take = [](Arena& arena) {
    void* pieces[] = {arena.take<float>(5), arena.take<double>(16), arena.take<float>(0), arena.take<float>(16)};
    return std::vector<char*>{static_cast<char*>(pieces[0]), static_cast<char*>(pieces[1]),
                              static_cast<char*>(pieces[2]), static_cast<char*>(pieces[3])};
  };
  for (char* piece : take(count))
    if (piece) return 2;
  std::vector<char> memory(count.used());
  Arena arena(memory.data());
  const std::vector<char*> pieces = take(arena);
  std::printf("%lld bytes, %s\n", static_cast<long long>(arena.used()),
              std::isnan(reinterpret_cast<float*>(pieces[0])[4]) ? "NaN" : "not NaN");
  if (which >= 0) pieces[which][offset] = 1;
  try {
    arena.check();
    std::puts("clean");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""
DEBUG = "-DFASTODE_DEBUG"


def compiled(folder: Path, *flags: str) -> Path:
    root = operators.source_root()
    assert root is not None
    command, _ = toolchain.compiler()
    source, program = folder / "guards.cpp", folder / "guards"
    source.write_text(PROGRAM)
    line = [*command, "-std=c++20", "-Wall", "-Werror", *flags, f"-I{root}", str(source), "-o", str(program)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(line, check=True, env=environment, timeout=120)
    return program


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("debug"), DEBUG)


def said(program: Path, which: int = -1, offset: int = 0) -> list[str]:
    done = subprocess.run([program, str(which), str(offset)], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_scratch_that_is_used_as_it_should_be_is_clean(guarded: Path) -> None:
    assert said(guarded)[1] == "clean"
    for which, size in ((0, 20), (1, 128), (3, 64)):
        for offset in (0, size - 1):
            assert said(guarded, which, offset)[1] == "clean"


@pytest.mark.parametrize(
    ("which", "offset", "message"),
    [
        (0, 20, "scratch piece 1 of 4 (20 bytes) was written behind its end"),
        (0, 64, "scratch piece 1 of 4 (20 bytes) was written behind its end"),
        (0, 127, "scratch piece 1 of 4 (20 bytes) was written behind its end"),
        (0, -1, "scratch piece 1 of 4 (20 bytes) was written before its start"),
        (1, 128, "scratch piece 2 of 4 (128 bytes) was written behind its end"),
        (1, -64, "scratch piece 2 of 4 (128 bytes) was written before its start"),
        (2, 0, "scratch piece 3 of 4 (0 bytes) was written behind its end"),
        (3, 64, "scratch piece 4 of 4 (64 bytes) was written behind its end"),
    ],
)
def test_an_overrun_is_caught(guarded: Path, which: int, offset: int, message: str) -> None:
    assert said(guarded, which, offset)[1] == message


def test_scratch_starts_as_nan_in_debug_builds_only(guarded: Path, tmp_path: Path) -> None:
    assert said(guarded)[0].endswith("bytes, NaN")
    plain = compiled(tmp_path)
    # 20, 128, 0 and 64 bytes in whole cache lines and nothing between them.
    assert said(plain)[0] == "256 bytes, not NaN"
    assert said(plain, 0, 20)[1] == "clean"


def test_a_debug_build_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    root = operators.source_root()
    assert root is not None
    monkeypatch.delenv("FASTODE_DEBUG", raising=False)
    monkeypatch.delenv("FASTODE_CXXFLAGS", raising=False)
    plain = toolchain.recipe(root)
    monkeypatch.setenv("FASTODE_DEBUG", "1")
    debug = toolchain.recipe(root)
    assert DEBUG in debug.compile_flags and DEBUG not in plain.compile_flags
    assert debug.key != plain.key
    assert operators.prebuilt() is None
