"""Telling what a class of others is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .. import checks
from ..dispatch.registry import is_twin, register, twin_of
from .graph import Unreadable
from .twin import Adapter, adapters, taken_name, twin_for

_Adapter = TypeVar("_Adapter", bound=Adapter)


def adapt(kind: type[nn.Module]) -> Callable[[_Adapter], _Adapter]:
    """Function decorator: say what the blocks of another's class are, so that `fuse` can give them a twin.

    The function gets one of their blocks and returns a new block of `fastode.reference` around the block's own modules:
    a `ResBlock` with its shortcut and the activation after the sum, a `Chain`, an explicit scheme, an IE-Skip. Layers
    without parameters may be made anew. It may return a sentence instead: why this very block stays as it is. It is
    asked again whenever something that it reads has changed: of the block, in what its attributes hold, in globals and
    functions. What it cannot be asked again for, as a tensor's numbers, keeps the block as it is.

    What is returned is taken at its word: compare a fused block with its original by `fastode.testing`.

    Args:
        kind: their exact class; subclasses of it are left alone.

    Returns:
        The decorator, which returns the function it was given. A second one for the same class replaces the first.

    Raises:
        TypeError: kind is no class of modules, or what is decorated no function.
        ValueError: kind is a class that has a twin already, or has a name that its twin needs.

    Example:
        >>> import fastode
        >>> from fastode import reference
        >>> class Theirs(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        ...     def forward(self, x):
        ...         return (x + self.norm(self.conv(x))).relu()
        >>> @fastode.adapt(Theirs)
        ... def theirs(block):
        ...     return reference.ResBlock(nn.Sequential(block.conv, block.norm), post_activation=nn.ReLU())
        >>> model = nn.Sequential(Theirs())
        >>> print(fastode.fuse(model, engine="reference"))
        block  type    twin                    engines    why
        0      Theirs  as fastode.nn.ResBlock  reference
        0 fused, 1 as the reference
        >>> from fastode.dispatch.registry import _twins
        >>> _ = _twins.pop(Theirs), adapters.pop(Theirs)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of nn.Module, got {kind!r}")
    if is_twin(kind) or (twin_of(kind) is not None and kind not in adapters):
        raise ValueError(f"kind must be a class that has no twin, got {kind.__name__}")
    taken = taken_name(kind)
    if taken:
        raise ValueError(f"kind must be a class without {taken!r}, which its twin has, got {kind.__name__}")

    def decorator(adapter: _Adapter) -> _Adapter:
        if not callable(adapter) or isinstance(adapter, nn.Module):
            raise TypeError(f"adapter must be a function of a {kind.__name__}, got {checks.what(adapter)}")
        try:
            twin = twin_for(kind)
        except Unreadable as error:
            raise ValueError(f"kind must be a class that can have a twin, got {kind.__name__}: {error}") from error
        adapters[kind] = adapter
        register(kind)(twin)
        return adapter

    return decorator
