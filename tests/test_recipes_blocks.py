"""Fused blocks and reference blocks give the same table of a recipe, within what seeds change."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from fastode.recipes import RECIPES, Plan, Table, run, small_digits
from fastode.recipes.measures import Attacked, Clean
from fastode.recipes.tables import values_of

RECIPE = RECIPES["004-table1"]
MEASURES = (Clean(), Attacked("FGSM", "fgsm", {"eps": 0.04}))  # at the recipe's radius nothing is left so early


def shorter(plan: Plan) -> Plan:
    """One network of the quick size, on fewer images."""
    networks = tuple(network for network in plan.networks if network.name == "SSP-3")
    training = replace(plan.training, epochs=4, batch=16, images=500)
    return replace(plan, networks=networks, training=training, tables=(Table("Table 1", "", MEASURES),), images=200)


def test_fused_and_reference_blocks_give_the_same_table_within_seed_noise(tmp_path: Path) -> None:
    plan, images = shorter(RECIPE.plan(False, False)), small_digits()
    assert (plan.seeds, len(plan.networks)) == (3, 1)
    found = [
        run(RECIPE, tmp_path / str(fused), images=images, plan=plan, fused=fused, say=lambda line: None)
        for fused in (True, False)
    ]
    for column in plan.tables[0].columns:
        one, other = ([float(value) for value in values_of(each, "SSP-3", column)] for each in found)
        doubt = 2 * ((statistics.variance(one) + statistics.variance(other)) / plan.seeds) ** 0.5
        assert abs(statistics.fmean(one) - statistics.fmean(other)) <= doubt, (column, one, other)
        assert column != "natural" or min(*one, *other) > 50, f"it has not learned: {one}, {other}"
