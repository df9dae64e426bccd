"""The papers' branches as Sequentials, and the norms as plain arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference_cases import assert_same, make_input
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastode.reference import BottleneckBranch, PreActBranch, plain_norms


def kinds(branch):
    return [type(layer).__name__ for layer in branch]


def test_pre_act_branch_is_norm_activation_convolution_twice():
    branch = PreActBranch(8, 12, stride=2)
    assert kinds(branch) == ["BatchNorm2d", "ReLU", "Conv2d"] * 2
    first, second = branch[2], branch[5]
    assert (first.in_channels, first.out_channels, first.stride, first.padding) == (8, 12, (2, 2), (1, 1))
    assert (second.in_channels, second.out_channels, second.stride, second.padding) == (12, 12, (1, 1), (1, 1))
    assert first.bias is not None
    assert branch(torch.zeros(2, 8, 6, 6)).shape == (2, 12, 3, 3)
    assert not branch[1].inplace


def test_bottleneck_branch_goes_down_and_up():
    branch = BottleneckBranch(8, 16, norm="layer", stride=2, bias=False)
    assert kinds(branch) == ["GroupNorm", "ReLU", "Conv2d"] * 3
    convs = [branch[i] for i in (2, 5, 8)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (8, 4, 1, 1),
        (4, 4, 3, 2),
        (4, 16, 1, 1),
    ]
    assert all(c.bias is None for c in convs)
    assert branch(torch.zeros(2, 8, 6, 6)).shape == (2, 16, 3, 3)


@pytest.mark.parametrize(
    ("norm", "channels", "groups"), [("group", 8, 8), ("group", 64, 32), ("layer", 8, 1), ("instance", 8, 8)]
)
def test_norms_by_name(norm, channels, groups):
    layer = PreActBranch(channels, norm=norm)[0]
    assert (layer.num_groups, layer.num_channels) == (groups, channels)


def test_other_norms_activations_and_sizes():
    assert kinds(PreActBranch(4, norm="none", layers=1)) == ["ReLU", "Conv2d"]
    branch = PreActBranch(
        4,
        norm=lambda channels: nn.GroupNorm(2, channels),
        activation=lambda: nn.LeakyReLU(0.2, inplace=True),
        layers=3,
        kernel_size=5,
        bias=False,
    )
    assert kinds(branch) == ["GroupNorm", "LeakyReLU", "Conv2d"] * 3
    assert (branch[0].num_groups, branch[1].negative_slope, branch[2].padding, branch[2].bias) == (2, 0.2, (2, 2), None)
    names = {"leaky_relu": "LeakyReLU", "tanh": "Tanh", "softplus": "Softplus", "elu": "ELU", "silu": "SiLU"}
    names |= {"gelu": "GELU", "gelu_tanh": "GELU", "sigmoid": "Sigmoid"}
    for name, kind in names.items():
        assert kinds(PreActBranch(4, activation=name))[1] == kind


def test_a_slice_is_a_plain_sequential_and_a_copy_a_branch():
    branch = PreActBranch(4)
    assert type(branch[2:]) is nn.Sequential
    assert branch[2:][0] is branch[2]
    assert type(copy.deepcopy(branch)) is PreActBranch


NORMS = "'batch', 'group', 'layer', 'instance', 'none'"
ACTIVATIONS = "'relu', 'leaky_relu', 'tanh', 'softplus', 'elu', 'silu', 'gelu', 'gelu_tanh', 'sigmoid'"
REFUSALS = [
    ({"in_channels": 0}, ValueError, "in_channels must be an int >= 1, got 0"),
    ({"out_channels": 2.0}, TypeError, "out_channels must be an int >= 1, got 2.0"),
    ({"norm": "weight"}, ValueError, f"norm must be one of {NORMS}, got 'weight'"),
    ({"norm": None}, TypeError, f"norm must be one of {NORMS}, got None"),
    ({"activation": "mish"}, ValueError, f"activation must be one of {ACTIVATIONS}, got 'mish'"),
    ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
    ({"kernel_size": 4}, ValueError, "kernel_size must be odd, so that padding keeps the size, got 4"),
    ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
]


@pytest.mark.parametrize("make", [PreActBranch, BottleneckBranch])
@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSALS)
def test_refusals(make, arguments, kind, message):
    with pytest.raises(kind) as refused:
        make(**{"in_channels": 8, **arguments})
    assert str(refused.value) == message


def test_refusals_of_one_branch():
    with pytest.raises(ValueError, match=r"^layers must be an int >= 1, got 0$"):
        PreActBranch(8, layers=0)
    with pytest.raises(ValueError, match=r"^out_channels must be a multiple of expansion = 4, got 6$"):
        BottleneckBranch(6)


NORM_CALLS = {
    "batch": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "instance": lambda x, w, b: F.instance_norm(x, None, None, w, b),
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[2:], w[0].expand(x.shape[2:]), b[1].expand(x.shape[2:])),
}


@pytest.mark.parametrize("name", NORM_CALLS)
def test_plain_norms_have_the_right_derivatives_of_three_orders(name):
    call = NORM_CALLS[name]
    x, w, b = (t.requires_grad_() for t in (make_input()[:, :, :2, :2], torch.rand(3).double(), torch.rand(3).double()))

    def plain(*arguments):
        with plain_norms():
            return call(*arguments)

    def gradient(x, w, b):
        with plain_norms():
            # Through a nonlinear function, or the third derivative would be that of a linear one.
            return torch.autograd.grad(call(x, w, b).tanh().sum(), (x, w, b), create_graph=True)

    assert gradcheck(plain, (x, w, b), fast_mode=True)
    assert gradgradcheck(plain, (x, w, b), fast_mode=True)
    assert gradgradcheck(gradient, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("name", NORM_CALLS)
def test_plain_norms_agree_with_pytorch_up_to_second_derivatives(name):
    call, w, b = NORM_CALLS[name], torch.rand(3).double(), torch.rand(3).double()

    def derivatives(x):
        x = x.detach().clone().requires_grad_()
        value = call(x, w, b)
        (first,) = torch.autograd.grad(value.tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return {"value": value.detach(), "first": first.detach(), "second": second}

    x = make_input()
    with plain_norms():
        found = derivatives(x)
    assert_same(found, derivatives, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_plain_norms_update_running_statistics_as_pytorch_does(kind, momentum, dtype):
    # InstanceNorm2d takes no momentum=None.
    momentum = 0.3 if momentum is None and kind is nn.InstanceNorm2d else momentum
    plain = kind(3, momentum=momentum, affine=True, track_running_stats=True).to(dtype)
    usual = copy.deepcopy(plain)
    for seed in range(3):
        x = make_input(seed).to(dtype)
        with plain_norms():
            assert plain(x).dtype == dtype
        usual(x)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), usual.buffers(), strict=True))
    plain.eval(), usual.eval()
    with plain_norms():
        assert torch.equal(plain(x), usual(x))


def test_plain_norms_refuse_what_pytorch_refuses():
    with plain_norms(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    with plain_norms(), pytest.raises(ValueError, match="more than 1 spatial element"):
        nn.InstanceNorm2d(3)(torch.zeros(2, 3, 1, 1))
