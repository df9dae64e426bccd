"""`python -m benchmarks.cuda_kernels`: what the CUDA C++ kernels compile to, without a card.

Every .cu of csrc/cuda is compiled with the library's own flags for each architecture. ptxas tells registers and spills,
and the machine code is counted: tensor-core instructions and ldmatrix as they are written, not as loops repeat them.
What shared memory a launch asks for the compiler does not know: a small program, built with the headers, tells it.
Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastode.native import nvcc, toolchain
from fastode.native.constants import MOST_UNITS, TILES

from . import header

CSRC = header.ROOT / "csrc"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_THREADS = re.compile(r"\.entry (\w+)\((?:(?!\.entry)[^{])*?\.maxntid (\d+)")
_SECTION = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)

# "kernel<SchemeForward<Tile<BFloat16, 16, 32, 8>>, SchemeCall>": the program, and its size.
_PROGRAM = re.compile(r"kernel<(\w+(?:<.*>)?), \w+>")
_TILE = re.compile(r"Tile<\w+, (\d+), (\d+), \d+>")


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        kernel: its name, template arguments included.
        source: the file in csrc/cuda.
        architecture: as in sm_90a.
        warps: of a block, by its launch bounds; 0 where it has none.
        registers: of a thread.
        spills: bytes stored to and loaded from local memory because there are no more registers.
        stack: bytes of local memory of a thread, for spills and for arrays that are indexed at run time.
        shared: bytes of shared memory that it always has.
        dynamic: bytes that a launch asks for beside them, with the most units that a branch has at this size; None of a
            kernel that is none of the programs.
        instructions: of machine code; None, like the next two, where there is no nvdisasm.
        tensor_core: instructions for the tensor cores.
        ldmatrix: instructions that load their operands.
    """

    kernel: str
    source: str
    architecture: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    dynamic: int | None
    instructions: int | None
    tensor_core: int | None
    ldmatrix: int | None


def disassembler() -> str | None:
    """nvdisasm beside nvcc, on PATH, or Triton's; None where there is none."""
    try:
        beside = str(Path(nvcc.find().path).resolve().parent)
    except toolchain.BuildError:
        beside = ""
    found = shutil.which("nvdisasm", path=beside) or shutil.which("nvdisasm")
    if found is None:
        import triton

        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(packaged) if packaged.exists() else None
    return found


def compile_one(source: Path, architecture: str, root: Path = CSRC) -> list[Kernel]:
    """The kernels of one file, compiled for one architecture.

    Args:
        source: a .cu under ``root``.
        architecture: as "90a".
        root: the directory that holds ``constants.h``.

    Raises:
        RuntimeError: nvcc refuses it; the message is what it says.
    """
    with tempfile.TemporaryDirectory() as work:
        cubin = Path(work) / f"{source.stem}.cubin"
        keep = ("-cubin", "-Xptxas=-v", "-keep", f"-keep-dir={work}")
        command = [*nvcc.device_compiler(root, [architecture]), *keep, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for sm_{architecture}: {(done.stdout + done.stderr).strip()}")
        code = _disassemble(cubin)
        threads = dict(_THREADS.findall(cubin.with_suffix(".ptx").read_text()))
    rows = []
    names = _demangled(_ENTRY.findall(done.stderr))
    for said in re.split(r"(?=ptxas info\s+: Compiling entry function)", done.stderr)[1:]:
        (entry,) = _ENTRY.findall(said)
        stack, stored, loaded = map(int, _STACK.findall(said)[0])
        own = None if code is None else code[entry]
        rows.append(
            Kernel(
                names[entry],
                source.name,
                f"sm_{architecture}",
                int(threads.get(entry, 0)) // 32,
                int(_USED.findall(said)[0]),
                stored + loaded,
                stack,
                sum(map(int, _SHARED.findall(said))),
                None,
                None if own is None else len(own),
                None if own is None else sum(_is_tensor_core(each) for each in own),
                None if own is None else sum(each.startswith("LDSM") for each in own),
            )
        )
    return rows


def _is_tensor_core(instruction: str) -> bool:
    """mma.sync and wgmma of 16-bit floats and tf32, and Blackwell's fifth generation."""
    return instruction.split(".")[0] in {"HMMA", "HGMMA", "UTCHMMA"}


def _disassemble(cubin: Path) -> dict[str, list[str]] | None:
    """The instructions of each kernel, but for those that only fill up."""
    program = disassembler()
    if program is None:
        return None
    text = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    pieces = _SECTION.split(text)
    found = {}
    for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        found[name] = [each for each in _INSTRUCTION.findall(piece) if each != "NOP"]
    return found


def _demangled(entries: Sequence[str]) -> dict[str, str]:
    """The names as they are written, without our namespaces and parameters; mangled where nothing can read them."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not entries:
        return {entry: entry for entry in entries}
    lines = subprocess.run([program, *entries], capture_output=True, text=True, check=True).stdout.splitlines()
    return {entry: _short(line) for entry, line in zip(entries, lines, strict=True)}


def _short(name: str) -> str:
    """ "mma<3>" of "void fastode::cuda::(anonymous namespace)::mma<3>(float*)"."""
    name = re.sub(r"fastode::(\w+::)*", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    depth = 0
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


_SIZES = """
#include <cstdio>
{includes}
using namespace fastode::device;
template <class Program, class Tile>
size_t bytes(int units) {{
  if constexpr (requires {{ Program::bytes(units); }}) return Program::bytes(units);
  else if constexpr (requires {{ Program::bytes(); }}) return Program::bytes();
  else return Memory<Tile>::bytes(units, units);
}}
int main() {{
{lines}
}}
"""


def dynamic_bytes(kernels: Iterable[str], root: Path = CSRC) -> dict[str, int]:
    """What each program asks for in shared memory with the most units of its size, by the name of its kernel.

    Args:
        kernels: names as `compile_one` gives them; those of other kernels are left out.
        root: the directory that holds ``cuda/``.

    Raises:
        RuntimeError: the program that tells it is not built, or does not run.
    """
    programs = {name: match for name in sorted(set(kernels)) if (match := _PROGRAM.fullmatch(name))}
    if not programs:
        return {}
    lines = []
    for name, match in programs.items():
        tile = _TILE.search(name)
        units = TILES[int(tile[1]), int(tile[2])] if tile else MOST_UNITS
        lines.append(f'  std::printf("%zu {name}\\n", bytes<{match[1]}, {tile[0] if tile else "void"}>({units}));')
    headers = sorted(f'#include "{path.name}"' for path in (root / toolchain.CUDA).glob("*.cuh"))
    with tempfile.TemporaryDirectory() as work:
        source, built = Path(work) / "sizes.cu", Path(work) / "sizes"
        source.write_text(_SIZES.format(includes="\n".join(headers), lines="\n".join(lines)))
        compiler = nvcc.device_compiler(root, [nvcc.PREBUILT[0]])
        for command in ([*compiler, f"-I{root / toolchain.CUDA}", str(source), "-o", str(built)], [str(built)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the sizes of shared memory: {(done.stdout + done.stderr).strip()}")
    told = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: int(size) for size, _, name in told}


def compile_all(architectures: Sequence[str] = nvcc.PREBUILT, root: Path = CSRC) -> list[Kernel]:
    """Every kernel under ``root``/cuda for some architectures, by name."""
    wanted = list(itertools.product(sorted(root.glob(f"{toolchain.CUDA}/*.cu")), architectures))
    with ThreadPoolExecutor(max_workers=toolchain.jobs()) as pool:
        found = pool.map(lambda each: compile_one(*each, root), wanted)
        rows = [row for rows in found for row in rows]
    sizes = dynamic_bytes((row.kernel for row in rows), root)
    rows = [replace(row, dynamic=sizes.get(row.kernel)) for row in rows]
    return sorted(rows, key=lambda row: (row.source, row.kernel, int(re.sub(r"\D", "", row.architecture))))


def markdown(rows: Sequence[Kernel]) -> str:
    """The table, a line for each kernel and architecture."""
    lines = [
        "Compiled, not timed. Instructions as they stand in the code, not as loops repeat them. Shared memory is that"
        " of a launch with the most units; a block has 166912 bytes at most on sm_80, where a larger one is refused,"
        " and 232448 on sm_90a and sm_100.",
        "",
        "| kernel | source | architecture | warps | registers | spilled bytes | stack bytes | shared bytes |"
        " instructions |"
        " tensor-core | ldmatrix | ldmatrix per tensor-core |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ratio = f"{row.ldmatrix / row.tensor_core:.2f}" if row.ldmatrix is not None and row.tensor_core else ""
        cells = [
            f"`{row.kernel}`", row.source, row.architecture, row.warps or "", row.registers, row.spills, row.stack,
            row.shared + (row.dynamic or 0),
            *("" if each is None else each for each in (row.instructions, row.tensor_core, row.ldmatrix)), ratio,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything and write the table.

    Returns:
        0 if every kernel keeps what is its threads' own in registers, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_kernels", description=__doc__)
    parser.add_argument("--results", type=Path, default=header.RESULTS / "offline")
    folder = parser.parse_args(argv).results
    about = {"commit": header.commit(), "versions": header.versions(), "nvcc": list(nvcc.find().release)}
    rows = compile_all()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    (folder / "cuda.json").write_text(f'{{"header": {json.dumps(about)},\n"results": [\n{lines}\n]}}\n')
    (folder / "cuda.md").write_text(markdown(rows))
    local = [row for row in rows if row.spills or row.stack]
    print(f"{len(rows)} rows in {folder}; {len(local)} use local memory")
    return 1 if local else 0


if __name__ == "__main__":
    sys.exit(main())
