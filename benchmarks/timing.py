"""Times contenders in turns, round by round: a ratio is taken within each round, and the median of these counts."""

from __future__ import annotations

import math
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .header import ROOT

Run = Callable[[], object]

# Seconds. A call shorter than this is repeated within its turn, so that the noise of the clock stays small beside it.
SHORTEST_REGION = 5e-3
# Larger than the L2 cache of current cards (H200: 60 MB): writing as much empties it.
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Spread:
    """The median of a sample with its 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


@dataclass
class Times:
    """Seconds per call, one entry per round and contender, and the message of every contender that failed."""

    seconds: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)

    def spread(self, name: str) -> Spread:
        return spread(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """How many times faster `name` is than `other`, paired round by round."""
        pairs = zip(self.seconds[other], self.seconds[name], strict=True)
        return spread([theirs / ours for theirs, ours in pairs])


def spread(values: Sequence[float]) -> Spread:
    """The median, 20th and 80th percentiles of a sample, by linear interpolation.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        Spread(median=3.5, p20=2.0, p80=5.0)
    """
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Spread(statistics.median(ordered), at(0.2), at(0.8))


# Up to a package's folder, or this project's, a path is of the machine.
_OF_THE_MACHINE = re.compile(rf"[^\s`'\"(]*/(?:site|dist)-packages/|{re.escape(str(ROOT))}/")


def one_line(text: str, most: int) -> str:
    """A text for a record: in one line, of so many characters at most, without the machine's paths."""
    return _OF_THE_MACHINE.sub("", " ".join(text.split()))[:most]


def message(error: BaseException) -> str:
    """An exception in one line."""
    return one_line(f"{type(error).__name__}: {error}", 400)


class OutOfTime(BaseException):
    """The time of what runs is up. No Exception, so that what takes those for a contender's failure lets it through."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raise OutOfTime in what runs here once a deadline on time.monotonic's clock has passed.

    It interrupts Python between two of its steps: an operator that has been called returns first. Only a process's
    main thread can be interrupted; in another this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Times one region on a device.

    Args:
        device: on a CPU the wall clock; on a GPU events around the region, synchronised, the L2 cache flushed before.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            self._cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Run, repeats: int = 1) -> float:
        """Seconds per call, the mean over `repeats` calls."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            self._cache.zero_()
            # While the card is still flushing, the region's kernels are queued, so their launches are not timed.
            self._start.record()
            run()
            self._end.record()
            self._end.synchronize()
            total += self._start.elapsed_time(self._end) * 1e-3
        return total / repeats


def processor_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the processor per call: with one thread, what other processes do meanwhile does not count."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def interleave(
    runs: Mapping[str, Run],
    clock: Callable[[Run, int], float],
    *,
    seconds: float = 8.0,
    rounds: tuple[int, int] = (5, 40),
    warm: int = 2,
    now: Callable[[], float] = time.monotonic,
) -> Times:
    """Time contenders in turns (A B C A B C ...) after each has been warmed.

    Args:
        runs: one call per contender, by name, in the order of the turns.
        clock: seconds per call of a run and a number of repeats.
        seconds: stop after this long once the least number of rounds is done.
        rounds: the least and the largest number of rounds.
        warm: untimed calls of each contender before the first round.
        now: the clock of the time limit.

    Returns:
        The times; a contender that raises is left out of the rounds and its message kept.

    Example:
        >>> times = interleave({"a": lambda: None, "b": lambda: None}, lambda run, n: 1.0, seconds=0, warm=0)
        >>> times.seconds["a"], times.ratio("a", "b").median
        ([1.0, 1.0, 1.0, 1.0, 1.0], 1.0)
    """
    alive = dict(runs)
    errors: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        try:
            for _ in range(warm):
                run()
            repeats[name] = max(1, min(50, math.ceil(SHORTEST_REGION / max(clock(run, 1), 1e-9))))
        except Exception as error:  # whatever a contender raises belongs in its row, not in the way of the others
            errors[name] = message(error)
            del alive[name]
    found: dict[str, list[float]] = {name: [] for name in alive}
    start = now()
    for done in range(rounds[1]):
        if not alive or (done >= rounds[0] and now() - start > seconds):
            break
        for name in list(alive):
            try:
                found[name].append(clock(alive[name], repeats[name]))
            except Exception as error:
                errors[name] = message(error)
                del alive[name]
    return Times({name: found[name] for name in alive}, errors)


@dataclass(frozen=True)
class Machine:
    """A large matrix product and a large copy, which take turns with the contenders and measure the machine's rates."""

    matmul: Run
    copy: Run
    matmul_flops: float
    copy_bytes: float


def machine(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Machine:
    """The two calls that measure the roofline, in the working precision.

    Args:
        dtype: of the factors of the product.
        device: the CPU takes 2048 x 2048 factors and a copy of 64 MB, a GPU 8192 x 8192 and 1 GiB. On the CPU a
            float32 product is the faster of torch.mm and oneDNN's: on AMD's processors MKL, which torch.mm calls, uses
            half of the vector units.

    Returns:
        The calls and the work each of them does (a copy reads and writes: twice its size).
    """
    cuda = torch.device(device).type == "cuda"
    size, length = (8192, 1 << 28) if cuda else (2048, 1 << 24)
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty(size, size, dtype=dtype, device=device)
    here, there = torch.ones(length, device=device), torch.empty(length, device=device)
    products = [lambda: torch.mm(left, right, out=product)]
    if not cuda and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = left.to_mkldnn(), right.to_mkldnn()
        products.append(lambda: torch._C._nn.mkldnn_linear(*packed))
    return Machine(fastest(products), lambda: there.copy_(here), 2.0 * size**3, 2.0 * 4 * length)


def fastest(runs: Sequence[Run]) -> Run:
    """The one of several calls that takes the least time, of five turns."""
    clock = Clock()
    return runs[0] if len(runs) == 1 else min(runs, key=lambda run: min(clock(run) for _ in range(5)))


def graphed(run: Run) -> Run:
    """The same call as a replay of a CUDA graph captured now.

    Args:
        run: a call that was made before, so that nothing in it compiles, synchronises or allocates for the first time.

    Returns:
        The replay.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
