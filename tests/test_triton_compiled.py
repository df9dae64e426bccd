"""Launches of kernels that were compiled before, without a card: compiled for one, with a driver that writes down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_triton import BATCH, GROUP
from torch import nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature

from benchmarks import kernels
from fastode.ops.triton import compiled, launch, passes
from fastode.ops.triton.value import value_apply_kernel

HOPPER = GPUTarget("cuda", 90, 32)
FIRST = 90  # no machine has so many cards: what Triton keeps of these is in nobody's way


class Launcher:
    """What a card would be told: (launcher, grid, stream, function, arguments) of each launch."""

    told: list[tuple[Any, ...]]

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, *arguments: Any) -> None:
        *grid, stream, function, _, launch_metadata, enter, leave = arguments[:9]
        if enter is not None:
            enter(launch_metadata)
        self.told.append((self, tuple(grid), stream, function, arguments[9:]))
        if leave is not None:
            leave(launch_metadata)


class Card:
    """A driver for cards that are not there."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.device = FIRST
        self.loaded = itertools.count(1)
        properties = {"max_shared_mem": 1 << 18}
        self.utils = SimpleNamespace(load_binary=self.load, get_device_properties=lambda device: properties)

    def load(self, *binary: Any) -> tuple[None, int, int, int, int]:
        return None, next(self.loaded), 32, 0, 1024  # no module, so that there is none to unload

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return HOPPER


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    made = Card()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(Launcher, "told", [], raising=False)
    compiled._found.clear()
    yield made
    compiled._found.clear()
    for kernel in (value_apply_kernel, small_kernel):
        for device in (FIRST, FIRST + 1):
            kernel.device_caches.pop(device, None)


@triton.jit(do_not_specialize=["size"])
def small_kernel(out, terms, scale: tl.float64, size, count, bias, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One of each kind of argument."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, ACC)
    for i in tl.static_range(len(terms)):
        total += terms[i].to(ACC) if terms[i].dtype.is_floating() else tl.load(terms[i] + at % size).to(ACC)
    if bias is not None:
        total += count
    tl.store(out + at, (total * scale).to(out.dtype.element_ty))


x, y = (torch.zeros(64) for _ in range(2))
PLAIN: dict[str, Any] = {
    "out": x, "terms": (x, y), "scale": 1.0, "size": 64, "count": 5, "bias": None,
    "BLOCK": 16, "ACC": tl.float32, "warps": 1,
}  # fmt: skip
# Facts of a call on which Triton compiles another kernel.
OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"out": x.to(torch.bfloat16)},
    "alignment": {"out": x[1:]},
    "dtype in a tuple": {"terms": (x, y.double())},
    "alignment in a tuple": {"terms": (x[1:], y)},
    "length of a tuple": {"terms": (x,)},
    "numbers in a tuple": {"terms": (0.5, 0.25)},
    "tuple in a tuple": {"terms": ((x, y),)},
    "None in a tuple": {"terms": (x, None)},
    "what a tuple in a tuple holds": {"terms": ((x,), y)},
    "a tuple and a number": {"count": (1,), "bias": 7},
    "a number and a tuple": {"count": 1, "bias": (7,)},
    "a tensor for None": {"bias": x},
    "a number for a tensor": {"bias": 1.5},
    "a bool": {"bias": True},
    "one": {"count": 1},
    "a multiple of 16": {"count": 32},
    "beyond 32 bits": {"count": 5 + 2**32},
    "beyond 63 bits": {"count": 5 + 2**63},
    "below 32 bits": {"count": -(2**31) - 1},
    "float for int": {"count": 5.0},
    "bool for int": {"count": True},
    "size beyond 32 bits": {"size": 64 + 2**32},
    "constant": {"BLOCK": 32},
    "constant dtype": {"ACC": tl.float64},
    "warps": {"warps": 2},
    "an option": {"num_stages": 2},
    "another option": {"maxnreg": 64},
}  # fmt: skip
# Other calls of the same kernel.
SAME: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tensors": {"out": y, "terms": (y, x)},
    "a parameter": {"out": nn.Parameter(x)},
    "a number": {"scale": 3.0},
}


def split(call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Arguments, constants and warps of a call of small_kernel."""
    rest = dict(call)
    arguments = tuple(rest.pop(name) for name in small_kernel.arg_names[:6])
    warps = rest.pop("warps")
    return arguments, rest, warps


def key(call: dict[str, Any]) -> tuple[Any, ...]:
    """What `run` looks a call up under."""
    made = object.__new__(triton.compiler.CompiledKernel)
    made._run = made.module = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Card())
        patch.setattr(compiled, "_found", {})
        patch.setattr(triton.compiler.CompiledKernel, "run", None)
        patch.setattr(triton.JITFunction, "run", lambda self, *arguments, **keywords: made)
        compiled.run(small_kernel, 3, *split(call))
        (found,) = compiled._found
    return found


def of_triton(call: dict[str, Any]) -> str:
    """What Triton looks it up under."""
    arguments, constants, warps = split(call)
    bind = create_function_from_signature(small_kernel.signature, small_kernel.params, make_backend(HOPPER))
    _, specialization, options = bind(*arguments, **constants, num_warps=warps)
    return f"{specialization} {options}"


@pytest.mark.parametrize("fact", OTHERS)
def test_what_triton_distinguishes_has_a_key_of_its_own(fact: str) -> None:
    call = PLAIN | OTHERS[fact]
    assert of_triton(call) != of_triton(PLAIN)  # or the row would show nothing
    rows = {name: PLAIN | other for name, other in OTHERS.items() if name != fact}
    for other in (PLAIN, *rows.values()):
        if of_triton(call) != of_triton(other):
            assert key(call) != key(other)


@pytest.mark.parametrize("name", SAME)
def test_the_same_call_has_the_same_key(name: str) -> None:
    call = PLAIN | SAME[name]
    assert of_triton(call) == of_triton(PLAIN)
    assert key(call) == key(PLAIN)


def run(call: dict[str, Any], programs: int = 3) -> tuple[Any, ...]:
    """A launch, and what the card was told of it."""
    before = len(Launcher.told)
    compiled.run(small_kernel, programs, *split(call))
    assert len(Launcher.told) == before + 1
    return Launcher.told[-1]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every launch that goes Triton's own way."""
    seen: list[Any] = []
    real = triton.JITFunction.run

    def keeping(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(self)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(triton.JITFunction, "run", keeping)
    return seen


def test_a_second_launch_is_the_first_again(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    launcher, grid, stream, function, given = run(PLAIN)
    again = run(PLAIN | {"out": y, "scale": 2.0}, 7)
    assert len(seen) == 1
    assert (grid, again[1]) == ((3, 1, 1), (7, 1, 1))
    assert again[0] is launcher and again[2:4] == (stream, function) == (1000 + FIRST, 1)
    assert given == (x, (x, y), 1.0, 64, 5, None, 16, tl.float32)
    assert again[4] == (y.data_ptr(), (x.data_ptr(), y.data_ptr()), 2.0, 64, 5, None, 16, tl.float32)


def test_another_kind_of_call_is_compiled(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    functions = {run(PLAIN)[3], run(PLAIN | OTHERS["alignment"])[3], run(PLAIN | OTHERS["constant"])[3]}
    assert len(functions) == len(seen) == 3
    assert run(PLAIN)[3] in functions and len(seen) == 3


def test_another_kernel_of_the_same_arguments_has_its_own(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    twin = triton.jit(do_not_specialize=["size"])(small_kernel.fn)
    for kernel in (small_kernel, twin, small_kernel, twin):
        compiled.run(kernel, 3, *split(PLAIN))
    assert [id(each) for each in seen] == [id(small_kernel), id(twin)]


def test_constants_are_known_by_name(card: Card) -> None:
    arguments, constants, warps = split(PLAIN)
    compiled.run(small_kernel, 3, arguments, constants | {"num_stages": 2}, warps)
    compiled.run(small_kernel, 3, arguments, constants | {"num_ctas": 2}, warps)
    assert len(compiled._found) == 2


def test_a_card_has_its_own(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    first = run(PLAIN)
    card.device = FIRST + 1
    second, third = run(PLAIN), run(PLAIN)
    assert len(seen) == 2
    assert (second[2], third[2]) == (1001 + FIRST, 1001 + FIRST)
    assert first[3] != second[3] == third[3]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_launch_goes_to_the_tensors_card(card: Card, monkeypatch: pytest.MonkeyPatch, hooked: bool) -> None:
    @contextmanager
    def device(index: int) -> Iterator[None]:
        card.device, before = index, card.device
        yield
        card.device = before

    assert compiled._home(x) == compiled._home((x, y)) == -1
    monkeypatch.setattr(compiled, "_home", lambda first: FIRST + 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(compiled, "_hooked", lambda: hooked)
    assert [run(PLAIN)[2] for _ in range(2)] == [1001 + FIRST] * 2
    assert card.device == FIRST


def test_hooks_are_called_as_triton_calls_them(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    run(PLAIN)
    names: list[str] = []

    def enter(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        run(PLAIN)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    run(PLAIN)
    assert names == ["small_kernel"] and len(seen) == 2
    monkeypatch.setattr(small_kernel, "pre_run_hooks", [lambda *arguments, **keywords: names.append("before")])
    run(PLAIN)
    assert names == ["small_kernel", "before"] and len(seen) == 3


def test_what_is_not_known_goes_tritons_way(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    for _ in range(2):
        run(PLAIN | {"ACC": tl.float32, "bias": tl.constexpr(2)})
    assert len(seen) == 2 and not compiled._found


def test_ever_new_calls_do_not_fill_the_memory(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST", 3)
    for size in range(64, 70):
        run(PLAIN | {"size": size})
        assert 0 < len(compiled._found) <= 3


def test_a_kernel_that_was_not_compiled_is_not_kept(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *arguments, **keywords: None)
    compiled.run(small_kernel, 3, *split(PLAIN))
    assert not compiled._found


def test_an_interpreted_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **keywords: calls.append((grid, arguments, keywords))

    launch.launch(Interpreted(), 5, x, 2, warps=8, BLOCK=16)
    assert calls == [((5,), (x, 2), {"BLOCK": 16, "num_warps": 8})]


@pytest.mark.parametrize("maps", [GROUP, BATCH], ids=["group", "batch"])
def test_a_launcher_gets_what_triton_would_give_it(
    card: Card, monkeypatch: pytest.MonkeyPatch, maps: kernels.Maps
) -> None:
    given: list[tuple[Any, ...]] = []
    made = object.__new__(triton.compiler.CompiledKernel)
    made.module, made.function, made.packed_metadata = None, 2, (4, 1, 0)
    made._run = lambda *arguments: given.append(arguments)
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *arguments, **keywords: made)
    for each, *_ in kernels.launches([maps], [torch.bfloat16], [90]):
        constants = dict(each.constants)
        for _ in range(2):
            launch.launch(each.kernel, 9, *each.arguments, **constants, warps=each.warps)
        bind = create_function_from_signature(each.kernel.signature, each.kernel.params, make_backend(HOPPER))
        bound, _, _ = bind(*each.arguments, **constants, num_warps=each.warps)
        assert given.pop() == (9, 1, 1, 1000 + FIRST, 2, (4, 1, 0), None, None, None, *map(pointers, bound.values()))
    assert not given


def pointers(argument: Any) -> Any:
    """An argument with the addresses of its tensors in their place."""
    if isinstance(argument, tuple):
        return tuple(map(pointers, argument))
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def test_an_operators_second_call_compiles_nothing(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    maps = torch.zeros(2, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        passes.combine([maps, maps], torch.ones(2, dtype=torch.float64), 0, 0.0, 0.0)
    assert seen == [value_apply_kernel] and len(Launcher.told) == 3
