"""The reference blocks in every mode of PyTorch (no_grad, autocast, transforms, the compiler), and what they refuse."""

import copy

import pytest
import torch
from reference_cases import BLOCKS, assert_same, make_branch, make_input
from torch import nn
from torch.autograd import forward_ad

from fastode.reference import Ark, IESkip, ResBlock, ShuOsher

IE_BLOCKS = ["ie", "ie-detached"]


def make_block(name, *arguments, **options):
    return BLOCKS[name][0](make_branch(*arguments, **options)).double()


def in_inference_tensors(block):
    """The block with all its parameters and buffers made in inference mode."""
    for module in block.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.clone())
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    return block


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_grad_and_inference_mode_give_the_same_values_and_buffers(name, norm):
    x = make_input()

    def run(context, remake=lambda block: block):
        block = make_block(name, norm)
        with context:
            y = remake(block)(x)
            return y, {"y": y.clone(), **{key: b.clone() for key, b in block.named_buffers()}}

    y, found = run(torch.no_grad())
    assert not y.requires_grad

    def with_gradients(x):
        block = make_block(name, norm)
        y = block(x)
        return {"y": y, **dict(block.named_buffers())}

    assert_same(found, with_gradients, x)
    y, found = run(torch.inference_mode())
    assert y.is_inference()
    assert_same({key: value.clone() for key, value in found.items()}, with_gradients, x)
    _, found = run(torch.inference_mode(), in_inference_tensors)
    assert_same({key: value.clone() for key, value in found.items()}, with_gradients, x)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_gives_the_dtype_of_plain_arithmetic(name, context):
    block, x = make_block(name).float(), make_input().float()
    seen = set()
    block.branch.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    with context(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.float32
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("name", BLOCKS)
def test_batch_statistics_are_updated_once_for_each_evaluation_in_order(name):
    block, x = make_block(name, "batch"), make_input()
    norm, inputs = block.branch[0], []
    norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().clone()))
    block(x)
    count = BLOCKS[name][1]
    assert len(inputs) == norm.num_batches_tracked == count
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for u in inputs:
        mean = 0.9 * mean + 0.1 * u.mean((0, 2, 3))
        variance = 0.9 * variance + 0.1 * u.var((0, 2, 3))
    assert_same(
        {"mean": norm.running_mean, "variance": norm.running_var},
        lambda _: {"mean": mean, "variance": variance},
        x,
    )


class InPlaceFirst(nn.Module):
    """A user's own branch, which nothing tells to write into its input."""

    def forward(self, x):
        return x.clamp_(min=0.0)


@pytest.mark.parametrize(
    "first",
    [
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(inplace=True))),
        nn.Sequential(nn.Dropout().eval(), nn.ReLU(inplace=True)),
        InPlaceFirst(),
    ],
    ids=["activation", "nested", "after dropout", "own module"],
)
@pytest.mark.parametrize("name", BLOCKS)
def test_an_in_place_first_activation_changes_nothing_outside(name, first):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    make, _ = BLOCKS[name]
    x = make_input().requires_grad_()
    kept = x.detach().clone()
    y = make(nn.Sequential(first, conv)).double()(x)
    expected = make(nn.Sequential(nn.ReLU(), conv)).double()(x)
    assert torch.equal(x, kept)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.sum(), [x, conv.weight]) for out in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_transforms_and_forward_mode_agree_with_backward(name, frozen):
    block, x, t = make_block(name).requires_grad_(not frozen), make_input(), make_input(1)
    jacobian = torch.autograd.functional.jacobian(block, x).reshape(x.numel(), x.numel())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(block(forward_ad.make_dual(x, t))).tangent
    found = {
        "forward mode": dual,
        "jvp": torch.func.jvp(block, (x,), (t,))[1],
        "vjp": torch.func.vjp(block, x)[1](t)[0],
        "vmap": torch.func.vmap(block)(x[None])[0],
    }
    push, pull = (jacobian @ t.flatten()).view_as(x), (jacobian.T @ t.flatten()).view_as(x)
    assert_same(found, lambda x: {"forward mode": push, "jvp": push, "vjp": pull, "vmap": block(x)}, x)


@pytest.mark.parametrize("name", IE_BLOCKS)
def test_transforms_over_the_parameters_agree_with_backward(name):
    block, x, cotangent = make_block(name), make_input(), make_input(1)
    parameters = {key: p.detach() for key, p in block.named_parameters()}
    _, pull = torch.func.vjp(lambda values: torch.func.functional_call(block, values, (x,)), parameters)

    def backward(x):
        gradients = torch.autograd.grad(block(x), list(block.parameters()), cotangent)
        return dict(zip(parameters, gradients, strict=True))

    assert_same(pull(cotangent)[0], backward, x)


@pytest.mark.parametrize("name", IE_BLOCKS)
def test_frozen_blocks_on_plain_inputs_leave_no_graph(name):
    block = make_block(name).requires_grad_(False)
    assert not block(make_input()).requires_grad
    assert block(make_input().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", BLOCKS)
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_the_compiler_traces_a_training_step_without_a_graph_break(name):
    torch._dynamo.reset()
    block, x = make_block(name), make_input().requires_grad_()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x), block(x))


def test_a_block_can_be_copied_and_its_state_moved():
    block, x = make_block("ark", "batch"), make_input()
    other = Ark(make_branch("batch"), a21=3.0, b10=-3.0, learn_a21=True, learn_b10=False).double()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), copy.deepcopy(block)(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_branch_that_changes_the_shape_is_refused(name):
    make, _ = BLOCKS[name]
    block = make(nn.Conv2d(3, 1, 1).double()).double()
    with pytest.raises(ValueError, match="branch") as refused:
        block(make_input())
    assert str(refused.value) == "branch must be a map to the shape [2, 3, 4, 5], got an output of [2, 1, 4, 5]"


REFUSALS = [
    (ResBlock, {"branch": torch.relu}, TypeError, "branch must be an nn.Module, got an object of type "),
    (ResBlock, {"step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
    (ResBlock, {"shortcut": 1}, TypeError, "shortcut must be an nn.Module, got 1"),
    (IESkip, {"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
    (IESkip, {"steps": 1.0}, TypeError, "steps must be an int >= 1, got 1.0"),
    (IESkip, {"step_size": float("nan")}, ValueError, "step_size must be a finite number > 0, got nan"),
    (IESkip, {"theta": 1.5}, ValueError, "theta must be a number in [0, 1], got 1.5"),
    (IESkip, {"detach": 1}, TypeError, "detach must be True or False, got 1"),
    (ShuOsher, {"tableau": "ssp2"}, TypeError, "tableau must be a fastode.tableau.Tableau or LinearTable, got 'ssp2'"),
    (Ark, {"a21": float("nan")}, ValueError, "a21 must be a finite number, got nan"),
    (Ark, {"b10": "1"}, TypeError, "b10 must be a finite number, got '1'"),
    (Ark, {"learn_b10": None}, TypeError, "learn_b10 must be True or False, got None"),
]


@pytest.mark.parametrize(("make", "arguments", "kind", "message"), REFUSALS)
def test_refusals(make, arguments, kind, message):
    with pytest.raises(kind) as refused:
        make(**{"branch": nn.Identity(), **arguments})
    assert type(refused.value) is kind
    # The name of a function's type is Python's own.
    assert str(refused.value).startswith(message)
