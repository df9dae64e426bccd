"""The steps build, smoke and sanitize of `benchmarks.gpu`: every row of its table judged, and under the sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import gpu_rows, header, inside, programs
from .gpu_processes import Crew, stream
from .gpu_report import Report

TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER = "compute-sanitizer"
FOUND = 9  # the sanitizer's exit status where it found something
PROGRAMS = 2 / 3  # of the time for launches, after which one of the CUDA programs that hangs leaves it to the others
AT_ONCE = 6  # sanitized programs share the card, and wait for it most of their time
# Freed memory goes back to the driver: what the caching allocator keeps is in bounds for the sanitizer.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
_REFUSED = re.compile(r"Device not supported|unsupported|not supported on this", re.IGNORECASE)


def build(report: Report, crew: Crew, deadline: float) -> bool:
    """Build the operators and the CUDA programs. Without compilers there is still Triton, so that is no failure."""
    start = time.monotonic()
    with ThreadPoolExecutor(1) as beside:  # which no end of a stage interrupts: what is compiled half would be lost
        reason = beside.submit(inside.build).result()
    report.say(f"operators: {reason or 'built and loaded'}, in {time.monotonic() - start:.0f} s")
    start = time.monotonic()
    reason = inside.build_programs(crew.device)
    report.say(f"CUDA programs: {reason or 'built'}, in {time.monotonic() - start:.0f} s")
    return True


def launches(report: Report, crew: Crew, deadline: float) -> bool:
    """Every row on every engine, judged, a line each; True if all that ran were equal and every kernel was launched."""
    results: list[gpu_rows.Result] = []
    head = header.header(crew.device, report.step)

    def hear(result: gpu_rows.Result) -> None:
        results.append(result)
        if "left_out" not in result:
            report.say(gpu_rows.line(result))
        report.write(f"launches-{report.step}.json", {"header": head, "results": results})

    # The CUDA programs are compiled by now: one process has them judged before a crowd of others has begun.
    every, log, start = gpu_rows.items(), report.folder / "workers.txt", time.monotonic()
    own = [item for item in every if gpu_rows.is_program(item)]
    alone = Crew(crew.device, min(1, crew.count))
    left = alone.work("launches", gpu_rows.judge, own, start + PROGRAMS * (deadline - start), hear, log)
    others = [item for item in every if item not in own]
    left += crew.work("launches", gpu_rows.judge, others, deadline, hear, log)
    ran = [result for result in results if "left_out" not in result]
    equal = sum(result["ok"] for result in ran)
    report.say(f"launches: {equal} of {len(ran)} comparisons equal")
    if took_none := gpu_rows.no_part(results):
        report.say("engines that took no part: " + "; ".join(took_none))
    report.left_out("launches", left)
    missing = unlaunched(ran) if crew.device.type == "cuda" else set()
    if crew.device.type == "cuda":
        report.say(f"kernels that were not launched: {', '.join(sorted(missing)) or 'none'}")
        if reason := inside.no_programs(crew.device):
            report.say(f"there are no CUDA programs: {reason}")
            missing -= programs.names()
    # What was out of time has not failed; it is listed.
    return bool(ran) and equal == len(ran) and (bool(left) or not missing)


def unlaunched(results: Sequence[gpu_rows.Result]) -> set[str]:
    """The project's Triton kernels and CUDA programs that none of these results has launched, by name."""
    launched = {name for result in results for kind in ("kernels", "programs") for name in result.get(kind, ())}
    return (inside.kernel_names() | programs.names()) - launched


def prepare(report: Report, crew: Crew, deadline: float) -> bool:
    """Compile and judge what the sanitizer will run, so that it finds the kernels in Triton's cache."""
    return launches(report, crew, deadline) if sanitizer() else True


def sanitizer() -> str | None:
    """The path of compute-sanitizer, from the search path or the toolkit's folder; None where there is none."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=str(toolkit))


def sanitize(report: Report, crew: Crew, deadline: float) -> bool:
    """The rows of the table under every tool of compute-sanitizer, a line each.

    Returns:
        True if nothing was found; also where the tool is missing or refuses this card, which one line then says.
    """
    path = sanitizer()
    if path is None:
        report.say(f"sanitize: skipped, {SANITIZER} is not on this machine")
        return True
    results: list[dict[str, Any]] = []
    left = [f"{tool} {row.name}" for tool in TOOLS for row in gpu_rows.sanitized()]
    refused: list[str] = []
    lock = threading.Lock()
    head = header.header(crew.device, "sanitize")

    def one(tool: str, row: gpu_rows.Row) -> None:
        name = f"{tool} {row.name}"
        if refused or time.monotonic() >= deadline:
            return
        command = [path, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "benchmarks.gpu"]
        command += ["--launch", row.name, "--device", str(crew.device)]
        lines: list[str] = []
        log = report.folder / f"{name.replace(' ', '-').replace('@', '-')}.txt"
        status = stream(command, log, deadline - time.monotonic(), lines.append, ENVIRONMENT)
        with lock:
            if any(_REFUSED.search(line) for line in lines if line.startswith("=")):
                refused.append(next(line for line in lines if _REFUSED.search(line)))
                return
            if status is None:
                return
            left.remove(name)
            if status == 0:
                log.unlink()  # the verdict says it all, and there are many
            told = [match[1] for line in lines if (match := _SUMMARY.search(line))]
            verdict = "clean" if status == 0 else f"FOUND {'; '.join(told)}" if told else f"FAILED with status {status}"
            results.append({"tool": tool, "row": row.name, "status": status, "summary": told})
            report.say(f"{name:<40} {verdict}{'' if status == 0 else f'; see {log.name}'}")
            report.write("sanitize.json", {"header": head, "results": results})

    with ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(one, tool, row) for tool in TOOLS for row in gpu_rows.sanitized()]:
            done.result()
    if refused:
        report.say(f"sanitize: skipped, {SANITIZER} refuses this machine: {refused[0].strip('= ')}")
        return True
    clean = sum(result["status"] == 0 for result in results)
    report.say(f"sanitize: {clean} of {len(results)} clean")
    report.left_out("sanitize", left)
    return bool(results) and clean == len(results)
