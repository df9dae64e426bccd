"""IE-Skip blocks (Li et al. 2020): the papers' ResNet shapes and those of WideResNet-34-10."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastode.reference import IESkip, PreActBranch

from .workloads import Workload, maps

SHAPES = ((16, 32), (32, 16), (64, 8), (128, 4))
WIDE = ((160, 32), (320, 16), (640, 8))
DEFAULT = ((16, 32), (64, 8))
STEP_SIZE = 0.1


def block(channels: int, norm: str, steps: int, detach: bool) -> nn.Module:
    """An IE-Skip with the released code's branch: no bias, GroupNorm with one group ("layer") or BatchNorm."""
    branch = PreActBranch(channels, norm=norm, bias=False)
    return IESkip(branch, steps=steps, step_size=STEP_SIZE, detach=detach)


def workloads() -> list[Workload]:
    """ie, ie-bn (training and running statistics) and wrn."""
    rivals = ("compile", "compile-cl", "vjp-compile")
    found = []
    for name, norm, statistics in (("ie", "layer", "train"), ("ie-bn", "batch", "train"), ("ie-bn", "batch", "eval")):
        for steps in (1, 3):
            for detach in (False, True):
                variant = f"k{steps}{'-detached' if detach else ''}{'-eval' if statistics == 'eval' else ''}"
                for channels, size in SHAPES:
                    found.append(
                        Workload(
                            name,
                            variant,
                            f"{channels}@{size}",
                            partial(block, channels, norm, steps, detach),
                            maps(channels, size),
                            statistics=statistics,
                            rivals=rivals,
                            default=variant == "k1" and name == "ie" and (channels, size) in DEFAULT,
                        )
                    )
    for channels, size in WIDE:
        build = partial(block, channels, "batch", 1, False)
        found.append(Workload("wrn", "k1", f"{channels}@{size}", build, maps(channels, size, wide=True), rivals=rivals))
    return found
