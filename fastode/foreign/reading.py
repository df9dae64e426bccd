"""A block's forward, read as one of this project's blocks over the same modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from .. import reference
from ..branch.layers import ACTIVATION, KNOWN
from ..tableau import LinearTable
from .graph import Unreadable, graph_of
from .values import Atom, Chain, Layer, Point, Start, Terms, Values, has_sum


def adds(block: nn.Module) -> bool:
    """Whether the forward of a module adds maps by itself, its modules left aside.

    Raises:
        Unreadable: it cannot be followed.
    """
    return has_sum(graph_of(block, inside=False))


def read_forward(block: nn.Module) -> tuple[nn.Module, str]:
    """Read what a block's forward computes, in its present mode.

    Recognised are x + chain, chain + chain, both behind layers that they share, with a step before the second and an
    activation behind the sum, and Shu–Osher combinations of one chain.

    Args:
        block: theirs; it is left as it is.

    Returns:
        The reference block around its modules, and the program that was read: the same for the same computation.

    Raises:
        Unreadable: it is none of these, with the reason.
    """
    graph = graph_of(block)
    values = Values(block, graph)
    terms, activation = _before_activation(values)
    points = [point for point in values.points if point.terms is not terms]
    if points:
        if activation is not None:
            raise Unreadable("its forward has an activation behind a scheme of several stages.")
        return _scheme(values, points, terms), str(graph)
    return _residual(values, terms, activation), str(graph)


def _before_activation(values: Values) -> tuple[Terms, nn.Module | None]:
    """The sum that a forward returns, and the activation that it may apply to it."""
    terms = values.result
    ((atom, c), *others) = terms.items()
    if others or c != 1:
        return terms, None
    if isinstance(atom, Chain) and isinstance(atom.base, Point):
        last = atom.layers[0].make()
        known = KNOWN.get(type(last))
        if len(atom.layers) > 1 or known is None or known[0] != ACTIVATION:
            names = ", ".join(layer.name for layer in atom.layers)
            raise Unreadable(f"its forward has more behind its sum than an activation ({names}).")
        return atom.base.terms, last
    if isinstance(atom, Point):
        return atom.terms, None
    raise Unreadable("its forward has no sum of which its result is made.")


def _residual(values: Values, terms: Terms, activation: nn.Module | None) -> nn.Module:
    """x + h chain, or chain + h chain."""
    if len(terms) != 2:
        raise Unreadable(f"its forward returns a sum of {len(terms)} maps, where two are read.")
    (first, a), (second, b) = terms.items()
    if isinstance(first, Start) or isinstance(second, Start):
        (_, a), (chain, h) = sorted(terms.items(), key=lambda term: isinstance(term[0], Chain))
        assert isinstance(chain, Chain)
        if a == 1 and h > 0:
            return reference.ResBlock(_sequence(chain.layers), h, None, activation)
        if activation is not None:
            raise Unreadable("its forward has an activation behind a sum in which x has a factor.")
        return reference.ShuOsher(_sequence(chain.layers), LinearTable("read", ((a,),), ((h,),)))
    assert isinstance(first, Chain) and isinstance(second, Chain)
    shared = _shared(first, second)
    shortcut, branch, h = _told_apart(first, a, second, b)
    rest = shortcut.layers[shared:]
    block = reference.ResBlock(_sequence(branch.layers[shared:]), h, _sequence(rest) if rest else None, activation)
    if not shared:
        return block
    return reference.Chain(OrderedDict([*_named(branch.layers[:shared]).items(), ("then", block)]))


def _shared(first: Chain, second: Chain) -> int:
    """How many evaluations of layers two chains share, from their beginning."""
    pairs = zip(first.calls, second.calls, strict=False)
    count = 0
    for one, other in pairs:
        if one is not other:
            break
        count += 1
    if count == len(first.calls) == len(second.calls):
        raise Unreadable("its forward adds a chain to itself.")
    return count


def _told_apart(first: Chain, a: float, second: Chain, b: float) -> tuple[Chain, Chain, float]:
    """The shortcut, the branch and its step."""
    if a == 1 and b == 1 and len(first.layers) > len(second.layers):
        return second, first, a
    if a == 1 and b > 0:
        return first, second, b
    if b == 1 and a > 0:
        return second, first, a
    raise Unreadable(f"its forward adds two chains by the factors {a:g} and {b:g}, where one must be 1.")


def _scheme(values: Values, points: Sequence[Point], terms: Terms) -> nn.Module:
    """A Shu–Osher combination of one chain, evaluated at x and at sums."""
    bases: list[Start | Point] = [values.start, *points]
    rows = [point.terms for point in points] + [terms]
    chains = list(dict.fromkeys(atom for row in rows for atom in row if isinstance(atom, Chain)))
    keys = {tuple(layer.key for layer in chain.layers) for chain in chains}
    if len(keys) != 1:
        raise Unreadable("its forward applies different chains at its stages.")
    if len({chain.base for chain in chains}) != len(chains):
        raise Unreadable("its forward evaluates its chain twice at one point.")
    alpha, beta = [], []
    for index, row in enumerate(rows):
        _check_row(row, bases[: index + 1])
        alpha.append(tuple(_factor(row, base) for base in bases[: index + 1]))
        beta.append(
            tuple(sum(_factor(row, chain) for chain in chains if chain.base is base) for base in bases[: index + 1])
        )
    return reference.ShuOsher(_sequence(chains[0].layers), LinearTable("read", tuple(alpha), tuple(beta)))


def _check_row(row: Terms, known: Sequence[Start | Point]) -> None:
    for atom in row:
        if (atom.base if isinstance(atom, Chain) else atom) not in known:
            raise Unreadable("its forward uses a stage before it is made.")


def _factor(row: Terms, atom: Atom) -> float:
    return row.get(atom, 0.0)


def _sequence(layers: Sequence[Layer]) -> nn.Sequential:
    return nn.Sequential(_named(layers))


def _named(layers: Sequence[Layer]) -> OrderedDict[str, nn.Module]:
    named: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in layers:
        name, count = layer.name, 1
        while name in named:
            count += 1
            name = f"{layer.name}_{count}"
        named[name] = layer.make()
    return named
