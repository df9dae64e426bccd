"""The skew field of two matrix products, and its solution, as one operator each way: that they equal the reference."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from called import Names
from second_derivatives import compare_second_derivatives
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import fastode
from fastode import SolveError, Solver, reference
from fastode.dispatch import choice
from fastode.dispatch.engines import BY_NAME
from fastode.dispatch.linear import read_linear
from fastode.native import nodes
from fastode.ops.resident.linear import encode
from fastode.ops.resident.solve import solver_code
from fastode.reference.adaptive import MOST_GROWTH, MOST_SHRINKAGE, integrate, next_factor
from fastode.reference.solvers import without_time
from fastode.steps import Watch
from fastode.testing import MODES, assert_blocks_equal

F32, F64 = torch.float32, torch.float64
UTILITIES = ("test_schema", "test_faketensor")
(ENGINE,) = (name for name, engine in BY_NAME.items() if "linear_solution" in vars(type(engine)))

# Features, classes, γ, activation, whether it is the released field, and the solver. A first step of 2 is too long for
# its tolerance, so that it is rejected; dopri8 has it: where it meets a tolerance by far its error is rounding.
CASES: list[tuple[int, int, float, str, bool, dict[str, Any]]] = [
    (8, 3, 0.0, "leaky_relu", False, {"method": "dopri5"}),
    (48, 16, 0.3, "tanh", True, {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}),
    (33, 17, 0.1, "softplus", False, {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3}),
    (1, 1, 0.2, "elu", True, {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-3, "first_step": 2.0}),
    (16, 9, 0.0, "silu", False, {"method": "fehlberg2", "t1": 2.0}),
    (20, 10, 0.4, "tanh", False, {"method": "dopri8", "rtol": 1e-6, "atol": 1e-6, "t1": 2.0, "first_step": 2.0}),
    (12, 4, 0.0, "relu", True, {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "t1": 0.6}),
]
# Its first step is rejected, and the next one by an error whose cotangent the way back needs.
REJECTED = (*CASES[3][:-1], {**CASES[3][-1], "gradient": "exact"})
FIXED: list[tuple[int, int, float, str, bool, dict[str, Any]]] = [
    (8, 3, 0.0, "leaky_relu", False, {"method": "euler"}),
    (17, 33, 0.3, "tanh", True, {"method": "euler", "steps": 3, "t1": 0.7}),
    (16, 16, 0.0, "softplus", True, {"method": "midpoint", "steps": 2}),
    (40, 10, 0.2, "elu", False, {"method": "rk4", "steps": 2}),
    (5, 2, 0.0, "silu", False, {"method": "rk4"}),
]


def block_of(case: tuple[int, int, float, str, bool, dict[str, Any]], dtype: torch.dtype, **more: Any) -> nn.Module:
    features, classes, gamma, activation, released, options = case
    torch.manual_seed(0)
    solver = Solver(**{**options, **more})
    return reference.SOClassifier(features, classes, gamma, activation, released, solver=solver).to(dtype)


def input_of(block: nn.Module, batch: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = block.field.weight
    return 2 * torch.randn(batch, weight.shape[1], dtype=weight.dtype, generator=generator)


def fused(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block)
    fastode.fuse(twin, engine=ENGINE)
    return twin


@pytest.mark.parametrize("gradient", ["solver", "constant", "exact"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_equals_the_reference(case: int, dtype: torch.dtype, gradient: str) -> None:
    block = block_of(CASES[case], dtype, gradient=gradient)
    assert_blocks_equal(block, fused(block), input_of(block), mode=("train", "input_grad"))


@pytest.mark.parametrize("case", FIXED)
def test_by_equal_steps_it_equals_the_reference(case: Any) -> None:
    for dtype in (F32, F64):
        block = block_of(case, dtype)
        assert_blocks_equal(block, fused(block), input_of(block), mode=MODES)


# Those whose error is not rounding, which a sample alone has more of.
@pytest.mark.parametrize("case", [1, 2, 3, 6])
def test_samples_alone_equal_the_reference(case: int) -> None:
    for dtype, gradient in itertools.product((F32, F64), ("solver", "constant", "exact")):
        block = block_of(CASES[case], dtype, gradient=gradient, per_sample=True)
        assert_blocks_equal(block, fused(block), input_of(block, 3), mode="train")


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "softplus", "gelu", "sigmoid"])
def test_the_field_alone_equals_the_reference(activation: str, released: bool) -> None:
    for (features, classes), gamma, dtype in itertools.product(((8, 3), (33, 16)), (0.0, 0.3), (F32, F64)):
        field = reference.SkewLinear(features, classes, gamma, activation, released).to(dtype)
        state = torch.randn(5, classes, dtype=dtype), torch.randn(5, features, dtype=dtype)
        assert_blocks_equal(field, fused(field), state, mode=MODES)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("gamma", "released"), [(0.0, False), (0.2, False), (0.0, True)])
def test_one_slope_has_the_gradients_that_it_depends_on(gamma: float, released: bool, which: int) -> None:
    field = reference.SkewLinear(6, 3, gamma, "tanh", released).double()
    found = []
    for each in (field, fused(field)):
        state = [torch.ones(2, size, dtype=F64, requires_grad=True) for size in (3, 6)]
        leaves = [*state, *each.parameters()]
        found.append(torch.autograd.grad(each(*state)[which].square().sum(), leaves, allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_takes_the_same_steps(case: int) -> None:
    for alone in (False, True):
        block = block_of(CASES[case], F64, per_sample=alone)
        x = input_of(block, 2)
        with fastode.record_steps() as log, torch.no_grad():
            block(x), fused(block)(x)
        half = len(log) // 2
        assert half == (2 if alone else 1)
        for one, other in zip(log[:half], log[half:], strict=True):
            assert other.times == pytest.approx(one.times, rel=1e-7)
            assert (other.evaluations, len(other.rejected)) == (one.evaluations, len(one.rejected))
            assert (other.block, other.solver, other.sample) == (one.block, one.solver, one.sample)


def test_a_solution_is_one_operator_each_way() -> None:
    for case, alone in ((CASES[0], False), (CASES[0], True), (REJECTED, False), (REJECTED, True), (FIXED[3], False)):
        block = fused(block_of(case, F32, per_sample=alone))
        x = input_of(block).requires_grad_()
        with Names() as names:
            y = block(x)
        names.called.pop("detach", None)
        assert names.called == {"resident_linear_solve_forward": 1}
        bar = torch.ones_like(y)
        with Names() as names:
            torch.autograd.grad(y, [x, *block.parameters()], bar)
        names.called.pop("detach", None)
        assert names.called == {"resident_linear_solve_backward": 1}


@pytest.mark.parametrize("gradient", ["solver", "constant", "exact"])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_a_gradient_may_be_differentiated(case: int, gradient: str) -> None:
    block = block_of(CASES[case], F64, gradient=gradient)
    solver = block.settings

    def plain(x: Tensor) -> Tensor:
        return integrate(without_time(block.field), block.field.initial_state(x), solver, Watch("", solver))[0]

    compare_second_derivatives(block, plain, fused(block), input_of(block))


@pytest.mark.parametrize("case", [FIXED[1], FIXED[3]])
def test_a_gradient_by_equal_steps_may_be_differentiated(case: Any) -> None:
    block = block_of(case, F64)
    compare_second_derivatives(block, block, fused(block), input_of(block))
    compare_second_derivatives(block.field, slopes_of(block.field), fused(block).field, input_of(block), slope_sum)


def slope_sum(field: nn.Module, x: Tensor) -> Tensor:
    """A number that depends on both slopes of a field alone."""
    dy, dz = field(*field.initial_state(x))
    return dy.square().sum() + dz.square().sum()


def slopes_of(field: nn.Module) -> Callable[[Tensor], Tensor]:
    return functools.partial(slope_sum, field)


NODES: list[tuple[Any, bool]] = [
    *((CASES[0], False), (CASES[1], True), (REJECTED, False), (REJECTED, True)),
    *((FIXED[0], False), (FIXED[1], False)),
]


@pytest.mark.parametrize(("case", "alone"), NODES)
def test_its_nodes_give_what_the_functions_give(case: Any, alone: bool) -> None:
    block = fused(block_of(case, F64, per_sample=alone))
    x = input_of(block).requires_grad_()
    y = torch.randn(5, block.field.weight.shape[0], dtype=F64, requires_grad=True)
    parameters = list(block.parameters())

    def run(node: bool) -> list[Tensor | None]:
        end, slopes = block(x), block.field(y, x)
        assert all((type(t.grad_fn).__name__ == "CppFunction") == node for t in (end, *slopes))
        found: list[Tensor | None] = [end.detach(), *(slope.detach() for slope in slopes)]
        for asked in ([x], parameters, [x, *parameters]):
            bar = torch.ones_like(end)
            found += torch.autograd.grad(end, asked, bar, retain_graph=True, allow_unused=True)
        many = torch.stack([torch.ones_like(end), end.detach()])
        found += torch.autograd.grad(end, [x], many, is_grads_batched=True)
        for outputs in (slopes, slopes[:1], slopes[1:]):
            bars, leaves = [slope.detach() for slope in outputs], [y, x, *parameters]
            found += torch.autograd.grad(outputs, leaves, bars, retain_graph=True, allow_unused=True)
        return found

    ours = run(True)
    with nodes.left_out():
        theirs = run(False)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [CASES[1], REJECTED, FIXED[1]])
def test_a_compiled_backward(case: Any) -> None:
    block = fused(block_of(case, F64))
    x = input_of(block).requires_grad_()
    sources = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), sources)
    loss = block(x).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close([source.grad for source in sources], list(expected))


@pytest.mark.parametrize("case", [CASES[2], REJECTED, FIXED[2]])
def test_the_functions_stand_alone(case: Any) -> None:
    with nodes.left_out():
        block = block_of(case, F64)
        assert_blocks_equal(block, fused(block), input_of(block), mode="train")
        compare_second_derivatives(block.field, slopes_of(block.field), fused(block).field, input_of(block), slope_sum)


def test_the_cases_have_every_way_from_an_error_to_a_size() -> None:
    found = set()
    for case in CASES:
        block = block_of(case, F64)
        x, slopes = input_of(block).requires_grad_(), []
        for gradient in ("solver", "exact"):
            block.gradient = gradient
            with fastode.record_steps() as log:
                slopes += torch.autograd.grad(block(x).square().sum(), x)
        # What the sizes add is far above what the rule allows.
        assert (slopes[1] - slopes[0]).norm() > 1e-5 * slopes[0].norm()
        for accepted, ratios in ((True, log[0].ratios[:-1]), (False, [ratio for *_, ratio in log[0].rejected])):
            for ratio in ratios:
                factor = next_factor(ratio, block.settings.tableau.order)
                found.add((accepted, factor if factor in (1.0, MOST_GROWTH, MOST_SHRINKAGE) else None))
    assert found == {(True, None), (True, 1.0), (True, MOST_GROWTH), (False, None), (False, MOST_SHRINKAGE)}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("released", [False, True])
# Not dopri8: its error is rounding here (docs/limits.md), and so is a quotient of sizes that it decides.
@pytest.mark.parametrize("method", sorted(fastode.embedded.EMBEDDED.keys() - {"dopri8"}))
def test_its_exact_gradient_is_the_difference_quotient(method: str, released: bool, per_sample: bool) -> None:
    torch.manual_seed(0)
    tolerance = 1e-9 if method == "dopri5" else 1e-3
    solver = Solver(method, tolerance, tolerance, gradient="exact", per_sample=per_sample, t1=2.0)
    twin = fused(reference.SOClassifier(9, 4, 0.1, "tanh", released, solver=solver).double())
    x = input_of(twin, 2).requires_grad_()
    with fastode.record_steps() as log:
        twin(x)
    order = twin.settings.tableau.order
    assert any(1 < next_factor(ratio, order) < MOST_GROWTH for ratio in log[0].ratios[:-1])
    assert torch.autograd.gradcheck(lambda x, *_: twin(x), (x, *twin.parameters()), fast_mode=True)


@pytest.mark.parametrize("released", [False, True])
def test_its_gradient_is_the_difference_quotient_where_no_size_depends_on_the_input(released: bool) -> None:
    # At these tolerances every step is ten times as long as the one before.
    solvers = [Solver(rtol=1e3, atol=1e3, first_step=0.05, gradient="constant"), Solver("rk4", steps=2)]
    for solver in solvers:
        twin = fused(reference.SOClassifier(9, 4, 0.1, "tanh", released, solver=solver).double())
        x = input_of(twin, 2).requires_grad_()
        with fastode.record_steps() as log:
            twin(x)
        assert not solver.is_adaptive or log[0].times == pytest.approx((0.0, 0.05, 0.55, 5.55))
        assert torch.autograd.gradcheck(lambda x, *_, twin=twin: twin(x), (x, *twin.parameters()), fast_mode=True)
    field, y = twin.field, torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, z, *_: field(y, z), (y, x, *field.parameters()), fast_mode=True)


@pytest.mark.parametrize("gradient", ["solver", "exact"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_bits_depend_neither_on_the_threads_nor_on_what_memory_held(alone: bool, gradient: str) -> None:
    block = fused(block_of(CASES[2], F32, per_sample=alone, gradient=gradient))
    field, x = block.field, input_of(block, 37).requires_grad_()
    y = torch.randn(37, 17)

    def run() -> list[Tensor]:
        end, slopes = block(x), field(y, x)
        leaves = [x, *block.parameters()]
        bars = torch.autograd.grad(end.square().sum(), leaves)
        return [end.detach(), *bars, *torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)]

    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    first = run()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
        torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN, scratch included
        assert torch.empty(3).isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


def test_inputs_and_parameters_may_lie_in_any_way() -> None:
    for solver in (Solver("bosh3", rtol=1e-3, atol=1e-3), Solver("midpoint")):
        block = reference.SOClassifier(16, 5, 0.1, "tanh", True, solver=solver).double()
        block.field.weight = nn.Parameter(block.field.weight.detach().t().contiguous().t())
        wide = torch.randn(6, 40, dtype=F64)
        for x in (wide[:, 3:19], wide[:, ::2][:, :16], torch.randn(16, 6, dtype=F64).t(), wide[:1, :16].expand(6, 16)):
            assert_blocks_equal(block, fused(block), x, mode="train")


def test_what_changes_between_two_calls_is_seen() -> None:
    block = block_of(CASES[1], F64)
    twin, x = fused(block), input_of(block)

    def agree() -> Tensor:
        expected = block(x)
        torch.testing.assert_close(twin(x), expected, rtol=1e-9, atol=1e-9)
        return expected

    before = agree()
    changes: list[Callable[[nn.Module], None]] = [
        lambda block: setattr(block.field, "gamma", 0.7),
        lambda block: setattr(block.field, "activation", nn.Softplus(2.0)),
        lambda block: setattr(block.field.activation, "beta", 3.0),
        lambda block: block.field.weight.data.mul_(1.5),
        lambda block: setattr(block.field, "bias_y", nn.Parameter(torch.ones(16, dtype=F64))),
        lambda block: setattr(block, "rtol", 1e-5),
        lambda block: setattr(block, "first_step", 0.03),
        lambda block: setattr(block, "t1", 0.4),
        lambda block: setattr(block, "solver", "rk4"),
        lambda block: setattr(block, "steps", 3),
    ]
    for change in changes:
        change(block), change(twin)
        after = agree()
        assert not torch.equal(after, before)
        before = after
    weights = {name: 0.5 * parameter for name, parameter in block.named_parameters()}
    found = torch.func.functional_call(twin, weights, (x,))
    torch.testing.assert_close(found, torch.func.functional_call(block, weights, (x,)))


def test_it_fails_as_the_reference_does() -> None:
    options: list[tuple[dict[str, Any], float]] = [
        ({"max_steps": 1, "first_step": 0.3}, 1.0),
        ({}, float("nan")),
        ({"first_step": 0.1}, float("inf")),
        ({"first_step": 0.1}, float("nan")),
        ({"max_steps": 1, "first_step": 0.1}, float("nan")),
    ]
    for (changes, factor), alone in itertools.product(options, (False, True)):
        block = reference.SOClassifier(6, 3, solver=Solver(rtol=1e-6, atol=1e-6, per_sample=alone, **changes)).double()
        x = input_of(block, 2)
        x[-1] *= factor
        found = []
        for solve in (block, fused(block)):
            with pytest.raises(SolveError) as caught:
                solve(x)
            found.append(caught.value)
        assert (found[0].block, found[0].reason, found[0].t, found[0].h) == (
            found[1].block,
            found[1].reason,
            found[1].t,
            pytest.approx(found[1].h, nan_ok=True),
        )
    block = reference.SOClassifier(6, 3, solver="euler")
    assert torch.equal(
        fused(block)(torch.full((1, 6), torch.inf)).isnan(), block(torch.full((1, 6), torch.inf)).isnan()
    )


def test_what_is_not_fused_runs_as_the_reference_and_says_why() -> None:
    block, x = reference.SOClassifier(6, 3), torch.randn(2, 6)
    fastode.fuse(block)
    assert block.why_not(ENGINE, x) == "" and block.why_not(ENGINE) == "" and block.against(ENGINE, x) == ""
    with choice.recording() as used:
        block(x)
    assert used == {block: ENGINE, block.field: ENGINE}
    for name in BY_NAME:
        if name != ENGINE and BY_NAME[name].devices == ("cpu", "cuda"):
            reason = "it has skew fields of convolutions, and none of two matrix products"
            assert block.why_not(name, x) == block.field.why_not(name, torch.zeros(2, 3), x) == reason
    half = copy.deepcopy(block).bfloat16()
    reason = "it has the field of two matrix products in float32 and float64, and not in torch.bfloat16"
    assert half.why_not(ENGINE, x.bfloat16()) == reason
    with torch.autocast("cpu", torch.bfloat16):
        assert block.why_not(ENGINE, x) == "it does not lower matrix products as autocast asks"
    for block.gradient in ("constant", "exact"):
        assert block.why_not(ENGINE, x) == ""
        with choice.recording() as used:
            block(x)
        assert used == {block: ENGINE, block.field: ENGINE}
    large = fastode.nn.SOClassifier(4096, 80)
    assert large.why_not(ENGINE, torch.zeros(1, 4096)) == ""
    assert "KB" in large.against(ENGINE, torch.zeros(1, 4096))
    block.field.activation = nn.PReLU()
    assert block.why_not(ENGINE, x) == "activation (PReLU) is of a type the reader does not know."


def test_autocast_and_empty_batches_are_the_references() -> None:
    for solver in (Solver("rk4"), Solver(rtol=2.0, atol=2.0)):
        block = reference.SOClassifier(8, 3, 0.1, "tanh", solver=solver)
        twin = copy.deepcopy(block)
        fastode.fuse(twin)
        assert_blocks_equal(block, twin, torch.randn(4, 8), autocast=torch.bfloat16)
        assert_blocks_equal(block, twin, torch.randn(0, 8))
        x = torch.randn(3, 8)
        mapped = torch.func.vmap(lambda x, twin=twin: twin(x[None])[0])(x) if solver.name == "rk4" else twin(x)
        torch.testing.assert_close(mapped, block(x))
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), block(x))
        with torch.no_grad():
            assert twin(x).grad_fn is None


def test_what_compiles_is_one_graph() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    blocks: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (reference.SOClassifier(8, 3, 0.1, "tanh", solver="rk4"), (x,)),
        (reference.SOClassifier(8, 3, 0.1, "tanh", released=True), (x,)),
        (reference.SOClassifier(8, 3, 0.1, "tanh", rtol=1e-3, atol=1e-3, gradient="exact"), (x,)),
        (reference.SkewLinear(8, 3, 0.1, "tanh", released=True), (torch.randn(3, 3), x)),
    ]
    for block, inputs in blocks:
        twin = fused(block)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(twin), backend="aot_eager", fullgraph=True)
        sums = []
        for call in (twin, compiled):
            found = call(*inputs)
            sums.append(found.sum() if isinstance(found, Tensor) else found[0].sum() + found[1].sum())
        torch.testing.assert_close(*sums)
        torch.testing.assert_close(*[torch.autograd.grad(total, x) for total in sums])


@pytest.mark.parametrize("released", [False, True])
def test_a_tracer_is_told_what_the_operators_return(released: bool) -> None:
    field = reference.SkewLinear(6, 3, 0.1, "tanh", released).requires_grad_(False)
    reading = read_linear([field.weight, field.bias_y, field.bias_z], 0.1, field.activation, released, field.initial)
    code = encode(reading.call("", "").program, reading.tensors)
    y, x = torch.ones(4, 3), torch.ones(4, 6)
    ops = torch.ops.fastode
    torch.library.opcheck(ops.resident_linear_forward.default, (y, x, *code), test_utils=UTILITIES)
    for wanted in (False, True):
        given = (y, x, y, None, *code, wanted, not wanted, wanted)
        torch.library.opcheck(ops.resident_linear_backward.default, given, test_utils=UTILITIES)
    for solver in (Solver(), Solver("rk4", steps=2)):
        solves = (*code, *solver_code(solver))
        for raises in (False, True):
            given = (x, *solves, False, 0, raises)
            torch.library.opcheck(ops.resident_linear_solve_forward.default, given, test_utils=UTILITIES)
        _, log, _ = ops.resident_linear_solve_forward.default(*given)
        for through, wanted in ((1, False), (2, True)):
            given = (x, y, log, [], *solves, through, wanted)
            torch.library.opcheck(ops.resident_linear_solve_backward.default, given, test_utils=UTILITIES)
