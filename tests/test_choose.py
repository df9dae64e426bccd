"""The rule that `benchmarks.choose` draws: from points that are given, and from a small block that is measured."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import choose
from fastode.ops.resident import rule as measured
from fastode.ops.resident.rule import Few, Line
from fastode.testing import sample_input

THREADS = 2
FULL = 128
RULES = sorted(measured.FOLDER.glob("*.json"))


def points(ratios: dict[tuple[int, int, int], float]) -> dict[str, choose.Point]:
    """Points by (channels, size, batch), each with the same ratio in both modes."""
    return {choose.name(*at): {mode: [r, r, r] for mode in choose.MODES} for at, r in ratios.items()}


def grid(faster: Callable[[int, int], float], batches: tuple[int, ...] = (FULL,)) -> dict[str, choose.Point]:
    shapes = itertools.product((8, 16, 64, 256), (4, 8, 32), batches)
    return points({(c, s, n): faster(c, s) for c, s, n in shapes})


@pytest.mark.parametrize(
    ("faster", "line"),
    [
        (lambda c, s: 2.0, Line(256, 1024)),
        (lambda c, s: 0.5, measured.NEVER),
        (lambda c, s: 2.0 if c <= 64 else 0.5, Line(64, 1024)),
        (lambda c, s: 2.0 if c * s * s <= 16384 else 0.5, Line(256, 64)),
        (lambda c, s: 2.0 if s >= 8 else 0.5, Line(256, 1024, least_pixels=64)),
        (lambda c, s: 2.0 if c <= 16 and s >= 32 else 0.5, Line(16, 1024, least_pixels=1024)),
        (lambda c, s: 2.0 if c >= 16 else 0.5, Line(256, 1024, least_channels=16)),
    ],
)
def test_the_bounds_are_those_between_faster_and_slower(faster: Callable[[int, int], float], line: Line) -> None:
    drawn = choose.draw(grid(faster), THREADS, 4)
    given = grid(faster)
    for text, point in given.items():
        assert choose._inside(text, drawn, THREADS, 4) == (choose.gain(point) > 0), text
    assert (drawn.most_channels, drawn.least_pixels) == (line.most_channels, line.least_pixels)
    assert drawn.least_channels == line.least_channels
    assert drawn.few == () and drawn.most_kb in (line.most_kb, None)


def test_small_maps_of_more_channels_are_taken_beside_large_ones_of_few() -> None:
    def faster(c: int, s: int) -> bool:
        return c <= 16 or c * s * s * 4 <= 4096

    drawn = choose.draw(grid(lambda c, s: 2.0 if faster(c, s) else 0.5), THREADS, 4)
    assert (drawn.most_channels, drawn.most_kb, drawn.small_channels, drawn.small_kb) == (16, 1024, 64, 4)
    for text in grid(lambda c, s: 1.0):
        assert choose._inside(text, drawn, THREADS, 4) == faster(*choose.read_name(text)[:2]), text
    # Not for less than it is worth to say.
    assert choose.draw(grid(lambda c, s: 1.02 if faster(c, s) else 0.5), THREADS, 4).small_channels is None


def test_a_point_that_is_slower_by_little_is_given_up_for_many_that_are_faster() -> None:
    given = grid(lambda c, s: 2.0) | points({(16, 8, FULL): 0.9})
    assert choose.draw(given, THREADS, 4).most_channels == 256
    drawn = choose.draw(given | points({(256, 4, FULL): 0.01}), THREADS, 4)
    assert not choose._inside("256@4 batch 128", drawn, THREADS, 4)


def test_a_mode_that_is_slower_counts_more_than_one_that_is_faster() -> None:
    shape = choose.name(256, 8, FULL)
    given = grid(lambda c, s: 2.0 if c * s * s <= 256 * 64 else 0.2)
    for forward, taken in ((1.0, True), (0.96, True), (0.5, False)):
        point: choose.Point = {"train": [1.2, 1.2, 1.2], "forward": [forward, forward, forward]}
        drawn = choose.draw(given | {shape: point}, THREADS, 4)
        assert choose._inside(shape, drawn, THREADS, 4) == taken, forward
    assert choose.loss({"train": [2.0] * 3, "forward": [1.0] * 3}) == 0
    assert choose.loss({"train": [2.0] * 3, "forward": [0.97] * 3}) == pytest.approx(-math.log(0.97) / 2)
    clear = -math.log(0.94)
    expected = (clear + (choose.SLOWER - 1) * (clear - choose.NOISE)) / 2
    assert choose.loss({"train": [2.0] * 3, "forward": [0.94] * 3}) == pytest.approx(expected)
    assert choose.loss({"train": [9.0] * 3, "forward": [0.92] * 3}) == choose.UNFIT


@pytest.mark.parametrize(
    ("small", "few"),
    [
        ({1: 2.0, 2: 2.0}, (Few(1.0, 16, 4), Few(2.0, 16, 4))),
        ({1: 0.5, 2: 2.0}, (Few(1.0, 0), Few(2.0, 16, 4))),
        ({1: 0.5, 2: 0.5}, (Few(1.0, 0), Few(2.0, 0))),
    ],
)
def test_small_batches_have_bounds_of_their_own(small: dict[int, float], few: tuple[Few, ...]) -> None:
    given = grid(lambda c, s: 2.0) | points({(16, 8, batch): ratio for batch, ratio in small.items()})
    drawn = choose.draw(given, THREADS, 4)
    assert drawn.few == few and drawn.most_channels == 256
    for batch, ratio in small.items():
        assert bool(drawn.beyond(16, 64, 4, batch, THREADS)) == (ratio < 1)


def test_small_batches_whose_bounds_are_the_others_have_none_of_their_own() -> None:
    drawn = choose.draw(grid(lambda c, s: 2.0, (1, 2, FULL)), THREADS, 4)
    assert drawn.few == () and drawn.describe() == (
        "at most 256 channels, at most 1024 KB for a feature map of one sample"
    )


def test_the_smallest_batches_keep_the_bounds_of_the_others_where_those_between_have_their_own() -> None:
    shapes = ((64, 64), (256, 4), (256, 8))
    few = points({(c, s, n): 0.5 if c == 256 and n == 1 else 2.0 for c, s in shapes for n in (1, 2)})
    drawn = choose.draw(grid(lambda c, s: 2.0 if c <= 64 else 0.5) | few, THREADS, 4)
    assert drawn == Line(64, 1024, few=(Few(1.0, 64, 1024), Few(2.0, 256, 1024)), why=drawn.why)
    assert drawn.beyond(256, 64, 4, 1, THREADS) and not drawn.beyond(256, 64, 4, 2, THREADS)


def test_small_batches_may_be_bounded_by_channels() -> None:
    small = points({(c, 8, n): 0.5 if c >= 64 and n == 1 else 2.0 for c in (8, 16, 64, 256) for n in (1, 2)})
    drawn = choose.draw(grid(lambda c, s: 2.0) | small, THREADS, 4)
    assert drawn.few == (Few(1.0, 16, 64), Few(2.0, 256, 64))
    assert "with fewer than 1 samples for each thread at most 16 channels and 64 KB" in drawn.describe()
    assert not drawn.beyond(16, 64, 4, 1, THREADS) and not drawn.beyond(64, 64, 4, 2, THREADS)
    told = drawn.beyond(256, 64, 4, 1, THREADS)
    assert told == "with fewer than 1 samples for each thread and more than 16 channels"


def test_small_batches_may_be_bounded_by_the_size_of_a_map() -> None:
    small = points({(c, s, 1): 0.5 if c * s * s >= 16384 else 2.0 for c in (16, 64, 256) for s in (4, 8, 32)})
    drawn = choose.draw(grid(lambda c, s: 2.0) | small, THREADS, 4)
    assert drawn.few == (Few(1.0, 256, 16),)
    assert not drawn.beyond(64, 64, 4, 1, THREADS) and not drawn.beyond(64, 1024, 4, 2, THREADS)
    told = drawn.beyond(64, 1024, 4, 1, THREADS)
    assert told == "with fewer than 1 samples for each thread and a feature map of one sample of more than 16 KB"


def test_a_shape_beyond_a_clear_loss_is_not_measured() -> None:
    lost = points({(64, 8, FULL): 0.5, (16, 32, 1): 0.1})
    assert choose.beyond_a_loss(lost, 256, 8, THREADS)
    assert not choose.beyond_a_loss(lost, 64, 32, THREADS)  # no wider: what lost there were the weights
    assert not choose.beyond_a_loss(lost, 256, 2, THREADS)  # a smaller map
    assert not choose.beyond_a_loss(lost, 32, 32, THREADS)  # a single sample that lost says nothing of many
    assert not choose.beyond_a_loss(points({(64, 8, FULL): 0.9}), 256, 8, THREADS)


def test_the_plan_has_everything_once_and_what_is_used_most_first() -> None:
    dtypes = list(choose.DTYPES)
    items = list(choose.plan(list(choose.BLOCKS), dtypes))
    of_float32 = [group for group in choose.BLOCKS if group.startswith("chain3")]
    turns = len(choose.BLOCKS) * len(dtypes) - len(of_float32) * (len(dtypes) - 1)
    assert len(items) == len(set(items)) == turns * len(choose.SHAPES)
    assert {dtype for group, dtype, *_ in items if group in of_float32} == {"float32"}
    assert [group for group, *_ in items[: len(choose.BLOCKS)]] == list(choose.BLOCKS)
    assert items[0][1:] == ("float32", *choose.SHAPES[0])
    for dtype, later in choose.LATER.items():
        before = {(c, s) for _, d, c, s in items[: items.index(("ie sample", dtype, *choose.SHAPES[0]))] if d != dtype}
        assert before >= set(choose.SHAPES[:later])
    # Wide channels on large and small maps, where weights and maps leave the caches, and the papers' own.
    assert set(choose.SHAPES) >= {(512, 4), (512, 8), (256, 4), (256, 8), (256, 16), (256, 32), (160, 8), (160, 32)}
    assert set(choose.SHAPES) >= {(16, 32), (32, 16), (64, 8), (128, 4), (64, 32)}
    assert set(choose.BLOCKS) <= {f"{family} {norms}" for family in measured.FAMILIES for norms in measured.NORMS}


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_step_of_a_full_batch_stays_short(threads: int) -> None:
    for group, (channels, size) in itertools.product(choose.BLOCKS, choose.SHAPES):
        found = choose.batches(group, channels, size, threads)
        assert found[-1] == 1 and threads in found and found[0] <= max(choose.FULL, threads)
    assert choose.batches("ie sample", 8, 8, threads)[0] == choose.FULL
    assert max(choose.batches("ie sample", 320, 16, 2)) == choose.FEWEST
    # Of a block with fewer convolutions a step has time for more samples.
    assert max(choose.batches("chain batch", 256, 8, 2)) > 5 * max(choose.batches("shu_osher batch", 256, 8, 2))


def test_what_is_written_is_read_back_and_drawn_again(tmp_path: Path) -> None:
    path = measured.path_of(measured.cpu_kind(), tmp_path)
    found = {"ie sample float32": grid(lambda c, s: 2.0 if c <= 64 else 0.5), "skew_pair sample float64": {}}
    lines = choose.write(path, found, ["a shape: out of time"], THREADS)
    assert list(lines) == ["ie sample float32"] and "of 9 points faster" in lines["ie sample float32"].why
    rule = measured.read(tmp_path)
    assert rule.measured and rule.lines == lines
    content = json.loads(path.read_text())
    assert choose.rule_of(content["points"], THREADS) == lines
    assert content["left_out"] == ["a shape: out of time"] and content["measured_on"]["threads"] == THREADS
    assert all(text.count("{") == text.count("}") for text in path.read_text().splitlines() if " batch " in text)


def test_points_of_shapes_that_were_not_measured_stay(tmp_path: Path) -> None:
    path, line = measured.path_of(measured.cpu_kind(), tmp_path), "ie sample float32"
    slow = {(16, 32, FULL): 0.5, (16, 32, 1): 0.5, (32, 16, FULL): 0.5}
    choose.write(path, {line: points(slow)}, [], THREADS)
    choose.write(path, {line: points({(16, 32, FULL): 2.0})}, [], THREADS)
    content = json.loads(path.read_text())
    assert content["points"][line] == points({(16, 32, FULL): 2.0, (32, 16, FULL): 0.5})
    assert content["measured_on"]["older_points"] == 1
    choose.write(path, {line: points({(16, 32, FULL): 2.0})}, [], THREADS + 1)
    content = json.loads(path.read_text())
    assert list(content["points"][line]) == [choose.name(16, 32, FULL)] and "older_points" not in content["measured_on"]


def test_there_are_recorded_rules() -> None:
    assert RULES


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_recorded_rule_is_the_one_its_points_give(path: Path) -> None:
    content = json.loads(path.read_text())
    kind = content["measured_on"]["kind"]
    rule = measured.read(kind=kind)
    assert path == measured.path_of(kind) and rule.measured
    assert rule.lines == choose.rule_of(content["points"], content["measured_on"]["threads"])


def test_the_command_writes_the_rule_and_tells_of_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(group: str, dtype: str, channels: int, size: int, threads: int) -> tuple[dict[str, choose.Point], str]:
        if group == "ie batch":
            return {}, "NOT EQUAL: resident: output has 3 of what is allowed"
        return points({(channels, size, FULL): 3.0 if channels < 100 else 0.5}), ""

    monkeypatch.setattr(choose, "measure", measure)
    path = measured.path_of(measured.cpu_kind(), tmp_path)
    arguments = ["--dtypes", "float32", "--out", str(path), "--groups"]
    assert choose.main([*arguments, "ie sample"]) == 0
    assert measured.read(tmp_path).line("ie", "sample", "float32").most_channels == 96
    assert any(line.endswith("beyond a loss") for line in json.loads(path.read_text())["left_out"])
    assert choose.main([*arguments, "ie batch", "ie sample"]) == 1
    assert "ie batch float32 16@32: NOT EQUAL: resident" in capsys.readouterr().out
    assert choose.main([*arguments, "ie sample", "--minutes", "0"]) == 0
    left = json.loads(path.read_text())["left_out"]
    assert len(left) == len(choose.SHAPES) and all(line.endswith(": out of time") for line in left)


def test_both_engines_are_measured_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ROUNDS", 1)
    monkeypatch.setattr(choose, "FULL", 4)
    threads = torch.get_num_threads()
    found, reason = choose.measure("shu_osher batch", "float32", 4, 4, threads)
    assert reason == "" and [choose.read_name(text)[:2] for text in found] == [(4, 4)] * len(found)
    assert [choose.read_name(text)[2] for text in found] == choose.batches("shu_osher batch", 4, 4, threads)
    for point in found.values():
        assert set(point) == set(choose.MODES)
        assert all(0 < p20 <= median <= p80 and math.isfinite(p80) for median, p20, p80 in point.values())
    monkeypatch.setattr(
        choose.rejudge, "compare_by_either", lambda *_: type("Not", (), {"ok": False, "worst": Worst()})
    )
    assert choose.measure("shu_osher batch", "float32", 4, 4, threads) == (
        {},
        "NOT EQUAL: resident: output has 2 of what is allowed",
    )


@pytest.mark.parametrize(
    ("dtype", "reference"),
    [
        ("float32", "shu_osher skew_pair skew_solution chain chain3"),
        ("float64", "skew_pair skew_solution chain chain3"),
    ],
)
def test_resident_is_measured_against_what_runs_without_it(dtype: str, reference: str) -> None:
    for group, make in choose.BLOCKS.items():
        x = sample_input(2, 32, 4, 4, dtype=choose.DTYPES[dtype], layout="channels_last", seed=0)
        inputs = (x, x.clone()) if group.startswith("skew_pair") else (x,)
        other = "reference" if group.split()[0] in reference.split() else "staged"
        assert choose.engines_of(make(32).to(x.dtype), inputs) == ("resident", other), group


def test_chains_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ROUNDS", 1)
    monkeypatch.setattr(choose, "FULL", 4)
    for group in ("chain batch", "chain sample"):
        found, reason = choose.measure(group, "float32", 16, 4, torch.get_num_threads())
        assert reason == "" and all(set(point) == set(choose.MODES) for point in found.values()) and found
        few, reason = choose.measure(group, "float32", 8, 4, torch.get_num_threads())
        assert few == {} and reason.startswith("PyTorch's weight gradient")
    monkeypatch.setitem(choose.DTYPES, "float16", torch.float16)
    half, reason = choose.measure("chain batch", "float16", 16, 4, torch.get_num_threads())
    assert half == {} and reason.startswith("resident: there are no CPU kernels")


class Worst:
    name, ratio = "output", 2.0
