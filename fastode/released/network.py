"""A network that reads state_dicts under a released code's names as well as under its own."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..reference.branches import PlainSlices
from .names import Pair, Table, is_copy, pairs, shape_in_theirs, to_ours, to_theirs, without_wrapper


class Network(PlainSlices):
    """An nn.Sequential of named parts whose `load_state_dict` also takes the released code's state_dict.

    What such a state_dict lacks, has too much or has in another shape is reported as nn.Module reports it, under its
    own names. Names that all begin with "module.", as nn.DataParallel saves them, are taken without.

    Args:
        parts: the modules by name.
        table: which name of theirs is which of ours.
        copies: how many copies of each block their network holds, where it holds some.
    """

    def __init__(self, parts: OrderedDict[str, nn.Module], table: Table, copies: int = 1) -> None:
        super().__init__(parts)
        self.table = table
        self.copies = copies

    def released_pairs(self, own: dict[str, Tensor]) -> list[Pair]:
        """Every name of theirs, with our names."""
        return pairs(self.table, own, self.copies)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own: dict[str, Tensor] = self.state_dict(keep_vars=True)
        given = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        wrapper = without_wrapper(given)
        found = self.released_pairs(own)
        theirs = {name.removeprefix(wrapper): value for name, value in given.items()}
        if sum(name in own for name in given) < sum(pair.theirs in theirs for pair in found):
            for name in given:
                del state_dict[prefix + name]
            shown = prefix + wrapper
            read, errors = _read(found, theirs, own, shown)
            # What is missing keeps its values, so that only their name for it is reported.
            state_dict.update({prefix + name: read.get(name, value) for name, value in own.items()})
            known = {pair.theirs for pair in found}
            missing_keys += [shown + name for name in _missing(found, theirs)]
            unexpected_keys += [shown + n for n in theirs if n not in known and not is_copy(self.table, n, known)]
            error_msgs += errors
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state_dict of a network of this package under the released code's names, which that code can load.

    Args:
        model: what a function of `fastode.released` has made, fused or not.

    Returns:
        Their names, with tensors that share memory with the model's where both have the same tensor.

    Raises:
        TypeError: model is no such network.

    Example:
        >>> import torch
        >>> from fastode import released
        >>> model = released.ie_resnet18(width=4)
        >>> [name for name in released.state_dict(model) if name.startswith("d4")]
        ['d4.0.weight', 'd4.0.bias', 'd4.2.weight']
    """
    if not isinstance(model, Network):
        raise TypeError(f"model must be a network made by fastode.released, got {checks.what(model)}")
    own: dict[str, Tensor] = model.state_dict()
    return OrderedDict((pair.theirs, to_theirs(pair, own)) for pair in model.released_pairs(own))


def _missing(found: list[Pair], theirs: dict[str, Any]) -> list[str]:
    """The names of theirs that have to be there: of several for one tensor, one is enough."""
    seen = {name for pair in found if pair.is_read and pair.theirs in theirs for name in pair.ours}
    missing: dict[str, None] = {}
    for pair in found:
        if pair.is_read and not seen.issuperset(pair.ours):
            missing[pair.theirs] = None
            seen.update(pair.ours)  # one name is enough to say it
    return list(missing)


def _read(
    found: list[Pair], theirs: dict[str, Any], own: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """Our tensors, and what is wrong with theirs."""
    read: dict[str, Any] = {}
    names: dict[str, str] = {}
    errors = []
    for pair in found:
        value = theirs.get(pair.theirs)
        if not pair.is_read or pair.theirs not in theirs:
            continue
        if not isinstance(value, Tensor):
            errors.append(f"{prefix}{pair.theirs} must be a tensor, got {checks.what(value)}.")
            continue
        wanted = shape_in_theirs(pair, own)
        if list(value.shape) != wanted:
            errors.append(
                f"size mismatch for {prefix}{pair.theirs}: the state_dict has the shape {list(value.shape)}, "
                f"the network {wanted}."
            )
            continue
        for name, tensor in to_ours(pair, value, own).items():
            if name in read and not read[name].equal(tensor):
                errors.append(f"{prefix}{names[name]} and {prefix}{pair.theirs} must be one tensor, and they differ.")
            else:
                read[name], names[name] = tensor, pair.theirs
    return read, errors
