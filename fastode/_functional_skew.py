"""The skew pair as a function, and how its twins choose an engine and call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _dispatch, _one_step, _rule, _trial, branch
from .ops.rerun import Rerun
from .ops.resident import skew as resident
from .ops.skew_pair.autograd import March, MarchFunction, SkewFunction
from .ops.skew_pair.engine import TENSORS_PER_NORM, Pair
from .reference.branches import make_activation
from .reference.skew import check_gamma, skew_field

PAIR = "skew_pair"  # the kind of a field alone


@dataclass
class Field:
    """A skew pair as it was read: its constants but for autocast, its tensors, and why it cannot be fused, if so.

    `norms` holds, as a `Pair` orders them, what the reader found of the norms before W on y and z and after σ on each.
    """

    weight: Tensor
    stride: int
    padding: int
    gamma: float
    activation: branch.Activation | None
    norms: list[branch.Reading]
    reason: str = ""

    @property
    def tensors(self) -> list[Tensor | None]:
        """Four of each norm, as the engine takes them."""
        rows = (reading.tensors or [None] * TENSORS_PER_NORM for reading in self.norms)
        return [tensor for row in rows for tensor in row[:TENSORS_PER_NORM]]

    def why_not(self, engine: str, states: Sequence[Tensor]) -> str:
        """Why an engine cannot run it on these states (or, without any, on some); empty if it can."""
        if self.reason:
            return self.reason
        reason = _dispatch.elsewhere(engine, states[0] if states else None)
        device = states[0].device.type if states else "cuda" if engine == "fused_convolution" else "cpu"
        reason = reason or _dispatch.no_operators(device)
        reason = reason or (_dispatch.cannot_take(states, [self.weight, *self.tensors]) if states else "")
        if reason or engine not in ("resident", "fused_convolution"):
            return reason
        x = states[0] if states else self.weight
        if engine == "fused_convolution":
            from .ops.triton import skew

            return skew.why_not(self.pair(x), self.weight, self.tensors, states)
        return resident.why_not(self.pair(x), self.weight, self.tensors, states)

    def against(
        self, engine: str, states: Sequence[Tensor], kind: str, make_reference: Callable[[], nn.Module] | None = None
    ) -> str:
        """Why "auto" does not take an engine that could run it on these states; empty if it does.

        Args:
            engine: its name.
            states: the inputs of the block.
            kind: the family of the block, one of `_rule.FAMILIES`, and what beside the field tells its calls apart.
            make_reference: makes the reference block, where a trial may be made now.
        """
        x = states[0]
        if x.device.type in _trial.DEVICES:
            activation = "" if self.activation is None else self.activation.kind
            shape = f"{list(self.weight.shape)} stride {self.stride} padding {self.padding} {activation}"
            norms = [_one_step.describe(reading.units) for reading in self.norms if reading.units]
            lower, tensors = _dispatch.autocast_dtype(x), [self.weight, *self.tensors]
            wanted = _trial.key(" ".join([kind, shape, *norms]), states, tensors, lower)
            able = partial(_dispatch.candidates, lambda name: self.why_not(name, states))
            return _trial.against(engine, wanted, states, lower, able, make_reference)
        if engine != "resident":
            return ""
        coupled = any(unit.norm is not None and unit.norm.mode == "batch" for r in self.norms for unit in r.units or ())
        return _rule.slower(kind.split(" ", 1)[0], coupled, states[-1], max(self.weight.shape[:2]))

    def pair(self, x: Tensor, engine: str = "staged") -> Pair:
        """The constants, for an engine and under the autocast that holds now."""
        norms = [reading.units[0].norm if reading.units else None for reading in self.norms]
        tracked = [any(norm is not None for norm in reading.norms) for reading in self.norms]
        return Pair(
            self.stride,
            self.padding,
            float(self.gamma),
            self.activation,
            (norms[0], norms[1], norms[2], norms[3]),
            (tracked[0], tracked[1], tracked[2], tracked[3]),
            _dispatch.autocast_dtype(x),
            fused=engine == "fused_convolution",
        )

    def check(self, y: Tensor, z: Tensor) -> None:
        """Refuse what the norms would refuse, before anything runs."""
        for reading, x in zip(self.norms, (y, z, y, z), strict=True):
            _check.enough_values(reading, x)

    def update_running(self, statistics: Sequence[Tensor], y: Tensor, z: Tensor) -> None:
        """Update running statistics: `statistics` holds one entry of each tracked norm for each evaluation."""
        pairs = zip(self.norms, (y, z, y, z), strict=True)
        tracked = [(reading, x) for reading, x in pairs if any(norm is not None for norm in reading.norms)]
        for index, (reading, x) in enumerate(tracked):
            _one_step.update_running(reading, statistics[index :: len(tracked)], x)


def read(
    weight: Tensor,
    stride: int,
    padding: int,
    gamma: float,
    activation: nn.Module | None,
    norms: Sequence[nn.Module] = (),
    names: Sequence[str] = (),
) -> Field:
    """Read a pair with σ = activation (None for the identity) and either four norms with their names, or none."""
    field = Field(weight, stride, padding, gamma, None, [branch.Reading(())] * 4)
    if activation is not None and (type(activation) is not nn.Identity or has_hooks(activation)):
        reading = branch.read(activation)
        if reading.units is None:
            field.reason = reading.reason.replace("branch", "activation", 1)
        elif len(reading.units) > 1 or reading.units[0].norm is not None or reading.units[0].conv is not None:
            field.reason = "its activation is more than one activation layer."
        else:
            field.activation = reading.units[0].activation
    for index, (name, norm) in enumerate(zip(names, norms, strict=True)):
        if type(norm) is nn.Identity and not has_hooks(norm):
            continue
        reading = field.norms[index] = branch.read(norm)
        if reading.units is None:
            field.reason = reading.reason.replace("branch", name, 1)
        elif len(reading.units) > 1 or reading.units[0].activation is not None or reading.units[0].conv is not None:
            field.reason = f"its {name} is more than one norm layer."
    updated = [norm.running_mean for reading in field.norms for norm in reading.norms if norm is not None]
    if len({id(mean) for mean in updated}) < len(updated):
        field.reason = "two of its norms update the same running statistics."
    return field


def evaluate(
    field: Field, y: Tensor, z: Tensor, make_reference: Callable[[], nn.Module], engine: str
) -> tuple[Tensor, Tensor]:
    """The slopes at (y, z), by an engine that can run the field."""
    field.check(y, z)
    rerun = None if torch.compiler.is_compiling() else Rerun(make_reference)
    if engine == "resident":
        return resident.ResidentSkewFunction.apply(y, z, field.weight, field.pair(y), rerun, *field.tensors)
    dy, dz, *statistics = SkewFunction.apply(y, z, field.weight, field.pair(y, engine), rerun, *field.tensors)
    field.update_running(statistics, y, z)
    return dy, dz


def march(
    field: Field, y: Tensor, z: Tensor, steps: March, make_reference: Callable[[], nn.Module], engine: str
) -> Tensor:
    """y at the end of equal steps from (y, z), by an engine other than the resident one."""
    field.check(y, z)
    rerun = None if torch.compiler.is_compiling() else Rerun(make_reference)
    end, *statistics = MarchFunction.apply(y, z, field.weight, field.pair(y, engine), steps, rerun, *field.tensors)
    field.update_running(statistics, y, z)
    return end


def solve(field: Field, x: Tensor, steps: March, make_reference: Callable[[], nn.Module]) -> Tensor:
    """y at the end of equal steps from the initial state that x gives, by the resident engine."""
    y = x[:, :1, :: field.stride, :: field.stride].expand(-1, field.weight.shape[0], -1, -1)
    field.check(y, x)
    rerun = None if torch.compiler.is_compiling() else Rerun(make_reference)
    return resident.ResidentMarchFunction.apply(x, field.weight, field.pair(x), steps, rerun, *field.tensors)


class _PlainPair(nn.Module):
    """The pair without norms, its weight a tensor of any origin: what the function's reference is."""

    weight: Tensor

    def __init__(self, weight: Tensor, stride: int, padding: int, gamma: float, activation: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.stride, self.padding, self.gamma, self.activation = stride, padding, gamma, activation

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return skew_field(y, z, self.weight, self.stride, self.padding, self.gamma, self.activation)


class _TriedPair(_PlainPair):
    """What a trial of the function starts from: its weight is a parameter where a gradient is asked for."""

    fused_twin: type[nn.Module]

    def __init__(self, weight: Tensor, *constants: Any) -> None:
        super().__init__(weight, *constants)
        del self.weight
        self.weight = nn.Parameter(weight.detach(), weight.requires_grad)


class _FusedPair(_TriedPair):
    engine: str

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        activation = None if type(self.activation) is nn.Identity else self.activation
        return _pair(y, z, self.weight, self.stride, self.padding, self.gamma, activation, self.engine)


_TriedPair.fused_twin = _FusedPair


def skew_pair(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    gamma: float = 0.0,
    activation: str | Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The skew-symmetric field (σ(W z − γ y), σ(−Wᵀ y − γ z)), with a convolution W and its transpose.

    Args:
        y: [N, C_out, H', W'], the shape of W's output.
        z: [N, C_in, H, W], which must be (H' − 1) stride + k − 2 padding high, and as wide accordingly.
        weight: W's kernel [C_out, C_in, k, k].
        stride: of W.
        padding: of W, on every side.
        gamma: γ ≥ 0, the damping.
        activation: σ: "leaky_relu" (slope 0.01), "tanh", "softplus", "elu", "relu", "silu", a module such as
            nn.ELU(0.5), any function of a tensor (which runs as the reference), or None for the linear pair.

    Returns:
        (ẏ, ż), of the shapes of y and z.

    Raises:
        TypeError, ValueError: an argument is none of what it may be; nothing has run then.

    Source: Huang et al., "Adversarial Robustness of Stabilized NeuralODEs Might be from Obfuscated Gradients", eq. 3
        (paper 003).

    Example:
        >>> y, z = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 8, 8)
        >>> dy, dz = skew_pair(y, z, torch.ones(2, 1, 4, 4), stride=2)
        >>> dy[0, 0, 1, 1].item(), dz[0, 0, 1, 1].item()
        (16.0, -8.0)
    """
    check_gamma(gamma)
    _check.skew_pair(y, z, weight, stride, padding)
    if isinstance(activation, str):
        activation = make_activation(activation)
    if not (activation is None or callable(activation)):
        raise TypeError(f"activation must be a name, a module, a function or None, got {_check.what(activation)}")
    return _pair(y, z, weight, stride, padding, gamma, activation)


def _pair(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    gamma: float,
    activation: Callable[[Tensor], Tensor] | None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`skew_pair` with its arguments checked."""
    module = activation if isinstance(activation, nn.Module) else None
    field = read(weight, stride, padding, gamma, module)
    if activation is not None and module is None:
        field.reason = "its activation is a function, which the reader does not know."
    function = torch.nn.Identity() if activation is None else activation
    constants = (stride, padding, gamma, function)
    chosen = _dispatch.choose(
        engine,
        lambda name: field.why_not(name, (y, z)),
        lambda name: field.against(name, (y, z), PAIR, lambda: _TriedPair(weight, *constants)),
    )
    if chosen == "reference":
        return skew_field(y, z, weight, stride, padding, gamma, function)
    return evaluate(field, y, z, lambda: _PlainPair(weight, *constants), chosen)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
