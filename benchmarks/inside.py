"""What the benchmarks use of fastode beyond its public names, but for the offline compilation of kernels."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastode
from fastode.dispatch import choice
from fastode.dispatch import decisions as kept
from fastode.dispatch.engines import ENGINES, REFERENCE
from fastode.native import cuda_library, operators
from fastode.native.toolchain import BuildError
from fastode.ops.resident import rule
from fastode.ops.resident.engine import Resident
from fastode.reference import adaptive

# The measured rule by which "auto" chooses on a CPU, which benchmarks/choose.py writes, and what a line of it is.
Few, Line = rule.Few, rule.Line
# The engines that fuse something, in the project's order of preference.
FUSED_ENGINES: tuple[str, ...] = tuple(engine.name for engine in ENGINES if engine is not REFERENCE)
# The engine whose calls launch the CUDA programs.
PROGRAM_ENGINE = Resident.name
# The file of what trials on cards have decided, and the package's folder, where one of that name may be shipped.
DECISIONS, PACKAGE = kept.NAME, kept.PACKAGE


def build() -> str:
    """Build and load the C++ operators; why they are missing, or "" where they are not."""
    return operators.load() or ""


def build_programs(device: torch.device) -> str:
    """Build all CUDA programs, as many at a time as there are cores; why they are missing, or "" where they are not."""
    reason = no_programs(device)
    if not reason:
        try:
            cuda_library.build_all()
        except BuildError as error:
            reason = str(error)
    return reason


def no_programs(device: torch.device) -> str:
    """Why there are no CUDA programs here, "" where there are."""
    return cuda_library.why_not(device.index) if device.type == "cuda" else "there is no card"


def refusals(twin: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """For every engine that fuses, why it cannot run a fused block on these inputs; "" where it can."""
    x = inputs[0] if len(inputs) == 1 else inputs
    reasons = {}
    for name in FUSED_ENGINES:
        able, reason = choice.can_use(name, twin, x)
        reasons[name] = "" if able else reason
    return reasons


def engines_used() -> AbstractContextManager[dict[nn.Module, str]]:
    """A context that collects which engine each fused block used last."""
    return choice.recording()


def decisions(index: int | None) -> dict[str, Any]:
    """What trials on a card have decided, by kind of call."""
    return kept.entries(index)


def card(index: int | None) -> str:
    """A card and everything else that its decisions depend on, in words."""
    return kept.card(index)


def first_step(field: nn.Module, x: Tensor, solver: fastode.Solver) -> Tensor:
    """The size of the first step that a solver chooses for a field of pairs from the state that x gives."""
    state = field.initial_state(x)

    def slope(_: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return field(*state)

    return adaptive.first_step(slope, state, slope(None, state), solver.tableau.order, solver)


@contextmanager
def launches_replaced(make: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Have every launch of a Triton kernel go through what `make` makes of the real launch."""
    from fastode.ops.triton import launch, passes

    real, modules = launch.launch, (launch, passes)
    replaced = make(real)
    for module in modules:
        module.launch = replaced  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.launch = real  # type: ignore[attr-defined]


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel as the project does."""
    from fastode.ops.triton import launch as launching

    launching.launch(kernel, programs, *arguments, **constants)


def kernel_names() -> set[str]:
    """The Triton kernels of the project, by the names of their functions; read from the sources."""
    folder = Path(fastode.__file__).parent / "ops" / "triton"
    found = set()
    for path in folder.glob("*.py"):
        functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
        found |= {function.name for function in functions if function.name.endswith("_kernel")}
    return found
