"""Checkpoints that hold tensors and plain values, written so that a full disk leaves the old one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .. import checks

__all__ = ["load_weights"]

_SHOWN = 3  # names that an error lists


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint's weights into the network that it is of.

    Args:
        model: takes the weights, on its own device; unchanged if they are not its own.
        path: a file that `Trainer` wrote, or one that holds a state_dict alone.

    Returns:
        What else the checkpoint holds, by name; nothing for a state_dict alone.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file is no checkpoint, or one of another network.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(model.state_dict(), f"{folder}/a.pt")
        ...     load_weights(nn.Linear(2, 3), f"{folder}/a.pt")
        Traceback (most recent call last):
        ValueError: checkpoint must be one of this network, got a.pt, where bias is [2] in place of [3]; ...
    """
    checks.module("model", model)
    content = read(path)
    name = Path(path).name
    weights = content.pop("model") if isinstance(content.get("model"), dict) else content
    _check_names(model.state_dict(), weights, name)
    model.load_state_dict(weights)
    return {} if weights is content else content


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; nothing of it is run.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint.
    """
    wanted = "checkpoint must be a file of tensors and plain values"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{wanted}, got {path}, which is not there") from None
    except Exception as error:  # a file of another kind fails in any of its reader's ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{wanted}, got {Path(path).name}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{wanted} by name, got {Path(path).name}, which holds {checks.what(content)}")
    return dict(content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: of the file.
        content: tensors and plain values, by name.

    Raises:
        TypeError: something in it is neither.
        OSError: it could not be written; the one before it stands.
    """
    content = plain(content, "checkpoint")
    replace(path, "checkpoint", lambda file: torch.save(content, file))


def replace(path: Path, name: str, fill: Callable[[BinaryIO], object]) -> None:
    """Fill a file beside another one, and put it in that one's place.

    Args:
        path: of the file that is replaced, if it is there.
        name: what an error calls it.
        fill: writes the new one.

    Raises:
        OSError: it could not be written; the one before it stands.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # or the new name could reach the disk before what it names
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        before = "the one before it stands" if path.exists() else "there is none from before"
        raise OSError(f"{name} must be a file that can be written, got {path}: {error}; {before}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def plain(value: Any, where: str) -> Any:
    """A value of tensors, numbers, strings, None, and lists, tuples and dicts of these; anything else is refused.

    Args:
        value: what is checked; an OrderedDict becomes a dict.
        where: what an error calls it.
    """
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return value
    if isinstance(value, Counter):  # which schedules count their milestones by
        return value
    if isinstance(value, dict):
        return {key: plain(each, f"{where}[{key!r}]") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(each, f"{where}[{place}]") for place, each in enumerate(value))
    raise TypeError(f"{where} must be a tensor or a plain value, got {checks.what(value)}")


def _check_names(own: dict[str, Any], weights: dict[str, Any], name: str) -> None:
    faults = []
    for key in sorted(own.keys() | weights.keys(), key=str):
        if key not in weights:
            faults.append(f"{key} is missing")
        elif key not in own:
            faults.append(f"{key} is more than it has")
        elif isinstance(own[key], Tensor):
            found = weights[key]
            if not isinstance(found, Tensor):
                faults.append(f"{key} is {checks.what(found)}")
            elif found.shape != own[key].shape:
                faults.append(f"{key} is {list(found.shape)} in place of {list(own[key].shape)}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(
            f"checkpoint must be one of this network, got {name}, where {'; '.join(faults[:_SHOWN])}{more}"
        )
