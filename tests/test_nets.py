"""The papers' networks: their parameters, depths and shapes follow from the papers, and every one of them trains."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastode
from fastode import nets, reference

BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}

# A small instance of every network, by the function that makes it; each is given width and norm by the tests.
SMALL = {
    "ie_resnet18": functools.partial(nets.ie_resnet18, steps=2, step_size=0.05),
    "ie_resnet34": nets.ie_resnet34,
    "ie_resnet50": functools.partial(nets.ie_resnet50, theta=0.5),
    "ie_resnet18 detached": functools.partial(nets.ie_resnet18, detach=True),
    "resnet18": nets.resnet18,
    "resnet34": nets.resnet34,
    "resnet50": nets.resnet50,
    "sw_resnet58": nets.sw_resnet58,
    "sspnet res": functools.partial(nets.sspnet, "res", n=2),
    "sspnet ssp2": functools.partial(nets.sspnet, "ssp2", n=2),
    "sspnet ssp3": functools.partial(nets.sspnet, "ssp3", n=2),
    "sspnet midpoint": functools.partial(nets.sspnet, "midpoint", n=2),
    "sspnet adap": functools.partial(nets.sspnet, "adap", n=2),
    "sspnet_mnist ssp3": functools.partial(nets.sspnet_mnist, "ssp3", n=2),
    "sspnet_mnist adap": functools.partial(nets.sspnet_mnist, "adap", n=2),
    "resnet56": functools.partial(nets.resnet56, step_size=0.1),
    "polynet": functools.partial(nets.polynet, step_size=0.5),
    "fractalnet": functools.partial(nets.fractalnet, columns=3),
    "revnet": nets.revnet,
    "wide_resnet34_10 ie": functools.partial(nets.wide_resnet34_10, "ie"),
    "wide_resnet34_10 res": functools.partial(nets.wide_resnet34_10, "res"),
    "resnet10": nets.resnet10,
    "sonet": functools.partial(nets.sonet, solver="rk4"),
    "soblock_resnet10": functools.partial(nets.soblock_resnet10, solver="midpoint"),
    "odenet": functools.partial(nets.odenet, blocks=2, solver="midpoint"),
    "neural_ode_mnist": functools.partial(nets.neural_ode_mnist, solver="euler", t1=1.0),
    "neural_ode_cifar": functools.partial(nets.neural_ode_cifar, solver="euler", steps=2, t1=2.0),
}


def small(name, **keywords):
    width = 1 if name.startswith("wide") else 8
    return SMALL[name](**{"width": width, **keywords})


def images(name, batch=2, side=16):
    generator = torch.Generator().manual_seed(0)
    channels = 1 if "mnist" in name else 3
    return torch.rand(batch, channels, side, side, generator=generator)


def parameters(make, **keywords):
    with torch.device("meta"):
        return sum(p.numel() for p in make(**keywords).parameters())


def affine(*channels):
    """Weights and biases of norms with these channels."""
    return 2 * sum(channels)


def linear(features, classes):
    return classes * (features + 1)


def basic_stage(c, o, blocks, shortcut):
    """Norm, 3×3, norm, 3×3 from c to o channels, then blocks - 1 times from o to o; `shortcut` weights to change."""
    return affine(c, o) + 9 * (c + o) * o + shortcut + (blocks - 1) * (affine(o, o) + 18 * o * o)


def preact_resnet(depth, w, kernel, image=3, classes=10):
    """He et al. 2016b with a 3×3 stem, no convolution bias and `kernel`² shortcuts without a norm."""
    total, c = 9 * image * w, w
    for i, blocks in enumerate(BASIC[depth]):
        m = w * 2**i
        if depth == 50:
            o = 4 * m
            total += affine(c, m, m) + c * m + 9 * m * m + m * o + kernel**2 * c * o
            total += (blocks - 1) * (affine(o, m, m) + 2 * o * m + 9 * m * m)
        else:
            o = m
            total += basic_stage(c, o, blocks, kernel**2 * c * o if i > 0 else 0)
        c = o
    return total + affine(c) + linear(c, classes)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_an_ie_resnet_has_exactly_the_resnets_parameters(depth, width, kernel):
    counts = {
        parameters(getattr(nets, f"{kind}resnet{depth}"), width=width, shortcut_kernel=kernel) for kind in ("ie_", "")
    }
    assert counts == {preact_resnet(depth, width, kernel)}


def test_sharing_weights_adds_no_parameter_to_resnet34():
    assert parameters(nets.sw_resnet58, width=16) == preact_resnet(34, 16, 3)


def test_images_and_classes_count_in_stem_and_classifier():
    assert parameters(nets.ie_resnet18, width=8, in_channels=1, num_classes=100) == preact_resnet(18, 8, 3, 1, 100)


@pytest.mark.parametrize("skip", ["ie", "res"])
@pytest.mark.parametrize(("kernel", "count", "millions"), [(3, 48_228_954, 46), (1, 46_160_474, 44)])
def test_wide_resnet34_10_has_the_papers_parameters(skip, kernel, count, millions):
    """46M against 44M in Li et al. 2020, Section 5.4, are units of 2²⁰."""
    widths = (16, 160, 320, 640)
    total = 9 * 3 * 16 + affine(640) + linear(640, 10)
    for c, o in itertools.pairwise(widths):
        total += basic_stage(c, o, 5, kernel**2 * c * o)
    assert total == count
    assert round(count / 2**20) == millions
    assert parameters(nets.wide_resnet34_10, skip=skip, shortcut_kernel=kernel) == count


@pytest.mark.parametrize("block", ["res", "ssp2", "ssp3", "midpoint", "adap"])
@pytest.mark.parametrize("n", [6, 10])
def test_an_sspnet_has_resnets_parameters_and_adap_one_more_per_ark_block(block, n):
    """Kim et al. 2020: stages share one F, so only the ArkBlock's learned β₁₀ is new (α₂₁ is fixed)."""

    def keeping(c):
        return affine(c, c) + 2 * (9 * c * c + c)

    def expanding(c, o):
        return affine(c, o, o) + 9 * (c + o) * o + 2 * o + c * o

    total = 9 * 3 * 16 + 16 + linear(64, 10)
    total += n * (keeping(16) + keeping(32) + keeping(64)) + expanding(16, 32) + expanding(32, 64)
    learned = n if block == "adap" else 0
    assert parameters(nets.sspnet, block=block, n=n) == total + learned


@pytest.mark.parametrize("block", ["res", "ssp2", "ssp3", "midpoint", "adap"])
def test_sspnet_mnist_has_one_group_of_64_channels(block):
    stem = (9 + 1) * 64 + 2 * (16 * 64 * 64 + 64) + affine(64, 64)
    group = 6 * (affine(64, 64) + 2 * (9 * 64 * 64 + 64))
    learned = 6 if block == "adap" else 0
    assert parameters(nets.sspnet_mnist, block=block) == stem + group + affine(64) + linear(64, 10) + learned


def test_resnet56_has_the_085_million_parameters_of_its_paper():
    """He et al. 2016a, Table 6; shortcut A has none, and neither has the step size."""
    total = 27 * 16 + affine(16) + linear(64, 10)
    c = 16
    for o in (16, 32, 64):
        total += 9 * c * o + (2 * 9 - 1) * 9 * o * o + 18 * affine(o)
        c = o
    assert round(total / 1e6, 2) == 0.85
    assert parameters(nets.resnet56, step_size=1.0) == parameters(nets.resnet56, step_size=1e-10) == total
    assert parameters(nets.polynet) == total  # both evaluations share F


@pytest.mark.parametrize(("columns", "width"), [(4, 18), (2, 8)])
def test_a_fractalnet_has_two_to_the_columns_units_less_one_in_a_block(columns, width):
    total, c = 0, 3
    for o in (width, 2 * width, 4 * width):
        first = columns  # units that read the block's input, one in each column
        total += 9 * first * c * o + (2**columns - 1 - first) * 9 * o * o + (2**columns - 1) * affine(o)
        c = o
    assert parameters(nets.fractalnet, columns=columns, width=width) == total + linear(c, 10)
    assert (columns, width) != (4, 18) or round((total + linear(c, 10)) / 1e6, 2) == 0.80


def test_revnet_has_four_reversible_blocks_in_a_stage_on_half_the_channels():
    total, c = 27 * 28, 28
    for o in (28, 56, 112):
        total += affine(c, o) + 9 * (c + o) * o + 4 * 2 * (affine(o // 2, o // 2) + 18 * (o // 2) ** 2)
        c = o
    total += affine(c) + linear(c, 10)
    assert parameters(nets.revnet) == total and round(total / 1e6, 2) == 0.82


def resnet10_body(w, classes=10):
    """The four residual blocks and the classifier of Huang et al. 2021, Section 5.1."""
    total, c = 0, w
    for i in range(4):
        o = w * 2**i
        total += 9 * (c + o) * o + affine(o, o) + (c * o + affine(o) if i > 0 else 0)
        c = o
    return total + linear(c, classes)


@pytest.mark.parametrize("width", [32, 64])
def test_resnet10_has_four_blocks_of_two_convolutions(width):
    assert parameters(nets.resnet10, width=width) == 27 * width + affine(width) + resnet10_body(width)


@pytest.mark.parametrize("width", [32, 64])
def test_soblock_resnet10_replaces_the_first_layer_by_a_skew_pair(width):
    """One kernel serves W and Wᵀ; both halves of the pair have a norm before and a norm after."""
    pair = 27 * width + 2 * affine(3, width)
    assert parameters(nets.soblock_resnet10, width=width) == pair + resnet10_body(width)


@pytest.mark.parametrize("width", [32, 64])
def test_sonet_replaces_every_layer_by_a_skew_pair(width):
    """3×3 kernels at stride 1, 4×4 at stride 2, and a classifier whose matrix has no bias."""
    channels = [3, width, width, 2 * width, 4 * width, 8 * width]
    total = 8 * width * 10
    for i, (c, o) in enumerate(itertools.pairwise(channels)):
        total += (9 if i < 2 else 16) * c * o + 2 * affine(c, o)
    assert parameters(nets.sonet, width=width) == total
    # The released classifier has a bias for each of its two sides.
    assert parameters(nets.sonet, width=width, released=True) == total + 8 * width + 10


def time_conv(c):
    """A 3×3 convolution from c channels and the time's."""
    return 9 * (c + 1) * c + c


def test_odenet_has_the_released_layout():
    """Ten blocks norm, conv, norm, conv, norm on 3×3 maps of the time and w channels, and a head on 3×3 positions."""
    w = 64
    block = affine(w, w, w) + 2 * time_conv(w)
    assert parameters(nets.odenet, width=w) == 10 * block + affine(w) + linear(9 * w, 10)
    with torch.device("meta"):
        model = nets.odenet()
    # Beside a counter of evaluations the released field has these.
    released = ["norm1", "conv1._layer", "norm2", "conv2._layer", "norm3"]
    assert list(model.block9.field.state_dict()) == [f"{name}.{end}" for name in released for end in ("weight", "bias")]
    x = torch.rand(1, 2, 4, 4)
    assert torch.equal(nets.odenet(in_channels=2, width=5).copy(x), torch.cat([x, x, x[:, :1]], 1))


@pytest.mark.parametrize(
    ("make", "image", "convs", "w", "t1"),
    [(nets.neural_ode_mnist, 1, 4, 128, 100.0), (nets.neural_ode_cifar, 3, 5, 256, 500.0)],
)
def test_neural_odes_have_table_a1s_layers_channels_and_times(make, image, convs, w, t1):
    stem = 9 * image * w + w + 2 * (16 * w * w + w) + affine(w, w)
    field = convs * (affine(w) + time_conv(w)) + affine(w)
    assert parameters(make) == stem + field + affine(w) + linear(w, 10)
    with torch.device("meta"):
        blocks = [make(width=8).block, make(width=8, t1=2.0).block, make(width=8, solver=fastode.Solver()).block]
    assert [block.settings for block in blocks] == [
        fastode.Solver("dopri5", 1e-3, 1e-3, t1),
        fastode.Solver("dopri5", 1e-3, 1e-3, 2.0),
        fastode.Solver(),
    ]


def layers_run(model, x, shortcuts=False):
    """How many convolutions and linear layers a forward goes through, shortcuts apart."""
    run = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and (shortcuts or "shortcut" not in name):
            module.register_forward_hook(lambda *_: run.append(1))
    model(x)
    return len(run)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("resnet18", 18),
        ("resnet34", 34),
        ("resnet50", 50),
        ("sw_resnet58", 58),
        ("resnet56", 56),
        ("resnet10", 10),
        ("revnet", 56),
    ],
)
def test_a_network_is_as_deep_as_its_name_says(name, depth):
    assert layers_run(small(name), images(name)) == depth


def test_wide_resnet_is_34_convolutions_deep():
    """6 n + 4 counts the three shortcuts that change the shape, and not the classifier."""
    name = "wide_resnet34_10 res"
    assert layers_run(small(name), images(name), shortcuts=True) - 1 == 34


def kinds(model):
    blocks = (reference.ResBlock, reference.IESkip, reference.ShuOsher, reference.Ark, reference.SOBlock)
    return [type(module).__name__ for module in model.modules() if isinstance(module, blocks)]


@pytest.mark.parametrize(
    ("name", "skips", "expansive"),
    [("ie_resnet18", 5, 3), ("ie_resnet34", 13, 3), ("ie_resnet50", 12, 4), ("wide_resnet34_10 ie", 12, 3)],
)
def test_a_block_is_an_ie_skip_wherever_it_keeps_the_shape(name, skips, expansive):
    found = kinds(small(name))
    assert sorted(found) == ["IESkip"] * skips + ["ResBlock"] * expansive
    assert set(kinds(small(name.removeprefix("ie_").replace(" ie", " res")))) == {"ResBlock"}


def test_ie_arguments_reach_every_skip():
    model = nets.ie_resnet34(3, 0.05, theta=0.25, detach=True, width=8)
    skips = [module for module in model.modules() if isinstance(module, reference.IESkip)]
    assert len(skips) == 13
    assert {(s.steps, s.step_size, s.theta, s.detach) for s in skips} == {(3, 0.05, 0.25, True)}


def test_adap_has_groups_ark_res_ssp2():
    model = small("sspnet adap")
    assert [set(kinds(model.get_submodule(f"group{i}"))) for i in (1, 2, 3)] == [{"Ark"}, {"ResBlock"}, {"SSP2"}]


@pytest.mark.parametrize("name", ["sspnet adap", "sspnet_mnist adap"])
def test_adap_learns_b10_and_keeps_a21(name):
    learned = [n.rpartition(".")[2] for n, _ in small(name).named_parameters() if n.endswith(("a21", "b10"))]
    assert learned == ["b10", "b10"]


@pytest.mark.parametrize(("block", "evaluations"), [("res", 1), ("ssp2", 2), ("ssp3", 3), ("midpoint", 2), ("adap", 2)])
def test_the_shared_norm_of_an_expansive_block_is_evaluated_once(block, evaluations):
    model = small(f"sspnet {block}")
    model(images("sspnet"))
    counts = [m.num_batches_tracked.item() for m in model.expand1.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [1, 1, 1]
    counts = [m.num_batches_tracked.item() for m in model.group1.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [evaluations] * 4


@pytest.mark.parametrize("name", ["resnet18", "sspnet res"])
def test_an_expansive_block_forks_after_its_first_norm_and_activation(name):
    model = small(name, norm="layer").double()
    block = model.get_submodule("stage2.0" if name == "resnet18" else "expand1")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1)
        norm = next(m for m in block.modules() if isinstance(m, nn.GroupNorm))
        first, inner, second = (m for m in block.block.branch if not isinstance(m, nn.ReLU))
        fork = F.relu(norm(x))
        wanted = block.block.shortcut(fork) + second(F.relu(inner(first(fork))))
        assert torch.equal(block(x), wanted)


def test_a_repeated_block_of_sw_resnet58_is_its_resnet34_block_twice():
    shared, plain = small("sw_resnet58").double(), small("resnet34").double()
    plain.load_state_dict(shared.state_dict())
    x = images("resnet34").double()
    with torch.no_grad():
        wanted = x
        for name, part in plain.named_children():
            for i, layer in enumerate(part) if name.startswith("stage") else [(0, part)]:
                wanted = layer(wanted)
                if i > 0:
                    wanted = layer(wanted)
        assert torch.equal(shared(x), wanted)


def test_resnet56_takes_steps_of_size_h():
    model = nets.resnet56(0.25, width=8).double()
    steps = [module.step_size for module in model.modules() if isinstance(module, reference.ResBlock)]
    assert steps == [0.25] * 27
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = model.get_submodule("stage2.0")
    with torch.no_grad():
        # Shortcut A: every second pixel, and as many channels of zeros; h F is exact, as h is a power of two.
        wanted = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8)) + 0.25 * step[0].branch(x))
        assert torch.equal(step(x), wanted)


def test_polynet_is_resnet56_with_its_first_block_evaluated_twice():
    model, plain = small("polynet"), nets.resnet56(0.5, width=8)
    model.load_state_dict(plain.state_dict())
    assert kinds(model).count("PolyBlock") == 25 and kinds(model).count("ResBlock") == 2
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    block = model.stage1[0].eval()
    with torch.no_grad():
        f = block[0].branch
        assert torch.allclose(block(x), F.relu(x + 0.5 * f(x) + 0.5 * f(0.5 * f(x))), atol=1e-6)


def test_soblock_resnet10_keeps_all_but_the_first_layer():
    plain, skewed = (
        [n for n, _ in small(name).named_parameters() if "stem" not in n] for name in ("resnet10", "soblock_resnet10")
    )
    assert plain == skewed
    assert kinds(small("soblock_resnet10")) == ["SOBlock"] + ["ResBlock"] * 4


def test_ode_arguments_reach_every_block():
    given = {"gamma": 0.5, "solver": "bosh3", "rtol": 0.2, "atol": 0.3, "t1": 2.0, "steps": 4}
    models = [small("sonet", **given), small("soblock_resnet10", norm="layer", skew_norm="batch", **given)]
    blocks = [module for model in models for module in model.modules() if isinstance(module, reference.SOBlock)]
    assert len(blocks) == 6 + 1
    for block in blocks:
        assert {name: getattr(block.field if name == "gamma" else block, name) for name in given} == given
    assert isinstance(models[1].stem.field.pre_norm_y, nn.BatchNorm2d)
    del given["gamma"]
    whole = fastode.Solver(given["solver"], **{name: given[name] for name in ("rtol", "atol", "t1", "steps")})
    for model in (small("odenet", **given), nets.odenet(width=8, blocks=2, solver=whole)):
        assert [model.block0.settings, model.block1.settings] == [whole, whole]


@pytest.mark.parametrize("name", SMALL)
def test_every_network_trains(name):
    torch.manual_seed(0)
    model = small(name, num_classes=4)
    x, labels = images(name, batch=3), torch.tensor([0, 3, 1])
    logits = model(x)
    assert logits.shape == (3, 4)
    loss = F.cross_entropy(logits, labels)
    assert loss.isfinite()
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert F.cross_entropy(model(x), labels).isfinite()


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
@pytest.mark.parametrize(
    "name",
    ["ie_resnet18", "ie_resnet50", "sspnet adap", "sspnet_mnist ssp3", "resnet56", "sonet", "odenet"],
)
def test_every_norm(name, norm):
    torch.manual_seed(0)
    model = small(name, norm=norm)
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    if norm == "none":
        assert not norms
    elif norm == "batch":
        assert {type(m) for m in norms} == {nn.BatchNorm2d}
    else:
        most = 8 if name in ("sonet", "odenet") else 32
        groups = {"group": lambda c: min(most, c), "layer": lambda c: 1, "instance": lambda c: c}[norm]
        assert {m.num_groups == groups(m.num_channels) for m in norms} == {True}
    # Every norm of the network is of the kind: in training batch norm alone lets the samples see each other.
    x = images(name, batch=3).double()
    model.double()
    apart = (model(x)[:1] - model(x[:1])).abs().max()
    assert (apart > 1e-3) if norm == "batch" else (apart < 1e-10)


@pytest.mark.parametrize("make", [nets.sonet, functools.partial(nets.odenet, blocks=2)])
def test_a_network_runs_its_adaptive_solver(make):
    torch.manual_seed(0)
    model = make(width=4, gradient="exact")
    model(images("sonet", side=8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


EVERY = tuple(getattr(nets, name) for name in nets.__all__)
NORMS = "'batch', 'group', 'layer', 'instance', 'none'"


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
@pytest.mark.parametrize("argument", ["in_channels", "num_classes", "width"])
@pytest.mark.parametrize(
    ("value", "error", "got"), [(0, ValueError, "0"), (2.0, TypeError, "2.0"), (True, TypeError, "True")]
)
def test_sizes_are_positive_ints(make, argument, value, error, got):
    with pytest.raises(error) as raised:
        make(**{argument: value})
    assert str(raised.value) == f"{argument} must be an int >= 1, got {got}"


PARTS = "'rtol', 'atol', 't1', 'steps', 'gradient', 'per_sample', 'max_steps', 'first_step'"
WIDTH = "width must be a number whose multiples by 1 are each at most 8 or a multiple of 8 with norm 'group', got 54"
REFUSED = [
    (nets.ie_resnet18, {"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
    (nets.ie_resnet34, {"steps": 1.5}, TypeError, "steps must be an int >= 1, got 1.5"),
    (nets.ie_resnet50, {"step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
    (nets.ie_resnet18, {"theta": 1.5}, ValueError, "theta must be a number in [0, 1], got 1.5"),
    (nets.ie_resnet18, {"detach": 1}, TypeError, "detach must be True or False, got 1"),
    (nets.resnet18, {"shortcut_kernel": 2}, ValueError, "shortcut_kernel must be 1 or 3, got 2"),
    (nets.wide_resnet34_10, {"skip": "ssp2"}, ValueError, "skip must be one of 'ie', 'res', got 'ssp2'"),
    (nets.wide_resnet34_10, {"steps": -1}, ValueError, "steps must be an int >= 1, got -1"),
    (nets.resnet56, {"step_size": float("nan")}, ValueError, "step_size must be a finite number > 0, got nan"),
    (nets.polynet, {"step_size": 0}, ValueError, "step_size must be a finite number > 0, got 0"),
    (nets.fractalnet, {"columns": 0}, ValueError, "columns must be an int >= 1, got 0"),
    (nets.revnet, {"width": 7}, ValueError, "width must be an even number, got 7"),
    (
        nets.revnet,
        {"width": 96, "norm": "group"},
        ValueError,
        "width must be at most 64 or a multiple of 64 with norm 'group', got 96",
    ),
    (nets.sspnet, {"n": 0}, ValueError, "n must be an int >= 1, got 0"),
    (nets.soblock_resnet10, {"skew_norm": None}, TypeError, f"skew_norm must be one of {NORMS}, got None"),
    (nets.sonet, {"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
    (nets.sonet, {"stepz": 1}, TypeError, f"a part of solver must be one of {PARTS}, got 'stepz'"),
    (nets.odenet, {"blocks": 0}, ValueError, "blocks must be an int >= 1, got 0"),
    (nets.odenet, {"width": 54}, ValueError, WIDTH),
    (nets.neural_ode_mnist, {"t1": 0}, ValueError, "t1 must be a finite number > 0, got 0"),
    (nets.sspnet_mnist, {"n": "6"}, TypeError, "n must be an int >= 1, got '6'"),
]
REFUSED += [(make, {"norm": "spectral"}, ValueError, f"norm must be one of {NORMS}, got 'spectral'") for make in EVERY]
BLOCKS = "'res', 'ssp2', 'ssp3', 'midpoint', 'adap'"
REFUSED += [
    (make, {"block": "rk4"}, ValueError, f"block must be one of {BLOCKS}, got 'rk4'")
    for make in (nets.sspnet, nets.sspnet_mnist)
]


@pytest.mark.parametrize(("make", "keywords", "error", "message"), REFUSED)
def test_bad_arguments_are_refused_by_name(make, keywords, error, message):
    with pytest.raises(error) as raised:
        make(**keywords)
    assert str(raised.value) == message
