"""Equality by the one rule or, where a few runs of the reference do not show its rounding, by the second judgement."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks import rejudge
from fastode.testing import Judge


def assert_equal_by_either(plain: nn.Module, fused: nn.Module, x: Tensor, mode: Any, *, by_error: bool = False) -> None:
    """`rejudge` says what the second judgement is: `fuzz` takes it, too, because what draws or CPUs decide is rounding.

    Args:
        plain: the reference.
        fused: its twin.
        x: the input.
        mode: as `compare_blocks` takes it.
        by_error: whether steps follow their error.
    """
    comparison = rejudge.compare_by_either(Judge(plain, x, mode=mode), plain, fused, mode, None, by_error=by_error)
    assert comparison.ok, comparison.describe()
