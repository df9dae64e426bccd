"""The face of an engine, and the call that it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..branch.layers import is_plain
from ..branch.read import Unit
from ..native import cuda, operators
from .plan import MaybeTensors, Plan
from .schemes.chain.chain import Chain
from .schemes.implicit_euler.descent import Descent
from .schemes.runge_kutta.stages import Scheme
from .schemes.skew_pair.linear import Linear
from .schemes.skew_pair.pair import Pair

Mode = Literal["train", "input_grad", "forward"]

_CPU_STORAGE = (torch.float32, torch.float64, torch.bfloat16)
STORAGE = {"cpu": _CPU_STORAGE, "cuda": (*_CPU_STORAGE, torch.float16)}
NO_LINEAR = "it has skew fields of convolutions, and none of two matrix products"
NO_EXACT_IE = "it has no products of a branch's Jacobian alone, of which the exact implicit Euler step is made"
ODE_SOLUTION = "ode_solution"  # the family of a single map's equation
NO_ODE_SOLUTION = "it has no solution of a single map's equation"
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True, eq=False)
class Call:
    """What an engine is asked to run: a block of a family, its branch or field, and the tensors it gets.

    Attributes:
        family: "ie", "exact_ie", "shu_osher", "chain", "skew_pair", "skew_solution", "skew_adaptive",
            "skew_linear", "linear_solution", "linear_adaptive" or "ode_solution".
        variant: what else the time of its calls depends on, in words.
        program: the branch, the chain, or the field, as constants; None where it cannot be read.
        tensors: of the branch or the chain (six for each unit), of the pair (the weight, then four for each norm), or
            of the field of two matrix products (the weight, then the biases of y and z).
        inputs: what the block is called with; none where it is asked about on any input.
        fault: why no engine but plain PyTorch can run the block, in a sentence; empty if nothing is known.
        stages: of an explicit scheme, or the steps of an IE-Skip.
        learned: whether a scheme's coefficients are learned.
        exact: whether the gradient goes through the size of every step by error.
    """

    family: str
    variant: str
    program: Plan | Chain | Pair | Linear | None
    tensors: MaybeTensors
    inputs: tuple[Tensor, ...] = ()
    fault: str = ""
    stages: int = 1
    learned: bool = False
    exact: bool = False

    @property
    def x(self) -> Tensor | None:
        """The first input, if there is one."""
        return self.inputs[0] if self.inputs else None

    @property
    def lower(self) -> torch.dtype | None:
        """The dtype to which autocast lowers convolutions, None where it is off."""
        return None if self.program is None else self.program.lower

    @property
    def is_single(self) -> bool:
        """Whether it is an explicit step that evaluates its branch once."""
        return self.family == "shu_osher" and self.stages == 1

    @property
    def mode(self) -> Mode:
        """Which gradients the call will be asked for, as fastode.testing calls it."""
        return mode(self.inputs, self.tensors)

    @property
    def kind(self) -> str:
        """The block and its branch in words: with the inputs and the mode, all that its engines' times depend on."""
        if isinstance(self.program, Plan):
            what = describe_branch(self.program.units)
        else:
            what = describe_chain(self.program) if isinstance(self.program, Chain) else self._field_in_words()
        return f"{' '.join(part for part in (self.family, self.variant) if part)}, {what}"

    def _field_in_words(self) -> str:
        pair, weight = self.program, self.tensors[0]
        assert isinstance(pair, Pair | Linear) and weight is not None
        activation = "" if pair.activation is None else pair.activation.kind
        shape = "x".join([f"{side}" for side in weight.shape])
        if isinstance(pair, Linear):
            return f"{shape} {activation}{' released' if pair.released else ''}"
        norms = [describe_branch([Unit(norm, None, None)]) for norm in pair.norms if norm is not None]
        return " ".join([f"{shape} stride {pair.stride} padding {pair.padding} {activation}", *norms])


def describe_branch(units: Sequence[Unit]) -> str:
    """A branch in words: what its operators' speed depends on."""
    words = []
    for unit in units:
        if unit.norm is not None:
            words.append(f"{unit.norm.mode} norm{f' of {unit.norm.groups}' if unit.norm.mode == 'group' else ''}")
        if unit.activation is not None:
            words.append(unit.activation.kind)
        if unit.conv is not None:
            conv = unit.conv
            spread = "" if conv.dilation == (1, 1) and conv.groups == 1 else f" d{conv.dilation} g{conv.groups}"
            step = "" if conv.stride == (1, 1) else f" stride {conv.stride[0]}x{conv.stride[1]}"
            after = f"mean and {conv.added} channels" if conv.mean else f"to {conv.out_channels}"
            words.append(f"{conv.kernel[0]}x{conv.kernel[1]} {after}{step}{spread}")
    return " ".join(words)


def describe_chain(chain: Chain) -> str:
    """A chain in words."""
    after = "" if chain.activation is None else f", {chain.activation.kind}"
    return " / ".join([describe_branch(plan.units) for plan in chain.plans]) + after


def mode(inputs: Sequence[Tensor], tensors: MaybeTensors) -> Mode:
    """Which gradients a call on these inputs will be asked for."""
    if not torch.is_grad_enabled():
        return "forward"
    if any(t is not None and t.requires_grad for t in tensors):
        return "train"
    return "input_grad" if any(x.requires_grad for x in inputs) else "forward"


class Engine:
    """One way to run the blocks; `dispatch.engines` has the table of all.

    A subclass gives the autograd Functions of the families it has, whose arguments ops/function.py describes.

    Attributes:
        name: by which users ask for it.
        devices: the types of device it is for; none for all.
    """

    name: str
    devices: tuple[str, ...] = ()
    solution_from_x = False  # whether the solutions take x itself instead of what x gives
    head: type[Function] | None = None  # of a network, as (the dtype to which autocast lowers, Rerun, x, weight, bias)
    # Whether skew_adaptive asks no Python between steps: traced, of each sample alone, and by the exact gradient, too.
    steps_inside = False

    @property
    def ie_skip(self) -> type[Function]:
        """IE-Skip, as (Plan, Descent, Rerun, x, *tensors)."""
        return self._lacks("IE-Skip")

    @property
    def exact_ie(self) -> type[Function]:
        """The exact implicit Euler step, as (Plan, Exact, Rerun, x, *tensors)."""
        return self._lacks("the exact implicit Euler step")

    @property
    def shu_osher(self) -> type[Function]:
        """An explicit scheme, as (Plan, Scheme, Rerun, x, table, *tensors)."""
        return self._lacks("explicit schemes")

    @property
    def chain(self) -> type[Function]:
        """A chain, as (Chain, Rerun, x, *tensors)."""
        return self._lacks("chains")

    @property
    def skew_pair(self) -> type[Function]:
        """The skew pair, as (Pair, Rerun, y, z, *tensors)."""
        return self._lacks("the skew pair")

    @property
    def skew_solution(self) -> type[Function]:
        """The pair's solution by equal steps, as (Pair, March, Rerun, y, z, *tensors), or with x for y and z."""
        return self._lacks("the skew pair's solution")

    @property
    def skew_adaptive(self) -> type[Function] | None:
        """The pair's solution with steps by error, as (Pair, Solver, Watch, Steps, Rerun, y, z, ẏ, ż, h, *tensors).

        From x it is (Pair, Solver, Watches, Steps of each, Rerun, x, *tensors): one of each for a batch that shares its
        steps, else one for each sample; none where a compiler traces.

        None where the engine has the pair alone: then each evaluation is a call of it, and the reference drives.
        """
        return None

    @property
    def ode_solution(self) -> type[Function]:
        """The solution of a single map's equation, as (Plan, Course, Rerun, x, *tensors)."""
        return self._lacks("the solution of a single map's equation")

    @property
    def skew_linear(self) -> type[Function]:
        """The field of two matrix products, as (Linear, Rerun, y, z, *tensors)."""
        return self._lacks("the field of two matrix products")

    @property
    def linear_solution(self) -> type[Function]:
        """That field's solution, as (Linear, Solver, Watches, Steps of each, Rerun, x, *tensors).

        There are a watch and steps for each solve with steps by error, as in `skew_adaptive`, and none by equal ones.
        """
        return self._lacks("the solution of a field of two matrix products")

    def apart(self, results: Any, plans: Sequence[Plan], rule: Descent | Scheme | None = None) -> Any:
        """(y, *statistics) from what a Function returns, which may have packed what batch norms have met.

        Args:
            results: of a call of `ie_skip`, `shu_osher` or `chain`.
            plans: the block's branch, or a chain's.
            rule: the block's, None for a chain.
        """
        return results

    def _lacks(self, family: str) -> NoReturn:
        raise TypeError(f"the engine {self.name} has no function for {family}, which its why_not has to say")

    def why_not(self, call: Call) -> str:
        """Why it cannot run the call; empty if it can."""
        return ""

    def against(self, call: Call) -> str:
        """Why "auto" had better leave a call that it can run, by what was measured on CPUs; empty if it need not."""
        return ""

    def rule_in_words(self) -> list[str]:
        """What was measured on CPUs, by which `against` judges: lines to print, none where there is no such rule."""
        return []

    def elsewhere(self, x: Tensor | None) -> str:
        """Why it cannot run where x is (or, without x, on this machine); empty if it can."""
        if not self.devices:
            return ""
        if x is not None and x.device.type not in self.devices and len(self.devices) == 1:
            home = self.devices[0]
            return f"it runs on {'the CPU' if home == 'cpu' else 'CUDA'} only"
        return cuda.why_not() if x is None and "cpu" not in self.devices else ""

    def describe(self, device: str) -> tuple[bool, str]:
        """Whether this machine can run it on a type of device, and why (not); nothing is compiled to find out."""
        return True, "plain PyTorch, on any device"


class OperatorEngine(Engine):
    """An engine on the operators of torch.ops.fastode."""

    def why_not(self, call: Call) -> str:
        x = call.x
        device = x.device.type if x is not None else self.devices[0]
        return (
            call.fault
            or self.elsewhere(x)
            or no_operators(device)
            or (cannot_take(call) if x is not None else "")
            or self.refuses(call)
        )

    def refuses(self, call: Call) -> str:
        """Why it cannot run a call that operators of its device can take; empty if it can."""
        return ""

    def describe(self, device: str) -> tuple[bool, str]:
        if device == "cuda":
            missing = cuda.why_not()
            return not missing, missing or "Triton compiles each kernel when it is first launched"
        return operators.available()


def no_operators(device: str = "cpu") -> str:
    """Why the operators cannot be called on a device, after building them if that has not been tried."""
    reason = "" if operators.loaded() else (operators.load() or "")
    return cuda.no_kernels() if device == "cuda" else reason


def cannot_take(call: Call) -> str:
    """Why no operator can take the inputs and parameters of a call; empty if they can."""
    present = [tensor for tensor in call.tensors if tensor is not None]
    for x in call.inputs:
        if not is_plain(x):
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if x.layout is not torch.strided:
            return f"the input's layout is {x.layout}, not strided"
        device = x.device.type
        if device not in STORAGE:
            return f"the input is on {device}, and there are kernels for the CPU and CUDA only"
        if x.dtype not in STORAGE[device]:
            return f"there are no {DEVICE_NAMES[device]} kernels for {x.dtype}"
        if x.numel() == 0:
            return "the input is empty"
    device, lower = call.inputs[0].device.type, call.lower
    if lower is not None and lower not in STORAGE[device]:
        return f"there are no {DEVICE_NAMES[device]} kernels for autocast to {lower}"
    dtype = call.inputs[0].dtype
    for tensor in present:
        if tensor.dtype != dtype:
            if tensor.dtype != torch.float32:
                return "its parameters are neither float32 nor of the input's dtype"
            if lower is None and isinstance(call.program, Plan | Chain):
                return "its parameters are not of the input's dtype, and autocast is off"
    if is_transformed([*call.inputs, *present]):
        return "a torch.func transform or forward-mode differentiation is at work"
    return ""


def is_transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether a torch.func transform, or forward-mode differentiation of one of the tensors, is at work."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    # A tracer cannot look at tangents.
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast lowers convolutions here, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in STORAGE and torch.is_autocast_enabled(device) else None
