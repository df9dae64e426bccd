"""What forward leaves to backward under a tracer: a ticket, which stands for it once and frees it with itself."""

from __future__ import annotations

import copy
import gc
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import fastode
from fastode import reference
from fastode.dispatch import opaque
from fastode.native import nodes
from fastode.native.constants import KEEP_NOTHING, KEEP_TICKET
from fastode.testing import sample_input

UTILITIES = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def branch(norm: str = "layer") -> nn.Sequential:
    return reference.PreActBranch(8, norm=norm, activation="tanh")


def strided() -> nn.Module:
    layers = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1))
    return reference.ResBlock(layers, shortcut=nn.Conv2d(8, 12, 1, stride=2), post_activation=nn.ReLU())


def pair() -> nn.Module:
    return reference.SkewPair(8, 8, gamma=0.1, activation="tanh")


class PairOfOne(nn.Module):
    """ẏ + ż of a pair at (x, 2x)."""

    def __init__(self) -> None:
        super().__init__()
        self.field = pair()

    def forward(self, x: Tensor) -> Tensor:
        dy, dz = self.field(x, 2 * x)
        return dy + dz


class Classifier(nn.Module):
    """The field of two matrix products, solved from the means of x's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.solution = reference.SOClassifier(8, 3, 0.1, "tanh", solver="rk4", steps=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.solution(x.mean((2, 3)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "ie": lambda: reference.IESkip(branch(), steps=2),
    "ie, batch norm": lambda: reference.IESkip(branch("batch")),
    "ssp3, batch norm": lambda: reference.SSP3(branch("batch")),
    "ark": lambda: reference.Ark(branch("group"), learn_a21=True),
    "a block that halves": strided,
    "a pair": PairOfOne,
    "equal steps": lambda: reference.SOBlock(pair(), solver="rk4", steps=2),
    "a classifier": Classifier,
    "steps by error": lambda: reference.SOBlock(pair(), rtol=1e-3, atol=1e-3),
}


def fused(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    fastode.fuse(block, engine="resident")
    return block


def compiled(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(block, fullgraph=True, backend="aot_eager")


def pulled(block: nn.Module, y: Tensor, x: Tensor, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y), retain_graph=retain))


def gradients(block: nn.Module, call: Callable[[Tensor], Tensor], moved: float = 0.0) -> list[Tensor]:
    """Of x and of the parameters; `moved` is added to what x holds before the backward, unseen by autograd."""
    x = sample_input(3, 8, 6, 6).requires_grad_()
    y = call(x)
    x.data.add_(moved)
    return pulled(block, y, x)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_compiled_backward_uses_what_forward_has_kept_and_a_second_computes_it_again(name: str) -> None:
    block = fused(name)
    twin = copy.deepcopy(block)
    call, x = compiled(twin), sample_input(3, 8, 6, 6).requires_grad_()
    y = call(x)
    first = pulled(twin, y, x, retain=True)
    assert same(first, gradients(block, block))
    assert same(pulled(twin, y, x), first)
    # A backward that computes everything again does so from another x.
    kept = gradients(block, block, 0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        again = gradients(block, block, 0.5)
    if name not in ("a pair", "equal steps", "a classifier", "steps by error"):  # of those the hooks save it, too
        assert not same(again, kept)
    if name == "steps by error":  # whose graph has a copy of x
        kept = gradients(block, block)
    assert same(gradients(twin, call, 0.5), kept)


@pytest.mark.parametrize("name", ["ie", "ssp3, batch norm", "a block that halves", "steps by error"])
def test_a_copy_of_a_ticket_is_as_good(name: str) -> None:
    block = fused(name)
    expected = gradients(block, block)
    held: list[Tensor] = []
    # As an offload to other memory does it: what autograd has is a copy, and what was saved is gone, or is not.
    for keep in (held.append, lambda tensor: None):

        def pack(tensor: Tensor, keep: Callable[[Tensor], None] = keep) -> Tensor:
            keep(tensor)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert same(gradients(block, compiled(block)), expected)
        torch.compiler.reset()
    assert any(tensor.dtype == torch.int64 and tensor.numel() == 1 for tensor in held)


@pytest.mark.parametrize("name", ["ie", "equal steps", "a pair"])
def test_what_hooks_make_of_a_ticket_is_no_ticket(name: str) -> None:
    """A cast of all saved tensors, which loses the number: everything is computed again, from what is left of them."""
    block, x = fused(name), sample_input(3, 8, 6, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        y = compiled(block)(x)
    found = pulled(block, y, x)
    rounded, x = copy.deepcopy(block).half().float(), x.detach().half().float().requires_grad_()
    assert same(found, pulled(rounded, rounded(x), x))


class Between(nn.Module):
    """A solution between maps of whose memory a compiler makes use again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.block = BLOCKS["steps by error"]()

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.first(x) * 1.5 + 0.1) * 0.7 + torch.sin(x.mean(1, keepdim=True))
        return torch.tanh(self.last(torch.relu(self.block(u)) * 2 + 1).cos() + 0.1)


@torch._functorch.config.patch(donated_buffer=False)
def test_a_graph_has_its_memory_for_itself() -> None:
    torch.manual_seed(0)
    model = Between()
    fastode.fuse(model, engine="resident")
    x = sample_input(4, 3, 16, 16).requires_grad_()
    y = torch.compile(model)(x)
    by_graph = pulled(model, y, x, retain=True)
    assert same(by_graph, pulled(model, y, x))  # which computes everything again, from what the compiler has saved


def test_under_checkpoint() -> None:
    block = fused("ie, batch norm")
    twin = copy.deepcopy(block)
    call = torch.compile(lambda x: checkpoint(twin, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    assert same(gradients(twin, call), gradients(block, block))


@pytest.mark.parametrize("name", ["ie", "ark", "a block that halves", "a pair", "equal steps", "a classifier"])
def test_nothing_is_kept_where_no_backward_can_come(name: str) -> None:
    block, x = fused(name), sample_input(3, 8, 6, 6)
    kept: list[int] = []

    def see(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.op == "call_function" and "_forward" in str(node.target) and "fastode" in str(node.target):
                where = [argument.name for argument in node.target._schema.arguments].index("keep")
                kept.append(node.args[where])
        return graph.forward

    def traced(x: Tensor) -> list[int]:
        kept.clear()
        torch.compiler.reset()
        torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=see))(x)
        return kept

    assert traced(x) == [KEEP_TICKET]
    with torch.no_grad():
        assert traced(x) == [KEEP_NOTHING]
    block.requires_grad_(False)
    assert traced(x) == [KEEP_NOTHING]
    assert traced(x.requires_grad_()) == [KEEP_TICKET]


class Seen(torch.fx.Interpreter):
    """A graph that is run node by node, and what the backward operators of blocks return in it."""

    def __init__(self, graph: torch.fx.GraphModule, found: list[Tensor]) -> None:
        super().__init__(graph)
        self.found = found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if "_backward" in str(target):
            self.found += [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        return result


def watched(block: nn.Module, found: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The block compiled; each backward leaves in `found` what its operator has returned."""

    def see(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *given: found.clear() or Seen(graph, found).run(*given)

    def as_it_is(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return graph.forward

    return torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=as_it_is, bw_compiler=see))


def computed(found: list[Tensor]) -> int:
    """How many gradients an operator has made that are not zero."""
    return sum(bool(t.any()) for t in found)


# A learned table is computed in the graph, and so no leaf; a classifier's two matrices are cheap.
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("ark", "a classifier")])
def test_a_compiled_attack_pays_for_no_gradient_of_parameters(name: str) -> None:
    block, found = fused(name), list[Tensor]()
    call, x = watched(block, found), sample_input(3, 8, 6, 6).requires_grad_()
    parameters = [p for p in block.parameters() if p.requires_grad]
    whole = pulled(block, block(x), x)
    (alone,) = torch.autograd.grad(block(x).sum(), x)

    assert same(torch.autograd.grad(call(x).sum(), x), [alone])
    attack = computed(found)
    call(x).sum().backward(inputs=[x])
    assert torch.equal(x.grad, alone) and computed(found) == attack
    x.grad = None
    # Whoever asks for any parameter's gradient, or for all by not saying which, has it.
    for index, parameter in enumerate(parameters):
        assert same(torch.autograd.grad(call(x).sum(), [parameter]), [whole[1 + index]])
    assert same(pulled(block, call(x), x), whole)
    call(x).sum().backward()
    assert same([x.grad, *(p.grad for p in parameters)], whole) and computed(found) > attack


class OfComputed(nn.Module):
    """A block whose convolution's weight is computed in the graph, beside leaves."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.block, self.name = block, name
        self.raw = nn.Parameter(0.5 * block.get_parameter(name).detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.block, {self.name: 2 * self.raw}, (x,))


@pytest.mark.parametrize("name", ["ie", "ssp3, batch norm", "equal steps"])
def test_a_weight_that_the_graph_computes_has_its_gradient(name: str) -> None:
    block = fused(name)
    weight = next(name for name, p in block.named_parameters() if p.dim() == 4)
    model, found = OfComputed(block, weight), list[Tensor]()
    x = sample_input(3, 8, 6, 6).requires_grad_()
    (expected,) = torch.autograd.grad(block(x).sum(), block.get_parameter(weight))
    call = watched(model, found)
    assert same(torch.autograd.grad(call(x).sum(), [model.raw]), [2 * expected])
    assert computed(found) > 1


class StraightThrough(torch.autograd.Function):
    """`hard`, whose gradient `soft` gets."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, bar


class OfEstimated(OfComputed):
    """A block whose weight is one parameter, and its gradient another one's."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__(block, name)
        self.soft = nn.Parameter(torch.zeros_like(self.raw))

    def forward(self, x: Tensor) -> Tensor:
        weight = StraightThrough.apply(self.raw, self.soft)
        return torch.func.functional_call(self.block, {self.name: weight}, (x,))


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("ark", "a classifier")])
def test_a_parameter_under_another_name_is_no_leaf(name: str) -> None:
    block = fused(name)
    weight = next(name for name, p in block.named_parameters() if p.dim() == 4)
    model, x = OfEstimated(block, weight), sample_input(3, 8, 6, 6)
    expected = torch.autograd.grad(model(x).sum(), [model.soft])
    assert bool(expected[0].any())
    assert same(torch.autograd.grad(compiled(model)(x).sum(), [model.soft]), expected)


def test_leaves_that_hooks_replace_have_their_gradients() -> None:
    block = fused("ie")
    expected = gradients(block, block)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = gradients(block, compiled(block))
    assert same(found, expected)


def test_without_a_backward_at_work_nothing_goes_unused() -> None:
    leaf = nn.Parameter(torch.ones(1))
    assert not nodes.go_unused([leaf])
    with nodes.left_out():
        assert not nodes.go_unused([leaf])


class OfMaster(nn.Module):
    """A block whose parameters are written from others' before each call."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.master = block, copy.deepcopy(block)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, other in zip(self.block.parameters(), self.master.parameters(), strict=True):
                parameter.copy_(other)
        return self.block(x)


@pytest.mark.parametrize("name", ["ie", "a block that halves", "equal steps", "steps by error"])
def test_parameters_that_a_graph_writes_have_their_gradients(name: str) -> None:
    """Inductor reads what was copied from, so that the operator is given another leaf than its gradients' own."""
    model, x = OfMaster(fused(name)), sample_input(3, 8, 6, 6).requires_grad_()
    parameters = list(model.block.parameters())
    expected = torch.autograd.grad(model(x).sum(), parameters)
    call = torch.compile(model, fullgraph=True)
    assert all(bool(found.any()) for found in torch.autograd.grad(call(x).sum(), parameters))
    assert same(torch.autograd.grad(call(x).sum(), parameters), expected)
    assert same(torch.autograd.grad(call(x).sum(), x), torch.autograd.grad(model(x).sum(), x))


@pytest.mark.parametrize("name", ["ie", "steps by error"])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_traced_backward_inside_of_another_one_is_whole(name: str) -> None:
    block, x = fused(name), sample_input(3, 8, 6, 6)
    parameters = list(block.parameters())
    alive = block(x)  # whose graph holds the parameters' accumulators

    def inner(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(block(x).square().sum(), parameters))

    expected, found = inner(x), list[Tensor]()
    call, leaf = torch.compile(inner, fullgraph=True, backend="aot_eager"), x.clone().requires_grad_()
    y = 2 * leaf

    def hook(bar: Tensor) -> None:
        with torch.enable_grad():
            found.extend(call(x))

    y.register_hook(hook)
    torch.autograd.grad(y.sum(), leaf)
    assert same(found, expected) and alive.requires_grad


def test_a_solve_by_error_has_no_graph_where_no_backward_can_come() -> None:
    block, x = fused("steps by error"), sample_input(3, 8, 6, 6)
    call = compiled(block)
    with torch.no_grad():
        call(x)
    assert not opaque._graphs
    y = call(x)
    assert len(opaque._graphs) == 1
    del y
    assert not opaque._graphs


def test_an_exported_program_keeps_nothing() -> None:
    block = fused("ie")
    program = torch.export.export(block, (sample_input(3, 8, 6, 6),))
    calls = [node for node in program.graph.nodes if "resident_ie_forward" in str(node.target)]
    assert [node.args[-2] for node in calls] == [KEEP_NOTHING]


def test_what_no_backward_asks_for_is_freed() -> None:
    torch.manual_seed(0)
    block = reference.SSP3(reference.PreActBranch(16, norm="layer"))
    fastode.fuse(block, engine="resident")
    x = sample_input(16, 16, 32, 32).requires_grad_()  # its five maps are 5 MB
    call = compiled(block)

    def calls(count: int) -> None:
        for _ in range(count):
            call(x)
        gc.collect()

    calls(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # of 300 MB, in KB


def test_a_tracer_is_told_of_tickets() -> None:
    """The fakes of every operator with a ticket; those without are in the tests of each family."""
    seen: set[str] = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith("fastode.") and "_forward" in name and name not in seen:
                arguments, where = list(args), [argument.name for argument in func._schema.arguments].index("keep")
                arguments[where] = KEEP_TICKET
                calls.append((func, arguments))
                seen.add(name)
            return func(*args, **(kwargs or {}))

    calls: list[tuple[Any, list[Any]]] = []
    with torch.no_grad(), Record():
        for name in BLOCKS:
            fused(name)(sample_input(3, 8, 6, 6))
    assert len(calls) == 7
    for function, arguments in calls:
        if "raises" in [argument.name for argument in function._schema.arguments]:
            arguments[-1] = True  # a log's length depends on the data
        torch.library.opcheck(function, tuple(arguments), test_utils=UTILITIES)


MOVED = {
    "two momenta": lambda: [nn.BatchNorm2d(8, momentum=0.3), nn.BatchNorm2d(8)],
    "a momentum below and one above a half": lambda: [nn.BatchNorm2d(8, momentum=0.9), nn.BatchNorm2d(8)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norms", MOVED)
def test_running_statistics_move_in_one_operator(norms: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = MOVED[norms]()
    layers = [first, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), second, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    block = reference.SSP3(nn.Sequential(*layers)).to(dtype)
    fastode.fuse(block, engine="resident")
    twin, codes = copy.deepcopy(block), []

    def see(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph.forward

    call = torch.compile(twin, fullgraph=True, backend=see)
    compiled_whole = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    whole = compiled_whole._orig_mod
    x = sample_input(3, 8, 6, 6, dtype=dtype)
    for _ in range(3):
        block(x), call(x), compiled_whole(x)
    assert [code.count("fastode.move_running") for code in codes] == [1]
    for name, buffer in block.named_buffers():
        assert torch.equal(twin.get_buffer(name), buffer) and torch.equal(whole.get_buffer(name), buffer), name
    assert first.num_batches_tracked == 9


def test_batches_may_be_counted_in_floats() -> None:
    block = reference.SSP2(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
    fastode.fuse(block)
    block.branch[0].num_batches_tracked = block.branch[0].num_batches_tracked.float()
    call = compiled(block)
    for _ in range(3):
        call(sample_input(3, 8, 6, 6))
    assert block.branch[0].num_batches_tracked == 6.0
    mean, given = torch.zeros(4), ([torch.ones(4)], [torch.tensor(0.0)], [torch.rand(2, 4)], [0.1], [1.0])
    with pytest.raises(RuntimeError, match="another type"):
        torch.ops.fastode.move_running.default([mean], *given)
    assert not mean.any()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8, momentum=None), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)], ids=type
)
def test_other_running_statistics_are_left_to_pytorch(norm: nn.Module) -> None:
    torch.manual_seed(0)
    block = reference.SSP2(nn.Sequential(copy.deepcopy(norm), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
    fastode.fuse(block)
    twin, x = copy.deepcopy(block), sample_input(3, 8, 6, 6)
    call = compiled(twin)
    for _ in range(2):
        block(x), call(x)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, msg=name)


def test_an_operator_that_moves_says_what_it_writes() -> None:
    move = torch.ops.fastode.move_running.default
    mean, variance, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    given = ([mean], [variance], [count], [torch.rand(2, 4), torch.rand(2, 4)], [0.1], [1.5])
    torch.library.opcheck(move, given, test_utils=UTILITIES)
    with pytest.raises(RuntimeError, match="other channels than its own"):
        move([mean], [variance], [count], [torch.rand(2, 3)], [0.1], [1.5])
