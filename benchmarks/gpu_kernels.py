"""What fraction of its roofline each Triton kernel reaches, on the arguments of a workload's training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import contenders, header, inside, measure, timing, workloads
from .gpu_processes import Crew
from .gpu_report import Report
from .workloads import Workload

REPEATS = 10


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        kernel: as Triton knows it.
        programs: how many.
        arguments: tensors, tuples of tensors, numbers.
        constants: the kernel's, with warps.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.kernel, "__name__", str(self.kernel))

    @property
    def tensors(self) -> list[Tensor]:
        """Each once."""
        flat = [each for given in self.arguments for each in (given if isinstance(given, tuple) else (given,))]
        return list({id(t): t for t in flat if isinstance(t, Tensor)}.values())

    @property
    def least_bytes(self) -> int:
        """Each tensor read or written once."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def flops(self) -> int:
        """Of a convolution or its weight gradient, which have the constants CI, CO, KH and KW; else 0."""
        given = self.constants
        if not {"CI", "CO", "KH", "KW"} <= given.keys():
            return 0
        maps = [t for t in self.tensors if t.dim() == 4 and tuple(t.shape[2:]) != (given["KH"], given["KW"])]
        pixels = max(t.numel() // t.shape[1] for t in maps) // given.get("STEP", 1) ** 2
        return 2 * pixels * given["CI"] * given["CO"] * given["KH"] * given["KW"]

    @property
    def key(self) -> str:
        """What tells two launches apart."""
        shapes = [tuple(t.shape) for t in self.tensors]
        return f"{self.name} {self.programs} {shapes} {sorted(self.constants.items(), key=lambda item: item[0])}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch made meanwhile."""
    found: list[Launch] = []

    def keeping(real: Callable[..., None]) -> Callable[..., None]:
        def kept(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
            found.append(Launch(kernel, programs, arguments, constants))
            real(kernel, programs, *arguments, **constants)

        return kept

    with inside.launches_replaced(keeping):
        yield found


def row_of(launch: Launch, seconds: float, matmul: float, copy: float) -> dict[str, Any]:
    """One kernel's time beside the least that the card's measured rates allow.

    Args:
        launch: what ran.
        seconds: it took.
        matmul: FLOP/s of a large matrix product.
        copy: bytes/s of a large copy.
    """
    bound = max(launch.flops / matmul, launch.least_bytes / copy)
    return {
        "kernel": launch.name,
        "programs": launch.programs,
        "shapes": [list(t.shape) for t in launch.tensors if t.dim() == 4],
        "microseconds": round(seconds * 1e6, 2),
        "least_mb": round(launch.least_bytes * 1e-6, 3),
        "gflop": round(launch.flops * 1e-9, 3),
        "bound_by": "matrix product" if launch.flops / matmul > launch.least_bytes / copy else "copy",
        "fraction_of_roofline": round(bound / seconds, 4),
    }


def rooflines(
    report: Report,
    crew: Crew,
    deadline: float,
    chosen: Sequence[Workload],
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> bool:
    """Each kernel of the workloads' training steps, timed alone, until the deadline.

    Args:
        report: where the rows go.
        crew: whose device.
        deadline: on time.monotonic's clock.
        chosen: the workloads.
        clock: seconds per call; by default events on the card.
    """
    device = crew.device
    clock = clock or timing.Clock(device)
    rows: list[dict[str, Any]] = []
    for dtype in ("bfloat16", "tf32"):
        measure.set_precision(dtype, device)
        machine = timing.machine(measure.DTYPES[dtype], device)
        for run in (machine.matmul, machine.copy):
            run()
        matmul = machine.matmul_flops / min(clock(machine.matmul, 3) for _ in range(3))
        copy = machine.copy_bytes / min(clock(machine.copy, 3) for _ in range(3))
        del machine
        for workload in chosen:
            block, inputs = workloads.make(workload, device, measure.DTYPES[dtype])
            for engine in (engine for engine, why in contenders.engines(block, inputs).items() if not why):
                module, own = contenders.fused(engine).make(block, inputs)
                with recorded() as launches:
                    workloads.work(module, own, "train").run()
                for launch in {each.key: each for each in launches}.values():
                    if time.monotonic() > deadline:
                        return _tell(report, rows, "stopped at its time")

                    def again(launch: Launch = launch) -> None:
                        inside.launch(launch.kernel, launch.programs, *launch.arguments, **launch.constants)

                    row = row_of(launch, clock(again, REPEATS), matmul, copy)
                    rows.append({"workload": workload.name, "dtype": dtype, "engine": engine} | row)
                report.write("kernels.json", {"header": header.header(device, "kernels"), "rows": rows})
    return _tell(report, rows, "all")


def _tell(report: Report, rows: list[dict[str, Any]], ended: str) -> bool:
    lines = ["| kernel | dtype | launches | bound by | median of the roofline |", "|---|---|---:|---|---:|"]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        group = (row["kernel"], row["dtype"], row["bound_by"])
        groups.setdefault(group, []).append(row["fraction_of_roofline"])
    for (kernel, dtype, bound), reached in sorted(groups.items()):
        middle = sorted(reached)[len(reached) // 2]
        lines.append(f"| {kernel} | {dtype} | {len(reached)} | {bound} | {100 * middle:.0f} % |")
    report.say(f"kernels alone ({ended}): {len(rows)} launches; see kernels.json")
    if rows:
        report.say("\n".join(lines))
    return True
