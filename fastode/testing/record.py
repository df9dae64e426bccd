"""What a run of a reference block tells about its own rounding: reduction lengths and distances to kinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _at_zero(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, ...]:
    return (0.0,)


def _at_threshold(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, ...]:
    beta = _argument(args, kwargs, 1, "beta", 1.0)
    return (_argument(args, kwargs, 2, "threshold", 20.0) / beta,)


def _at_bounds(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, ...]:
    return (_argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0))


# Where each activation is not smooth: the function, its slope (ELU: its curvature) jumps there.
_KINKS: dict[str, Callable[[Sequence[Any], dict[str, Any]], tuple[float, ...]]] = {
    "relu": _at_zero,
    "leaky_relu": _at_zero,
    "prelu": _at_zero,
    "elu": _at_zero,
    "celu": _at_zero,
    "selu": _at_zero,
    "relu6": lambda args, kwargs: (0.0, 6.0),
    "hardtanh": _at_bounds,
    "softplus": _at_threshold,
}


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    weight = _argument(args, kwargs, 1, "weight", None)
    forward, transposed = weight[0].numel(), weight[:, 0].numel()
    return max(forward, transposed, result[:, 0].numel())


def _linear(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    weight = _argument(args, kwargs, 1, "weight", None)
    rows = result.numel() // max(result.shape[-1], 1)
    return max(*weight.shape, rows)


def _per_channel(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    return result.numel() // max(result.shape[1], 1)


def _group_norm(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    groups = _argument(args, kwargs, 1, "num_groups", 1)
    return max(result[:1].numel() // groups, _per_channel(args, kwargs, result))


def _layer_norm(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    size = 1
    for extent in _argument(args, kwargs, 1, "normalized_shape", ()):
        size *= extent
    return max(size, result.numel() // max(size, 1))


# The longest sum in a call and in its derivatives: a convolution's fan-in, fan-out and the N x H x W of its weight
# gradient; a norm's statistics and the N x H x W of its affine gradients.
_REDUCTIONS: dict[str, Callable[[Sequence[Any], dict[str, Any], Tensor], int]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    "conv_transpose3d": _convolution,
    "linear": _linear,
    "batch_norm": _per_channel,
    "instance_norm": _per_channel,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
}


class Recorder(TorchFunctionMode):
    """Notes the longest reduction of the calls made under it, and every pre-activation that has a kink to be near."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 1
        self.pre_activations: list[Tensor] = []
        self.kinks: list[tuple[float, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_")
        kink = _KINKS.get(name)
        if kink is not None:
            # Read before the call: the activation may work in place.
            self.kinks.append(kink(args, kwargs))
            self.pre_activations.append(_argument(args, kwargs, 0, "input", None).detach().clone())
        result = func(*args, **kwargs)
        length = _REDUCTIONS.get(name)
        if length is not None:
            self.longest = max(self.longest, length(args, kwargs, result))
        return result


class Shifted(TorchFunctionMode):
    """Adds a tensor, dense or sparse, to the pre-activations of each call that a `Recorder` notes, in order."""

    def __init__(self, steps: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps = iter(steps)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "").rstrip("_") in _KINKS:
            moved = _argument(args, kwargs, 0, "input", None) + next(self.steps)
            kwargs.pop("input", None)
            args = (moved, *args[1:])
        return func(*args, **kwargs)


def across_kinks(truth: Recorder, runs: Sequence[Recorder], eps: float) -> list[Tensor] | None:
    """What moves each pre-activation to the other side of a kink where it can fall there by rounding; zero elsewhere.

    It can, unless the distance to the kink exceeds twice the largest deviation that the working precision's own runs
    show, plus two units of rounding of the largest pre-activation: the shape of the rule, applied to pre-activations.

    Args:
        truth: the recorder of the float64 run.
        runs: the recorders of the runs in the working precision.
        eps: the working precision's unit of rounding.

    Returns:
        A sparse tensor for each recorded call; None when runs made different calls or a value is not finite.
    """
    found = []
    for index, (exact, kinks) in enumerate(zip(truth.pre_activations, truth.kinks, strict=True)):
        if any(len(run.pre_activations) != len(truth.pre_activations) for run in runs):
            return None
        if exact.numel() == 0:
            found.append(torch.zeros_like(exact).to_sparse())
            continue
        largest = float(exact.abs().max())
        deviations = [float((run.pre_activations[index] - exact).abs().max()) for run in runs]
        margin = 2.0 * max(deviations, default=0.0) + 2.0 * eps * largest
        if not math.isfinite(sum(deviations, margin)):
            return None
        to_kinks = torch.stack([kink - exact for kink in kinks])
        step = to_kinks.gather(0, to_kinks.abs().argmin(0, keepdim=True))[0]
        beyond = torch.where(step >= 0, 1.0, -1.0) * 4.0 * torch.finfo(torch.float64).eps * largest
        found.append(torch.where(step.abs() <= margin, step + beyond, 0.0).to_sparse())
    return found


def warm_up() -> None:
    """Call the CPU's vector mathematics once on every thread.

    The first multi-threaded float64 transcendental of a process can be off by 1e-7 on one thread's share (seen with
    torch.sin on PyTorch 2.13), which is enough to spoil a truth.
    """
    values = torch.linspace(-1.0, 1.0, 1 << 17, dtype=torch.float64)
    for function in (torch.sin, torch.exp, torch.tanh, torch.expm1, torch.log1p):
        function(values * 0.5)
