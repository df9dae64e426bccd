"""What the tests of the reference blocks share: the papers' blocks by name, inputs, and the one comparison."""

import torch
from torch import nn

from fastode import reference
from fastode.reference import PreActBranch
from fastode.testing import compare_tensors, moved, sample_input

CHANNELS = 3
# A 3×3 convolution of three channels, twice, is the longest sum a branch here makes for one entry.
LONGEST = 2 * 9 * CHANNELS

# Block, and how often it evaluates its branch.
BLOCKS = {
    "res": (reference.ResBlock, 1),
    "ie": (lambda branch: reference.IESkip(branch, steps=2, theta=0.5), 3),
    "ie-detached": (lambda branch: reference.IESkip(branch, detach=True), 2),
    "ssp2": (reference.SSP2, 2),
    "ssp3": (reference.SSP3, 3),
    "midpoint": (reference.Midpoint, 2),
    "ark": (reference.Ark, 2),
}


def make_branch(norm="layer", activation="tanh", **options):
    torch.manual_seed(3)
    return PreActBranch(CHANNELS, norm=norm, activation=activation, **options).double()


def make_input(seed=0):
    return sample_input(2, CHANNELS, 4, 5, dtype=torch.float64, seed=seed)


def no_statistics(channels):
    """A batch norm that changes no buffer, which torch.func asks for."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def assert_same(found, formula, x):
    """Hold what a block gave against a formula of its input, by the one rule: float64 on both sides."""

    def plain(tensors):
        return {name: tensor.detach() for name, tensor in tensors.items()}

    again = [plain(formula(moved(x, seed))) for seed in (1, 2)]
    comparison = compare_tensors(plain(found), plain(formula(x)), again, LONGEST)
    assert comparison.ok, comparison.describe()


def outputs_and_gradients(block, x, cotangent):
    """The output, and the gradients of the input and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    y = block(x)
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], cotangent)
    names = ["gradient of x", *(f"gradient of {name}" for name in parameters)]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
