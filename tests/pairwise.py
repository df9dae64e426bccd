"""A small covering design: every pair of values of every two factors occurs in some case."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Designs of these seeds; one covers every pair as well, and is enough where a test is slow (make sanitize).
SEEDS = (1,) if os.environ.get("FASTODE_ONE_DESIGN") else (1, 2)

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
Partners = dict[tuple[str, Any], set[tuple[str, Any]]]  # of a factor's value those that it has not met yet


def design_factors(factors: Mapping[str, Sequence[Any]], seed: int) -> dict[str, Sequence[Any]]:
    """The factors of one of the designs in `SEEDS`, which share the activations out: all of them in both would
    be half as many cases again.
    """
    left_out = {1: ("gelu", "gelu_tanh", "sigmoid"), 2: ("relu_inplace", "tanh", "softplus", "silu")}[seed]
    return {**factors, "activation": [each for each in factors["activation"] if each not in left_out]}


def pairs_of(case: Mapping[str, Any]) -> set[Pair]:
    """Every pair of (factor, value) that a case covers."""
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every pair of values of every two factors."""
    found: set[Pair] = set()
    for first, second in itertools.combinations(sorted(factors), 2):
        found.update(((first, a), (second, b)) for a in factors[first] for b in factors[second])
    return found


def covering(
    factors: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    possible: Callable[[Case], bool] = lambda case: True,
    candidates: int = 12,
) -> list[Case]:
    """Greedy pairwise cases: each is the best of some candidates grown around a pair that is still missing.

    Args:
        factors: the values of each factor, hashable.
        seed: of the tie-breaking; the same seed gives the same cases.
        possible: refuses complete cases that cannot be built; pairs that occur only in such cases are left out.
        candidates: how many cases are grown for each one kept.

    Returns:
        The cases, in the order they were found.
    """
    generator = random.Random(seed)
    missing = sorted(all_pairs(factors), key=repr)
    generator.shuffle(missing)
    uncovered = dict.fromkeys(missing)
    partners: Partners = {}
    for one, other in missing:
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)
    cases: list[Case] = []
    while uncovered:
        wanted = next(iter(uncovered))
        grown = (_grow(factors, wanted, partners, generator) for _ in range(candidates))
        best = max((c for c in grown if possible(c)), key=lambda c: _gain(c, uncovered), default=None)
        if best is None:
            best = _search(factors, wanted, possible, generator)
        for pair in [wanted] if best is None else pairs_of(best):
            if pair in uncovered:
                del uncovered[pair]
                partners[pair[0]].remove(pair[1])
                partners[pair[1]].remove(pair[0])
        if best is None:
            continue
        cases.append({name: best[name] for name in factors})
    return cases


def _gain(case: Case, uncovered: Mapping[Pair, None]) -> int:
    return sum(pair in uncovered for pair in pairs_of(case))


def _grow(factors: Mapping[str, Sequence[Any]], wanted: Pair, partners: Partners, generator: random.Random) -> Case:
    case: Case = dict(wanted)
    names = [name for name in factors if name not in case]
    generator.shuffle(names)
    for name in names:
        values = list(factors[name])
        generator.shuffle(values)
        held = case.items()
        case[name] = max(values, key=lambda value: len(held & partners.get((name, value), ())))
    return case


def _search(
    factors: Mapping[str, Sequence[Any]], wanted: Pair, possible: Callable[[Case], bool], generator: random.Random
) -> Case | None:
    """Any possible case that holds the wanted pair, by trial; None when 300 random ones are all impossible."""
    for _ in range(300):
        case = {name: generator.choice(list(values)) for name, values in factors.items()} | dict(wanted)
        if possible(case):
            return case
    return None
