"""`fastode.released` against networks written from what the released codes compute, under random state_dicts."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from released_codes import IEResNet, PreactResNet, SSPNet, SSPNetMnist
from released_odes import FourLayers, ODENet
from torch import Tensor, nn

import fastode
from fastode import nets, reference, released
from fastode.released.names import Table, pairs, to_theirs
from fastode.released.network import Network
from fastode.released.tables import TABLES

TOLERANCE = 1e-10  # of float64, relative to the largest value
CLASSES = 5

Make = Callable[[], nn.Module]


def case(name: str, theirs: Make, size: int = 8, **arguments: Any) -> tuple[str, Make, int, dict[str, Any]]:
    """A network of `fastode.released`, the independent one, the image's side, and our arguments."""
    return name, theirs, size, {"num_classes": CLASSES, **arguments}


def ie(depth: int, steps: int, theta: float = 1.0, follow: str = "code") -> Any:
    theirs = partial(IEResNet, depth, 4, CLASSES, steps, 0.03, theta, follow)
    arguments = {"width": 4, "steps": steps, "step_size": 0.03, "theta": theta, "follow": follow}
    return case(f"ie_resnet{depth}", theirs, **arguments)


def ssp(block: str, norm: str, *kinds: str) -> Any:
    theirs = partial(SSPNet, kinds or (block,) * 3, 2, 4, norm, CLASSES)
    return case("sspnet", theirs, block=block, n=2, width=4, norm=norm)


def mnist(block: str, kind: str, norm: str) -> Any:
    return case(
        "sspnet_mnist", partial(SSPNetMnist, kind, 2, 4, norm, CLASSES), 16, block=block, n=2, width=4, norm=norm
    )


def layers(name: str, counts: tuple[int, ...], solver: str = "") -> Any:
    theirs = partial(FourLayers, name, counts, 4, CLASSES, solver or "dopri5")
    return case(name, theirs, width=4, blocks=counts, **({"solver": solver} if solver else {}))


CASES = {
    "ie_resnet18": ie(18, 1),
    "ie_resnet18 two steps": ie(18, 2, theta=0.7),
    "ie_resnet18 paper": ie(18, 2, theta=0.7, follow="paper"),
    "ie_resnet34": ie(34, 1),
    "ie_resnet50": ie(50, 2, theta=0.7),
    "ie_resnet50 paper": ie(50, 1, follow="paper"),
    "resnet18": case("resnet18", partial(PreactResNet, 18, 4, CLASSES), width=4),
    "resnet34": case("resnet34", partial(PreactResNet, 34, 4, CLASSES), width=4),
    "resnet50": case("resnet50", partial(PreactResNet, 50, 4, CLASSES), width=4),
    "sspnet res": ssp("res", "layer"),
    "sspnet midpoint": ssp("midpoint", "batch"),
    "sspnet ssp2": ssp("ssp2", "batch"),
    "sspnet ssp3": ssp("ssp3", "group"),
    "sspnet adap": ssp("adap", "batch", "ark", "res", "ssp2"),
    "sspnet adap instance": ssp("adap", "instance", "ark", "res", "ssp2"),
    "sspnet_mnist res": mnist("res", "res", "batch"),
    "sspnet_mnist ssp3": mnist("ssp3", "ssp3", "batch"),
    "sspnet_mnist ssp2": mnist("ssp2", "ssp2", "instance"),
    "sspnet_mnist adap": mnist("adap", "ark", "batch"),
    "sonet": layers("sonet", (1, 1, 1, 1), "dopri5"),
    "sonet two blocks": layers("sonet", (2, 1, 1, 2), "rk4"),
    "soblock_resnet10": layers("soblock_resnet10", (1, 1, 1, 1), "bosh3"),
    "resnet10": layers("resnet10", (2, 1, 1, 1)),
    "odenet": case("odenet", partial(ODENet, 2, 4, CLASSES, "dopri5"), width=4, blocks=2, solver="dopri5"),
}
# What moves running statistics, where training and evaluation differ.
WITH_STATISTICS = ("sspnet midpoint", "sspnet adap", "sspnet_mnist adap", "resnet10", "soblock_resnet10")
FEW = (
    "ie_resnet18",
    "ie_resnet50",
    "sspnet midpoint",
    "sspnet adap",
    "sspnet_mnist adap",
    "sonet",
    "resnet10",
    "odenet",
)


def draw(model: nn.Module, seed: int = 0) -> None:
    """Random parameters and buffers, of a size that lets every layer count."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() > 1:
                tensor.copy_(drawn / tensor[0].numel() ** 0.5)
            elif name.endswith("bias") or name.endswith("running_mean"):
                tensor.copy_(0.2 * drawn)
            else:
                tensor.copy_(0.5 + drawn.abs() / 2)


def their_network(name: str) -> nn.Module:
    theirs = CASES[name][1]().double()
    draw(theirs)
    return theirs


def our_network(name: str) -> Network:
    function, _, _, arguments = CASES[name]
    return getattr(released, function)(**arguments).double()


def images(name: str) -> Tensor:
    function, _, size, _ = CASES[name]
    channels = 1 if "mnist" in function else 3
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient at the image; the parameters' are accumulated."""
    x = x.clone().requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_equal(found: Tensor, wanted: Tensor, what: str, scale: float = 0.0) -> None:
    scale = scale or max(wanted.abs().max().item(), 1e-3)
    worst = (found - wanted).abs().max().item()
    assert worst <= TOLERANCE * scale, f"{what} differs by {worst:.1e} of {scale:.1e}"


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


def loading_error(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
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
