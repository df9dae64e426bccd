"""A progress bar with the means so far, by tqdm, which is imported where one is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

_EVERY = 0.5  # seconds between two readings of the means, each of which waits for the device


class Bar:
    """The bar of an epoch.

    Args:
        shown: whether it is.
        title: in front of it.
        total: batches, or None where nobody knows.
        before: numbers of the epoch before that stay in sight.
    """

    def __init__(self, shown: bool, title: str, total: int | None, before: Mapping[str, float]) -> None:
        self.before, self.read_at = before, 0.0
        self.bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError(f'a progress bar needs tqdm: pip install "fastode[training]" ({error})') from error
            self.bar = tqdm(total=total, desc=title, unit=" batches")

    def update(self, count: int, means: Callable[[], Mapping[str, float]]) -> None:
        """Go on.

        Args:
            count: batches since the last call.
            means: reads the numbers that are shown.
        """
        if self.bar is None:
            return
        now = time.perf_counter()
        if now - self.read_at >= _EVERY or self.bar.n + count == self.bar.total:
            self.bar.set_postfix({**self.before, **means()}, refresh=False)
            self.read_at = now
        self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
