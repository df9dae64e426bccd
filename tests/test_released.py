"""`fastode.released` against networks written from what the released codes compute, under random state_dicts."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from released_cases import CASES, FEW, WITH_STATISTICS, assert_equal, images, our_network, run, their_network
from torch import nn

import fastode
from fastode import nets, reference, released
from fastode.released.names import to_theirs


def is_overwritten(name: str) -> bool:
    """Whether their code overwrites a tensor before it looks at it, or counts its calls with it."""
    return name.endswith(".nfe") or ("_d." in name and not re.search(r"\d+\.\d+\.[68]\.", name))


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in CASES), *((name, False) for name in WITH_STATISTICS)]
)
def test_their_state_dict_loads_and_forward_gradients_and_buffers_are_theirs(name: str, training: bool) -> None:
    theirs, ours = their_network(name).train(training), our_network(name).train(training)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    x = images(name)
    (y, x_bar), (wanted, wanted_bar) = run(ours, x), run(theirs, x)
    assert_equal(y, wanted, "the output")
    assert_equal(x_bar, wanted_bar, "the image's gradient")

    own = ours.state_dict(keep_vars=True)
    gradients = {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in own.items()}
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    largest = max(p.grad.abs().max().item() for p in parameters.values() if p.grad is not None)
    compared = set()
    for pair in ours.released_pairs(own):
        if pair.is_read and pair.theirs in parameters and not any("inner" in key for key in pair.ours):
            grad = parameters[pair.theirs].grad
            assert grad is not None
            assert_equal(to_theirs(pair, gradients), grad, pair.theirs, largest)
            compared.add(pair.theirs)
    assert {n for n, p in parameters.items() if p.grad is not None} <= compared

    back = released.state_dict(ours)
    for key, value in theirs.state_dict().items():
        if not is_overwritten(key) and not ("_d." in key and "paper" in name):
            assert_equal(back[key].double(), value.double(), key)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_to_ours_and_back(name: str) -> None:
    theirs, ours = their_network(name), our_network(name)
    wanted = theirs.state_dict()
    ours.load_state_dict(wanted)
    back = released.state_dict(ours)
    assert set(back) == set(wanted)
    for key, value in wanted.items():
        assert back[key].shape == value.shape, key
        if is_overwritten(key) or ("_d." in key and "paper" in name):
            source = re.sub(r"_d((?:\.\d)?)\.\d+\.(\d\.)", r"_d\1.\2", key).replace("_d.", ".")
            expected = torch.zeros_like(value) if key.endswith(".nfe") else wanted[source]
        else:
            expected = value
        assert torch.equal(back[key], expected), key
    theirs.load_state_dict(back)  # strict
    again = our_network(name)
    again.load_state_dict(ours.state_dict())  # our own names load as ever
    assert all(torch.equal(t, ours.state_dict()[key]) for key, t in again.state_dict().items())


@pytest.mark.parametrize("block", ["res", "ssp2", "ssp3", "midpoint", "adap"])
def test_the_papers_sspnet_is_the_one_of_nets(block: str) -> None:
    x = images("sspnet res").float()
    ours, wanted = released.sspnet(block, 1, width=4, follow="paper"), nets.sspnet(block, 1, width=4)
    ours.load_state_dict(wanted.state_dict())
    assert torch.equal(ours(x), wanted(x))
    assert all(torch.equal(t, wanted.state_dict()[key]) for key, t in ours.state_dict().items())


@pytest.mark.parametrize("name", ["ie_resnet18", "ie_resnet50", "sspnet midpoint"])
def test_code_and_paper_differ(name: str) -> None:
    function, _, _, arguments = CASES[name]
    state_dict = their_network(name).state_dict()
    outputs = []
    for follow in ("code", "paper"):
        model = getattr(released, function)(**{**arguments, "follow": follow}).double()
        model.load_state_dict(state_dict)
        outputs.append(model(images(name)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# What fuse leaves as it is: a head whose two tensors one error judges.
NOT_FUSED = {"sonet": ["head"]}


@pytest.mark.parametrize("name", FEW)
def test_fused_they_compute_the_same(name: str) -> None:
    ours = our_network(name)
    ours.load_state_dict(their_network(name).state_dict())
    plain, x = copy.deepcopy(ours), images(name)
    report = fastode.fuse(ours)
    assert [row.name for row in report.rows if row.fused is None] == NOT_FUSED.get(name, [])
    # All blocks are known: what is not in the report has no skip.
    blocks = [
        n for n, m in plain.named_modules() if isinstance(m, (reference.ResBlock, reference.IESkip, reference.Ark))
    ]
    assert set(blocks) <= {row.name for row in report.rows}
    (y, x_bar), (wanted, wanted_bar) = run(ours, x), run(plain, x)
    assert_equal(y, wanted, "the output")
    assert_equal(x_bar, wanted_bar, "the image's gradient")
    parameters = dict(plain.named_parameters())
    largest = max(p.grad.abs().max().item() for p in parameters.values() if p.grad is not None)
    for key, parameter in ours.named_parameters():
        grad = parameters[key].grad
        assert (parameter.grad is None) == (grad is None), key
        if grad is not None and parameter.grad is not None:
            assert_equal(parameter.grad, grad, key, largest)
    for key, value in released.state_dict(ours).items():
        assert_equal(value.double(), released.state_dict(plain)[key].double(), key)
    ours.load_state_dict(their_network(name).state_dict())  # fused, too
    fastode.unfuse(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["ie_resnet18", "ie_resnet50", "sspnet adap"])
def test_without_gradients_they_compute_the_same(name: str) -> None:
    model = our_network(name).eval()
    model.load_state_dict(their_network(name).state_dict())
    wanted = model(images(name)).detach()
    for fused in (False, True):
        if fused:
            fastode.fuse(model)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert_equal(model(images(name)), wanted, mode.__name__)
        model.requires_grad_(False)
        assert_equal(model(images(name)), wanted, "frozen")


@pytest.mark.parametrize("name", ["ie_resnet18", "sspnet adap", "sonet"])
def test_they_are_copied_and_pickled(name: str) -> None:
    model = our_network(name)
    x = images(name)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(their_network(name).state_dict())
        copied = our_network(name)
        copied.load_state_dict(again.state_dict())
        assert torch.equal(again(x), copied(x))
        assert all(torch.equal(t, again.state_dict()[key]) for key, t in copied.state_dict().items())  # hooks, too
    assert type(model[:2]) is nn.Sequential


def test_own_layers_of_the_inner_steps_are_trained_by_nothing() -> None:
    model = our_network("ie_resnet50")
    inner = [p for n, p in model.named_parameters() if ".inner." in n]
    assert len(inner) == 2 * 12 * 3  # of each step of each block: a norm's weight and bias, and a convolution's weight
    assert not any(p.requires_grad for p in inner)
