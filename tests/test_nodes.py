"""The autograd nodes in C++: when they are taken, what they hold, and that the Functions in Python give the same."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import test_attack_gradients as attack
import test_changes_before_backward as changes
import test_double_backward as double
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad

import fastode
from fastode import reference
from fastode.native import nodes, operators
from fastode.testing import sample_input

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ie": lambda branch: reference.IESkip(branch, steps=2, theta=0.5),
    "ie, detached": lambda branch: reference.IESkip(branch, detach=True),
    "ssp3": reference.SSP3,
    "ark": reference.Ark,
    "chain": lambda branch: reference.ResBlock(branch, 0.5, post_activation=nn.ReLU()),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def block_of(kind: str, norm: str = "group", dtype: torch.dtype = torch.float32) -> nn.Module:
    block = KINDS[kind](reference.PreActBranch(8, norm=norm, activation="tanh")).to(dtype)
    fastode.fuse(block, engine="resident")
    return block


def image(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return sample_input(3, 8, 5, 4, dtype=dtype, seed=seed).requires_grad_()


def takes_node(y: Tensor) -> bool:
    return nodes.module.kept(y) is not None


def gradients(block: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """y, and the gradients of a sum of its squares."""
    y = block(x)
    assert takes_node(y) == (nodes.module is not None and nodes.usable())
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()], **options)]


def test_the_nodes_of_this_checkout_load() -> None:
    """Without this a machine on which they do not build would test the Functions twice and be green."""
    assert operators.load() is None
    assert nodes.module is not None, nodes.load(operators.source_root())
    assert nodes.available(operators.source_root())[0]


# ---- the same as the Functions, bit for bit


@pytest.mark.parametrize("norm", ["group", "batch", "batch_eval", "none"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS for dtype in DTYPES if kind != "chain" or dtype != torch.bfloat16],
)
def test_same_as_the_function(kind: str, norm: str, dtype: torch.dtype) -> None:
    block = block_of(kind, norm.removesuffix("_eval"), dtype).train(norm != "batch_eval")
    twin = copy.deepcopy(block)
    for layout, trainable in itertools.product((torch.contiguous_format, torch.channels_last), (True, False)):
        x = image(dtype=dtype).detach().to(memory_format=layout).requires_grad_()
        found = _step(block.requires_grad_(trainable), x)
        module = nodes.module
        with nodes.left_out():
            expected = _step(twin.requires_grad_(trainable), x, module)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


def _step(block: nn.Module, x: Tensor, module: Any = None) -> list[Tensor]:
    """Result, gradients of all that has one, and buffers; `module` are the nodes that are not to be used."""
    y = block(x)
    assert takes_node(y) if module is None else module.kept(y) is None
    sources = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), sources), *block.buffers()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_stem_under_autocast_has_its_node_behind_the_cast(layout: torch.memory_format) -> None:
    torch.manual_seed(2)
    stem = reference.Chain(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh())
    fastode.fuse(stem, engine="resident")
    x = sample_input(3, 3, 5, 4, layout="contiguous").to(memory_format=layout).requires_grad_()

    sources, module = [x, *stem.parameters()], nodes.module

    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = stem(x)
        assert (module.kept(y) is not None) == nodes.usable()
        return [y, *torch.autograd.grad(y.square().sum(), sources)]

    found = step()
    with nodes.left_out():
        expected = step()
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_there_is_no_node(kind: str) -> None:
    block, x = block_of(kind, "batch"), image()
    twin = copy.deepcopy(block)
    with torch.no_grad():
        y = block(x)
    with nodes.left_out(), torch.no_grad():
        expected = twin(x)
    assert y.grad_fn is None and torch.equal(y, expected)
    assert block.requires_grad_(False)(x.detach()).grad_fn is None
    with torch.inference_mode():
        assert block(x).is_inference()


AFTER_CHANGES = (
    changes.test_a_tangent_of_a_cotangent_is_not_lost,
    changes.test_gradients_of_gradients_where_hooks_save_copies,
)
ATTACKS = (
    attack.test_attacks_and_training_steps_in_any_order,
    attack.test_no_weight_gradient_is_computed_for_an_image_alone,
)
WITHOUT_NODES: list[Any] = [
    *[
        pytest.param(changes.test_a_change_before_backward_changes_nothing, (change, kind, "resident"))
        for change, kind in itertools.product([*changes.CHANGES, "a setting"], changes.KINDS)
    ],
    *[pytest.param(test, (kind, "resident")) for test, kind in itertools.product(AFTER_CHANGES, changes.KINDS)],
    *[pytest.param(test, (kind, "resident")) for test, kind in itertools.product(ATTACKS, attack.BLOCKS)],
    pytest.param(attack.test_only_the_parameters_that_are_asked_for_have_a_gradient, ("resident",)),
    pytest.param(attack.test_a_retained_graph_answers_both_questions, ()),
    *[pytest.param(double.test_gradient_penalty, (family, "batch", torch.float64)) for family in double.FAMILIES],
    *[pytest.param(double.test_many_cotangents_at_once, (family, "layer", "resident")) for family in double.FAMILIES],
    *[
        pytest.param(double.test_is_grads_batched, (family, "resident", create_graph))
        for family, create_graph in itertools.product([*double.FAMILIES, "SkewPair", "SOBlock"], (False, True))
    ],
    pytest.param(double.test_a_vectorized_jacobian, ("resident",)),
]


@pytest.mark.parametrize(("test", "arguments"), WITHOUT_NODES)
def test_the_functions_stand_alone(test: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What other files test with nodes, without them."""
    with nodes.left_out():
        test(*arguments)


# ---- running statistics, which are moved in C++ behind a node


def _running(kind: str, momentum: float | None = 0.1) -> tuple[nn.Module, list[nn.BatchNorm2d]]:
    block = block_of(kind, "batch")
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    return block, norms


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, 1, None])
@pytest.mark.parametrize("kind", ["ssp3", "chain"])
def test_running_statistics_are_those_of_the_function(kind: str, momentum: float | None) -> None:
    block, norms = _running(kind, momentum)
    twin = copy.deepcopy(block)
    for seed in range(3):
        x = image(seed=seed % 2)
        versions = [buffer._version for buffer in block.buffers()]
        block(x)
        with nodes.left_out():
            twin(x)
        for (name, buffer), other, before in zip(block.named_buffers(), twin.buffers(), versions, strict=True):
            assert torch.equal(buffer, other), name
            # PyTorch's norms raise the versions of counters alone.
            assert (buffer._version > before) == name.endswith("num_batches_tracked"), name
    assert norms[0].num_batches_tracked == 3 * (3 if kind == "ssp3" else 1)


@pytest.mark.parametrize("kind", ["ssp3", "chain"])
def test_changes_between_calls_reach_the_running_statistics(kind: str) -> None:
    block, norms = _running(kind)
    twin = copy.deepcopy(block)
    others = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]

    def compare(x: Tensor) -> None:
        block(x)
        with nodes.left_out():
            twin(x)
        assert all(torch.equal(a, b) for a, b in zip(block.buffers(), twin.buffers(), strict=True))

    compare(image())
    for norm in (norms[0], others[0]):
        norm.momentum = 0.4
    compare(image())
    for norm in (norms[1], others[1]):
        norm.running_mean = torch.ones(8)
        # Not contiguous: left to PyTorch's operators.
        norm.running_var = torch.ones(16)[::2]
    compare(image())
    compare(sample_input(2, 8, 3, 3, dtype=torch.float32, seed=1))  # another number of values, another n / (n - 1)
    norms[0].num_batches_tracked = torch.tensor([3.0])  # no integer: PyTorch's operators add to it
    block(image())
    assert norms[0].num_batches_tracked.item() > 3


def test_statistics_made_under_inference_mode_are_moved_there() -> None:
    with torch.inference_mode():
        block, norms = _running("chain")
        block(image())
    assert norms[0].num_batches_tracked == 1


def test_arguments_of_the_mover_are_checked() -> None:
    with pytest.raises(TypeError, match="expected a list"):
        nodes.module.running(())
    with pytest.raises(TypeError, match="expected a tensor, got int"):
        nodes.module.running([(1, 2, 3, 0, 1, 0.1, 1.0)])
    moves = nodes.module.running([(torch.ones(2), torch.ones(2), torch.tensor(0), 0, 2, 0.5, 1.0)])
    with pytest.raises(TypeError, match="expected a tensor, got int"):
        nodes.module.move(moves, 1)
    assert not nodes.module.move(moves, torch.zeros(3))  # shorter than what they read
    assert nodes.module.move(moves, torch.zeros(4))


# ---- when they are taken


def test_hooks_on_saved_tensors_get_the_function() -> None:
    block, x = block_of("ssp3"), image()
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert not takes_node(block(x))
    assert len(seen) > len(list(block.parameters()))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert takes_node(block(x))


def test_forward_mode_gets_the_function() -> None:
    block, x = block_of("ssp3"), image()
    with forward_ad.dual_level():
        assert not takes_node(block(x))
    assert takes_node(block(x))


def test_a_tensor_of_an_ended_transform_gets_the_function() -> None:
    block, x, held = block_of("ssp3"), image(), []
    torch.func.grad(lambda x: (held.append(x), x.sum())[1])(x.detach())
    y = block(held[0].requires_grad_())
    assert torch.equal(y, block(x.detach()))


# ---- what backward is asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_computes_the_same_again(kind: str) -> None:
    block, x = block_of(kind), image()
    y = block(x)
    assert len(nodes.module.kept(y)) > 0 or kind == "ie, detached"
    sources = [x, *block.parameters()]
    first = torch.autograd.grad(y.sum(), sources, retain_graph=True)
    assert nodes.module.kept(y) == ()
    second = torch.autograd.grad(y.sum(), sources)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_between_forward_and_backward_is_refused_as_by_the_function(kind: str) -> None:
    messages = []
    for without in (False, True):
        block, x = block_of(kind), image()
        with nodes.left_out() if without else torch.enable_grad():
            loss = block(x).sum()
        with torch.no_grad():
            block.branch[2].weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as refused:
            loss.backward()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_gradients(kind: str) -> None:
    results = []
    for without in (False, True):
        torch.manual_seed(0)
        block, x = block_of(kind), image()
        seen: list[Tensor] = []
        with nodes.left_out() if without else torch.enable_grad():
            y = block(x)
        y.register_hook(lambda bar: 2 * bar)
        y.grad_fn.register_prehook(lambda bars: tuple(3 * bar for bar in bars))
        y.grad_fn.register_hook(lambda found, bars, seen=seen: seen.extend([*bars, found[0]]))
        block.branch[2].weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))
        y.square().sum().backward()
        results.append([*seen, x.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(results[0]) == 3 + 1 + len(list(block.parameters()))


def test_a_result_that_is_not_used_gives_nothing() -> None:
    block, x = block_of("ssp3"), image()
    y = block(x)
    found = torch.autograd.grad(
        (torch.zeros_like(y) + y.detach() + x).sum(), [x, block.branch[2].weight], allow_unused=True
    )
    assert found[1] is None
    given = y.grad_fn(None)
    assert all(g is None for g in given)


def test_a_direct_call_of_a_node_gives_all_gradients() -> None:
    block, x = block_of("ssp3"), image()
    y = block(x)
    bar = torch.ones_like(y)
    with torch.no_grad():
        given = [g for g in y.grad_fn(bar) if g is not None]
    expected = torch.autograd.grad(block(x), [x, *block.parameters()], bar)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_an_error_in_a_backward_that_python_runs_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Exception):
        pass

    def broken(*_: Any) -> None:
        raise Own("as it was")

    block, x = block_of("ssp3"), image()
    y = block(x)
    monkeypatch.setattr(type(y), "view_as", broken)  # which the reference is run again with
    with pytest.raises(Own, match="as it was"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_anomaly_mode_names_the_node_and_where_it_was_made() -> None:
    block, x = block_of("ssp3"), image()
    with pytest.warns(UserWarning, match="ResidentShuOsherFunctionBackward.*(?s:.)*test_nodes.py"):  # noqa: SIM117
        with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="nan values"):
            block(x).backward(torch.full_like(x, torch.nan))


@pytest.mark.parametrize("kind", ["ie", "ssp3", "chain"])
def test_a_compiled_backward(kind: str) -> None:
    """One trace for each set of numbers, and none that stands for another."""
    block = block_of(kind)
    for seed, change in enumerate((0.1, 0.3, 0.1)):
        if kind != "ssp3":
            block.step_size = change
        x = image(seed=seed)
        expected = gradients(block, x)[1:]
        loss = block(x).square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        found = [x.grad, *(p.grad for p in block.parameters())]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))
        block.zero_grad()


def test_backwards_in_threads_end_and_are_right() -> None:
    block = block_of("ie")
    inputs = [image(seed=seed) for seed in range(4)]
    expected = [gradients(block, x) for x in inputs]
    found: list[list[list[Tensor]]] = [[] for _ in inputs]

    def work(index: int) -> None:
        for turn in range(8):
            found[index].append(gradients(block, inputs[index], create_graph=turn % 4 == 3))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for runs, truth in zip(found, expected, strict=True):
        assert len(runs) == 8
        for turn, run in enumerate(runs):
            for a, b in zip(run, truth, strict=True):
                assert torch.equal(a, b) if turn % 4 != 3 else torch.allclose(a, b, rtol=1e-3, atol=1e-4)


# ---- what they hold


class Features:
    """What a forward hook has read."""

    y: Any = None

    def read(self, module: nn.Module, given: Any, y: Any) -> None:
        self.y = y


@pytest.mark.parametrize("kind", KINDS)
def test_results_that_a_hook_stores_are_freed(kind: str) -> None:
    """The collector does not look into a C++ node, which so must not hold the hook that holds its result."""
    block, features = block_of(kind), Features()
    block.register_forward_hook(features.read)
    block(image())
    assert takes_node(features.y)
    gone = weakref.ref(features), weakref.ref(block)
    del block, features
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("backward", [True, False])
def test_memory_is_freed(backward: bool) -> None:
    block, x = block_of("ssp3"), image()
    y = block(x)
    branch = weakref.ref(block.branch)
    if backward:
        y.sum().backward()
    del block
    gc.collect()
    assert branch() is not None  # a gradient of a gradient may be asked for
    del y
    gc.collect()
    assert branch() is None


# ---- where they are missing


def test_the_switch_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "module", None)
    monkeypatch.setattr(nodes, "_reason", nodes._reason)
    monkeypatch.setenv(nodes.SWITCH, "0")
    assert nodes.load(operators.source_root()) == "FASTODE_CPP_NODES is 0"
    assert nodes.available(operators.source_root()) == (False, "FASTODE_CPP_NODES is 0")
    y = block_of("ssp3")(image())
    assert re.fullmatch("ResidentShuOsherFunctionBackward", type(y.grad_fn).__name__)
