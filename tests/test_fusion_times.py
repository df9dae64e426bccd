"""What `fuse` measures of an example, shares and gains, and what it says would help most: by planted slow modules."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch.registry import _twins
from fastode.fusion import advice, example, times
from fastode.fusion.report import FusionReport, FusionRow, times_as_fast
from fastode.fusion.times import Span, Times, timed

UNIT = 2.0**-6  # s, far above what a hook or a tiny convolution takes; sums of such are exact
NOTHING = "nothing stands out: no change that is known of is expected to save 5 % of the forward"
MAP = torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)


class Clock:
    """Stands still but for what the modules below spend; `real` sleeps instead."""

    def __init__(self) -> None:
        self.now = 0.0
        self.real = False

    def perf_counter(self) -> float:
        return time.perf_counter() if self.real else self.now

    def spend(self, units: float) -> None:
        self.now += units * UNIT
        if self.real:
            time.sleep(units * UNIT)


CLOCK = Clock()


class Sleeper(nn.Module):
    """Hands its input on, late."""

    def __init__(self, units: float = 1.0) -> None:
        super().__init__()
        self.units = units

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.spend(self.units)
        return x


class Own(Sleeper):
    """A block whose twin has times of its own, and may have others in another layout and under autocast."""

    def __init__(self, units: float, fused: float, layout: float = 0.0, autocast: float = 0.0) -> None:
        super().__init__(units)
        self.fused, self.layout, self.autocast = fused, layout, autocast


class FusedOwn(Own):
    def forward(self, x: Tensor) -> Tensor:
        CLOCK.spend(self.fused)
        CLOCK.spend(0.0 if x.is_contiguous(memory_format=torch.channels_last) else self.layout)
        CLOCK.spend(self.autocast if torch.is_autocast_enabled("cpu") else 0.0)
        return x


class Residual(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    fastode.register(Own)(FusedOwn)
    yield
    del _twins[Own]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the real one, so that every figure is exact."""
    monkeypatch.setattr(times, "time", CLOCK)
    monkeypatch.setattr(CLOCK, "real", False)
    return CLOCK


def _no_memory(self: Own, x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("a test")


def kept(units: float) -> nn.Module:
    """A block that cannot be read, and evaluates its branch twice."""
    return reference.SSP2(Sleeper(units / 2))


def test_shares_and_gains_are_those_that_were_planted(clock: Clock) -> None:
    model = nn.Sequential(Own(4, 1), kept(3), Sleeper(1), nn.Flatten())
    report = fastode.fuse(model, example=MAP)
    first, second = report.rows
    assert [first.share, second.share, report.share] == pytest.approx([0.2, 0.6, 0.2])
    assert first.gain == pytest.approx(4) and second.gain is None
    assert report.gain == pytest.approx(8 / 5)
    why = "resident, staged: branch (Sleeper) is of a type the reader does not know."
    assert report.advice == f"to fuse 1 (SSP2), 60 % of the forward: {why}"
    assert str(report).splitlines() == [
        "block  type  twin                        engine     share  gain        why",
        f"0      Own   {FusedOwn.__module__}.FusedOwn  own        20 %   about 4.0x",
        f"1      SSP2  fastode.nn.SSP2             reference  60 %               {why}",
        "1 fused, 1 as the reference",
        "of one forward, 20 % of the time is in fused calls; the model is about 1.6x as fast as with reference blocks",
        f"what would help most: {report.advice}",
    ]


class Normalising(nn.Module):
    """Theirs, with a sum of its own around a block that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = kept(3)
        self.register_buffer("mean", torch.zeros(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x - self.mean)
        return found


def test_what_holds_other_blocks_is_not_what_would_help(clock: Clock) -> None:
    report = fastode.fuse(nn.Sequential(Normalising()), example=MAP, read=True)
    outer, inner = report.rows
    assert [outer.name, inner.name] == ["0", "0.body"] and outer.share == inner.share == 1
    assert report.advice.startswith("to fuse 0.body (SSP2), 100 % of the forward: ")


def test_the_clock_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLOCK, "real", True)
    report = fastode.fuse(nn.Sequential(Own(6, 1), kept(3)), example=MAP)
    first, second = report.rows
    assert first.share is not None and second.share is not None and first.gain is not None
    assert second.share > 0.55 > 0.45 > first.share > 0 and first.share + second.share > 0.9
    assert 2 < first.gain < 12


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            (Own(4, 1), kept(0.5), Sleeper(1.5)),
            "a block around 2 (Sleeper), 50 % of the forward outside of all blocks: fastode.reference.Chain is fused, "
            "and fastode.adapt tells what others' blocks are",
        ),
        (
            (Own(1, 3), Own(2, 2), kept(1)),
            "to leave out 0 (Own) by filter=, if that is so again: it ran at about 0.3x the reference's speed",
        ),
        (
            (Own(3, 1), Residual(Sleeper(1)), Residual(Sleeper(2))),
            "fastode.fuse(model, read=True): it reads 2 (Residual) and 1 more like it, 75 % of the forward",
        ),
        ((Own(4, 2),), NOTHING),
        # Where what is fused gained little, more of it would save little.
        ((Own(3, 2.9), kept(2)), NOTHING),
        ((Own(4, 1), kept(0.05)), NOTHING),
        (
            (Own(4, 1), kept(1), kept(2), Sleeper(1)),
            "to fuse 2 (SSP2) and 1 more like it, 60 % of the forward: resident, staged: branch (Sleeper) is of a type "
            "the reader does not know.",
        ),
    ],
    ids=["outside", "slower", "read", "nothing", "little gain", "little share", "two of a kind"],
)
def test_the_sentence_names_what_would_save_most(parts: tuple[nn.Module, ...], expected: str, clock: Clock) -> None:
    assert fastode.fuse(nn.Sequential(*parts), example=MAP).advice == expected


def test_the_sentence_is_of_a_layout_or_of_autocast_where_those_take_the_time(clock: Clock) -> None:
    model = nn.Sequential(Own(8, 1, layout=2, autocast=3))
    x = torch.zeros(2, 4, 3, 3)
    layout = "an example in channels_last: a forward then took {} less time"
    assert fastode.fuse(model, example=x).advice == layout.format("67 %")
    with torch.autocast("cpu", torch.bfloat16):
        assert fastode.fuse(model, example=x).advice == "no autocast: a forward then took 50 % less time"
        assert fastode.fuse(model, example=MAP).advice == "no autocast: a forward then took 75 % less time"
    assert fastode.fuse(model, example=MAP).advice == NOTHING
    assert fastode.fuse(nn.Sequential(Own(8, 1, layout=0.1)), example=x).advice == NOTHING


def test_a_batch_too_small_for_the_rule_is_said() -> None:
    torch.set_num_threads(1)
    block = reference.ResBlock(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)), shortcut=nn.Conv2d(128, 128, 1))
    x = torch.zeros(1, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    report = fastode.fuse(nn.Sequential(block), example=x)
    assert report.rows[0].engines == ("reference",) and report.share == 0 and report.gain is None
    assert re.fullmatch(
        r"a larger batch: from 4 samples on, instead of 1, 0 \(ResBlock\), \d+ % of the forward, would run fused",
        report.advice,
    )
    x = torch.zeros(4, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    report = fastode.fuse(block, example=x)
    assert report.rows[0].engines != ("reference",) and "larger batch" not in report.advice


def test_the_engine_that_was_asked_for_is_said(clock: Clock) -> None:
    model = nn.Sequential(kept(1.9), Sleeper(0.1))
    report = fastode.fuse(model, engine="reference", example=MAP)
    assert report.advice == "engine='auto' for 0 (SSP2), 95 % of the forward"


def test_what_a_fused_block_runs_itself_has_no_figures_and_stays_a_part_of_it() -> None:
    inner = reference.ResBlock(reference.PreActBranch(16))
    model = nn.Sequential(reference.Chain(nn.Conv2d(16, 16, 1), inner))
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    report = fastode.fuse(model, example=x)
    outer, part = report.rows
    assert outer.is_fused and part.is_fused and part.engines == outer.engines
    assert outer.share == report.share and outer.gain is not None
    assert part.share is part.gain is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_where_only_fused_blocks_can_run_there_is_a_share_and_no_gain(clock: Clock) -> None:
    model = nn.Sequential(Own(1, 1), Sleeper(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Own, "forward", _no_memory)
        report = fastode.fuse(model, example=MAP)
    assert type(model[0]) is FusedOwn and report.share == pytest.approx(1 / 3)
    assert report.gain is report.rows[0].gain is None and "as fast as" not in str(report)


def test_a_forward_that_takes_long_is_timed_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "time", clock)
    spent: list[float] = []

    def spend(units: float) -> None:
        clock.now += units
        spent.extend([units] if units else [])

    monkeypatch.setattr(clock, "spend", spend)
    for fused, forwards in ((2 * example.ENOUGH, 1), (example.ENOUGH / 9, example.ROUNDS)):
        spent.clear()
        fastode.fuse(nn.Sequential(Own(2 * fused, fused)), example=MAP)
        assert spent == [fused] * (1 + forwards) + [2 * fused] * (1 + forwards)


def test_without_an_example_nothing_is_measured() -> None:
    report = fastode.fuse(nn.Sequential(Own(4, 1)))
    assert report.share is report.gain is report.rows[0].share is None and report.advice == ""
    assert str(report).splitlines()[-1] == "1 fused, 0 as the reference"


def test_a_gain_has_the_digits_of_one_measurement() -> None:
    assert [times_as_fast(gain) for gain in (0.849, 1.649, 9.94, 9.96, 123.4)] == [
        "about 0.8x", "about 1.6x", "about 9.9x", "about 10x", "about 123x",
    ]  # fmt: skip
    assert str(FusionReport((), True, 0.0, None, "so")).splitlines() == [
        "no block that fastode knows",
        "of one forward, 0 % of the time is in fused calls",
        "what would help most: so",
    ]


def test_times_within_others_count_once_and_the_least_of_each_part_is_taken() -> None:
    a, b, c = nn.Identity(), nn.Identity(), nn.Identity()
    one = Times(1.0, (Span(a, -1, 2.0), Span(b, 0, 4.0), Span(b, -1, 3.0), Span(c, 2, 5.0)))
    assert one.total == 15 and one.of({a}) == 6 and one.of({b}) == 12 and one.of({a, b}) == 14 and one.of({c}) == 5
    assert one.share({a, b, c}) == 14 / 15 and one.of(set()) == 0
    other = Times(2.0, (Span(a, -1, 1.0), Span(b, 0, 5.0), Span(b, -1, 2.0), Span(c, 2, 6.0)))
    assert [span.own for span in one.least(other).spans] == [1, 4, 2, 5] and one.least(other).rest == 1
    short = Times(2.0, (Span(a, -1, 1.0),))
    assert one.least(short) is short.least(one) is short


def test_each_call_has_its_own_time(clock: Clock) -> None:
    inner = Sleeper(2)
    outer = nn.Sequential(Sleeper(1), inner)
    found = timed(lambda: (outer(MAP), clock.spend(4)), [outer, inner])
    assert [(span.module, span.parent) for span in found.spans] == [(outer, -1), (inner, 0)]
    assert [found.rest, *[span.own for span in found.spans]] == pytest.approx([4 * UNIT, UNIT, 2 * UNIT])
    assert found.of({outer}) == pytest.approx(3 * UNIT) and found.total == pytest.approx(7 * UNIT)


def test_a_row_without_a_share_gives_no_advice() -> None:
    row = FusionRow("a", reference.SSP2, None, ("reference",), "a reason with {braces}")
    module = nn.Identity()
    measured = example.Measured(Times(0.0, (Span(module, -1, 1.0),)), None, {})
    assert advice.advise(module, [(row, module)], {}, measured, True) == NOTHING
    row = dataclasses.replace(row, share=1.0)
    assert (
        advice.advise(module, [(row, module)], {}, measured, True)
        == "to fuse a (SSP2), 100 % of the forward: a reason with {braces}"
    )
