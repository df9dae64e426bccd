"""A network made for a checkpoint of a released code, and loaded from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import checks
from . import ie_resnets, sonets, sspnets
from .names import Table, size_of, without_wrapper
from .network import Network
from .tables import TABLES

_NETWORKS: dict[str, Callable[..., Network]] = {
    "ie_resnet18": ie_resnets.ie_resnet18,
    "ie_resnet34": ie_resnets.ie_resnet34,
    "ie_resnet50": ie_resnets.ie_resnet50,
    "resnet18": ie_resnets.resnet18,
    "resnet34": ie_resnets.resnet34,
    "resnet50": ie_resnets.resnet50,
    "sspnet": sspnets.sspnet,
    "sspnet_mnist": sspnets.sspnet_mnist,
    "sonet": sonets.sonet,
    "soblock_resnet10": sonets.soblock_resnet10,
    "resnet10": sonets.resnet10,
    "odenet": sonets.odenet,
}


def load(name: str, checkpoint: Mapping[str, Any], **arguments: Any) -> Network:
    """Make the network that a checkpoint of a released code is of, and load it.

    Width, classes, numbers of blocks and inner steps are those that the checkpoint shows, unless they are given. What
    it does not show has the defaults of the network's function: γ, θ, the solver, and whether a block is "ssp2" or
    "ssp3", "res" or "midpoint".

    Args:
        name: of a function of `fastode.released`, as "ie_resnet18".
        checkpoint: their state_dict, or the dictionary that their code saves with it, as torch.load gives it.
        **arguments: of that function.

    Returns:
        The network, in training mode, in the checkpoint's dtype, on the CPU.

    Raises:
        TypeError: checkpoint is no mapping, or an argument is of the wrong kind.
        ValueError: name is not known, or an argument is not what it may be.
        RuntimeError: the checkpoint is of another network; the message names what is missing, unexpected, or of another
            shape.

    Example:
        >>> from fastode import released
        >>> theirs = released.state_dict(released.ie_resnet18(steps=3, width=4, num_classes=7))  # stands for torch.load
        >>> model = released.load("ie_resnet18", theirs, step_size=0.05)
        >>> model.stage1[0].steps, model.head[-1].out_features
        (3, 7)
    """
    checks.one_of("name", name, tuple(_NETWORKS))
    make = _NETWORKS[name]
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a state_dict, got {checks.what(checkpoint)}")
    known = inspect.signature(make).parameters
    given = {key for key, parameter in known.items() if parameter.kind is not parameter.VAR_KEYWORD}
    table = _table(name, arguments.get("block", known["block"].default if "block" in known else ""))
    inner = checkpoint.get(table.inside) if table.inside else None
    tensors = dict(inner if isinstance(inner, Mapping) else checkpoint)
    wrapper = without_wrapper(tensors)
    shown = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    for size in table.sizes:
        value = size_of(size, shown)
        if value is not None:
            arguments.setdefault(size.argument, value)
    if "norm" in given and "norm" not in arguments and not any(key.endswith("running_mean") for key in shown):
        raise ValueError(
            "norm must be given for a checkpoint without running statistics: 'group', 'layer' and 'instance' have the "
            "same parameters"
        )
    model = make(**arguments)
    dtypes = {value.dtype for value in shown.values() if isinstance(value, Tensor) and value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtype=dtypes.pop())
    model.load_state_dict(tensors)
    return model


def _table(name: str, block: Any) -> Table:
    """The table of a network; a `block` that is not known is refused by the function that makes it."""
    if name in TABLES:
        return TABLES[name]
    return TABLES.get(f"{name} {block}", TABLES[f"{name} res"])
