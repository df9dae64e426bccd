"""Tables of names: which of a released code's tensors is which of ours, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

_FIELD = re.compile(r"\{(\w)(\+1)?\}")

# What a tensor of theirs is of ours.
SAME = "same"  # it itself; several names of theirs may be one tensor of ours
NEGATED_TRANSPOSE = "negated transpose"
COPY = "copy"  # a copy that their code writes over at every call: made when written, not looked at when read
COUNTER = "counter"  # a scalar that counts calls: zero when written, not looked at when read


@dataclass(frozen=True)
class Row:
    """A pattern of their names and the pattern of ours that it stands for.

    Args:
        theirs: a name, or the beginning of names up to a dot, whose rest is the same in ours. `{i}` is any number; the
            last one of a copy is the copy's.
        ours: likewise, with the same fields; `{i+1}` is a number that counts one more than theirs. Several patterns
            are tensors that theirs holds one after the other, along its first dimension.
        kind: SAME, NEGATED_TRANSPOSE, COPY or COUNTER.
    """

    theirs: str
    ours: str | tuple[str, ...]
    kind: str = SAME

    @property
    def parts(self) -> tuple[str, ...]:
        """The patterns of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Size:
    """Where a released state_dict shows an argument of the function that makes its network.

    Args:
        argument: its name.
        theirs: a pattern of their names.
        axis: the dimension of this tensor that is the argument; None counts the numbers of the pattern's field, and
            with two fields those of the second for each number of the first.
    """

    argument: str
    theirs: str
    axis: int | None = None


@dataclass(frozen=True)
class Table:
    """What a released network's state_dict is called and what it shows.

    Args:
        rows: of names; where several stand for the same tensor of ours, all of theirs are that tensor.
        sizes: of arguments.
        inside: the key under which a checkpoint of theirs holds the state_dict, if it holds more.
    """

    rows: tuple[Row, ...]
    sizes: tuple[Size, ...] = field(default=())
    inside: str = ""


@dataclass(frozen=True)
class Pair:
    """A name of theirs, our names that it stands for, and how."""

    theirs: str
    ours: tuple[str, ...]
    kind: str

    @property
    def is_read(self) -> bool:
        return self.kind in (SAME, NEGATED_TRANSPOSE)


def pairs(table: Table, ours: Iterable[str], copies: int = 1) -> list[Pair]:
    """Every name of theirs for a network with these names of ours; copies are numbered up to `copies`."""
    found = []
    names = list(ours)
    for row in table.rows:
        first, *others = row.parts
        for name in names:
            match = _match(first, name)
            if match is None:
                continue
            numbers, rest = match
            free = [letter for letter, _ in _FIELD.findall(row.theirs) if letter not in numbers]
            for k in range(copies if free else 1):
                theirs = _fill(row.theirs, numbers | dict.fromkeys(free, k), rest)
                found.append(Pair(theirs, (name, *(_fill(other, numbers, rest) for other in others)), row.kind))
    return found


def is_copy(table: Table, name: str, known: Collection[str]) -> bool:
    """Whether a name of theirs is a copy's, of which there may be any number: a known one but for the copy's own."""
    for row in table.rows:
        match = _match(row.theirs, name) if row.kind == COPY else None
        if match is not None:
            numbers, rest = match
            if _fill(row.theirs, {**numbers, _free(row): 0}, rest) in known:
                return True
    return False


def _free(row: Row) -> str:
    """The field of a copy's name that counts the copies."""
    return next(reversed(_FIELD.findall(row.theirs)))[0]


def without_wrapper(names: Iterable[str]) -> str:
    """What all names begin with that were saved inside nn.DataParallel: "module.", or nothing."""
    names = list(names)
    return "module." if names and all(name.startswith("module.") for name in names) else ""


def shape_in_theirs(pair: Pair, own: Mapping[str, Tensor]) -> list[int]:
    """The shape that a tensor of theirs must have."""
    first = list(own[pair.ours[0]].shape)
    if pair.kind == NEGATED_TRANSPOSE:
        return first[::-1]
    if len(pair.ours) > 1:
        return [sum(own[name].shape[0] for name in pair.ours), *first[1:]]
    return first


def to_ours(pair: Pair, tensor: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, made of one of theirs."""
    if pair.kind == NEGATED_TRANSPOSE:
        tensor = -tensor.t()
    if len(pair.ours) == 1:
        return {pair.ours[0]: tensor}
    sizes = [own[name].shape[0] for name in pair.ours]
    return dict(zip(pair.ours, tensor.split(sizes), strict=True))


def to_theirs(pair: Pair, own: Mapping[str, Tensor]) -> Tensor:
    """Their tensor, made of ours."""
    first = own[pair.ours[0]]
    if pair.kind == COUNTER:
        return first.new_zeros(())
    if pair.kind == NEGATED_TRANSPOSE:
        return -first.t()
    return first if len(pair.ours) == 1 else torch.cat([own[name] for name in pair.ours])


def size_of(size: Size, tensors: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """The argument that a state_dict of theirs shows; None if it does not."""
    if size.axis is not None:
        tensor = tensors.get(size.theirs)
        return tensor.shape[size.axis] if isinstance(tensor, Tensor) and tensor.dim() > size.axis else None
    letters = [letter for letter, _ in _FIELD.findall(size.theirs)]
    counted: dict[int, set[int]] = {}
    for name in tensors:
        match = _match(size.theirs, name)
        if match is not None:
            numbers = [match[0][letter] for letter in letters]
            counted.setdefault(numbers[0] if len(numbers) > 1 else 0, set()).add(numbers[-1])
    if not counted:
        return None
    counts = tuple(len(counted[i]) for i in sorted(counted))
    return counts if len(letters) > 1 else counts[0]


def _match(pattern: str, name: str) -> tuple[dict[str, int], str] | None:
    """The fields of a pattern that a name fits, as theirs count, and the rest of the name."""
    expression, more = _compiled(pattern)
    match = expression.fullmatch(name)
    if match is None:
        return None
    numbers = {letter: int(match[letter]) - plus for letter, plus in more.items()}
    return None if any(number < 0 for number in numbers.values()) else (numbers, match["rest_"])


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """A pattern as a regular expression, and by how much each field counts more than theirs."""
    pieces: list[str] = []
    more: dict[str, int] = {}
    last = 0
    for piece in _FIELD.finditer(pattern):
        letter, plus = piece.groups()
        pieces += [re.escape(pattern[last : piece.start()]), rf"(?P<{letter}>\d+)"]
        last, more[letter] = piece.end(), 1 if plus else 0
    return re.compile("".join([*pieces, re.escape(pattern[last:]), r"(?P<rest_>(?:\..+)?)"])), more


def _fill(pattern: str, numbers: Mapping[str, int], rest: str) -> str:
    return _FIELD.sub(lambda piece: str(numbers[piece[1]] + (1 if piece[2] else 0)), pattern) + rest
