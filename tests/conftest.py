"""What every test shares: seeds, reproducible hypothesis, and the rule for tests that need a GPU, or nvcc."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Generator, Iterator

import pytest
import torch

from fastode.dispatch import known, registry
from fastode.native import nvcc
from fastode.ops.resident import rule as measured

NEEDS_GPU = "needs a CUDA device"
NEEDS_NVCC = "needs nvcc"
NEEDS_PAIRS = "needs a CPU with dot products of bfloat16 and without tiles"

try:
    import hypothesis
except ModuleNotFoundError:  # `make gpu` runs on machines that have torch, triton and pytest only
    collect_ignore = ["test_properties.py"]
else:
    # Derandomised, so that a red run is red again; HYPOTHESIS_PROFILE=explore looks for new cases.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
    hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {} if torch.cuda.is_available() else {"gpu": NEEDS_GPU}
    if not measured.multiplies_pairs():
        lacking["pairs"] = NEEDS_PAIRS
    try:
        nvcc.find()
    except nvcc.BuildError as error:
        lacking["nvcc"] = f"{NEEDS_NVCC}: {error}"
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is there by now stays, and no collection of garbage has to go over it; nor does one begin every 700 objects,
    which was a tenth of the suite's time: torch makes many objects, and few of them are garbage in cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost, so that this line comes last
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, what in ((NEEDS_GPU, "a GPU"), (NEEDS_NVCC, "nvcc"), (NEEDS_PAIRS, "another CPU")):
        count = sum(reason in str(report.longrepr) for report in skipped)
        if count or reason == NEEDS_GPU:
            terminalreporter.write_line(f"{count} tests were left out because they need {what}")


@pytest.fixture(autouse=True, scope="session")
def _quick_to_seed_and_to_trace() -> Iterator[None]:
    """Two habits of PyTorch that cost a tenth of every trace and most of a millisecond of every seed: a tracer forgets
    the code of all but the last 128 functions, where a block's has more, and for each device that is not there a seed
    keeps the call's stack.
    """
    patch = pytest.MonkeyPatch()
    for device in (torch.cuda, torch.mtia, torch.xpu):
        if not device.is_available():
            patch.setattr(device, "manual_seed_all", lambda seed: None)
    from torch._dynamo import bytecode_transformation as tracer

    kept = functools.cache(tracer._cached_cleaned_instructions.__wrapped__)
    patch.setattr(tracer, "_cached_cleaned_instructions", kept)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same random numbers for a test whatever ran before it, no test's thread count or twins for the next, and no
    rule of choice that was measured on some machine.
    """
    known.forget()
    monkeypatch.setattr(measured, "_rule", measured.Rule({}, "a test", False))
    threads, twins = torch.get_num_threads(), dict(registry._twins)
    torch.manual_seed(0)
    yield
    for kind in registry._twins.keys() - twins.keys():
        del registry._twins[kind]
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def small_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks measure the machine by calls that take no time."""
    from benchmarks import timing

    x = torch.ones(64, 64)
    monkeypatch.setattr(timing, "machine", lambda *_: timing.Machine(lambda: x @ x, lambda: x.clone(), 1.0, 1.0))


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" take small batches, as tests have them."""
    monkeypatch.setattr(measured, "threads", lambda: 1)
