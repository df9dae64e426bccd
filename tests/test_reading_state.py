"""What a forward or an adapter depends on beside modules: where it changes, a fused block computes the new function."""

from __future__ import annotations

import copy
import itertools
import types
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from foreign_networks import engine_of
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch.registry import _twins
from fastode.foreign.twin import adapters, class_of

pytestmark = pytest.mark.usefixtures("few_are_enough")

STEP = 0.5
TABLE = {"steps": [0.5]}
settings: Any = types.ModuleType("settings")
settings.step = 0.5


class Scale:
    """An object with a class attribute, a slot, and a method."""

    __slots__ = ("slot",)
    common = 0.5

    def __init__(self) -> None:
        self.slot = 0.5

    def __float__(self) -> float:
        return self.slot


@dataclass
class Config:
    step: float = 0.5
    inner: Any = field(default_factory=lambda: types.SimpleNamespace(step=0.5))
    unrelated: int = 0


def step() -> float:
    return 0.5


def with_default(step: float = 0.5) -> float:
    return step


def closed(value: float) -> tuple[Callable[[], float], Callable[[float], None]]:
    def get() -> float:
        return value

    def put(new: float) -> None:
        nonlocal value
        value = new

    return get, put


get_closed, put_closed = closed(0.5)


class Base(nn.Module):
    at_class = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.config, self.nested, self.scale = Config(), {"a": {"b": [0.5]}}, Scale()
        self.user: Any = UserDict(step=0.5)
        self.pair = (types.SimpleNamespace(step=0.5), 1)

    def helper(self) -> float:
        return 0.5

    @property
    def asked(self) -> float:
        return self.config.inner.step


def _put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: globals().__setitem__(name, value)


def _at_class(name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(class_of(block), name, value)


# How a forward comes to its step of 0.5, and what makes it 0.1.
STATES: dict[str, tuple[Callable[[Any], float], Callable[[Any], Any]]] = {
    "an object's attribute": (lambda b: b.config.step, lambda b: setattr(b.config, "step", 0.1)),
    "an object in an object": (lambda b: b.config.inner.step, lambda b: setattr(b.config.inner, "step", 0.1)),
    "another object": (lambda b: b.config.inner.step, lambda b: b.config.__dict__.update(inner=Config(0.1))),
    "an object in a tuple": (lambda b: b.pair[0].step, lambda b: setattr(b.pair[0], "step", 0.1)),
    "a list in dictionaries": (lambda b: b.nested["a"]["b"][0], lambda b: b.nested["a"]["b"].__setitem__(0, 0.1)),
    "an object of Python's own": (lambda b: b.user["step"], lambda b: b.user.update(step=0.1)),
    "by getattr": (lambda b: getattr(b.config, "st" + "ep"), lambda b: setattr(b.config, "step", 0.1)),
    "a slot": (lambda b: b.scale.slot, lambda b: setattr(b.scale, "slot", 0.1)),
    "a slot by __float__": (lambda b: float(b.scale), lambda b: setattr(b.scale, "slot", 0.1)),
    "a property": (lambda b: b.asked, lambda b: setattr(b.config.inner, "step", 0.1)),
    "a class attribute": (lambda b: b.at_class, _at_class("at_class", 0.1)),
    "a class attribute by type": (lambda b: type(b).at_class, _at_class("at_class", 0.1)),
    "an object's class": (lambda b: b.scale.common, lambda b: setattr(Scale, "common", 0.1)),
    "a method": (lambda b: b.helper(), _at_class("helper", lambda self: 0.1)),
    "a global": (lambda b: STEP, _put("STEP", 0.1)),
    "a global table": (lambda b: TABLE["steps"][0], lambda b: TABLE["steps"].__setitem__(0, 0.1)),
    "a module's variable": (lambda b: settings.step, lambda b: setattr(settings, "step", 0.1)),
    "a function": (lambda b: step(), _put("step", lambda: 0.1)),
    "a function's code": (lambda b: step(), lambda b: setattr(step, "__code__", (lambda: 0.1).__code__)),
    "a default": (lambda b: with_default(), lambda b: setattr(with_default, "__defaults__", (0.1,))),
    "a closure": (lambda b: get_closed(), lambda b: put_closed(0.1)),
}


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    before, of_scale, codes = dict(globals()), Scale.common, (step.__code__, with_default.__defaults__)
    registered, known = dict(_twins), dict(adapters)
    yield
    globals().update(before)
    Scale.common, step.__code__, with_default.__defaults__ = of_scale, *codes  # type: ignore[misc]
    settings.step, TABLE["steps"][0] = 0.5, 0.5
    put_closed(0.5)
    for now, then in ((_twins, registered), (adapters, known)):
        now.clear()
        now.update(then)


def with_step(step: Callable[[Any], float]) -> type[Base]:
    class Block(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + step(self) * self.f(x)

    Block.at_class, Block.helper = Base.at_class, Base.helper  # type: ignore[method-assign]
    return Block


X = torch.randn(2, 4, 6, 6)


def expected(block: Any, step: float) -> Tensor:
    return X + step * block.f(X)


@pytest.mark.parametrize("name", STATES)
def test_a_read_forward_that_depends_on_what_changes(name: str) -> None:
    step, change = STATES[name]
    block = with_step(step)().eval()
    assert fastode.fuse(block, read=True).rows[0].reason == ""
    torch.testing.assert_close(block(X), expected(block, 0.5))
    assert engine_of(block, X) == "resident"
    change(block)
    torch.testing.assert_close(block(X), expected(block, 0.1))
    assert engine_of(block, X) == "reference"
    fastode.fuse(block, read=True)
    torch.testing.assert_close(block(X), expected(block, 0.1))
    assert engine_of(block, X) == "resident"


@pytest.mark.parametrize("name", STATES)
def test_an_adapter_is_asked_again_where_what_it_reads_has_changed(name: str) -> None:
    step, change = STATES[name]
    kind = with_step(step)
    fastode.adapt(kind)(lambda block: reference.ResBlock(block.f, step(block)))
    block = kind().eval()
    assert fastode.fuse(block).rows[0].reason == ""
    torch.testing.assert_close(block(X), expected(block, 0.5))
    change(block)
    torch.testing.assert_close(block(X), expected(block, 0.1))
    assert engine_of(block, X) == "resident"


def test_a_forward_that_its_class_gets_later() -> None:
    kind = with_step(lambda b: 0.5)
    block = kind().eval()
    fastode.fuse(block, read=True)
    block(X)
    kind.forward = lambda self, x: x + 0.1 * self.f(x)  # type: ignore[method-assign]
    torch.testing.assert_close(block(X), expected(block, 0.1))


def test_a_class_attribute_that_is_written_at_the_twin() -> None:
    block = with_step(lambda b: b.at_class)().eval()
    fastode.fuse(block, read=True)
    block(X)
    type(block).at_class = 0.1
    torch.testing.assert_close(block(X), expected(block, 0.1))


def test_what_the_forward_does_not_name_is_no_change() -> None:
    block = with_step(lambda b: b.config.step)().eval()
    fastode.fuse(block, read=True)
    block(X)
    known = block.__dict__["_fastode_known"]
    kept = known.kept
    block.config.unrelated += 1
    block.config.step = float("0.5")  # another object of the same value
    block(X)
    assert known.kept is kept


def _imports(b: Any) -> float:
    import os

    return 0.5 if os.environ.get("STEP") is None else 0.1


halves = itertools.repeat(0.5)
REFUSED: dict[str, tuple[Callable[[Any], float], str]] = {
    "gradients": (
        lambda b: 0.5 if torch.is_grad_enabled() else 0.1,
        "asks for is_grad_enabled, and that may change from call to call.",
    ),
    "autocast": (
        lambda b: 0.1 if torch.is_autocast_enabled("cpu") else 0.5,
        "asks for is_autocast_enabled, and that may change from call to call.",
    ),
    "autocast that is turned off": (
        lambda b: torch.autocast("cpu", enabled=False)(lambda: 0.5)(),
        "asks for autocast, and that may change from call to call.",
    ),
    "autocast that is turned off around": (
        torch.autocast("cpu", enabled=False)(lambda b: 0.5),
        "asks for autocast, and that may change from call to call.",
    ),
    "the environment": (_imports, "uses the module os, and that may change from call to call."),
    "an object of C": (
        lambda b: 0.5 if memoryview(b.nested["a"]["c"])[0] else 0.1,
        "depends on nested, of whose type (bytearray) changes are not seen.",
    ),
    "a buffer's number": (
        lambda b: 0.5 * b.f[1].num_batches_tracked.add(1).item(),
        "asks for the numbers in a tensor, of which changes are not seen.",
    ),
    "a tensor's truth": (
        lambda b: 0.5 if b.nested["a"]["t"] else 0.1,
        "asks for the numbers in a tensor, of which changes are not seen.",
    ),
    "a tensor that learns": (
        lambda b: 0.1 if b.nested["a"]["t"].requires_grad else 0.5,
        "asks for requires_grad, and that may change from call to call.",
    ),
    "an iterator": (lambda b: next(halves), "depends on halves, of whose type (repeat) changes are not seen."),
    "anything": (lambda b: eval("0.5"), "calls eval, which may do anything."),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read", [True, False])
def test_what_would_change_unseen_is_refused(name: str, read: bool) -> None:
    step, reason = REFUSED[name]
    kind = with_step(step)
    if not read:
        fastode.adapt(kind)(lambda block: reference.ResBlock(block.f, step(block)))
    block: Any = kind().eval()
    block.nested["a"]["t"] = torch.ones(())
    if "bytearray" in reason:
        block.nested["a"]["c"] = bytearray(b"1")
    (row,) = fastode.fuse(block, read=read).rows
    if read:
        assert row.reason == f"its forward {reason}" and row.fused is None
    else:
        assert row.reason == f"resident, staged: its adapter {reason}" and row.engines == ("reference",)
    torch.testing.assert_close(block(X), expected(block, 0.5))


def test_adapters_may_keep_a_count_of_their_own() -> None:
    kind, asked = with_step(lambda b: 0.5), []

    @fastode.adapt(kind)
    def counting(block: Any) -> nn.Module:
        asked.append(block)
        return reference.ResBlock(block.f, 0.5)

    block = kind().eval()
    fastode.fuse(block)
    for _ in range(3):
        block(X)
    assert len(asked) == 1


class Registering(Base):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, key: str, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.known.append(cls)


class Registered(Registering, key="one"):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Meta(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if any(isinstance(base, Meta) for base in bases):
            raise TypeError(f"{name} is final")
        return super().__new__(mcs, name, bases, body)


class Final(Base, metaclass=Meta):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_a_class_that_asks_for_keywords_of_its_subclasses() -> None:
    block = Registered().eval()
    fastode.fuse(block, read=True)
    assert engine_of(block, X) == "resident" and Registering.known == [Registered]


def test_a_class_that_allows_no_subclass() -> None:
    why = "no twin of its class can be made: Final is final"
    block = Final()
    assert [(row.fused, row.reason) for row in fastode.fuse(block, read=True).rows] == [(None, why)]
    with pytest.raises(ValueError, match=f"^kind must be a class that can have a twin, got Final: {why}$"):
        fastode.adapt(Final)(lambda block: reference.ResBlock(block.f))
    assert Final not in adapters


def test_on_the_meta_device() -> None:
    kind = with_step(lambda b: 0.5)
    with torch.device("meta"):
        block = kind()
    why = "it is on the meta device, where nothing can be proven."
    assert [(row.fused, row.reason) for row in fastode.fuse(block, read=True).rows] == [(None, why)]
    block = kind()
    fastode.fuse(block, read=True)
    assert block.to("meta")(X.to("meta")).shape == X.shape


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
    ],
    ids=["meta", "autocast", "inference", "no_grad"],
)
def test_a_proof_is_made_as_if_nothing_were_set(around: Callable[[], Any]) -> None:
    block = with_step(lambda b: 0.5)().eval()
    expected = copy.deepcopy(block)(X)
    with around():
        assert fastode.fuse(block, read=True).rows[0].fused is not None
    assert engine_of(block, X) == "resident"
    torch.testing.assert_close(block(X), expected)
