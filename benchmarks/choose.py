"""`python -m benchmarks.choose`: where resident is slower than the others on this CPU, and the rule drawn from it.

Where "auto" would not take staged, resident is measured against the reference. Both take turns on blocks of every
family, over channels, sizes, batches and dtypes, each checked for equality first. The points and the rule drawn
from them go to a file of fastode/ops/resident/rules, which "auto" obeys on CPUs of this kind; a ratio above 1 means
that resident is the faster one. A shape far beyond one where resident lost is left out, and so is what does not fit
into the minutes given: points of it that the file already has stay.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastode import reference
from fastode.testing import Judge, sample_input

from . import contenders, header, rejudge, timing, workloads
from .inside import Few, Line, rule

MINUTES = 7.0
MODES = ("train", "forward")
ROUNDS = 5
# The family and norms of a line of the rule, and the block that stands for them.
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "ie sample": lambda c: reference.IESkip(reference.PreActBranch(c, norm="layer", bias=False)),
    "ie batch": lambda c: reference.IESkip(reference.PreActBranch(c, norm="batch", bias=False)),
    "shu_osher sample": lambda c: reference.SSP3(reference.PreActBranch(c, norm="layer")),
    "shu_osher batch": lambda c: reference.SSP3(reference.PreActBranch(c, norm="batch")),
    "skew_pair sample": lambda c: reference.SkewPair(c, c),
    "skew_solution sample": lambda c: reference.SOBlock(reference.SkewPair(c, c), solver="rk4"),
    "chain sample": lambda c: _halving(c, [nn.GroupNorm(1, c)], [], 3),
    "chain batch": lambda c: _halving(c, [nn.BatchNorm2d(c)], [nn.BatchNorm2d(c)], 1),
    "chain3 sample": lambda c: _keeping(c, lambda: nn.GroupNorm(1, c)),
    "chain3 batch": lambda c: _keeping(c, lambda: nn.BatchNorm2d(c)),
}
# (channels, size): first the papers' shapes and those where weights or maps just fit a cache or just do not.
SHAPES = (
    (16, 32), (64, 8), (160, 8), (64, 32), (256, 8), (512, 4), (32, 16), (128, 4), (160, 32), (128, 16),
    (256, 16), (8, 64), (256, 4), (512, 8), (16, 8), (64, 64), (8, 8), (320, 16), (640, 8), (256, 32), (96, 16),
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# How many shapes of float32 are measured before a dtype's first one: the less used, the more likely out of time.
LATER = {"float32": 0, "bfloat16": 1, "float64": 4}
FULL = 128  # samples, less where a step would take longer than STEP_GFLOP
FEWEST = 8
FEWEST_OF_CHAINS = 16  # channels
STEP_GFLOP = 16.0
STEP_CONVOLUTIONS = 18  # of an IE-Skip; the other blocks have as many or fewer
STEP_CONVOLUTIONS_OF_CHAINS = 3  # at most: theirs halve the size
JUDGED = 3  # samples
FAULTS = ("NOT EQUAL", "failed")  # a reason that begins so is an error of this project
LOST = 0.75  # below this ratio resident has lost clearly, and the group's larger shapes are not measured

SLOWER = 8.0  # how much more it counts that a choice is slower than that another would be faster
NOISE = -math.log(0.95)  # what five rounds do not tell from 1
LEAST = 0.93  # a line leaves every point of which a mode's ratio is below it
SMALL_GAIN = 0.1  # what small maps of more channels have to gain together, for a bound of their own
UNFIT = 10.0  # the loss of such a point: more than a line gains

# Of each mode, the median ratio of the other's time to resident's with the 20th and 80th percentiles.
Point = dict[str, list[float]]
Points = dict[str, dict[str, Point]]
Price = tuple[str, float, float]  # a point's name, and what it costs within the bounds and beyond them


def _halving(channels: int, between: list[nn.Module], behind: list[nn.Module], kernel: int) -> nn.Module:
    """A block that halves the size, with norms between its convolutions and behind those that are summed."""
    halve = nn.Conv2d(channels, channels, 3, 2, 1, bias=False)
    keep = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    shortcut = nn.Conv2d(channels, channels, kernel, 2, kernel // 2, bias=False)
    branch = nn.Sequential(halve, *between, nn.ReLU(), keep, *copy.deepcopy(behind))
    return reference.ResBlock(branch, shortcut=nn.Sequential(shortcut, *behind), post_activation=nn.ReLU())


def _keeping(channels: int, norm: Callable[[], nn.Module]) -> nn.Module:
    """A residual block with an activation behind its sum, as ResNets have them."""

    def conv() -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    branch = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm())
    return reference.ResBlock(branch, post_activation=nn.ReLU())


def engines_of(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, str]:
    """The engine that the rule is about, and the one that "auto" takes where it is left."""
    twin, given = contenders.fused("auto").make(block, inputs)
    return "resident", "reference" if cast(Any, twin).against("staged", *given) else "staged"


def batches(group: str, channels: int, size: int, threads: int) -> list[int]:
    """The full batch, one sample for each thread, and a single one."""
    convolutions = STEP_CONVOLUTIONS_OF_CHAINS if group.startswith("chain") else STEP_CONVOLUTIONS
    gflop = 2e-9 * 9 * channels**2 * size**2 * convolutions
    full = max(FEWEST, min(FULL, int(STEP_GFLOP / gflop)))
    return sorted({1, threads, full}, reverse=True)


def plan(groups: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, str, int, int]]:
    """(group, dtype, channels, size), every group's first shape before any group's second."""
    turns = sorted(itertools.product(range(len(SHAPES)), dtypes), key=lambda turn: turn[0] + LATER[turn[1]])
    for (index, dtype), group in itertools.product(turns, groups):
        # Other dtypes have rules of their own, or no products to save.
        if dtype == "float32" or not group.startswith("chain3"):
            yield group, dtype, *SHAPES[index]


def name(channels: int, size: int, batch: int) -> str:
    """A point's name; `read_name` takes it apart."""
    return f"{channels}@{size} batch {batch}"


@functools.cache
def read_name(text: str) -> tuple[int, int, int]:
    """Channels, size and batch of a point's name.

    Example:
        >>> read_name("16@32 batch 128")
        (16, 32, 128)
    """
    shape, _, batch = text.partition(" batch ")
    channels, _, size = shape.partition("@")
    return int(channels), int(size), int(batch)


def measure(group: str, dtype: str, channels: int, size: int, threads: int) -> tuple[dict[str, Point], str]:
    """The points of one shape, from the full batch down, or why there are none."""
    if group.startswith("chain") and channels < FEWEST_OF_CHAINS:
        return {}, "PyTorch's weight gradient of a 1×1 convolution of few channels at stride 2 writes beside its memory"
    torch.manual_seed(0)
    block = BLOCKS[group](channels).to(DTYPES[dtype])

    def inputs(batch: int) -> tuple[Tensor, ...]:
        count = 2 if group.startswith("skew_pair") else 1
        return tuple(
            sample_input(batch, channels, size, size, dtype=DTYPES[dtype], layout="channels_last", seed=i)
            for i in range(count)
        )

    reasons = contenders.engines(block, inputs(2))
    ours, other = both = engines_of(block, inputs(2))
    if any(reasons.get(engine) for engine in both):
        return {}, "; ".join(f"{engine}: {reasons[engine]}" for engine in both if reasons.get(engine))
    few = inputs(JUDGED)
    modules = {engine: contenders.fused(engine).make(block, few)[0] for engine in both}
    judge = Judge(block, few[0] if len(few) == 1 else few)
    for engine, module in modules.items():
        comparison = rejudge.compare_by_either(judge, block, module, "train", None)
        if not comparison.ok:
            worst = comparison.worst
            return {}, f"NOT EQUAL: {engine}: {worst.name} has {worst.ratio:.3g} of what is allowed"
    found: dict[str, Point] = {}
    for batch in batches(group, channels, size, threads):
        point: Point = {}
        for mode in MODES:
            given = inputs(batch)
            turns = {
                engine: workloads.work(contenders.fused(engine).make(block, given)[0], given, mode).run
                for engine in both
            }
            times = timing.interleave(turns, timing.Clock(), seconds=0.0, rounds=(ROUNDS, ROUNDS), warm=1)
            if times.errors:
                return found, f"failed: {times.errors}"
            ratio = times.ratio(ours, other)
            point[mode] = [round(value, 3) for value in (ratio.median, ratio.p20, ratio.p80)]
        found[name(channels, size, batch)] = point
    return found, ""


def gain(point: Point) -> float:
    """The logarithm of how many times faster resident is, the mean over the modes."""
    return sum(math.log(values[0]) for values in point.values()) / len(point)


def loss(point: Point) -> float:
    """What taking resident costs, in logarithms: the mean over the modes, where one does not make up for another.

    What is slower by more than the rounds' noise counts SLOWER times: "auto" is to be never slower.
    """
    if min(values[0] for values in point.values()) < LEAST:
        return UNFIT
    slower = [max(0.0, -math.log(values[0])) for values in point.values()]
    return sum(each + (SLOWER - 1) * max(0.0, each - NOISE) for each in slower) / len(slower)


def beyond_a_loss(points: Mapping[str, Point], channels: int, size: int, threads: int) -> bool:
    """Whether the group lost clearly, with full batches, at a narrower shape with no larger a map."""
    for text, point in points.items():
        c, s, batch = read_name(text)
        if batch > threads and gain(point) < math.log(LOST) and (c < channels and c * s * s <= channels * size * size):
            return True
    return False


def draw(points: Mapping[str, Point], threads: int, itemsize: int) -> Line:
    """The bounds with the least regret over the points of a group.

    A point's regret is what the wrong choice costs: outside the line the gain given up, inside its `loss`. The line
    with the least sum over the full batches wins; among equals (to a hundredth) the one with fewer bounds, then the
    wider one. Small maps of more channels are taken beside it where that gains clearly. Smaller batches have bounds of
    their own, drawn likewise. Where resident never lost, the largest shape measured is the bound.
    """
    full = {text: p for text, p in points.items() if read_name(text)[2] > threads} or dict(points)
    if not any(gain(p) > 0 for p in full.values()):
        return replace(rule.NEVER, why=_why(points, rule.NEVER, threads, itemsize))
    channels, sizes = _channels_and_sizes(full, itemsize)
    pixels = sorted({read_name(text)[1] ** 2 for text in full})
    priced = _priced(full)

    def key(line: Line) -> tuple[float, int, float]:
        c, kb, px, least = line.most_channels or 0, line.most_kb or 0, line.least_pixels, line.least_channels
        bounds = (c < channels[-1]) + (kb < sizes[-1]) + (px is not None) + (least is not None)
        width = math.log(c * kb) - math.log(px or 1) - math.log(least or 1)
        return round(_regret(priced, line, threads, itemsize), 2), bounds, -width

    tried = itertools.product(channels, sizes, [None, *pixels[1:]], [None, *channels[1:]])
    line = _with_small_maps(min((Line(*each) for each in tried), key=key), full, threads, itemsize)
    line = replace(line, few=_draw_few(points, line, threads, itemsize))
    return replace(line, why=_why(points, line, threads, itemsize))


def _with_small_maps(line: Line, points: Mapping[str, Point], threads: int, itemsize: int) -> Line:
    """The line, and what is beyond it of more channels and smaller maps, where that gains clearly."""
    channels, sizes = _channels_and_sizes(points, itemsize)
    priced = _priced(points)

    def regret(line: Line) -> float:
        return round(_regret(priced, line, threads, itemsize), 2)

    wider = itertools.product([each for each in channels if each > (line.most_channels or 0)], sizes)
    tried = [replace(line, small_channels=c, small_kb=kb) for c, kb in wider]
    found = min([line, *tried], key=regret)
    return found if regret(found) < regret(line) - SMALL_GAIN else line


def _draw_few(points: Mapping[str, Point], line: Line, threads: int, itemsize: int) -> tuple[Few, ...]:
    """The bounds of batches of at most a sample for each thread, the smaller first; none where they are the line's."""
    small = {text: p for text, p in points.items() if read_name(text)[2] <= threads}
    each = sorted({read_name(text)[2] / threads for text in small})
    drawn: list[Few] = []
    for own, below in zip(each, [*each[1:], *(2.0 * last for last in each[-1:])], strict=True):
        here = {text: p for text, p in small.items() if read_name(text)[2] / threads == own}
        channels, sizes = _channels_and_sizes(here, itemsize)
        priced = _priced(here)
        tried = [Few(below, 0), *(Few(below, *most) for most in itertools.product(channels, sizes))]

        def key(few: Few, priced: list[Price] = priced) -> tuple[float, int]:
            regret = _regret(priced, replace(line, few=(few,)), threads, itemsize)
            return round(regret, 2), -few.most_channels * (few.most_kb or 0)

        drawn.append(min(tried, key=key))
    # The last ones that are the line's are left to it; the others cannot be, as what is below them is read first.
    while drawn and line == Line(drawn[-1].most_channels, drawn[-1].most_kb):
        drawn.pop()
    return tuple(drawn)


def _channels_and_sizes(points: Mapping[str, Point], itemsize: int) -> tuple[list[int], list[int]]:
    """The channels, and the sizes of a map in KB, that there are points of."""
    return sorted({read_name(text)[0] for text in points}), sorted({_kb(text, itemsize) for text in points})


def _kb(text: str, itemsize: int) -> int:
    channels, size, _ = read_name(text)
    return -(-channels * size * size * itemsize // 1024)


def _inside(text: str, line: Line, threads: int, itemsize: int) -> bool:
    channels, size, batch = read_name(text)
    return not line.beyond(channels, size * size, itemsize, batch, threads)


def _priced(points: Mapping[str, Point]) -> list[Price]:
    return [(text, loss(point), max(0.0, gain(point))) for text, point in points.items()]


def _regret(priced: Iterable[Price], line: Line, threads: int, itemsize: int) -> float:
    return sum(taken if _inside(text, line, threads, itemsize) else left for text, taken, left in priced)


def _why(points: Mapping[str, Point], line: Line, threads: int, itemsize: int) -> str:
    """How many points there are on either side of a line, and how much faster resident was there."""
    parts = []
    for side, wanted in (("within", True), ("beyond", False)):
        ratios = sorted(math.exp(gain(p)) for t, p in points.items() if _inside(t, line, threads, itemsize) == wanted)
        if ratios:
            middle = ratios[len(ratios) // 2]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {middle:.2f}"
            parts.append(f"{side}, {sum(r > 1 for r in ratios)} of {len(ratios)} points faster ({spread})")
    return "; ".join(parts)


def rule_of(points: Mapping[str, Mapping[str, Point]], threads: int) -> dict[str, Line]:
    """A line for every group that has points."""
    return {
        group: draw(found, threads, 8 if group.endswith("float64") else 4) for group, found in points.items() if found
    }


def with_older(points: Points, before: Mapping[str, Any], threads: int) -> tuple[Points, int]:
    """The points, with those of an earlier file of shapes that were not measured now; and how many these are.

    What a run has no time for so stays known from the last one that had, if it had as many threads.
    """
    kept = before["points"] if before.get("measured_on", {}).get("threads") == threads else {}
    joined: Points = {line: dict(found) for line, found in points.items()}
    count = 0
    for line, found in kept.items():
        measured = {read_name(text)[:2] for text in points.get(line, {})}
        older = {text: point for text, point in found.items() if read_name(text)[:2] not in measured}
        joined.setdefault(line, {}).update(older)
        count += len(older)
    return joined, count


def write(path: Path, points: Points, left_out: Sequence[str], threads: int) -> dict[str, Line]:
    """Write the rule, what it was measured on and the points, those of the file before it included."""
    cpu = torch.device("cpu")
    before = json.loads(path.read_text()) if path.exists() else {}
    points, older = with_older(points, before, threads)
    measured_on = before.get("measured_on", {})
    since = measured_on.get("since", measured_on.get("date"))  # of the oldest, a file's older ones included
    lines = rule_of(points, threads)
    content: dict[str, Any] = {
        "about": "written by python -m benchmarks.choose; ratios are staged's time, or the reference's where auto does "
        "not take staged, to resident's: median, p20, p80",
        "measured_on": {
            "kind": rule.cpu_kind(),
            "device": header.device_name(cpu),
            "threads": threads,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": header.commit(),
            **{key: value for key, value in header.versions().items() if key in ("python", "torch")},
            **({"older_points": older, "since": since} if older else {}),
        },
        "rule": rule.as_json(lines),
        "left_out": list(left_out),
        "points": points,
    }
    text = json.dumps(content, indent=1)
    # A point is one line.
    for point in [point for found in points.values() for point in found.values()]:
        text = text.replace(json.dumps(point, indent=1).replace("\n", "\n   "), json.dumps(point))
    path.write_text(text + "\n")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 where an engine was not equal or failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start nothing later")
    parser.add_argument("--groups", nargs="*", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=rule.path_of(rule.cpu_kind()))
    arguments = parser.parse_args(argv)
    start, threads = time.monotonic(), torch.get_num_threads()
    points: Points = {}
    left_out: list[str] = []
    failed: set[str] = set()
    for group, dtype, channels, size in plan(arguments.groups, arguments.dtypes):
        line, what = f"{group} {dtype}", f"{group} {dtype} {channels}@{size}"
        reason = ""
        if time.monotonic() - start > 60 * arguments.minutes:
            reason = "out of time"
        elif beyond_a_loss(points.get(line, {}), channels, size, threads):
            reason = "beyond a loss"
        else:
            found, reason = measure(group, dtype, channels, size, threads)
            points.setdefault(line, {}).update(found)
            for text, point in found.items():
                ratios = ", ".join(f"{mode} {v[0]:.2f} ({v[1]:.2f}-{v[2]:.2f})" for mode, v in point.items())
                print(f"{line} {text}: {ratios}", flush=True)
            if reason.startswith(FAULTS):
                failed.add(what)
                print(f"{what}: {reason}", flush=True)
        if reason:
            left_out.append(f"{what}: {reason}")
    lines = write(arguments.out, points, left_out, threads)
    print(f"\n{len(left_out)} shapes left out; {time.monotonic() - start:.0f} s; written to {arguments.out}")
    for line, bounds in lines.items():
        print(f"{line:<26}{bounds.describe()}: {bounds.why}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
