"""The names of `fastode.released`: what loads, what is refused in which words, and the tables."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from released_cases import CASES, images, our_network, their_network
from torch import nn

from fastode import released
from fastode.released.names import Table, pairs
from fastode.released.tables import TABLES


def loading_error(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state_dict)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Error(s) in loading state_dict for ")
    return [line.strip() for line in lines[1:]]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ie_resnet18", "conv4.2.weight"),
        ("ie_resnet34", "conv3.1.0.bias"),
        ("ie_resnet50", "conv5_d.2.1.8.weight"),
        ("sspnet adap", "block1.1.b10"),
        ("sonet", "linear.odefunc.bias"),
        ("sonet", "linear.odefunc.weight"),
        ("sonet", "layer2.0.odefunc.kernel"),
        ("odenet", "conv.1.ode_conv.odefunc.conv2._layer.weight"),
        ("resnet10", "bn1.running_var"),
    ],
)
def test_errors_name_their_key(name: str, key: str) -> None:
    ours, state_dict = our_network(name), dict(their_network(name).state_dict())
    lacking = {k: v for k, v in state_dict.items() if k != key}
    assert loading_error(ours, lacking) == [f'Missing key(s) in state_dict: "{key}".']
    more = {**state_dict, f"{key}.more": torch.zeros(1)}
    assert loading_error(ours, more) == [f'Unexpected key(s) in state_dict: "{key}.more".']
    shape = list(state_dict[key].shape)
    wrong = {**state_dict, key: torch.zeros(*shape, 2)}
    said = f"size mismatch for {key}: the state_dict has the shape {[*shape, 2]}, the network {shape}."
    assert loading_error(ours, wrong) == [said]
    assert loading_error(ours, {**state_dict, key: 3}) == [f"{key} must be a tensor, got 3."]


def test_what_is_missing_stays_and_is_told_where_not_strict() -> None:
    ours, state_dict = our_network("ie_resnet18"), dict(their_network("ie_resnet18").state_dict())
    before = ours.state_dict()["stage2.0.branch.2.weight"].clone()
    del state_dict["conv4.2.weight"]
    state_dict["other"] = torch.zeros(1)
    told = ours.load_state_dict(state_dict, strict=False)
    assert (told.missing_keys, told.unexpected_keys) == (["conv4.2.weight"], ["other"])
    assert torch.equal(ours.state_dict()["stage2.0.branch.2.weight"], before)
    assert torch.equal(ours.state_dict()["stem.0.weight"], state_dict["conv1.0.weight"])


def test_two_names_of_one_tensor_are_one_tensor() -> None:
    ours, state_dict = our_network("sspnet ssp2"), dict(their_network("sspnet ssp2").state_dict())
    first, second = "block2.0.block.conv1.weight", "block2.0.block.residual.2.weight"
    one = {key: value for key, value in state_dict.items() if key != second}
    ours.load_state_dict(one)  # either name is enough
    assert torch.equal(ours.state_dict()["group2.0.branch.2.weight"], state_dict[first])
    assert loading_error(ours, {k: v for k, v in one.items() if k != first}) == [
        f'Missing key(s) in state_dict: "{first}".'
    ]
    state_dict[second] = state_dict[second] + 1
    assert loading_error(ours, state_dict) == [f"{first} and {second} must be one tensor, and they differ."]


def test_copies_are_written_and_not_looked_at() -> None:
    ours, theirs = our_network("ie_resnet18"), their_network("ie_resnet18").state_dict()
    with_more = {**theirs, "conv9_d.4.0.weight": torch.zeros(9)}  # of a network of more steps
    for state_dict in (with_more, {key: value for key, value in theirs.items() if "_d." not in key}):
        assert str(ours.load_state_dict(state_dict)) == "<All keys matched successfully>"
    back = released.state_dict(ours)
    assert back["conv5_d.0.2.weight"].data_ptr() == back["conv5.2.weight"].data_ptr()


def test_a_wrapper_on_either_side_is_seen_through() -> None:
    ours, theirs = our_network("ie_resnet18"), their_network("ie_resnet18").state_dict()
    parallel = {f"module.{key}": value for key, value in theirs.items()}
    ours.load_state_dict(parallel)
    assert torch.equal(ours.head[-1].weight, theirs["fc.weight"])
    del parallel["module.d6.2.weight"]
    assert loading_error(ours, parallel) == ['Missing key(s) in state_dict: "module.d6.2.weight".']
    outer = nn.ModuleDict({"features": nn.Identity(), "network": our_network("ie_resnet18")})
    inner = {f"network.{key}": value for key, value in theirs.items()}
    outer.load_state_dict(inner)
    assert torch.equal(outer["network"].head[-1].weight, theirs["fc.weight"])  # type: ignore[index]
    del inner["network.d6.2.weight"]
    assert loading_error(outer, inner) == ['Missing key(s) in state_dict: "network.d6.2.weight".']


def saved(name: str) -> Any:
    """A checkpoint as their code saves it: through a file, in what it is held in, as DataParallel names it."""
    state_dict = their_network(name).state_dict()
    function = CASES[name][0]
    inside = (TABLES[function] if function in TABLES else TABLES[name.removesuffix(" instance")]).inside
    whole = {f"module.{key}": value for key, value in state_dict.items()}
    file = io.BytesIO()
    torch.save({inside: whole, "epoch": 3} if inside else whole, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_load_makes_the_network_that_a_checkpoint_shows(name: str) -> None:
    function, _, _, arguments = CASES[name]
    shown = {"num_classes", "width", "n", "steps", "blocks"}
    if arguments.get("norm") == "batch":
        shown.add("norm")
    model = released.load(function, saved(name), **{k: v for k, v in arguments.items() if k not in shown})
    wanted = our_network(name)
    wanted.load_state_dict(their_network(name).state_dict())
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    with torch.no_grad():
        assert torch.equal(model.eval()(images(name)), wanted.eval()(images(name)))


def test_load_refuses_in_one_sentence() -> None:
    checkpoint = their_network("sspnet res").state_dict()
    for call, kind, said in (
        (partial(released.load, "resnet", {}), ValueError, "name must be one of 'ie_resnet18', "),
        (partial(released.load, "resnet18", 3), TypeError, "checkpoint must be a state_dict, got 3"),
        (partial(released.load, "sspnet", checkpoint), ValueError, "norm must be given for a checkpoint without "),
        (partial(released.load, "sspnet", checkpoint, norm="none"), ValueError, "norm must be one of 'batch', "),
        (partial(released.load, "sspnet", checkpoint, norm="layer", block="x"), ValueError, "block must be one of "),
        (partial(released.load, "resnet18", checkpoint), RuntimeError, 'Missing key(s) in state_dict: "conv1.0.we'),
        (partial(released.ie_resnet18, follow="both"), ValueError, "follow must be one of 'code', 'paper', got "),
        (partial(released.sspnet_mnist, "midpoint"), ValueError, "block must be one of 'res', 'ssp2', 'ssp3', 'adap'"),
        (partial(released.sonet, (1, 1)), ValueError, "blocks must be four ints >= 1, got 2"),
        (partial(released.resnet10, "1111"), TypeError, "blocks must be four ints >= 1, got '1111'"),
        (partial(released.resnet10, (1, 0, 1, 1)), ValueError, "blocks[1] must be an int >= 1, got 0"),
        (partial(released.state_dict, nn.Identity()), TypeError, "model must be a network made by fastode.released, "),
        (partial(released.ReleasedIESkip, nn.Identity(), own=3), TypeError, "branch must be an nn.Sequential of at "),
    ):
        with pytest.raises(kind, match=re.escape(said)):
            call()


@pytest.mark.parametrize("key", TABLES)
def test_every_row_of_a_table_stands_for_something(key: str) -> None:
    function, _, block = key.partition(" ")
    make = getattr(released, function)
    arguments: dict[str, Any] = {"width": 4, **({"block": block} if block else {})}
    if "resnet10" in key or key == "sonet":
        arguments["blocks"] = (1, 1, 1, 1)
    follows = [{"follow": follow} for follow in ("code", "paper")] if key.startswith("ie") else [{}]
    with torch.device("meta"):
        networks = [make(**arguments, **follow) for follow in follows]
    for network in networks:
        own = network.state_dict()
        assert {n for pair in network.released_pairs(own) if pair.is_read for n in pair.ours} == set(own)
    rows = TABLES[key].rows
    assert [row for row in rows if not any(pairs(Table((row,)), n.state_dict()) for n in networks)] == []
    assert len(set(rows)) == len(rows)
