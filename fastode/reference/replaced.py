"""Functions of torch replaced by others while a context manager is entered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode):
    """Context manager under which each function in `replacements` is called as what stands beside it."""

    replacements: ClassVar[Mapping[Callable[..., Any], Callable[..., Any]]]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))
