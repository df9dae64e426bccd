"""``python -m fastode info`` says what this machine can run and why; ``python -m fastode build`` compiles now."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fastode

from .dispatch import choice, decisions, trial
from .dispatch.engines import ENGINES
from .native import cuda_library, nodes, operators, toolchain


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastode", description=__doc__.replace("``", "`"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,build}")
    commands.add_parser("info", help="print versions, engines, and why each is or is not available")
    build = commands.add_parser("build", help="build the C++ and CUDA operators now, if they are not built yet")
    build.add_argument("--no-load", action="store_true", help="only build: do not open the library")
    chosen = parser.parse_args(arguments)
    return _info() if chosen.command == "info" else _build_now(load=not chosen.no_load)


def _info() -> int:
    for name, value in _machine():
        print(f"{name:<10}{value}")
    print("\nengines")
    for engine, device, usable, reason in choice.describe():
        print(f"  {engine:<18}{device:<6}{'yes' if usable else 'no':<5}{reason}")
    for rule in filter(None, (engine.rule_in_words() for engine in ENGINES)):
        print("", *rule, sep="\n")
    print('\nwhat "auto" takes on CUDA: the fastest in a trial on the card that is equal to the reference')
    print(f"  {decisions.path()}: {decisions.count()} decisions; trials are {trial.state()}")
    return 0


def _machine() -> list[tuple[str, str]]:
    try:
        command, version = toolchain.compiler()
        compiler = f"{version.splitlines()[0]} ({' '.join(command)})"
    except toolchain.BuildError as error:
        compiler = f"none: {error}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none: it is not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: torch sees no CUDA device"
    ready, where = operators.available()
    cuda_ready, cuda_where = cuda_library.available()
    nodes_ready, nodes_where = nodes.available(operators.source_root())
    return [
        ("fastode", f"{fastode.__version__} ({Path(fastode.__file__).parent})"),
        (
            "torch",
            f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}",
        ),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("compiler", compiler),
        ("nvcc", cuda_library.describe()),
        ("triton", triton),
        ("GPU", device),
        ("CPU", f"{_cpu_name()}: {', '.join(toolchain.kernel_features()) or 'no known features'}"),
        ("threads", str(torch.get_num_threads())),
        ("operators", f"{'ready' if ready else 'not ready'}: {where}"),
        ("nodes", f"{'in C++' if nodes_ready else 'in Python'}: {nodes_where}"),
        ("CUDA C++", f"{'ready' if cuda_ready else 'not ready'}: {cuda_where}"),
        ("cache", str(toolchain.cache_directory())),
    ]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _build_now(*, load: bool) -> int:
    """Exit status 1, with the reason, when the operators cannot be had, or CUDA's for architectures that were named."""
    reason: str | None = None
    with ThreadPoolExecutor(1) as beside:  # the nodes are one long file, which one core compiles meanwhile
        nodes_built = beside.submit(nodes.find_or_build, operators.source_root(), again=True)
        try:
            where = operators.find_or_build()
        except toolchain.BuildError as error:
            reason = str(error)
    if load and reason is None:  # after the nodes, which it would wait for
        reason = operators.load()
    print(reason or f"the C++ operators are built: {where}", file=sys.stderr if reason else sys.stdout)
    try:
        print(f"the autograd nodes are built: {nodes_built.result()}")
    except toolchain.BuildError as error:
        print(f"the autograd nodes are not built, and run in Python: {error}", file=sys.stderr)
    missing = ""
    named = bool(os.environ.get("FASTODE_CUDA_ARCHITECTURES"))
    if named or cuda_library.wanted():
        try:
            built = cuda_library.build_all()
            print(f"the CUDA operators and their {len(built) - 1} libraries of programs are built: {built[0]}")
        except toolchain.BuildError as error:
            missing = str(error)
            print(f"the CUDA operators are not built: {missing}", file=sys.stderr)
    return int(reason is not None or (named and missing != ""))


if __name__ == "__main__":
    sys.exit(main())
