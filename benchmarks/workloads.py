"""A workload: a block or a network of the papers, its input, and what one turn of a contender does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import counts, data

Inputs = tuple[Tensor, ...]

BLOCK_MODES = ("forward", "input_grad", "train")
# The modes in which parameters ask for gradients.
TRAINABLE = ("train", "attack_step", "adv_train", "trades")
BATCH = 128
# Wide blocks on a CPU, where 128 images of 160@32 would take minutes.
WIDE_BATCH = {"cpu": 8, "cuda": 128}


class Unavailable(Exception):
    """A contender cannot take part here, and why."""


@dataclass(frozen=True)
class Work:
    """One contender's turn: the call, and a call that frees the gradients it has left."""

    run: Callable[[], object]
    clear: Callable[[], object]


def work(module: nn.Module, inputs: Inputs, mode: str) -> Work:
    """A block's turn in one of the three modes; gradients are set to None before each call.

    Args:
        module: the block, on the inputs' device.
        inputs: tensors without gradients; they are copied here.
        mode: "forward" under no_grad; "input_grad" with frozen parameters; "train" for every gradient.
    """
    if mode == "forward":
        module.requires_grad_(False)

        def forward() -> object:
            with torch.no_grad():
                return module(*inputs)

        return Work(forward, lambda: None)

    module.requires_grad_(mode == "train")
    # detach keeps the memory format; each contender holds its own leaves.
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    cotangents: list[Tensor] = []

    def clear() -> None:
        module.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None

    def both() -> None:
        clear()
        outputs = module(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if not cotangents:
            cotangents.extend(_cotangent(y) for y in outputs)
        torch.autograd.backward(outputs, cotangents)

    return Work(both, clear)


def _cotangent(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return torch.empty_like(output).copy_(drawn)  # in the output's memory format, as a network would hand it over


def count(module: nn.Module, inputs: Inputs, mode: str) -> tuple[int, int]:
    """Least FLOPs and bytes of a block's turn."""
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return counts.flops(module, inputs, mode), counts.least_bytes(module, inputs, outputs, mode)


@dataclass(frozen=True)
class Workload:
    """A module of the papers at one shape.

    Args:
        id: as in the table of workloads, "ie" for example.
        variant: what else tells it apart, "k1" or "k3-detached" for example.
        shape: "16@32" for 16 channels at 32 x 32.
        build: makes the reference module, seeded by the caller.
        inputs: makes the float32 inputs for a device type ("cpu" or "cuda").
        modes: the modes it has.
        statistics: "train" or "eval", for the norms that tell them apart.
        rivals: contenders beside eager, eager-cl and fused.
        default: whether the default suite has it.
        own: the project's contender: "fused" for every engine that can run it, "fused:auto" for the project's own
            choice, as for a network, whose blocks may each take another engine.
        work: prepares a contender's turn from its module, inputs and mode.
        count: the least FLOPs and bytes of a turn, from the reference, its inputs and the mode.
        read: whether the project's contender reads the forwards of others' modules.
    """

    id: str
    variant: str
    shape: str
    build: Callable[[], nn.Module]
    inputs: Callable[[str], Inputs]
    modes: tuple[str, ...] = BLOCK_MODES
    statistics: str = "train"
    rivals: tuple[str, ...] = ("compile", "compile-cl")
    default: bool = False
    own: str = "fused"
    work: Callable[[nn.Module, Inputs, str], Work] = work
    count: Callable[[nn.Module, Inputs, str], tuple[int, int]] = count
    read: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.id, self.variant, self.shape) if part)


def make(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """The reference module and its inputs; always the same values, and running statistics that have seen the inputs."""
    inputs = workload.inputs(device.type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = workload.build()
    if workload.statistics == "eval":
        few = tuple(x[:8] for x in inputs)
        with torch.no_grad():
            for _ in range(10):
                module(*few)
        module.eval()
    return module.to(device, dtype), tuple(x.to(device, dtype) for x in inputs)


def maps(channels: int, size: int, wide: bool = False) -> Callable[[str], Inputs]:
    """Inputs of one feature map [N, channels, size, size]."""

    def inputs(device: str) -> Inputs:
        return (data.feature_maps(WIDE_BATCH[device] if wide else BATCH, channels, size),)

    return inputs
