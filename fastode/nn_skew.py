"""The fused twins of the skew-symmetric blocks: the same constructors, parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _build, _check, _dispatch, _functional_skew, reference
from ._registry import reference_of, register
from .ops.skew_pair.autograd import March, is_channels_last
from .reference.skew import PADDING
from .reference.solvers import FIXED, State, solve_adaptive, solve_fixed

_NORMS = ("pre_norm_y", "pre_norm_z", "post_norm_y", "post_norm_z")


class _Fused:
    """What the twins share: the engine's name and the operators' build."""

    engine: str = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _build.load()


@register(reference.SkewPair)
class SkewPair(_Fused, reference.SkewPair):
    __doc__ = reference.SkewPair.__doc__

    def why_not(self, engine: str, x: Tensor | State | None) -> str:
        """Why an engine cannot run this field on x (or on any input); empty if it can."""
        return _read(self).why_not(engine, x if isinstance(x, tuple) else () if x is None else (x,))

    def against(self, engine: str, x: Tensor | State) -> str:
        """Why "auto" does not take an engine that can run this field on x; empty if it does."""
        return _read(self).against(engine, x if isinstance(x, tuple) else (x,), _functional_skew.PAIR)

    def forward(self, y: Tensor, z: Tensor) -> State:
        _check.engine(self.engine, _dispatch.ENGINES)
        _check.skew_pair(y, z, self.weight, self.stride, PADDING)
        field = _read(self)
        chosen = _dispatch.choose(
            self.engine,
            lambda name: field.why_not(name, (y, z)),
            lambda name: field.against(name, (y, z), _functional_skew.PAIR, lambda: _as_reference(self)),
        )
        _note(self, chosen)
        if chosen == "reference":
            return super().forward(y, z)
        return _functional_skew.evaluate(field, y, z, lambda: _as_reference(self), chosen)


@register(reference.SkewLinear)
class SkewLinear(_Fused, reference.SkewLinear):
    __doc__ = reference.SkewLinear.__doc__

    def why_not(self, engine: str, x: Tensor | State | None) -> str:
        """Why an engine cannot run this field on x (or on any input); empty if it can."""
        return "its two matrix products are all the work there is, and PyTorch's are as fast as any"

    def forward(self, y: Tensor, z: Tensor) -> State:
        _check.engine(self.engine, _dispatch.ENGINES)
        _note(self, _dispatch.choose(self.engine, lambda name: self.why_not(name, None)))
        return super().forward(y, z)


class _FusedSolve(_Fused, reference.SOBlock):
    """What SOBlock and SOClassifier share."""

    def why_not(self, engine: str, x: Tensor | None) -> str:
        """Why an engine cannot run this block on x (or on any input); empty if it can."""
        kind = type(self.field)
        if kind is not SkewPair and kind is not reference.SkewPair:
            return f"its field is a {kind.__name__}, and only SkewPair is fused"
        if _functional_skew.has_hooks(self.field):
            return "its field has hooks, which a fused solution would not call"
        if getattr(self.field, "engine", "auto") == "reference":
            return "its field is asked to run as the reference"
        return _read(self.field).why_not(engine, () if x is None else (x,))

    def against(self, engine: str, x: Tensor, make_reference: Callable[[], nn.Module] | None = None) -> str:
        """Why "auto" does not take an engine that can run this block on x; empty if it does."""
        kind = f"skew_solution by {self.solver} in {self.steps} steps"
        return _read(self.field).against(engine, (x,), kind, make_reference)

    def forward(self, x: Tensor) -> Tensor:
        _check.engine(self.engine, _dispatch.ENGINES)
        if isinstance(self.field, reference.SkewPair):
            # Before an engine is chosen, so that a refusal reads the same in both twins.
            self.field.check_input(x)
        chosen = _dispatch.choose(
            self.engine,
            lambda name: self.why_not(name, x),
            lambda name: self.against(name, x, lambda: _as_plain_solve(self)),
        )
        _note(self, chosen)
        if chosen == "reference":
            return super().forward(x)
        _note(self.field, chosen)
        field = _read(self.field)
        if self.solver not in FIXED:
            return self._adaptive(field, x, chosen)
        scheme = FIXED[self.solver]
        steps = March(scheme.a, scheme.b, self.t1 / self.steps, self.steps)
        make = partial(_FixedSolution, self)
        if chosen == "resident":
            return _functional_skew.solve(field, x, steps, make)
        end = _functional_skew.march(field, _repeated(x, field.weight.shape[0], field.stride), x, steps, make, chosen)
        return end if is_channels_last(x) else end.contiguous()

    def _adaptive(self, field: _functional_skew.Field, x: Tensor, engine: str) -> Tensor:
        """torchdiffeq flattens its state: as [N, H, W, C], so that the field finds it in its own memory format."""
        make = partial(_as_reference, self.field)

        def slopes(y: Tensor, z: Tensor) -> State:
            pair = _functional_skew.evaluate(field, _to_front(y), _to_front(z), make, engine)
            return _to_back(pair[0]), _to_back(pair[1])

        back = (_to_back(_repeated(x, field.weight.shape[0], field.stride)), _to_back(x))
        end, _ = solve_adaptive(slopes, back, self.solver, self.rtol, self.atol, self.t1)
        return _to_front(end).contiguous()


@register(reference.SOBlock)
class SOBlock(_FusedSolve):
    __doc__ = reference.SOBlock.__doc__


@register(reference.SOClassifier)
class SOClassifier(_FusedSolve, reference.SOClassifier):
    __doc__ = reference.SOClassifier.__doc__


class _FixedSolution(nn.Module):
    """The reference solution by fixed steps, as a function of the initial state or of x, which gives one."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.field = _as_reference(block.field)
        self.scheme, self.t1, self.steps = FIXED[block.solver], block.t1, block.steps

    def forward(self, *state: Tensor) -> Tensor:
        y, z = state if len(state) == 2 else self.field.initial_state(*state)
        return solve_fixed(self.field, (y, z), self.scheme, self.t1, self.steps)[0]


def _as_reference(field: Any) -> nn.Module:
    """A reference field around the same parameters and modules."""
    twin = copy.copy(field)
    twin.__class__ = reference.SkewPair
    # A dictionary of its own: functional_call puts other tensors into it.
    twin.__dict__["_parameters"] = dict(field._parameters)
    return twin


def _as_plain_solve(block: Any) -> nn.Module:
    """A reference block around the same field."""
    twin = copy.copy(block)
    twin.__class__ = reference_of(type(block)) or type(block)
    twin.__dict__["_modules"] = {**block._modules, "field": _as_reference(block.field)}
    return twin


def _read(field: Any) -> _functional_skew.Field:
    norms = [getattr(field, name) for name in _NORMS]
    found = _functional_skew.read(field.weight, field.stride, PADDING, field.gamma, field.activation, norms, _NORMS)
    if "weight" not in field._parameters:
        found.reason = "its weight is not a parameter of its own."
    return found


def _repeated(x: Tensor, channels: int, stride: int) -> Tensor:
    """y(0) of `SkewPair.initial_state`, in channels_last and in one pass, where torch.cat takes one for each copy."""
    if stride == 1 and channels == x.shape[1]:
        # A copy of x; no operator writes into its inputs, so it can be x.
        return x
    small = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).unsqueeze(3)  # [N, H, W, 1, C]
    copies = -(-channels // x.shape[1])
    repeated = small.expand(-1, -1, -1, copies, -1).flatten(3)[..., :channels]
    return _to_front(repeated.contiguous())


def _note(block: nn.Module, engine: str) -> None:
    if not torch.compiler.is_compiling():
        _dispatch.note(block, engine)


def _to_back(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def _to_front(x: Tensor) -> Tensor:
    """[N, H, W, C] as [N, C, H, W]."""
    return x.permute(0, 3, 1, 2)
