"""What a run of `benchmarks.gpu` tells and leaves: a summary and results, each on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastode.recipes.records import write_json, write_text

SHOWN = 8  # of the things left out


class Report:
    """The summary and the results of one step.

    Args:
        folder: where they go.
        step: its name, and that of its summary.
        device: where the step runs.
    """

    def __init__(self, folder: Path, step: str, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.step, self.device = folder, step, device
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it on disk."""
        print(text, flush=True)
        self.lines.append(text)
        write_text(self.folder / f"summary-{self.step}.md", "\n\n".join(self.lines) + "\n")

    def left_out(self, what: str, left: Sequence[str]) -> None:
        """Say what the time was too short for; nothing where it was not."""
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            self.say(f"{what}: out of time for {len(left)}: {', '.join(left[:SHOWN])}{more}")

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        write_json(self.folder / name, value)
