"""Work that is shared out to processes until a deadline, so that a kernel that crashes costs one item, not the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import header

Row = dict[str, Any]
# What starts a line of the protocol; anything else that a worker prints is kept in its log.
ROW, DONE = "\x02row ", "\x02done"
# Each process is stopped with its own children, which share its session and nobody else's.
_ALONE: dict[str, Any] = {"cwd": header.ROOT, "start_new_session": True, "text": True}


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve(answer: Callable[[str], Iterator[Row]]) -> None:
    """A worker's side: take an item a line, answer with rows, and say when the item is done."""
    for line in sys.stdin:
        for row in answer(line.rstrip("\n")):
            print(f"{ROW}{json.dumps(row)}", flush=True)
        print(DONE, flush=True)


class _Crowd:
    """Processes that take the next item when they have done one, until there is none or the time is up."""

    def __init__(self, items: Sequence[str], command: Sequence[str], hear: Callable[[Row], object], log: Path) -> None:
        self.waiting, self.command, self.hear, self.log = list(items), list(command), hear, log
        self.left = list(items)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.processes: set[subprocess.Popen[str]] = set()

    def end(self) -> None:
        """The time is up: stop what runs."""
        self.over.set()
        with self.lock:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def work(self) -> None:
        """One process after the other: a new one only where the last has died."""
        with self.log.open("a") as log:
            while self.waiting and not self.over.is_set():
                with self.lock:  # so that `end` meets every process
                    if self.over.is_set():
                        return
                    process = subprocess.Popen(
                        self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, **_ALONE
                    )
                    self.processes.add(process)
                try:
                    self._feed(process, log)
                finally:
                    _stop(process)
                    with self.lock:
                        self.processes.discard(process)

    def _feed(self, process: subprocess.Popen[str], log: Any) -> None:
        assert process.stdin is not None and process.stdout is not None
        while True:
            with self.lock:
                if not self.waiting:
                    return
                item = self.waiting.pop(0)
            try:
                process.stdin.write(f"{item}\n")
                process.stdin.flush()
            except OSError:
                pass  # it has died, which the next line shows
            for line in process.stdout:
                if line.startswith(ROW):
                    with self.lock:
                        self.hear(json.loads(line.removeprefix(ROW)))
                elif line.startswith(DONE):
                    break
                else:
                    log.write(line)
            else:
                status = process.wait()
                if not self.over.is_set():  # else it was stopped, and the item is left
                    with self.lock:
                        self.left.remove(item)
                        self.hear({"item": item, "ok": False, "errors": f"its process ended with status {status}"})
                return
            with self.lock:
                self.left.remove(item)


def share_out(
    items: Sequence[str],
    command: Sequence[str],
    count: int,
    deadline: float,
    hear: Callable[[Row], object],
    log: Path,
) -> list[str]:
    """Have processes work through items, each the next one when it has done one.

    Args:
        items: a line each, in the order in which they are begun.
        command: starts a worker, which calls `serve`.
        count: of processes at a time.
        deadline: on time.monotonic's clock; what runs then is stopped.
        hear: called with every row as it comes, by one thread at a time. An item whose process died has a row with
            "errors".
        log: what the workers print besides.

    Returns:
        The items that were not done by the deadline.
    """
    if time.monotonic() >= deadline or not items:
        return list(items)
    crowd = _Crowd(items, command, hear, log)
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), crowd.end)
    timer.start()
    with ThreadPoolExecutor(min(count, len(items))) as threads:
        try:
            for worker in [threads.submit(crowd.work) for _ in range(min(count, len(items)))]:
                worker.result()
        finally:
            timer.cancel()
            crowd.end()  # also after an interrupt: nothing may outlive this
    return crowd.left


@dataclass(frozen=True)
class Crew:
    """Where the work of a step is done.

    Attributes:
        device: the card, or the CPU to try a step out.
        count: processes at a time; 0 does everything in this one, in turn.
    """

    device: torch.device
    count: int

    def work(
        self,
        kind: str,
        answer: Callable[[str, torch.device], Iterator[Row]],
        items: Sequence[str],
        deadline: float,
        hear: Callable[[Row], object],
        log: Path,
    ) -> list[str]:
        """Work through items; as `share_out`, which has the processes call `answer` under its name `kind`."""
        if self.count:
            command = [sys.executable, "-m", "benchmarks.gpu", "--worker", kind, "--device", str(self.device)]
            return share_out(items, command, self.count, deadline, hear, log)
        for done, item in enumerate(items):
            if time.monotonic() >= deadline:
                return list(items[done:])
            for row in answer(item, self.device):
                hear(row)
        return []


def stream(
    command: Sequence[str],
    log: Path,
    seconds: float,
    echo: Callable[[str], object] = print,
    environment: Mapping[str, str] | None = None,
) -> int | None:
    """Run a command, echoing its lines as they come and keeping them in a file.

    Args:
        command: the program and its arguments, run from the repository's root.
        log: where its output goes.
        seconds: after which it and its children are stopped.
        echo: called with each line.
        environment: variables beside those of this process.

    Returns:
        Its exit status, or None if it was stopped.
    """
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        **_ALONE,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(seconds, 1.0), stop)
    timer.start()
    try:
        assert process.stdout is not None
        with log.open("w") as file:
            for text in process.stdout:
                file.write(text)
                file.flush()
                echo(text.rstrip("\n"))
        status = process.wait()
    finally:
        timer.cancel()
        _stop(process)  # interrupted: it has a session of its own, which no signal to this one reaches
    return None if stopped.is_set() else status
