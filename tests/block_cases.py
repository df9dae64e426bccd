"""Blocks of every family, norm, activation and convolution from a description, as reference and as fused twin."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
from pairwise import Case
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.tableau import Tableau
from fastode.testing import sample_input

DIVISOR = {1: 1, 3: 3, 8: 4, 16: 2, 20: 5}

NORMS: dict[str, Callable[[int], nn.Module | None]] = {
    "batch": nn.BatchNorm2d,
    "batch_eval": nn.BatchNorm2d,
    "batch_bare": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "batch_cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "group": lambda c: nn.GroupNorm(DIVISOR.get(c, 1), c),
    "layer": lambda c: nn.GroupNorm(1, c),
    "layer_bare": lambda c: nn.GroupNorm(1, c, affine=False),
    "instance": lambda c: nn.GroupNorm(c, c),
    "instance_input": nn.InstanceNorm2d,
    "instance_running": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "instance_running_eval": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "none": lambda c: None,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "softplus": lambda: nn.Softplus(beta=1.5, threshold=4.0),
    "elu": lambda: nn.ELU(alpha=0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid,
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3_no_bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "1x1": {"kernel_size": 1},
    "5x5": {"kernel_size": 5, "padding": "same"},
    "3x5": {"kernel_size": (3, 5), "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": (2, 1), "dilation": (2, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 0},
}
SHAPES: dict[str, str] = {
    "two_layers": "nac nac",
    "one_layer": "nac",
    "three_layers": "nac nac nac",
    "norm_last": "nac nac n",
    "convolution_first": "c na c",
    "no_convolution": "na",
}
CUSTOM = Tableau(
    "custom", order=1,
    alpha=((1.0,), (0.5, 0.5), (0.25, 0.5, 0.25), (0.125, 0.0, 0.5, 0.375)),
    beta=((0.4,), (0.1, 0.3), (0.0, -0.2, 0.25), (0.15, 0.0, 0.2, 0.35)),
)  # fmt: skip

Make = Callable[[Any, nn.Module, Case], nn.Module]
FAMILIES: dict[str, Make] = {
    "ie": lambda m, f, c: m.IESkip(f, c["steps"], 0.1, c["theta"], c["detach"]),
    "res": lambda m, f, c: m.ResBlock(f, step_size=0.5),
    "ssp2": lambda m, f, c: m.SSP2(f),
    "ssp3": lambda m, f, c: m.SSP3(f),
    "midpoint": lambda m, f, c: m.Midpoint(f),
    "poly": lambda m, f, c: m.PolyBlock(f, step_size=0.75),
    "ark": lambda m, f, c: m.Ark(f, learn_a21=True),
    "custom": lambda m, f, c: m.ShuOsher(f, CUSTOM),
}
COMMON: dict[str, tuple[Any, ...]] = {
    "norm": tuple(NORMS),
    "activation": tuple(ACTIVATIONS),
    "convolution": tuple(CONVOLUTIONS),
    "shape": tuple(SHAPES),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
    "size": ((1, 1), (3, 5), (7, 7), (17, 9)),
    "channels": (1, 3, 8, 16, 20),
    "layout": ("contiguous", "channels_last", "sliced"),
    "batch": (0, 1, 5),
    "mode": ("train", "input_grad", "forward"),
}
IMPLICIT = {"family": ("ie",), **COMMON, "steps": (1, 2, 3, 5), "theta": (1.0, 0.5), "detach": (False, True)}
EXPLICIT = {"family": tuple(family for family in FAMILIES if family != "ie"), **COMMON}


def possible(case: Case) -> bool:
    """Whether PyTorch takes the case: a norm needs more than one value in each set whose statistics it takes, and
    instance norm with running statistics a sample.
    """
    norm, one_pixel = case["norm"], case["size"] == (1, 1)
    if case["batch"] == 0 and norm.startswith("instance_running"):
        return False
    if norm == "none" or norm.endswith("_eval"):
        return True
    return not (one_pixel and (case["batch"] == 1 or norm.startswith("instance_")))


def name_of(case: Case) -> str:
    """The case as a test's id."""
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def seed_of(case: Case) -> int:
    """A seed of its own for every case."""
    return zlib.crc32(f"design {name_of(case)}".encode())


def make_branch(case: Case) -> nn.Module:
    """The branch of a case: random parameters and statistics, in the case's mode of normalisation and its dtype."""
    channels = case["channels"]
    convolution = dict(CONVOLUTIONS[case["convolution"]])
    if convolution.get("groups") == 0:
        convolution["groups"] = DIVISOR[channels]
    make = {
        "n": lambda: NORMS[case["norm"]](channels),
        "a": ACTIVATIONS[case["activation"]],
        "c": lambda: nn.Conv2d(channels, channels, **convolution),
    }
    layers: list[nn.Module] = []
    for unit in SHAPES[case["shape"]].split():
        made = [layer for layer in (make[letter]() for letter in unit) if layer is not None]
        # A unit of several layers becomes a Sequential of its own: branches nest.
        layers += made if unit == "nac" else [nn.Sequential(*made)]
    branch = nn.Sequential(*layers)
    with torch.no_grad():
        for module in branch.modules():
            if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 1.5)
    branch.train(not case["norm"].endswith("_eval"))
    return branch.to(case["dtype"])


def make_pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """The reference block and its fused twin on equal branches; the twin must run on the staged engine or fail.

    Only an empty batch may go to whatever engine takes it.
    """
    torch.manual_seed(seed_of(case))
    branch = make_branch(case)
    plain = FAMILIES[case["family"]](reference, branch, case)
    fused = FAMILIES[case["family"]](fastode.nn, copy.deepcopy(branch), case)
    fused.engine = "staged" if case["batch"] else "auto"
    for block in (plain, fused):
        block.train(branch.training)
        for parameter in block.parameters():
            parameter.data = parameter.data.to(case["dtype"])
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def make_input(case: Case, seed: int = 0) -> Tensor:
    """The input of a case; another seed gives another input."""
    size = (case["batch"], case["channels"], *case["size"])
    return sample_input(*size, dtype=case["dtype"], layout=case["layout"], seed=seed_of(case) + seed)


def case_of(family: str = "ie", **changes: Any) -> Case:
    """A small case of the family, with some factors changed."""
    case = {
        "family": family, "norm": "layer", "activation": "tanh", "convolution": "3x3", "shape": "two_layers",
        "dtype": torch.float64, "size": (3, 5), "channels": 3, "layout": "contiguous", "batch": 2, "mode": "train",
        "steps": 1, "theta": 1.0, "detach": False,
    }  # fmt: skip
    return case | changes
