"""The peak memory of a call, from the profiler's allocator events, and a setting of malloc for steadier timings.

The peak is that of the running sum of what is allocated and freed, not the process's resident set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory for every contender alike, so that no turn pays for page faults.

    A page fault takes 0.25 us on some machines and 10 us on some virtual ones. The references allocate the most and
    would pay the most, so that ratios would depend on the machine.

    Returns:
        Whether malloc is glibc's and obeys.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def peak_of(changes: Iterable[int]) -> int:
    """The largest value that a running sum of allocations and frees reaches, at least 0.

    Example:
        >>> peak_of([100, 50, -100, 20])
        150
    """
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that a call holds at its fullest moment beyond what was held before it.

    What was allocated before the call (parameters, the input) does not count; outputs, gradients and everything
    between them do. Memory that does not come from torch's allocator is not seen.

    Args:
        run: the call; its result is dropped.
        device: whose allocator to watch.

    Returns:
        The peak in bytes.

    Example:
        >>> peak_bytes(lambda: torch.empty(1000, dtype=torch.float64)) >= 8000
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
    results = profiler.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type().name.lower() == kind]
    events.sort(key=lambda event: event.start_ns())
    return peak_of(event.nbytes() for event in events)
