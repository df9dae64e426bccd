"""What a reading of modules depended on, kept so that the next call need not read them again.

A reading looks at modules, their children, hooks, numbers and tensors. A snapshot has all of these as they were, and
`holds` compares them by identity, or by value where they are numbers, in a microsecond for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..native import nodes
from .read import has_global_hooks, is_sequential

KEY = "_fastode_known"  # among a module's variables: what is kept of it, this snapshot too
_CONTENTS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Modules as they were, below one of them that it does not keep alive.

    Args:
        root: that one.
        hooks_of_root: whether its own hooks count; False where it is a block, which is called as a module.
    """

    __slots__ = ("_hooks", "_past", "_rows", "_sequentials", "_tensors", "_watched")

    def __init__(self, root: nn.Module, hooks_of_root: bool = True) -> None:
        self._past: Past | None = None
        self._rows: list[tuple[Any, ...]] = []
        self._hooks: list[dict[Any, Any]] = []
        self._tensors: list[tuple[Tensor, type, torch.dtype, torch.device, torch.Size]] = []
        # Classes that are read as an nn.Sequential because of what they do not override; this may change.
        self._sequentials: set[type] = set()
        for module in _looked_at(root):
            if type(module) is not nn.Sequential and is_sequential(type(module)):
                self._sequentials.add(type(module))
            variables = module.__dict__
            held = [variables[name] for name in _CONTENTS]
            # Dictionaries that are empty are looked at together: whatever is put into one is a change.
            if hooks_of_root or module is not root:
                self._hooks += [variables[name] for name in _HOOKS]
            self._hooks += [each for each in held if not each]
            contents = [
                (name, tuple(variables[name].values()), tuple(variables[name]))
                for name, each in zip(_CONTENTS, held, strict=True)
                if each
            ]
            # Of objects that `contents` keeps alive, so that no other one can have their place.
            identities = [(name, [*map(id, values)], [*keys]) for name, values, keys in contents]
            known = None if module is root else module
            self._rows.append((known, type(module), variables, dict(variables), identities, contents))
            for tensor in (*variables["_parameters"].values(), *variables["_buffers"].values()):
                if tensor is not None:
                    self._tensors.append((tensor, type(tensor), tensor.dtype, tensor.device, tensor.shape))
        # The same comparison in C++, which a tracer cannot follow; it borrows what the lists above own.
        made = None if torch.compiler.is_compiling() else nodes.module
        self._watched = None if made is None else made.watched(self._hooks, self._rows, self._tensors)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All parameters and buffers of the modules."""
        return [row[0] for row in self._tensors]

    def holds(self, root: nn.Module) -> bool:
        """Whether everything is as it was."""
        if has_global_hooks() or (self._sequentials and not all(map(is_sequential, self._sequentials))):
            return False
        if self._watched is not None and nodes.module is not None:
            found = nodes.module.unchanged(self._watched, root)
            if found is not NotImplemented:
                return found
        return self._compares_equal(root)

    def _compares_equal(self, root: nn.Module) -> bool:
        if any(self._hooks):
            return False
        try:
            for module, kind, variables, before, identities, _ in self._rows:
                held = root if module is None else module
                # Another dictionary is in the place of theirs, or this is another module that counts as equal.
                if held.__dict__ is not variables or variables != before or type(held) is not kind:
                    return False
                for name, held_then, keys in identities:
                    if [*map(id, variables[name].values())] != held_then or [*variables[name]] != keys:
                        return False
        except Exception:  # a tensor or an array among the variables was replaced, and has no truth value
            return False
        for tensor, kind, dtype, device, shape in self._tensors:
            if (
                tensor.dtype is not dtype
                or tensor.shape != shape
                or tensor.device != device
                or type(tensor) is not kind
            ):
                return False
        return True

    @property
    def past(self) -> Past:
        """The modules as they were, without what would hold on to results of theirs."""
        if self._past is None:
            self._past = Past(self._rows)
        return self._past


class Past:
    """Modules as they were, to be made anew.

    A graph holds one. So it has none of their hooks, which hold what a user reads by them: results of that graph.
    """

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[tuple[Any, ...]]) -> None:
        left_out = {*_CONTENTS, *_HOOKS, KEY}
        self._rows = [
            (module, kind, {name: value for name, value in before.items() if name not in left_out}, contents)
            for module, kind, _, before, _, contents in rows
        ]

    def restored(self, stand_in: Callable[[Tensor], Tensor]) -> nn.Module:
        """The modules made anew around `stand_in` of each parameter and of a copy of each buffer."""
        made: dict[int, nn.Module] = {}
        for module, kind, before, contents in reversed(self._rows):  # children come before what holds them
            twin = made[id(module)] = kind.__new__(kind)
            twin.__dict__.update(before)
            twin.__dict__.update({name: {} for name in (*_CONTENTS, *_HOOKS)})
            for name, values, keys in contents:
                for key, value in zip(keys, values, strict=True):
                    if isinstance(value, Tensor):
                        stands = stand_in(value)
                        value = stands.clone() if name == "_buffers" and stands is value else stands
                    twin.__dict__[name][key] = made[id(value)] if isinstance(value, nn.Module) else value
        return made[id(None)]


def _looked_at(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all modules below it that a reading may look at."""
    yield module
    if is_sequential(type(module)) or module.__dict__["_modules"]:
        for child in module.__dict__["_modules"].values():
            if child is not None:
                yield from _looked_at(child)
