"""Equality by the one rule or, where a few runs of the reference do not show its rounding, by the second judgement."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from benchmarks import rejudge
from fastode.testing import Judge
from fastode.testing.compare import most_of


def assert_equal_by_either(
    plain: nn.Module, twins: Sequence[nn.Module], x: Tensor, modes: Sequence[Any], *, by_error: bool = False
) -> None:
    """`rejudge` says what the second judgement is: `fuzz` takes it, too, because what draws or CPUs decide is rounding.

    Args:
        plain: the reference.
        twins: its twins.
        x: the input.
        modes: as `assert_blocks_equal` takes them.
        by_error: whether steps follow their error.
    """
    judge = Judge(plain, x, mode=most_of(modes))
    for twin, mode in itertools.product(twins, modes):
        comparison = rejudge.compare_by_either(judge, plain, twin, mode, None, by_error=by_error)
        assert comparison.ok, f"{mode} by {getattr(twin, 'engine', '')}\n{comparison.describe()}"
