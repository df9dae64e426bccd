"""What a user changes between two calls of a fused block is seen, though readings and choices are kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import functional, reference
from fastode.branch.snapshot import Snapshot
from fastode.dispatch import choice, known
from fastode.native import nodes, operators
from fastode.testing import compare_tensors, sample_input

Change = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True, params=["in C++", "in Python"])
def compared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test with either comparison of a snapshot with what is there now."""
    if request.param == "in C++":
        operators.load()
        assert nodes.module is not None
        yield
    else:
        with nodes.left_out():
            yield


def units() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Sequential(nn.GroupNorm(2, 6), nn.ELU(), nn.Conv2d(6, 4, 3, padding=1, bias=False)),
    )


def replace_parameter(b: nn.Module) -> None:
    b[2].weight = nn.Parameter(0.5 * b[2].weight.detach())


def replace_data(b: nn.Module) -> None:
    b[2].weight.data = -b[2].weight.data


def write_in_place(b: nn.Module) -> None:
    with torch.no_grad():
        b[3][0].weight.mul_(3)


def drop_bias(b: nn.Module) -> None:
    b[2].bias = None


def add_bias(b: nn.Module) -> None:
    b[3][2].bias = nn.Parameter(torch.full((4,), 0.7, dtype=b[2].weight.dtype))


def swap_layer(b: nn.Module) -> None:
    b[1] = nn.Tanh()


def append_layer(b: nn.Module) -> None:
    b.append(nn.Softplus())


def delete_layer(b: nn.Module) -> None:
    del b[1]


def replace_buffer(b: nn.Module) -> None:
    b[0].running_var = torch.full((4,), 9.0, dtype=b[2].weight.dtype)


def load_by_assignment(b: nn.Module) -> None:
    state = {name: 2 * t if t.is_floating_point() else t.clone() for name, t in b.state_dict().items()}
    b.load_state_dict(state, assign=True)


CHANGES: dict[str, Change] = {
    "a parameter replaced": replace_parameter,
    "a parameter's data replaced": replace_data,
    "a parameter written to": write_in_place,
    "a bias dropped": drop_bias,
    "a bias added": add_bias,
    "a layer swapped": swap_layer,
    "a layer appended": append_layer,
    "a layer deleted": delete_layer,
    "an inner layer swapped": lambda b: b[3].__setitem__(1, nn.SiLU()),
    "eps set": lambda b: setattr(b[3][0], "eps", 0.5),
    "momentum set": lambda b: setattr(b[0], "momentum", 0.9),
    "momentum None": lambda b: setattr(b[0], "momentum", None),
    "groups set": lambda b: setattr(b[3][0], "num_groups", 3),
    "beta set": lambda b: setattr(b[1], "beta", 2.5),
    "eval": lambda b: b.eval(),
    "one norm in eval": lambda b: b[0].eval(),
    "a buffer replaced": replace_buffer,
    "running statistics dropped": lambda b: (setattr(b[0], "running_mean", None), setattr(b[0], "running_var", None)),
    "load_state_dict": lambda b: b.load_state_dict({n: t + 1 for n, t in b.state_dict().items()}),
    "load_state_dict(assign=True)": load_by_assignment,
    "a forward hook": lambda b: b[1].register_forward_hook(lambda m, given, out: 2 * out),
    "a forward pre-hook": lambda b: b[3].register_forward_pre_hook(lambda m, given: (given[0] + 1,)),
    "a hook on the branch": lambda b: b.register_forward_hook(lambda m, given, out: 2 * out),
    "a forward replaced": lambda b: setattr(b[1], "forward", lambda x: 3 * x),
    "a class swapped": lambda b: setattr(b[1], "__class__", nn.Tanh),
    "requires_grad toggled": lambda b: b[2].requires_grad_(False),
    "all frozen": lambda b: b.requires_grad_(False),
}
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ie": lambda b: reference.IESkip(b, 2, 0.1),
    "ssp3": lambda b: reference.SSP3(b),
}


def everything(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a call yields: output, gradients, buffers."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    found = {"output": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": b.clone() for name, b in block.named_buffers() if b.is_floating_point()}
    assert all(t is not None for t in found.values())
    return found


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    comparison = compare_tensors(everything(fused, x), everything(plain, x), [], 9 * 6 * 30)
    assert comparison.ok, comparison.describe()


@pytest.mark.parametrize("engine", ["auto", "staged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, kind: str, engine: str) -> None:
    plain = KINDS[kind](units()).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    # A named engine refuses what it cannot run.
    fused.engine = "auto" if "forward" in change or "hook" in change else engine
    for _ in range(2):
        assert_same(fused, plain, x)
    for module in (plain, fused):
        CHANGES[change](module.branch)
    for _ in range(2):
        assert_same(fused, plain, x)


@pytest.mark.parametrize("kind", ["ie", "ssp3"])
def test_settings_of_the_block_are_seen(kind: str) -> None:
    plain = KINDS[kind](units()).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    assert_same(fused, plain, x)
    changes = {
        "ie": [("steps", 1), ("step_size", 0.3), ("theta", 0.5), ("detach", True)],
        "ssp3": [("tableau", fastode.tableau.SSP2)],
    }
    for name, value in changes[kind]:
        for module in (plain, fused):
            setattr(module, name, value)
        assert_same(fused, plain, x)


@pytest.mark.parametrize("engine", ["auto", "resident", "staged"])
def test_a_step_that_becomes_zero_evaluates_its_branch(engine: str) -> None:
    """The constructor refuses such a step, an assignment does not: running statistics move, and a NaN is not lost."""
    plain = reference.ResBlock(units(), 0.5).double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused, engine=engine)
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    assert_same(fused, plain, x)
    fused.step_size = plain.step_size = 0.0
    assert_same(fused, plain, x)
    for block in (plain, fused):
        block.branch[2].weight.data.fill_(torch.nan)
        assert block(x).isnan().all()


@pytest.mark.parametrize(
    ("make", "name", "allowed"),
    [
        (reference.ResBlock, "step_size", "finite number > 0"),
        (lambda f: reference.ResBlock(f, post_activation=nn.ReLU()), "step_size", "finite number > 0"),
        (
            lambda f: reference.Chain(reference.ResBlock(f, shortcut=nn.Conv2d(4, 4, 1))),
            "0.step_size",
            "finite number > 0",
        ),
        (reference.IESkip, "step_size", "finite number > 0"),
        (reference.IESkip, "theta", r"number in \[0, 1\]"),
        (reference.ExactIE, "tol", "finite number > 0"),
    ],
)
def test_a_tensor_in_the_place_of_a_number_is_refused(make: Any, name: str, allowed: str) -> None:
    # Its value could change in place, and what was remembered of it would not.
    block = make(units()).eval()
    fastode.fuse(block)
    x = torch.randn(2, 4, 5, 5)
    block(x)
    path, _, name = name.rpartition(".")
    setattr(block.get_submodule(path), name, torch.tensor(0.5))
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"^{name} must be a {allowed}, got "):
            block(x)


def test_dtype_device_autocast_grad_mode_and_threads_are_seen() -> None:
    plain = KINDS["ssp3"](units()).eval()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(3, 4, 3, 2)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.float64, torch.float32):
        plain.to(dtype), fused.to(dtype)
        given = x.to(dtype)
        with torch.no_grad():
            for count in (1, 2):
                torch.set_num_threads(count)
                assert fused(given).dtype is dtype
        assert fused(given).requires_grad and not fused(given).detach().requires_grad
    torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype is plain(x).dtype
    with pytest.raises(TypeError, match="x must be of the parameters' dtype"):
        fused(x.double())
    with choice.recording() as used:
        fused(x)
        fused(x.to_mkldnn().to_dense())
        fused.to("meta")
        fused(x.to("meta"))
    assert used[fused] == "reference"


def test_functional_call_is_seen_and_leaves_nothing() -> None:
    block = fastode.nn.SSP3(units().double()).eval()
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    before = block(x)
    given = {name: (2 * p).detach().requires_grad_() for name, p in block.named_parameters()}
    plain = copy.deepcopy(block)
    fastode.unfuse(plain)
    for tensors in (given, {name: 3 * p for name, p in given.items()}):
        found, truth = (torch.func.functional_call(module, tensors, (x,)) for module in (block, plain))
        comparison = compare_tensors({"y": found.detach()}, {"y": truth.detach()}, [], 9 * 6 * 30)
        assert comparison.ok, comparison.describe()
        after = block(x)
        assert torch.equal(after, before)


def test_what_is_unchanged_is_compared_in_cpp_alone() -> None:
    branch = units()
    held = Snapshot(branch)
    assert held.holds(branch)
    if nodes.module is None:
        return
    answer = nodes.module.unchanged
    assert answer(held._watched, branch) is True
    assert answer(held._watched, units()) is False
    branch[0].eps = float(f"{branch[0].eps}")  # an equal number, which is another object
    assert answer(held._watched, branch) is NotImplemented and held.holds(branch)
    branch[0].eps = 0.5
    assert answer(held._watched, branch) is NotImplemented and not held.holds(branch)
    branch[3]._buffers = OrderedDict(more=None)
    assert Snapshot(branch)._watched is None and Snapshot(branch).holds(branch)
    for arguments in ((), ([], []), ([], (), [])):
        with pytest.raises(TypeError, match="expected"):
            nodes.module.watched(*arguments)
    with pytest.raises(ValueError, match="PyCapsule"):
        answer(branch, branch)


class Alike(nn.Sequential):
    """All of its instances are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    def __hash__(self) -> int:
        return 1


def test_equal_branches_and_replaced_dictionaries_are_told_apart() -> None:
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)

    def assert_right(branch: nn.Module) -> None:
        found, truth = ({"y": make(branch)(x).detach()} for make in (fastode.nn.SSP3, reference.SSP3))
        comparison = compare_tensors(found, truth, [], 9 * 6 * 30)
        assert comparison.ok, comparison.describe()

    first, second = (Alike(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)).double() for _ in range(2))
    for branch in (first, second, first):
        assert_right(branch)
    first[0].__dict__ = {**first[0].__dict__, "eps": 0.9}
    assert_right(first)
    first.__dict__ = {**first.__dict__, "_modules": {"0": nn.Tanh()}}
    assert_right(first)


def test_global_hooks_are_seen() -> None:
    block = fastode.nn.SSP3(units())
    x = sample_input(3, 4, 3, 2)
    calls: list[nn.Module] = []
    block(x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, given, out: calls.append(m))
    block(x)
    handle.remove()
    assert any(isinstance(m, nn.Softplus) for m in calls)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: setattr(f, "gamma", 0.4),
        lambda f: setattr(f, "activation", nn.Tanh()),
        lambda f: setattr(f, "weight", nn.Parameter(2 * f.weight.detach())),
        lambda f: setattr(f, "post_norm_y", nn.Identity()),
        lambda f: setattr(f.pre_norm_z, "eps", 0.3),
        lambda f: f.pre_norm_y.register_forward_hook(lambda m, given, out: 2 * out),
        lambda f: f.requires_grad_(False),
        lambda f: setattr(f, "engine", "reference"),
    ],
)
def test_changes_of_a_skew_pair_are_seen(change: Change) -> None:
    torch.manual_seed(5)
    plain = reference.SOBlock(reference.SkewPair(3, 4, norm="layer", activation="softplus"), solver="midpoint").double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(2, 3, 3, 4, dtype=torch.float64)
    y = sample_input(2, 4, 3, 4, dtype=torch.float64)
    for turn in range(2):
        for _ in range(2):
            assert_same(fused, plain, x)
            pairs = [dict(zip(("dy", "dz"), m.field(y, x), strict=True)) for m in (fused, plain)]
            found, truth = ({n: t.detach() for n, t in pair.items()} for pair in pairs)
            comparison = compare_tensors(found, truth, [], 9 * 6 * 30)
            assert comparison.ok, comparison.describe()
        if turn == 0:
            for module in (fused, plain):
                change(module.field)


def test_settings_of_a_solution_are_seen() -> None:
    plain = reference.SOBlock(reference.SkewPair(3, 4, norm="layer"), solver="midpoint").double()
    fused = copy.deepcopy(plain)
    fastode.fuse(fused)
    x = sample_input(2, 3, 3, 4, dtype=torch.float64)
    for name, value in (("steps", 3), ("t1", 0.5), ("solver", "euler"), ("solver", "rk4"), ("steps", 1)):
        for module in (plain, fused):
            setattr(module, name, value)
        assert_same(fused, plain, x)


def test_nothing_is_kept_alive() -> None:
    block = fastode.nn.SSP3(units())
    block(sample_input(3, 4, 3, 2))
    branch, weight = weakref.ref(block.branch), weakref.ref(block.branch[2].weight)
    assert known.kept(block.branch) is not None
    del block
    gc.collect()
    assert branch() is None and weight() is None


def test_a_parameter_that_knows_its_model_keeps_nothing_alive() -> None:
    block = fastode.nn.SSP3(units())
    block.branch[2].weight.register_hook(lambda gradient, owner=block: owner and gradient)
    block.branch[2].owner = [block]
    block(sample_input(3, 4, 3, 2)).sum().backward()
    branch = weakref.ref(block.branch)
    del block
    gc.collect()
    assert branch() is None


def test_copies_and_pickles_carry_nothing_of_what_is_kept() -> None:
    block = fastode.nn.SSP3(units())
    x = sample_input(3, 4, 3, 2)
    block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert known.kept(twin.branch) is None
        assert torch.equal(twin.eval()(x), copy.deepcopy(block).eval()(x))
    shallow = copy.copy(block.branch)
    shallow._modules = dict(shallow._modules)
    shallow[1] = nn.Tanh()
    twin = fastode.nn.SSP3(shallow).eval()
    comparison = compare_tensors(
        {"y": twin(x).detach()}, {"y": reference.SSP3(copy.deepcopy(shallow)).eval().double()(x.double()).detach()},
        [{"y": reference.SSP3(shallow).eval()(x).detach()}], 9 * 6,
    )  # fmt: skip
    assert comparison.ok, comparison.describe()


def test_a_function_and_a_block_share_a_branch() -> None:
    branch = units().double()
    x = sample_input(3, 4, 3, 2, dtype=torch.float64)
    block = fastode.nn.IESkip(branch, 2, 0.1).eval()
    for theta in (1.0, 0.5, 1.0):
        plain = reference.IESkip(branch, 2, 0.1, theta)
        found = functional.ie_skip(x, branch, steps=2, step_size=0.1, theta=theta)
        comparison = compare_tensors({"y": found.detach()}, {"y": plain(x).detach()}, [], 9 * 6 * 30)
        assert comparison.ok, comparison.describe()
        block(x)


def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    block = fastode.nn.SSP3(units()).eval()
    for width in range(1, 100):
        block(sample_input(1, 4, 1, 1 + width))
    kept = known.kept(block.branch)
    assert kept is not None and 0 < len(kept._answers) <= known._MOST_ANSWERS
