"""The reader: what it finds in a branch, what it refuses and in which words, and that it traces."""

import timeit

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastode import checks
from fastode.branch import TENSORS_PER_UNIT, Activation, Conv, Norm, Unit, channels, read
from fastode.testing import compare_tensors

CONV3 = Conv(8, 8, (3, 3), (1, 1), (1, 1), 1)


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


def run(units, tensors, x):
    """Evaluate the units by PyTorch's functions: what the reading means."""
    for index, unit in enumerate(units):
        weight, bias, mean, var, kernel, kernel_bias = tensors[TENSORS_PER_UNIT * index :][:TENSORS_PER_UNIT]
        norm, activation = unit.norm, unit.activation
        if norm is not None and norm.mode == "group":
            x = F.group_norm(x, norm.groups, weight, bias, norm.eps)
        elif norm is not None:
            x = F.batch_norm(x, mean, var, weight, bias, norm.mode == "batch", 0.0, norm.eps)
        if activation is not None:
            tanh = {"approximate": "tanh"} if (activation.kind, activation.p) == ("gelu", 1.0) else {}
            values = {"leaky_relu": (activation.p,), "softplus": (activation.p, activation.q), "elu": (activation.p,)}
            x = getattr(F, activation.kind)(x, *values.get(activation.kind, ()), **tanh)
        if unit.conv is not None:
            assert kernel.shape[0] == unit.conv.out_channels
            assert kernel.shape[1] * unit.conv.groups == unit.conv.in_channels
            assert tuple(kernel.shape[2:]) == unit.conv.kernel
            x = F.conv2d(x, kernel, kernel_bias, 1, unit.conv.padding, unit.conv.dilation, unit.conv.groups)
    return x


def instance_norm(**options):
    return nn.InstanceNorm2d(8, **options)


READABLE = {
    "group norm": lambda: [nn.GroupNorm(2, 8), nn.ReLU(), conv(), nn.GroupNorm(1, 8, eps=1e-3), nn.ReLU(), conv()],
    "batch norm": lambda: [nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(bias=False)],
    "batch norm without statistics": lambda: [nn.BatchNorm2d(8, track_running_stats=False), nn.Tanh(), conv()],
    "batch norm without weights": lambda: [nn.BatchNorm2d(8, affine=False, momentum=None), nn.ELU(0.7), conv()],
    "instance norm": lambda: [instance_norm(), nn.LeakyReLU(0.2), conv()],
    "instance norm with statistics": lambda: [instance_norm(affine=True, track_running_stats=True), nn.SiLU(), conv()],
    "group norm without weights": lambda: [nn.GroupNorm(4, 8, affine=False), nn.Softplus(2.0, 3.0), conv()],
    "two forms of GELU": lambda: [nn.GELU(), conv(), nn.GELU(approximate="tanh"), conv(), nn.Sigmoid()],
    "padding same": lambda: [nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 1)), nn.ReLU()],
    "padding valid": lambda: [nn.Conv2d(8, 8, 1, padding="valid")],
    "even kernel, dilated": lambda: [nn.Conv2d(8, 8, 2, padding=1, dilation=2), nn.SiLU()],
    "grouped": lambda: [nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(16, 8, 1, groups=8)],
    "nested": lambda: [
        nn.Sequential(nn.Identity(), nn.Sequential(nn.GroupNorm(1, 8))),
        nn.ReLU(),
        nn.Sequential(conv()),
    ],
    "convolution first": lambda: [conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.BatchNorm2d(8)],
    "two activations": lambda: [nn.Tanh(), nn.ReLU(), nn.GroupNorm(8, 8)],
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", READABLE)
def test_a_reading_means_what_the_branch_does(name, training):
    torch.manual_seed(0)
    branch = nn.Sequential(*READABLE[name]()).double().train(training)
    for module in branch.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key != "num_batches_tracked":
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    reading = read(branch)
    assert reading.reason == "" and reading.fault == ""
    assert len(reading.tensors) == TENSORS_PER_UNIT * len(reading.units)
    assert len(reading.norms) == len(reading.units)
    assert channels(reading.units) in (8, None)
    found = run(reading.units, reading.tensors, x)
    truth = branch(x.clone())
    comparison = compare_tensors({"output": found}, {"output": truth}, [], x.numel())
    assert comparison.ok, comparison.describe()


def test_the_units_of_a_branch_in_the_papers_order():
    reading = read(nn.Sequential(nn.GroupNorm(1, 8), nn.LeakyReLU(0.2), conv(), nn.Softplus(2, 3), conv(bias=False)))
    assert reading.units == (
        Unit(Norm("group", 1, 1e-5, 8), Activation("leaky_relu", 0.2), CONV3),
        Unit(None, Activation("softplus", 2.0, 3.0), CONV3),
    )
    present = [tensor is not None for tensor in reading.tensors]
    assert present == [True, True, False, False, True, True, False, False, False, False, True, False]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("norm", "trained", "evaluated"),
    [
        (nn.BatchNorm2d(8), ("batch", True), ("fixed", False)),
        (nn.BatchNorm2d(8, momentum=None), ("batch", True), ("fixed", False)),
        (nn.BatchNorm2d(8, track_running_stats=False), ("batch", False), ("batch", False)),
        (nn.InstanceNorm2d(8), ("group", False), ("group", False)),
        (nn.InstanceNorm2d(8, track_running_stats=True), ("group", True), ("fixed", False)),
        (nn.GroupNorm(2, 8), ("group", False), ("group", False)),
    ],
)
def test_which_statistics_a_norm_uses_and_which_it_updates(norm, trained, evaluated, training):
    branch = nn.Sequential(norm).train(training)
    mode, updates = trained if training else evaluated
    reading = read(branch)
    assert reading.units[0].norm.mode == mode
    assert reading.norms == [norm if updates else None]
    # The reader's word against PyTorch's own behaviour.
    before = [buffer.clone() for buffer in norm.buffers()]
    branch(torch.randn(2, 8, 3, 3))
    changed = any(not torch.equal(old, new) for old, new in zip(before, norm.buffers(), strict=True))
    assert changed == updates


def test_an_instance_norm_that_no_longer_tracks_still_updates_in_eval():
    norm = nn.InstanceNorm2d(8, track_running_stats=True)
    norm.track_running_stats = False
    assert read(nn.Sequential(norm).eval()).norms == [norm]
    norm.eval()(torch.randn(2, 8, 3, 3))
    assert norm.running_mean.abs().sum() > 0


def test_parameters_are_read_anew_at_each_call():
    branch = nn.Sequential(conv())
    old = read(branch).tensors[4]
    branch[0].weight = nn.Parameter(torch.zeros(8, 8, 5, 5))
    branch[0].padding = (2, 2)
    reading = read(branch)
    assert reading.tensors[4] is branch[0].weight and old is not branch[0].weight
    assert reading.units[0].conv.kernel == (5, 5)


class OwnForward(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


class OwnOrder(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class OwnConv(nn.Conv2d):
    pass


class PlainSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ReLU(), conv())


def test_a_sequential_subclass_that_keeps_its_forward_is_read():
    assert read(PlainSequential()).units == (Unit(None, Activation("relu"), CONV3),)


def hooked(kind):
    branch = nn.Sequential(nn.ReLU(), conv())
    getattr(branch[1], f"register_{kind}")(lambda *_: None)
    return branch


def replaced_forward():
    branch = nn.Sequential(nn.ReLU())
    branch[0].forward = torch.sin
    return branch


def changed(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return nn.Sequential(layer)


def one_statistic():
    norm = nn.BatchNorm2d(8)
    norm.running_var = None
    return nn.Sequential(norm)


def plain_weight():
    layer = conv()
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return nn.Sequential(layer)


def twice():
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(norm, conv(), norm)


HOOKS = "has hooks or a replaced forward, which a fused branch would not call."
UNEVEN = "has a stride or a padding that changes the size, or pads unevenly."
REFUSED = {
    "unknown type": (lambda: nn.Sequential(nn.Dropout()), "branch.0 (Dropout) is of a type the reader does not know."),
    "no sequential": (lambda: nn.Linear(2, 2), "branch (Linear) is of a type the reader does not know."),
    "nested unknown": (
        lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Mish())),
        "branch.1.0 (Mish) is of a type the reader does not know.",
    ),
    "SyncBatchNorm": (
        lambda: nn.Sequential(nn.SyncBatchNorm(8)),
        "branch.0 (SyncBatchNorm) is of a type the reader does not know.",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3)),
        "branch.0 (LazyConv2d) is of a type the reader does not know.",
    ),
    "subclass": (
        lambda: nn.Sequential(OwnConv(8, 8, 1)),
        "branch.0 (OwnConv) is of a type the reader does not know.",
    ),
    "own forward": (lambda: OwnForward(nn.ReLU()), "branch (OwnForward) is of a type the reader does not know."),
    "own order": (lambda: OwnOrder(nn.ReLU()), "branch (OwnOrder) is of a type the reader does not know."),
    "empty": (lambda: nn.Sequential(nn.Identity()), "the branch has no layer."),
    "forward hook": (lambda: hooked("forward_hook"), f"branch.1 (Conv2d) {HOOKS}"),
    "pre-forward hook": (lambda: hooked("forward_pre_hook"), f"branch.1 (Conv2d) {HOOKS}"),
    "backward hook": (lambda: hooked("full_backward_hook"), f"branch.1 (Conv2d) {HOOKS}"),
    "pre-backward hook": (lambda: hooked("full_backward_pre_hook"), f"branch.1 (Conv2d) {HOOKS}"),
    "replaced forward": (replaced_forward, f"branch.0 (ReLU) {HOOKS}"),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(conv())),
        "branch.0 (ParametrizedConv2d) has parametrizations, which the reader does not follow.",
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(conv())),
        f"branch.0 (Conv2d) {HOOKS}",
    ),
    "pruning": (
        lambda: nn.Sequential(prune.l1_unstructured(conv(), "weight", 0.5)),
        f"branch.0 (Conv2d) {HOOKS}",
    ),
    "plain weight": (
        plain_weight,
        "branch.0 (Conv2d) has a weight or bias that is not a parameter of its own.",
    ),
    "stride": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1)), f"branch.0 (Conv2d) {UNEVEN}"),
    "no padding": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)), f"branch.1 (Conv2d) {UNEVEN}"),
    "uneven padding": (lambda: nn.Sequential(nn.Conv2d(8, 8, 2, padding="same")), f"branch.0 (Conv2d) {UNEVEN}"),
    "circular padding": (
        lambda: nn.Sequential(conv(padding_mode="circular")),
        "branch.0 (Conv2d) has padding_mode 'circular', where the reader knows only 'zeros'.",
    ),
    "stride as an int": (
        lambda: changed(conv(), stride=1),
        "branch.0 (Conv2d) has a stride, padding or dilation that is not a pair.",
    ),
    "learnt slope": (
        lambda: changed(nn.LeakyReLU(), negative_slope=torch.tensor(0.1, requires_grad=True)),
        "branch.0 (LeakyReLU) has a parameter that is not a number.",
    ),
    "other channels at the end": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 1)),
        "the branch is one that takes 8 channels and returns 16.",
    ),
    "convolution misfit": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)),
        "the branch is one in which a convolution for 8 channels is given 16.",
    ),
    "norm misfit": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(8)),
        "the branch is one in which a norm for 8 channels is given 16.",
    ),
    "norm declared otherwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(4)),
        "a norm declared for 4 channels gets 8.",
    ),
    "two dtypes": (
        lambda: nn.Sequential(conv(dtype=torch.bfloat16), nn.GroupNorm(1, 8)),
        "the branch has tensors of torch.bfloat16 and of torch.float32.",
    ),
    "complex": (
        lambda: nn.Sequential(conv(dtype=torch.complex64)),
        "the branch has tensors of torch.complex64, for which there are no kernels.",
    ),
    "a norm twice": (twice, "two norms of the branch update the same running statistics."),
    "one of two statistics": (
        one_statistic,
        "branch.0 (BatchNorm2d) has only one of the running statistics, or has them as a tensor subclass.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_in_one_sentence(name):
    make, reason = REFUSED[name]
    reading = read(make())
    assert reading.units is None and reading.tensors == [] and reading.norms == []
    assert reading.reason == reason


def test_a_hook_on_every_module_is_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        reading = read(nn.Sequential(nn.ReLU()))
    finally:
        handle.remove()
    assert reading.reason == "a hook is registered on all modules, and a fused branch would not call it."


def test_a_norm_met_twice_is_read_where_it_updates_nothing():
    assert read(twice().eval()).reason == ""
    shared = conv()
    assert read(nn.Sequential(shared, nn.ReLU(), shared)).reason == ""


@pytest.mark.parametrize(
    ("layers", "size", "kept"),
    [
        ([nn.Conv2d(8, 8, 3, padding=1)], (5, 7), True),
        ([nn.Conv2d(8, 8, 3)], (5, 7), False),
        ([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=2)], (5, 7), True),
        ([nn.Conv2d(8, 8, 3, stride=2, padding=1)], (5, 7), False),
        ([nn.Conv2d(8, 8, 3, stride=2, padding=1)], (1, 1), True),
        ([nn.Conv2d(8, 8, 2, dilation=2, padding="same")], (5, 7), True),
        ([nn.Conv2d(8, 8, (3, 1), padding=(1, 0), dilation=(1, 2))], (5, 7), True),
    ],
)
def test_whether_a_branch_keeps_the_size_is_known_beforehand(layers, size, kept):
    branch = nn.Sequential(*layers)
    x = torch.randn(2, 8, *size)
    assert (branch(x).shape == x.shape) == kept
    if kept:
        checks.keeps_shape(read(branch), x)
    else:
        with pytest.raises(ValueError, match=r"^branch must be a map that keeps the shape of x, got one that takes "):
            checks.keeps_shape(read(branch), x)


SINGLE = {
    "batch norm": (nn.BatchNorm2d(8), (1, 8, 1, 1)),
    "group norm": (nn.GroupNorm(8, 8), (1, 8, 1, 1)),
    "instance norm": (nn.InstanceNorm2d(8), (2, 8, 1, 1)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_value_for_each_set_is_refused_where_pytorch_does(name):
    norm, shape = SINGLE[name]
    message = r"^x must be larger than one value for each normalised set, got shape \[\d, 8, 1, 1\]$"
    for batch in (1, 2, 3):
        for height in (1, 2):
            x = torch.randn(batch, *shape[1:3], height)
            branch = nn.Sequential(norm)
            try:
                branch(x)
            except ValueError:
                with pytest.raises(ValueError, match=message):
                    checks.enough_values(read(branch), x.shape)
            else:
                checks.enough_values(read(branch), x.shape)
    with pytest.raises(ValueError, match=message):
        checks.enough_values(read(nn.Sequential(norm)), shape)


@pytest.mark.parametrize(
    "name", ["group norm", "batch norm", "instance norm with statistics", "nested", "padding same"]
)
def test_reading_traces_without_a_graph_break(name):
    branch = nn.Sequential(*READABLE[name]())

    def call(x):
        reading = read(branch)
        checks.feature_map("x", x, channels(reading.units))
        checks.same_kind(x, reading.tensors)
        checks.keeps_shape(reading, x)
        checks.enough_values(reading, x.shape)
        return run(reading.units, reading.tensors, x)

    x = torch.randn(2, 8, 4, 4)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for training in (True, False):
        branch.train(training)
        assert torch.equal(compiled(x), call(x))


def test_a_refusal_traces_without_a_graph_break():
    branch = nn.Sequential(nn.ReLU(), nn.Dropout())
    compiled = torch.compile(lambda x: x if read(branch).units is None else -x, backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(compiled(x), x)


def test_reading_costs_little_beside_the_branch():
    branch = nn.Sequential(*READABLE["group norm"]())
    x = torch.randn(1, 8, 1, 2)
    number = 200
    with torch.no_grad():
        evaluation = min(timeit.repeat(lambda: branch(x), number=number, repeat=5))
    assert min(timeit.repeat(lambda: read(branch), number=number, repeat=5)) < evaluation
