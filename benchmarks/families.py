"""All workloads: a family is one module with a function `workloads`, and a line here."""

from __future__ import annotations

from . import bench_conv, bench_ie, bench_nets, bench_rk, bench_skew, bench_solve
from .workloads import Workload

FAMILIES = (bench_ie, bench_rk, bench_skew, bench_solve, bench_conv, bench_nets)


def everything() -> list[Workload]:
    """Every workload of every family, in the table's order."""
    return [workload for family in FAMILIES for workload in family.workloads()]
