"""What a call does once, not at every pass: conversions, coefficients, sums of gradients, running averages."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastode
from fastode.branch.read import read
from fastode.dispatch import running
from fastode.native import cuda
from fastode.ops import maps
from fastode.ops.plan import Gradients

aten = torch.ops.aten


class Converted(TorchDispatchMode):
    """How often each tensor is converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is aten._to_copy.default:
            self.counts[id(arguments[0])] += 1
        return function(*arguments, **(keywords or {}))


def branch(norm: str = "batch") -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers)


def pair(norm: str) -> nn.Module:
    torch.manual_seed(3)
    return fastode.nn.SkewPair(8, 8, norm=norm, gamma=0.1)


BLOCKS = {
    "ssp3": (lambda norm: fastode.nn.SSP3(branch(norm)), 1),
    "ie": (lambda norm: fastode.nn.IESkip(branch(norm), 2, 0.1), 1),
    "pair": (pair, 2),
    "march": (lambda norm: fastode.nn.SOBlock(pair(norm), solver="rk4"), 1),
}


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_parameter_is_converted_once_forwards_and_once_backwards(name: str, norm: str, lowered: bool) -> None:
    make, inputs = BLOCKS[name]
    block = make(norm).to(torch.float32 if lowered else torch.bfloat16)
    block.engine = "staged"
    dtype = torch.float32 if lowered else torch.bfloat16
    given = [torch.randn(2, 8, 5, 5, dtype=dtype, requires_grad=True) for _ in range(inputs)]
    with Converted() as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            outputs = block(*given)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    counts = {key: seen.counts[id(parameter)] for key, parameter in block.named_parameters()}
    assert max(counts.values()) == 2, counts


def test_fixed_statistics_are_made_once_of_a_call() -> None:
    block = fastode.nn.SSP3(branch()).eval()
    plan = block.describe_call((torch.randn(2, 8, 5, 5),)).program
    tensors = maps.converted(plan, block.describe_call().tensors, torch.float32)
    first = maps.fixed_statistics(tensors, 0, torch.float32)
    assert maps.fixed_statistics(tensors, 0, torch.bfloat16) is first
    assert maps.fixed_statistics(tensors, 0, torch.float64).dtype == torch.float64
    assert maps.fixed_statistics(tensors, 6, torch.float32) is not first
    again = maps.converted(plan, block.describe_call().tensors, torch.float32)
    block.branch[0].running_mean.add_(1)  # between two calls
    torch.testing.assert_close(maps.fixed_statistics(again, 0, torch.float32)[0], first[0] + 1, rtol=0, atol=0)


def test_coefficients_are_kept_where_they_may_be() -> None:
    made = maps.coefficients(0.5, -1.25)
    assert maps.coefficients(0.5, -1.25) is made
    assert made.tolist() == [0.5, -1.25] and made.dtype == torch.float64
    assert maps.coefficients(0.5, -1.0) is not made
    with FakeTensorMode():
        assert isinstance(maps.coefficients(0.5, -1.25), FakeTensor)
        assert isinstance(maps.coefficients(0.75, 3.5), FakeTensor)
    assert not isinstance(maps.coefficients(0.75, 3.5), FakeTensor)
    with torch.inference_mode():
        inside = maps.coefficients(0.125, 7.0)
    assert not inside.is_inference()


def test_ever_new_coefficients_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_MOST_COEFFICIENTS", 3)
    monkeypatch.setattr(maps, "_coefficients", {})
    for value in range(10):
        assert maps.coefficients(float(value)).item() == value
        assert len(maps._coefficients) <= 3


@pytest.mark.parametrize("learned", [False, True])
def test_rows_of_a_table(learned: bool) -> None:
    table = torch.rand(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(learned)
    places = [None, (0, 1, 2), (1, 2, 0)]
    wanted = [1.0, table[0, 1, 2].item(), table[1, 2, 0].item()]
    assert maps.rows_of(table)(places).tolist() == wanted
    with FakeTensorMode() as mode:  # as of a card: never read
        assert maps.rows_of(mode.from_tensor(table))(places).shape == (3,)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_gradients_are_the_sums_in_order(rounds: int) -> None:
    generator = torch.Generator().manual_seed(rounds)
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32]
    tensors = [torch.zeros(7, dtype=dtype) for dtype in dtypes]
    wanted = [True, True, False, True, True]
    grads, plain = Gradients(tensors, wanted), [None] * 5
    for turn in range(rounds):
        for index, tensor in enumerate(tensors):
            if index == 4 and turn % 2:  # not found in every evaluation
                continue
            gradient = torch.randn(7, generator=generator).to(tensor.dtype)
            grads.add(index, gradient, -0.3)
            plain[index] = gradient * -0.3 if plain[index] is None else plain[index] + gradient * -0.3
    found = grads.result()
    assert found[2] is None
    for index in (0, 1, 3, 4):
        assert found[index].dtype == dtypes[index] and torch.equal(found[index], plain[index])


def test_a_sum_of_several_dtypes() -> None:
    first, second = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-12])
    grads = Gradients([torch.zeros(1)], [True])
    grads.add(0, first)
    grads.add(0, second)
    assert torch.equal(grads.result()[0], first + second)
    assert torch.equal(first, torch.ones(1, dtype=torch.bfloat16))  # what was given is left as it was


NORMS = {
    "batch": lambda: [nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
    "instance": lambda: [nn.InstanceNorm2d(4, track_running_stats=True), nn.BatchNorm2d(4)],
    "cumulative": lambda: [nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None)],
    "two factors": lambda: [nn.BatchNorm2d(4, momentum=0.7), nn.BatchNorm2d(4)],
    "cumulative and not": lambda: [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True, momentum=None)],
    "large factor": lambda: [nn.BatchNorm2d(4, momentum=0.7), nn.BatchNorm2d(4, momentum=0.7)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", NORMS)
def test_running_averages_move_as_one_after_the_other(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    reading, twin = (
        read(nn.Sequential(*[m.to(dtype) for norm in NORMS[kind]() for m in (norm, nn.Conv2d(4, 4, 1))])) for _ in "ab"
    )
    size = 3, 10  # samples and pixels
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    statistics = []
    for norm in reading.norms * 3:
        sets = (2, 3, 4) if isinstance(norm, nn.InstanceNorm2d) else (2, 4)
        statistics.append(torch.rand(sets, dtype=wide, generator=generator))
    running.move_running(reading.norms, statistics, [size] * len(reading.norms))
    for norm, stats in zip(twin.norms * 3, statistics, strict=True):
        running._move(norm, *running._met(norm, stats, size))
    for norm, other in zip(reading.norms, twin.norms, strict=True):
        for (name, buffer), wanted in zip(norm.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(buffer, wanted), name
            assert not torch.equal(buffer, torch.zeros_like(buffer)) or isinstance(norm, nn.InstanceNorm2d)


def test_operators_are_called_directly_where_nothing_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.zeros(1), SimpleNamespace()
    assert cuda.operators(x) is torch.ops.fastode
    monkeypatch.setattr(cuda, "direct", {"cpu": plain})
    assert cuda.operators(x) is plain
    assert cuda.operators(torch.zeros(1, device="meta")) is torch.ops.fastode
    with Converted():
        assert cuda.operators(x) is torch.ops.fastode
    with FakeTensorMode():
        assert cuda.operators(x) is torch.ops.fastode
    with torch.profiler.profile():
        assert cuda.operators(x) is torch.ops.fastode
    found: list[Any] = []
    torch.jit.trace(lambda x: (found.append(cuda.operators(x)), x + 1)[1], (x,), check_trace=False)
    assert found == [torch.ops.fastode]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cuda.operators(x) is torch.ops.fastode
