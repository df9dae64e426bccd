"""Bad input: what is refused, in which words, and that a refusal leaves everything as it was."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import fastode
from fastode import functional, reference, testing
from fastode import nn as fused
from fastode.tableau import SSP3, Tableau

C = 4
# Each one-step block from a branch, as a fused twin, and the public functions.
TWINS = {
    "IESkip": fused.IESkip,
    "ResBlock": fused.ResBlock,
    "SSP2": fused.SSP2,
    "SSP3": fused.SSP3,
    "Midpoint": fused.Midpoint,
    "Ark": fused.Ark,
    "ShuOsher": lambda branch: fused.ShuOsher(branch, SSP3),
    "ie_skip": lambda branch: Function("ie_skip", branch),
    "shu_osher": lambda branch: Function("shu_osher", branch, SSP3),
}


class Function(nn.Module):
    """A public function as a module, so that its branch's state can be looked at."""

    def __init__(self, name, branch, *arguments):
        super().__init__()
        self.name, self.branch, self.arguments = name, branch, arguments

    def forward(self, x):
        return getattr(functional, self.name)(x, self.branch, *self.arguments)


def branch(out_channels=C, **options):
    return reference.PreActBranch(C, out_channels, **options)


def image(*shape, **options):
    return torch.randn(*(shape or (2, C, 5, 6)), **options)


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


NUMBERS = [
    ("steps", 0, ValueError, "steps must be an int >= 1, got 0"),
    ("steps", -3, ValueError, "steps must be an int >= 1, got -3"),
    ("steps", 1.0, TypeError, "steps must be an int >= 1, got 1.0"),
    ("steps", True, TypeError, "steps must be an int >= 1, got True"),
    ("steps", "2", TypeError, "steps must be an int >= 1, got '2'"),
    ("steps", None, TypeError, "steps must be an int >= 1, got None"),
    ("step_size", 0, ValueError, "step_size must be a finite number > 0, got 0"),
    ("step_size", -0.1, ValueError, "step_size must be a finite number > 0, got -0.1"),
    ("step_size", math.nan, ValueError, "step_size must be a finite number > 0, got nan"),
    ("step_size", math.inf, ValueError, "step_size must be a finite number > 0, got inf"),
    ("step_size", "0.1", TypeError, "step_size must be a finite number > 0, got '0.1'"),
    ("step_size", torch.ones(2), TypeError, "step_size must be a finite number > 0, got a tensor of shape [2]"),
    ("theta", -0.5, ValueError, "theta must be a number in [0, 1], got -0.5"),
    ("theta", 1.5, ValueError, "theta must be a number in [0, 1], got 1.5"),
    ("theta", math.nan, ValueError, "theta must be a number in [0, 1], got nan"),
    ("theta", None, TypeError, "theta must be a number in [0, 1], got None"),
    ("detach", 1, TypeError, "detach must be True or False, got 1"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), NUMBERS)
def test_numbers_of_the_implicit_skip(name, value, error, message):
    for make in (
        reference.IESkip,
        fused.IESkip,
        lambda branch, **options: functional.ie_skip(image(), branch, **options),
    ):
        with refused(error, message):
            make(branch(), **{name: value})


@pytest.mark.parametrize("kind", [reference.ResBlock, fused.ResBlock])
def test_step_of_the_residual_block(kind):
    with refused(ValueError, "step_size must be a finite number > 0, got -1.0"):
        kind(branch(), -1.0)
    with refused(TypeError, "step_size must be a finite number > 0, got an object of type list"):
        kind(branch(), [1.0])


@pytest.mark.parametrize("kind", [reference.Ark, fused.Ark])
def test_coefficients_of_ark(kind):
    with refused(ValueError, "a21 must be a finite number, got nan"):
        kind(branch(), a21=math.nan)
    with refused(TypeError, "b10 must be a finite number, got '1'"):
        kind(branch(), b10="1")
    with refused(TypeError, "learn_b10 must be True or False, got 0"):
        kind(branch(), learn_b10=0)


def test_a_tableau_whose_rows_do_not_sum_to_one():
    with refused(ValueError, "alpha must be rows that sum to one, got row 2 = (0.5, 0.4)"):
        Tableau("wrong", alpha=((1.0,), (0.5, 0.4)), beta=((1.0,), (0.0, 0.5)), order=1)


def test_a_tableau_of_another_type():
    message = "tableau must be a fastode.tableau.Tableau or LinearTable, got 'ssp3'"
    for make in (
        reference.ShuOsher,
        fused.ShuOsher,
        lambda branch, table: functional.shu_osher(image(), branch, table),
    ):
        with refused(TypeError, message):
            make(branch(), "ssp3")


@pytest.mark.parametrize("name", TWINS)
def test_a_branch_that_is_no_module(name):
    if name in ("ie_skip", "shu_osher"):
        function, more = getattr(functional, name), (SSP3,) if name == "shu_osher" else ()
        calls = [lambda: function(image(), torch.tanh, *more)]
    else:
        more = (SSP3,) if name == "ShuOsher" else ()
        calls = [lambda: getattr(reference, name)(torch.tanh, *more), lambda: getattr(fused, name)(torch.tanh, *more)]
    for call in calls:
        with refused(TypeError, "branch must be an nn.Module, got an object of type builtin_function_or_method"):
            call()


INPUTS = [
    (lambda: image(2, 3, 5, 6), ValueError, "x must be a tensor [N, 4, H, W], got shape [2, 3, 5, 6]"),
    (lambda: image(C, 5, 6), ValueError, "x must be a tensor [N, 4, H, W], got shape [4, 5, 6]"),
    (lambda: image(2, C, 5, 6, 1), ValueError, "x must be a tensor [N, 4, H, W], got shape [2, 4, 5, 6, 1]"),
    (lambda: image(dtype=torch.float64), TypeError, "x must be of the parameters' dtype float32, got float64"),
    (lambda: image(dtype=torch.bfloat16), TypeError, "x must be of the parameters' dtype float32, got bfloat16"),
    (
        lambda: torch.ones(2, C, 5, 6, dtype=torch.int64),
        TypeError,
        "x must be of dtype float32, float64, bfloat16 or float16, got int64",
    ),
    (
        lambda: image(dtype=torch.complex64),
        TypeError,
        "x must be of dtype float32, float64, bfloat16 or float16, got complex64",
    ),
    (lambda: image(device="meta"), ValueError, "x must be on the parameters' device cpu, got meta"),
    (lambda: [1.0], TypeError, "x must be a tensor [N, 4, H, W], got an object of type list"),
    (
        lambda: image(1, C, 1, 1),
        ValueError,
        "x must be larger than one value for each normalised set, got shape [1, 4, 1, 1]",
    ),
]


@pytest.mark.parametrize("case", range(len(INPUTS)))
@pytest.mark.parametrize("name", TWINS)
def test_inputs(name, case):
    make, error, message = INPUTS[case]
    block = TWINS[name](branch(norm="batch"))
    unchanged(block, lambda: refused(error, message), make())


def unchanged(block, refusal, *inputs):
    """The call is refused, and parameters and buffers are as they were."""
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with refusal():
        block(*inputs)
    after = block.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Opaque(nn.Sequential):
    """A Sequential that the reader does not follow."""

    def forward(self, x):
        return super().forward(x)


NORM = nn.BatchNorm2d
SHAPES = [
    (
        lambda: branch(2 * C),
        "branch must be a map that keeps the shape of x, got one that takes 4 channels and returns 8",
    ),
    (
        lambda: branch(stride=2),
        "branch must be a map that keeps the shape of x, got one that takes 5x6 to 3x3",
    ),
    (
        lambda: nn.Sequential(NORM(C), nn.Conv2d(C, C, 3)),
        "branch must be a map that keeps the shape of x, got one that takes 5x6 to 3x4",
    ),
    (
        lambda: nn.Sequential(NORM(C), nn.Conv2d(C, 8, 1), nn.Conv2d(C, C, 1)),
        "branch must be a map that keeps the shape of x, got one in which a convolution for 4 channels is given 8",
    ),
    # Only a call can tell.
    (
        lambda: Opaque(NORM(C), nn.Conv2d(C, C, 3)),
        "branch must be a map to the shape [2, 4, 5, 6], got an output of [2, 4, 3, 4]",
    ),
]


@pytest.mark.parametrize("case", range(len(SHAPES)))
@pytest.mark.parametrize("name", TWINS)
def test_a_branch_that_changes_the_shape(name, case):
    make, message = SHAPES[case]
    unchanged(TWINS[name](make()), lambda: refused(ValueError, message), image())


@pytest.mark.parametrize("name", ["ResBlock", "IESkip", "SSP2", "SSP3", "Midpoint", "Ark"])
def test_the_reference_names_a_branch_that_changes_the_shape(name):
    with refused(ValueError, "branch must be a map to the shape [2, 4, 5, 6], got an output of [2, 8, 5, 6]"):
        getattr(reference, name)(branch(2 * C))(image())


class Returns(nn.Module):
    """A branch that cannot be read and returns what it was given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize(("value", "got"), [(None, "None"), ((1, 2), "an object of type tuple")])
@pytest.mark.parametrize("name", TWINS)
def test_a_branch_that_returns_no_tensor(name, value, got):
    with refused(TypeError, f"branch must be a map to the shape [2, 4, 5, 6], got {got} from it"):
        TWINS[name](Returns(value))(image())


@pytest.mark.parametrize("name", TWINS)
def test_no_tensor_for_a_branch_that_cannot_be_read(name):
    with refused(TypeError, "x must be a tensor, got None"):
        TWINS[name](Returns(None))(None)


@pytest.mark.parametrize("name", TWINS)
def test_an_operator_is_given_no_layout_but_strided(name):
    block, x = TWINS[name](branch(norm="layer")), image()
    torch.testing.assert_close(block(x.to_mkldnn().to_dense()), block(x))
    with pytest.raises(RuntimeError) as expected:
        reference_of(block)(x.to_sparse())
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value)[:60])):
        block(x.to_sparse())


def test_a_field_without_an_initial_state():
    message = "field must be a module with initial_state(x), as SkewPair is, got an object of type Conv2d"
    for module in (reference, fused):
        with refused(TypeError, message):
            module.SOBlock(nn.Conv2d(3, 3, 3))


def test_a_comparison_of_nothing():
    with refused(TypeError, "x must be a tensor or a tuple of tensors, got None"):
        testing.compare_blocks(nn.Tanh(), nn.Tanh(), None)
    with refused(TypeError, "autocast must be a torch.dtype or None, got 'bf16'"):
        testing.compare_blocks(nn.Tanh(), nn.Tanh(), image(), autocast="bf16")


@pytest.mark.parametrize("name", TWINS)
def test_a_branch_of_two_dtypes_fails_without_a_trace(name):
    module = nn.Sequential(NORM(C), nn.Conv2d(C, C, 1).double())
    unchanged(TWINS[name](module), lambda: pytest.raises(RuntimeError), image())


@pytest.mark.parametrize("name", TWINS)
def test_autocast_mixes_dtypes_by_itself(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert TWINS[name](branch(norm="layer"))(image(dtype=torch.bfloat16)).shape == (2, C, 5, 6)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_go_through_as_in_the_reference(name, norm, value):
    block = TWINS[name](branch(norm=norm))
    x = image()
    x[1, 2, 3, 3] = value
    results = [output_and_gradient(other, x) for other in (reference_of(block), block)]
    assert not results[0][0].isfinite().all()
    for expected, found in zip(*results, strict=True):
        if math.isnan(value):
            assert torch.equal(found.isnan(), expected.isnan())
        else:
            # Where the reference meets inf - inf, the closed form may have cancelled it.
            assert torch.equal(finite_samples(found), finite_samples(expected))


def output_and_gradient(block, x):
    point = x.clone().requires_grad_()
    y = block(point)
    y.sum().backward()
    return y.detach(), point.grad


def finite_samples(x):
    return x.isfinite().flatten(1).all(1)


def reference_of(block):
    """The reference of a twin or of a function, with a branch of its own."""
    module = copy.deepcopy(block.branch)
    if isinstance(block, Function):
        return reference.IESkip(module) if block.name == "ie_skip" else reference.ShuOsher(module, SSP3)
    other = copy.deepcopy(block)
    fastode.unfuse(other)
    assert type(other) is getattr(reference, type(block).__name__)
    return other
