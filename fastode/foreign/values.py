"""The values in a forward as sums: of x, of points at which layers begin, and of chains of layers on these."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from .graph import ROOT, Draws, Unreadable


@dataclass(frozen=True)
class Layer:
    """A layer of theirs, or an activation that is called as a function.

    Attributes:
        key: of what it computes: the module's path, or the function and its numbers.
        name: what it is called in the block that is made of it.
        make: the module; a new one for a function.
    """

    key: Hashable
    name: str
    make: Callable[[], nn.Module] = field(compare=False)


@dataclass(frozen=True, eq=False)
class Start:
    """x."""


@dataclass(frozen=True, eq=False)
class Point:
    """A sum at which layers begin."""

    terms: dict[Atom, float]


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers applied to x or to a point; `calls` are their nodes, the same where two chains share an evaluation."""

    base: Start | Point
    layers: tuple[Layer, ...]
    calls: tuple[fx.Node, ...]


Atom = Start | Point | Chain
Terms = dict[Atom, float]

_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _NEGATE = "add", "sub", "mul", "div", "neg"
_LINEAR: Mapping[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"), _SUBTRACT),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"), _MULTIPLY),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_"), _DIVIDE),
    **dict.fromkeys((operator.neg, torch.neg, "neg", "neg_"), _NEGATE),
}
_DROPOUTS = (F.dropout, F.dropout2d)
SUMS = tuple(target for target, kind in _LINEAR.items() if kind in (_ADD, _SUBTRACT))


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope)


def _elu(alpha: float = 1.0, inplace: bool = False) -> nn.Module:
    return nn.ELU(alpha)


# By function or method: its name, and what makes the module of its further arguments.
_ACTIVATIONS: Mapping[Any, tuple[str, Callable[..., nn.Module]]] = {
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", lambda inplace=False: nn.ReLU())
    ),
    F.leaky_relu: ("leaky_relu", _leaky_relu),
    F.elu: ("elu", _elu),
    F.silu: ("silu", lambda inplace=False: nn.SiLU()),
    F.gelu: ("gelu", nn.GELU),
    F.softplus: ("softplus", nn.Softplus),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ("tanh", nn.Tanh)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), ("sigmoid", nn.Sigmoid)),
}


def has_sum(graph: fx.Graph) -> bool:
    """Whether a forward adds or subtracts two values itself."""
    return any(node.target in SUMS and _of_two(node) for node in graph.nodes if node.op != "call_module")


def _of_two(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(argument, fx.Node) for argument in node.args)


class Values:
    """The values of a graph's nodes.

    Args:
        block: theirs; the layers are its modules.
        graph: of its forward.
    """

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self._block = block
        self._terms: dict[fx.Node, Terms] = {}
        self._pads: dict[fx.Node, tuple[fx.Node, int]] = {}  # what is padded, and by how much on each side
        self.start = Start()
        self.points: list[Point] = []  # in the order of their evaluation
        self.result: Terms = {}
        for node in graph.nodes:
            if node.op == "output":
                self.result = self._value(node.args[0])
            elif not node.users:
                raise Unreadable(f"its forward computes what it does not return ({_called(node)}).")
            elif node.op == "call_function" and node.target is F.pad:
                self._pads[node] = _padding(node)
            else:
                self._terms[node] = self._of(node)

    def _of(self, node: fx.Node) -> Terms:
        if node.op == "placeholder":
            return {self.start: 1.0}
        swished = self._swished(node)
        if swished is not None:
            return self._behind(self._value(swished), Layer(("silu",), "silu", nn.SiLU), node)
        if node.target in _LINEAR and node.op != "call_module":
            terms = {atom: c for atom, c in self._linear(node).items() if c != 0}
            if not terms:
                raise Unreadable("its forward has a sum that is always zero.")
            return self._pointed(node, terms)
        padded = self._pads.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if padded is not None:
            return self._behind(self._value(padded[0]), self._padded(node, padded[1]), node)
        layer = self._layer(node)
        before = self._value(node.args[0] if node.args else None)
        return before if layer is None else self._behind(before, layer, node)

    def _behind(self, before: Terms, layer: Layer, node: fx.Node) -> Terms:
        ((atom, _),) = before.items()
        if isinstance(atom, Chain):
            return {Chain(atom.base, (*atom.layers, layer), (*atom.calls, node)): 1.0}
        return {Chain(atom, (layer,), (node,)): 1.0}

    def _swished(self, node: fx.Node) -> fx.Node | None:
        """What x is where a node is x * sigmoid(x), as SiLU is often written; None where it is none."""
        if node.op == "call_module" or _LINEAR.get(node.target) != _MULTIPLY or not _of_two(node) or node.kwargs:
            return None
        first, second = cast(tuple[fx.Node, fx.Node], node.args)
        if self._is_sigmoid(second, first):
            return first
        return second if self._is_sigmoid(first, second) else None

    def _is_sigmoid(self, node: fx.Node, x: fx.Node) -> bool:
        if len(node.args) != 1 or node.args[0] is not x or node.kwargs:
            return False
        if node.op == "call_module":
            return type(self._block.get_submodule(_path(node))) is nn.Sigmoid
        return _ACTIVATIONS.get(node.target, ("",))[0] == "sigmoid"

    def _pointed(self, node: fx.Node, terms: Terms) -> Terms:
        """The value of a sum, as one term where something else than a sum goes on from it."""
        ends = all(
            user.op == "output" or (user.target in _LINEAR and self._swished(user) is None) for user in node.users
        )
        if ends or (len(terms) == 1 and 1.0 in terms.values()):
            return terms
        point = Point(terms)
        self.points.append(point)
        return {point: 1.0}

    def _value(self, argument: Any) -> Terms:
        if not isinstance(argument, fx.Node):
            raise Unreadable(f"its forward returns or adds {type(argument).__name__}, and no single map.")
        if argument not in self._terms:
            raise Unreadable(f"its forward uses {_called(argument)} otherwise than as a map.")
        return self._terms[argument]

    def _linear(self, node: fx.Node) -> Terms:
        kind = _LINEAR[node.target]
        more = dict(node.kwargs)
        alpha = more.pop("alpha", 1)
        wanted = 1 if kind == _NEGATE else 2
        if more or len(node.args) != wanted or not _is_number(alpha):
            raise Unreadable(f"its forward calls {_called(node)} with arguments that are not followed.")
        if kind == _NEGATE:
            return _scaled(self._value(node.args[0]), -1.0)
        first, second = node.args
        if kind in (_MULTIPLY, _DIVIDE):
            if _is_number(second) and (kind == _MULTIPLY or second != 0):
                return _scaled(self._value(first), float(second) if kind == _MULTIPLY else 1 / float(second))
            if _is_number(first) and kind == _MULTIPLY:
                return _scaled(self._value(second), float(first))
            words = "multiplies" if kind == _MULTIPLY else "divides"
            raise Unreadable(f"its forward {words} by something else than a number ({_called(node)}).")
        if _is_number(first) or _is_number(second):
            raise Unreadable(f"its forward adds a number to a map ({_called(node)}).")
        sign = float(alpha) if kind == _ADD else -float(alpha)
        total = dict(self._value(first))
        for atom, c in _scaled(self._value(second), sign).items():
            total[atom] = total.get(atom, 0.0) + c
        return total

    def _padded(self, node: fx.Node, by: int) -> Layer:
        """A convolution of a map with so many zeros on each side, as one that pads by itself."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            raise Unreadable("its forward pads what it does not convolve then.")
        path = _path(node)
        module = self._block.get_submodule(path)
        if type(module) is not nn.Conv2d or module.padding != (0, 0):
            raise Unreadable(f"its forward pads what {path} takes, which is no convolution without padding.")

        def make() -> nn.Module:
            made = copy.copy(module)  # of the same tensors: its dictionary of parameters is theirs
            made.padding, made._reversed_padding_repeated_twice = (by, by), [by] * 4
            return made

        return Layer(("padded", path, by), path.replace(".", "_"), make)

    def _layer(self, node: fx.Node) -> Layer | None:
        """What a node applies to its first argument; None where it hands that on."""
        if node.op == "call_module":
            path = _path(node)
            module = self._block.get_submodule(path)
            if len(node.args) != 1 or node.kwargs:
                raise Unreadable(f"its forward calls {path} with more than one argument.")
            if type(module) is nn.Identity:
                return None
            if type(module) in (nn.Dropout, nn.Dropout2d):
                _check_drops_nothing(path, module.p, module.training)
                return None
            return Layer(("module", path), path.replace(".", "_"), lambda: module)
        if node.op == "call_function" and node.target in _DROPOUTS:
            _check_drops_nothing(_called(node), *node.args[1:], **node.kwargs)
            return None
        found = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        if found is None:
            raise Unreadable(f"its forward calls {_called(node)}, which is neither a layer nor a sum.")
        name, make = found
        more = (node.args[1:], dict(node.kwargs))
        try:
            activation = make(*more[0], **more[1])
        except TypeError as error:
            raise Unreadable(f"its forward calls {_called(node)} with arguments that are not followed.") from error
        return Layer((name, repr(more)), name, lambda: activation)


def _padding(node: fx.Node) -> tuple[fx.Node, int]:
    """What F.pad is called with, where it puts as many zeros on each side."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    source, pad = given.get("input"), given.get("pad")
    by = pad[0] if isinstance(pad, tuple | list) and len(pad) == 4 and len({*pad}) == 1 else None
    plain = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    if not isinstance(source, fx.Node) or not isinstance(by, int) or by < 0 or not plain:
        raise Unreadable("its forward pads otherwise than with as many zeros on each side of a map.")
    return source, by


def _check_drops_nothing(name: str, p: Any = 0.5, training: Any = True, inplace: Any = False) -> None:
    """Dropout that drops nothing hands its input on.

    Raises:
        Draws: it drops.
    """
    if not isinstance(training, bool) or not _is_number(p):
        raise Unreadable(f"its forward calls {name} with arguments that are not followed.")
    if training and p > 0:
        raise Draws(f"its forward draws random numbers in training ({name}).")


def _scaled(terms: Terms, by: float) -> Terms:
    return {atom: by * c for atom, c in terms.items()}


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _path(node: fx.Node) -> str:
    """The path, in the block, of what a node names."""
    return str(node.target).removeprefix(f"{ROOT}.")


def _called(node: fx.Node) -> str:
    """What a node calls, as a user knows it."""
    if node.op == "call_function" and node.target is getattr:
        return f"x.{node.args[1]}"
    if node.op in ("call_module", "get_attr"):
        return _path(node)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
