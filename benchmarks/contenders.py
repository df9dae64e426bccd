"""The contenders: the reference, eager and compiled, the best a user can write, other libraries, this project."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import inside, others, timing
from .workloads import Inputs, Unavailable

BASELINES = ("eager", "eager-cl")
OTHER_LIBRARIES = tuple(others.BUILDERS)
RECOMPILE_LIMIT = 64
THEN_COMPILED = "-compiled"  # at the end of an engine's name: the fused module, compiled


@dataclass(frozen=True)
class Contender:
    """A way to run a workload.

    Args:
        name: as in the table; the project's own is "fused".
        engine: which engine, for "fused"; with THEN_COMPILED at its end the fused module is compiled.
        channels_last: the memory format of its input and parameters.
        compiled: whether dynamo's counters have to be looked at.
        build: the contender's module from a private copy of the reference, in its layout, and the inputs.
    """

    name: str
    engine: str | None
    channels_last: bool
    compiled: bool
    build: Callable[[nn.Module, Inputs], nn.Module]

    @property
    def label(self) -> str:
        return f"{self.name}:{self.engine}" if self.engine else self.name

    def make(self, module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """The module to call and its inputs; the reference stays untouched."""
        private = copy.deepcopy(module)
        if self.channels_last:
            private = private.to(memory_format=torch.channels_last)
            inputs = tuple(
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone() for x in inputs
            )
        return self.build(private, inputs), inputs


class Pinned(nn.Module):
    """A compiled call as a module with the parameters and buffers, by name, of the module it was compiled from.

    A deep copy of it is the object itself: the equality check copies what it judges, and a copy of a compiled module
    would not be compiled.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        for registry in ("_modules", "_parameters", "_buffers"):
            setattr(self, registry, getattr(module, registry))
        self.training = module.training
        self.__dict__["_call"] = call  # not as a module, or it would be one of those that it was compiled from

    def forward(self, *inputs: Tensor) -> Any:
        return self._call(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pinned:
        return self


def configure_dynamo() -> None:
    """Have dynamo compile every shape and mode, trace autograd.grad, and raise rather than fall back to eager."""
    import torch._dynamo.config as config

    config.recompile_limit = RECOMPILE_LIMIT
    config.fail_on_recompile_limit_hit = True
    if hasattr(config, "trace_autograd_ops"):
        config.trace_autograd_ops = True


def graph_breaks() -> int:
    """How often dynamo has broken a graph so far in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def graph_break_reason() -> str:
    """The reasons of the graph breaks so far, in one line."""
    from torch._dynamo.utils import counters

    return timing.one_line("; ".join(map(str, counters["graph_break"])), 300)


def _compile(module: nn.Module, inputs: Inputs, **options: Any) -> nn.Module:
    configure_dynamo()
    return Pinned(module, torch.compile(module, dynamic=False, **options))


class VjpIESkip(nn.Module):
    """IE-Skip's closed form with torch.func.vjp: g = 2 (e - theta Jt e), no autograd.grad inside the forward.

    It has the parameters of the block it is made from, under the same names.

    Args:
        block: a reference IE-Skip.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.branch = block.branch
        self.steps, self.step_size, self.theta, self.detach = block.steps, block.step_size, block.theta, block.detach

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.branch.named_parameters())

        def f(point: Tensor) -> Tensor:
            return torch.func.functional_call(self.branch, parameters, (point,))

        s = f(x)
        y = x + s
        goal = x + (1 - self.theta) * s if self.theta != 1 else x
        for _ in range(self.steps):
            point, aim = (y.detach(), goal.detach()) if self.detach else (y, goal)
            value, pull = torch.func.vjp(f, point)
            e = point - aim - self.theta * value
            g = 2 * (e - self.theta * pull(e)[0])
            y = y - self.step_size * (g.detach() if self.detach else g)
        return y


def vjp_block(block: nn.Module) -> nn.Module:
    """The closed form of a reference IE-Skip, not compiled.

    Raises:
        Unavailable: the branch changes buffers, which torch.func.vjp refuses.
    """
    if block.training and any(True for _ in block.branch.buffers()):
        raise Unavailable("torch.func.vjp refuses a branch that changes buffers (BatchNorm in training)")
    return VjpIESkip(block).train(block.training)


def _vjp(module: nn.Module, inputs: Inputs) -> nn.Module:
    return _compile(vjp_block(module), inputs, fullgraph=True)


def _fused(engine: str, module: nn.Module, inputs: Inputs, read: bool = False) -> nn.Module:
    import fastode

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a build that failed must not be timed as if it were fused
        fastode.fuse(module, engine=engine, read=read)
    return module


def engines(block: nn.Module, inputs: Inputs, mode: str = "train") -> dict[str, str]:
    """For every engine of the project "" if it can run this block on this input in a mode, else why not.

    Args:
        block: a reference block.
        inputs: its inputs.
        mode: "forward", "input_grad" or "train".
    """
    try:
        twin = _fused("auto", copy.deepcopy(block), inputs)
    except RuntimeWarning as warning:  # no compiler, or a build that failed
        return dict.fromkeys(inside.FUSED_ENGINES, str(warning))
    if not hasattr(twin, "why_not"):
        return dict.fromkeys(inside.FUSED_ENGINES, f"{type(block).__name__} has no fused twin")
    twin.requires_grad_(mode == "train")
    with torch.set_grad_enabled(mode != "forward"):
        return inside.refusals(twin, tuple(x.detach().requires_grad_(mode != "forward") for x in inputs))


def _as_is(module: nn.Module, inputs: Inputs) -> nn.Module:
    return module


def _other_library(name: str, module: nn.Module, inputs: Inputs) -> nn.Module:
    configure_dynamo()
    return others.BUILDERS[name](module)


def _fused_and_compiled(engine: str, module: nn.Module, inputs: Inputs, read: bool = False) -> nn.Module:
    """The fused module compiled, without the tracing of autograd.grad that only the references need."""
    import torch._dynamo.config as config

    configure_dynamo()
    fused_module = _fused(engine, module, inputs, read)
    compiled = torch.compile(fused_module, dynamic=False)

    def call(*given: Tensor) -> Any:
        with config.patch(trace_autograd_ops=False):
            return compiled(*given)

    return Pinned(fused_module, call)


def fused(engine: str, read: bool = False) -> Contender:
    """This project's contender on a named engine ("auto" lets the dispatcher choose); `read` is as in fastode.fuse."""
    plain = engine.removesuffix(THEN_COMPILED)
    build = _fused if plain == engine else _fused_and_compiled
    return Contender("fused", engine, True, plain != engine, partial(build, plain, read=read))


class Autocast(nn.Module):
    """A module under autocast, its output in float32, as a loss takes it there."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, self.dtype):
            y = self.module(*inputs)
        return y.float() if isinstance(y, Tensor) else y


CONTENDERS: dict[str, Contender] = {
    "eager": Contender("eager", None, False, False, _as_is),
    "eager-cl": Contender("eager-cl", None, True, False, _as_is),
    "compile": Contender("compile", None, False, True, _compile),
    "compile-cl": Contender("compile-cl", None, True, True, _compile),
    "compile-ro": Contender("compile-ro", None, True, True, partial(_compile, mode="reduce-overhead")),
    "vjp-compile": Contender("vjp-compile", None, True, True, _vjp),
    **{
        name: Contender(name, None, True, name.endswith("compile"), partial(_other_library, name))
        for name in OTHER_LIBRARIES
    },
}
COMPILED = tuple(name for name, contender in CONTENDERS.items() if contender.compiled)
