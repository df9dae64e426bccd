"""What a fused network calls beside its fused calls: one convolution as a stem, and the norms' statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from called import Names
from torch import nn

import fastode
from fastode import nets

HEAD = {"resident_head_forward": 1}
STATISTICS = {"_foreach_add_", "_foreach_lerp_", "_foreach_mul", "split_with_sizes", "unbind", "view"}
ALLOCATION = {"empty_like", "detach"}

# A network, its fused calls but for the head's, and what it has beside them: a convolution, or norm and activation,
# that stand alone.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], dict[str, int]]] = {
    "ie_resnet18": (
        partial(nets.ie_resnet18, width=16),
        {"resident_ie_forward": 5, "resident_chain_forward": 3},
        {"convolution": 1, "native_group_norm": 1, "relu": 1},
    ),
    "resnet10": (partial(nets.resnet10, width=32), {"resident_chain_forward": 5}, {}),
    "sspnet": (
        partial(nets.sspnet, "ssp3", n=2),
        {"resident_rk_forward": 6, "resident_chain_forward": 2},
        {"convolution": 1},
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_but_the_ends_of_a_network_is_fused(name: str, training: bool) -> None:
    make, fused_calls, alone = NETWORKS[name]
    model = make().train(training)
    fastode.fuse(model)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        model(x)  # a first call of a process makes the schemes' tables
    with Names() as names, torch.set_grad_enabled(training):
        model(x)
    found = {call: count for call, count in names.called.items() if call not in ALLOCATION}
    if training:  # how often they are called is the norms' own affair
        found = {call: count for call, count in found.items() if call not in STATISTICS}
    assert found == fused_calls | alone | HEAD
