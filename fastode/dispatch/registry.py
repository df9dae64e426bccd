"""Which fused twin stands for which block, by type. A leaf, so that the twins' own module can fill it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

_Twin = TypeVar("_Twin", bound=type[nn.Module])

_twins: dict[type[nn.Module], type[nn.Module]] = {}
# The twins that were made of classes of others, whether or not `fuse` looks for these.
generated: dict[type[nn.Module], type[nn.Module]] = {}


def register(reference: type[nn.Module]) -> Callable[[_Twin], _Twin]:
    """Class decorator: make the decorated class the fused twin of `reference`, for `fastode.fuse` to swap in.

    The twin is a subclass of the reference that overrides `forward` and adds no state, because a swap only assigns
    `__class__`: no constructor runs. `fuse` sets one attribute on the module, `engine`, a string the twin may read; in
    the report its engine is "own". A second registration for the same reference replaces the first.

    Args:
        reference: the exact type that `fuse` looks for; subclasses of it are left alone.

    Returns:
        The decorator, which returns the class it was given.

    Raises:
        TypeError: if the decorated class is not a proper subclass of `reference`.

    Example:
        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return x + x
        >>> @register(Double)
        ... class FusedDouble(Double):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> twin_of(Double) is FusedDouble and reference_of(FusedDouble) is Double
        True
        >>> del _twins[Double]
    """
    if not (isinstance(reference, type) and issubclass(reference, nn.Module)):
        raise TypeError(f"reference must be a subclass of nn.Module, got {reference!r}")

    def decorator(twin: _Twin) -> _Twin:
        if not (isinstance(twin, type) and issubclass(twin, reference) and twin is not reference):
            raise TypeError(f"twin must be a subclass of {reference.__name__}, got {twin!r}")
        _twins[reference] = twin
        return twin

    return decorator


def twin_of(kind: type) -> type[nn.Module] | None:
    """The fused twin of exactly this type."""
    return _twins.get(kind)


def reference_of(kind: type) -> type[nn.Module] | None:
    """The reference whose twin is exactly this type."""
    for twins in (_twins, generated):
        for reference, twin in twins.items():
            if twin is kind:
                return reference
    return None


def is_twin(kind: type) -> bool:
    """Whether this type is a fused twin, or derives from one."""
    return any(base is twin for twins in (_twins, generated) for twin in twins.values() for base in kind.__mro__)


def ancestor_of(kind: type) -> type[nn.Module] | None:
    """The registered reference that this type derives from."""
    for base in kind.__mro__:
        if base in _twins:
            return base
    return None


def named(name: str) -> type[nn.Module] | None:
    """The registered reference of this class name."""
    for reference in _twins:
        if reference.__name__ == name:
            return reference
    return None
