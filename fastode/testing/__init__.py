"""The one rule by which a fused block equals its reference; tests and benchmarks both use it and know no other."""

from .compare import (
    MODES,
    Inputs,
    Judge,
    Mode,
    assert_blocks_equal,
    compare_blocks,
    compare_tensors,
)
from .inputs import Layout, moved, sample_input
from .rule import Comparison, Row, Rule, rounding

__all__ = [
    "MODES",
    "Comparison",
    "Inputs",
    "Judge",
    "Layout",
    "Mode",
    "Row",
    "Rule",
    "assert_blocks_equal",
    "compare_blocks",
    "compare_tensors",
    "moved",
    "rounding",
    "sample_input",
]
