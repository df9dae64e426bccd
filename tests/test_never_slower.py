"""Where something of ours is slower "auto" leaves it, as far as the records say: over the rule's points, and networks.

A line of the rule has the least regret over its points (benchmarks/choose.py), and a few bounds for each kind of batch:
a point may be on the wrong side of it. What is held here is that none within is clearly slower in any mode, and that no
other value of a bound would put a point right at a lower cost.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.choose import read_name
from benchmarks.header import RESULTS
from fastode.ops.resident import bfloat16
from fastode.ops.resident import rule as measured
from fastode.ops.resident.rule import Few, Line

Points = Mapping[str, Mapping[str, list[float]]]
CLEARLY = 0.95  # a ratio below it, or above its inverse, is told from 1 by the five rounds of a point
LEAST = 0.93  # of any mode of a point within
SLOWER = 8  # times what is gained counts what is clearly lost
UNFIT = 10.0  # what a point below LEAST costs
ROUNDED = 0.01  # regrets are compared to hundredths


class Group:
    """The points of a line, and the line."""

    def __init__(self, name: str, points: Points, line: Line, threads: int) -> None:
        self.name, self.line, self.threads = name, line, threads
        self.itemsize = 8 if name.endswith("float64") else 4
        self.ratios = {at: [mode[0] for mode in point.values()] for at, point in points.items()}
        # The mean over the modes, in logarithms: a gain above 0 is a faster resident.
        self.gains = {at: sum(map(math.log, ratios)) / len(ratios) for at, ratios in self.ratios.items()}
        self.costs = {at: (self._left(at), self._taken(at)) for at in points}
        self.small = {at for at in points if read_name(at)[2] <= threads}
        self.full = set(points) - self.small or set(points)
        self._tried: dict[int, list[tuple[Line, set[str], float]]] = {}

    def takes(self, at: str, line: Line) -> bool:
        channels, size, batch = read_name(at)
        return not line.beyond(channels, size * size, self.itemsize, batch, self.threads)

    def _left(self, at: str) -> float:
        return max(0.0, self.gains[at])

    def _taken(self, at: str) -> float:
        if min(self.ratios[at]) < LEAST:
            return UNFIT
        lost = [max(0.0, -math.log(ratio)) for ratio in self.ratios[at]]
        return sum(each + (SLOWER - 1) * max(0.0, each + math.log(CLEARLY)) for each in lost) / len(lost)

    def taken(self, line: Line, over: Iterable[str]) -> tuple[set[str], float]:
        """The points that a line takes, and its regret."""
        found = {at for at in over if self.takes(at, line)}
        return found, sum(self.costs[at][at in found] for at in over)

    def beside(self, at: str) -> set[str]:
        """The points that the bounds of this one are drawn from."""
        if at in self.full:
            return self.full
        return {each for each in self.small if read_name(each)[2] == read_name(at)[2]}

    def others(self, at: str) -> Iterator[Line]:
        """The line with another value of a bound that is drawn from points like this one."""
        shapes = [read_name(each) for each in self.beside(at)]
        channels, sizes = {c for c, _, _ in shapes}, {-(-c * s * s * self.itemsize // 1024) for c, s, _ in shapes}
        if at in self.full:
            values: dict[str, set[Any]] = {
                "most_channels": {0} | channels,
                "most_kb": {0} | sizes,
                "least_pixels": {None} | {s * s for _, s, _ in shapes},
                "least_channels": {None} | channels,
            }
            if self.line.small_channels is not None:
                values |= {"small_channels": channels, "small_kb": sizes}
            for name, found in values.items():
                yield from (dataclasses.replace(self.line, **{name: value}) for value in found)
            return
        _, _, batch = read_name(at)
        few = next((few for few in self.line.few if batch < few.below * self.threads), None)
        below = few.below if few else batch / self.threads * 1.01
        rest = tuple(each for each in self.line.few if each is not few)
        for most in [(0, None), *itertools.product(channels, sizes)]:
            changed = sorted((*rest, Few(below, *most)), key=lambda each: each.below)
            yield dataclasses.replace(self.line, few=tuple(changed))

    def tried(self, at: str) -> list[tuple[Line, set[str], float]]:
        """`others`, with what they take of the points beside this one, and their regret; the same for all of these."""
        key = 0 if at in self.full else read_name(at)[2]
        if key not in self._tried:
            over = self.beside(at)
            self._tried[key] = [(line, *self.taken(line, over)) for line in self.others(at)]
        return self._tried[key]

    def wrong(self) -> Iterator[str]:
        """The points on the wrong side of the line that another value of a bound would put right at a lower cost."""
        for at, gain in self.gains.items():
            takes = self.takes(at, self.line)
            if min(self.ratios[at]) >= CLEARLY if takes else gain <= -math.log(CLEARLY):
                continue
            _, now = self.taken(self.line, self.beside(at))
            for other, taken, regret in self.tried(at):
                if (at in taken) != takes and regret < now - ROUNDED:
                    side = "within" if takes else "beyond"
                    yield f"{self.name} {at}: {math.exp(gain):.2f}, {side}, and {other.describe()} would cost less"
                    break

    def faults(self) -> list[str]:
        """What of the line does not hold: points on the wrong side at no gain, and that it loses."""
        within = [gain for at, gain in self.gains.items() if at in self.full and self.takes(at, self.line)]
        return [*self.wrong(), *([f"{self.name}: what is within is slower"] if sum(within) < 0 else [])]


def groups(content: Mapping[str, Any]) -> list[Group]:
    threads, points = content["measured_on"]["threads"], content["points"]
    return [Group(name, points[name], line, threads) for name, line in measured.from_json(content["rule"]).items()]


def faults(content: Mapping[str, Any]) -> list[str]:
    """What of a rule does not hold: of its lines, and points without a line."""
    return [fault for group in groups(content) for fault in group.faults()] + [
        f"{name}: no line" for name, points in content["points"].items() if points and name not in content["rule"]
    ]


@pytest.fixture(params=sorted(measured.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A rule in the package, of one kind of CPU."""
    found: dict[str, Any] = json.loads(request.param.read_text())
    assert sum(map(len, found["points"].values())) > 100
    return found


def test_auto_leaves_the_resident_engine_where_it_was_slower(recorded: dict[str, Any]) -> None:
    assert faults(recorded) == []
    taken = {
        f"{group.name} {at}": ratios
        for group in groups(recorded)
        for at, ratios in group.ratios.items()
        if group.takes(at, group.line)
    }
    assert {at: ratios for at, ratios in taken.items() if min(ratios) < LEAST} == {}
    assert sum(min(ratios) < CLEARLY for ratios in taken.values()) <= 0.01 * len(taken)
    faster = {
        f"{group.name} {at}" for group in groups(recorded) for at, ratios in group.ratios.items() if min(ratios) >= 1
    }
    assert len(faster) > 100 and len(faster & taken.keys()) > 0.9 * len(faster)


def test_bounds_of_bfloat16_chains_hold_over_the_points_of_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no lines of the rule, because they know of autocast; its points hold them all the same."""
    content = json.loads(measured.path_of("x86_64 avx2 avx512f avx512_bf16").read_text())
    threads = content["measured_on"]["threads"]
    for name, value in (("_tiles", False), ("_products", True), ("threads", lambda: threads)):
        monkeypatch.setattr(measured, name, value)
    taken, left = [], []
    for norms in measured.NORMS:
        for at, point in content["points"][f"chain {norms} bfloat16"].items():
            channels, size, batch = read_name(at)
            x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta")
            x = x.to(memory_format=torch.channels_last)
            uneven = 0 if bfloat16.fills_tiles(size) else channels
            known = bfloat16.OneEvaluation(channels, channels, size * size, uneven, coupled=norms == "batch")
            reason = bfloat16.slower_chain(x, known)
            (left if reason else taken).append(min(mode[0] for mode in point.values()))
    assert len(taken) > 30 and min(taken) >= LEAST and max(taken) > 1.5
    assert sum(ratio < CLEARLY for ratio in taken) <= 0.03 * len(taken)
    assert sum(ratio < CLEARLY for ratio in left) > 0.6 * len(left)


def _bounded(line: dict[str, Any]) -> dict[str, Any]:
    return {"most_channels": 0}


def _unbounded(line: dict[str, Any]) -> dict[str, Any]:
    return {}


def _narrower(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"most_channels": 16} | {name: 16 for name in line if name == "small_channels"}


@pytest.mark.parametrize("change", [_bounded, _unbounded, _narrower])
def test_a_rule_with_other_bounds_is_refused(change: Callable[..., dict[str, Any]], recorded: dict[str, Any]) -> None:
    changed = recorded | {"rule": {name: change(line) for name, line in recorded["rule"].items()}}
    refused = [bool(group.faults()) for group in groups(changed)]
    assert len(refused) == len(recorded["rule"]) and sum(refused) >= len(refused) // 2
    assert all(refused) or change is _unbounded  # some have nothing beyond their bounds


def test_points_that_have_become_slower_are_found(recorded: dict[str, Any]) -> None:
    slower = copy.deepcopy(recorded)
    for group in groups(recorded):
        widest = max(read_name(at)[0] for at in group.full if group.takes(at, group.line))
        for at in group.full:
            if read_name(at)[0] == widest:
                slower["points"][group.name][at] = {"train": [0.5, 0.5, 0.5], "forward": [0.5, 0.5, 0.5]}
    found = faults(slower)
    for name in recorded["rule"]:
        assert any(fault.startswith(f"{name} ") or fault.startswith(f"{name}:") for fault in found), name
    del recorded["rule"]["ie sample float32"]
    assert faults(recorded) == ["ie sample float32: no line"]


def slower_networks(records: Iterable[dict[str, Any]]) -> list[str]:
    """The recorded networks that were slower fused, with the engines left to "auto", than the better eager layout.

    A ratio is held to the two digits with which it is published.
    """
    found = []
    for record in records:
        for row in record["rows"]:
            ours = (row["workload"], row["contender"], row["engine"]) in {
                (i, "fused", "auto") for i in ("nets", "networks")
            }
            ratio = row.get("ratio_to_better_eager")
            if ours and (row["errors"] or ratio is None or round(ratio["median"], 2) < 1):
                found.append(f"{row['variant']} {row['mode']} {row['dtype']}: {row['errors'] or ratio}")
    return found


def records_of_networks() -> list[dict[str, Any]]:
    found = []
    for path in sorted(RESULTS.glob("*/*.json")):
        record = json.loads(path.read_text())
        rows = record.get("rows") if isinstance(record, dict) else None
        if isinstance(rows, list) and any(row.get("workload") in ("nets", "networks") for row in rows):
            found.append(record)
    return found


def test_no_recorded_network_is_slower_fused() -> None:
    records = records_of_networks()
    assert len(records) >= 4 and slower_networks(records) == []


def test_a_network_that_is_slower_is_found() -> None:
    for record in records_of_networks():
        row = next(row for row in record["rows"] if row["contender"] == "fused")
        for change in (
            {"ratio_to_better_eager": row["ratio_to_better_eager"] | {"median": 0.99}},
            {"errors": "not equal"},
        ):
            other = {"rows": [row | change]}
            assert len(slower_networks([other])) == 1 and slower_networks([{"rows": [row]}]) == []
