"""`make fuzz SECONDS=...`: random blocks on random inputs, each fused engine against the reference, until time is up.

A case is drawn from a seed and an index alone, and is run by each engine that can run it. It is judged by the one rule
of fastode/testing; in float64 that is a few hundred units of rounding. A case that fails is judged once more, as
`rejudge` says, and left out where there is nothing to compare it with, as `excused` says. A failure is printed as it is
found, with the command that runs that case again.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.dispatch import choice
from fastode.reference.skew import PADDING
from fastode.tableau import Tableau
from fastode.testing import Comparison, Judge, sample_input
from fastode.testing.compare import run

from . import rejudge
from .inside import FUSED_ENGINES

ENGINES = (*FUSED_ENGINES, "reference", "auto")

Draw = random.Random


class Asked(nn.Module):
    """A block that is asked for its inputs' gradients, or for its parameters' alone."""

    def __init__(self, block: nn.Module, detach: bool) -> None:
        super().__init__()
        self.block, self.detach = block, detach

    def forward(self, *inputs: Tensor) -> Any:
        """The block's outputs."""
        return self.block(*([x.detach() for x in inputs] if self.detach else inputs))


@dataclass(frozen=True)
class Case:
    """A block in both versions, its inputs, and what is asked of it."""

    text: str
    family: str
    plain: Asked
    inputs: tuple[Tensor, ...]
    mode: Any
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Failure:
    """What went wrong with one engine on one case."""

    seed: int
    index: int
    engine: str
    text: str
    what: str

    def __str__(self) -> str:
        again = f"python -m benchmarks.fuzz --seed {self.seed} --index {self.index}"
        return f"FAILED {self.engine} on {self.text}\n{self.what}\nagain: {again}"


# A norm over fewer values than this is so ill-conditioned that rounding is all there is to compare.
FEWEST = 6


def draw_norm(draw: Draw, channels: int, size: tuple[int, int]) -> nn.Module:
    """A norm of any kind for maps of (batch, pixels), none where its sets would be too small."""
    batch, pixels = size
    kind, affine, tracked = (
        draw.choice(("none", "batch", "group", "instance")),
        draw.random() < 0.7,
        draw.random() < 0.7,
    )
    if kind == "batch" and batch * pixels >= FEWEST:
        momentum = draw.choice((0.1, 0.5, None))
        return nn.BatchNorm2d(channels, affine=affine, track_running_stats=tracked, momentum=momentum)
    if kind == "instance" and pixels >= FEWEST:
        return nn.InstanceNorm2d(channels, affine=affine, track_running_stats=tracked)
    groups = [g for g in range(1, channels + 1) if channels % g == 0 and channels // g * pixels >= FEWEST]
    if kind == "group" and groups:
        return nn.GroupNorm(draw.choice(groups), channels, affine=affine)
    return nn.Identity()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "softplus": lambda: nn.Softplus(beta=1.5, threshold=4.0),
    "elu": lambda: nn.ELU(alpha=0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid,
    "mish": nn.Mish,  # which no engine reads: everything falls back to the reference
}
CHANNELS = (1, 2, 3, 4, 5, 8, 12, 16, 20, 32)
INNER = CHANNELS[2:]  # fewer may all be dead behind a ReLU, and a norm of constants is rounding alone


def draw_case(seed: int, index: int) -> Case:
    """The case of a seed and an index, the same on every call."""
    draw = Draw(f"{seed} {index}")
    torch.manual_seed(draw.getrandbits(32))
    family = draw.choice(list(FAMILIES))
    channels = draw.choice(CHANNELS)
    batch, height, width = draw.choice((1, 1, 2, 3, 5, 9)), draw.choice((1, 2, 4, 6, 7)), draw.choice((1, 3, 4, 8, 9))
    dtype = draw.choice((torch.float32, torch.float64, torch.float64, torch.bfloat16))
    autocast = torch.bfloat16 if dtype is torch.float32 and draw.random() < 0.2 else None
    if family in BY_ERROR:  # in bfloat16 every rounding takes other steps
        dtype, autocast = torch.float32 if dtype is torch.float32 else torch.float64, None
    if family == EXACT:  # likewise; and its solves have no long double, which a truth for float64 would need
        dtype, autocast = torch.float32, None
    block, words, states = FAMILIES[family](draw, channels, (batch, height * width))
    block.train(draw.random() < 0.7)
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    block.to(dtype)
    randomise(block)
    if draw.random() < 0.5:
        block.to(memory_format=torch.channels_last)
    mode = draw.choice(("train", "train", "input_grad", "forward"))
    frozen = [name for name, p in block.named_parameters() if draw.random() < 0.3] if draw.random() < 0.4 else []
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    detach = mode == "train" and draw.random() < 0.3 and any(p.requires_grad for p in block.parameters())
    # Half as behind a convolution, where maps are bfloat16 already; by a draw of its own, so that no case changes.
    lowered = autocast is not None and Draw(f"{seed} {index} input").random() < 0.5
    inputs, layouts = [], []
    for i, (c, stride) in enumerate(states):
        layout = draw.choice(list(LAYOUTS))
        size = (stride * height, stride * width)
        x = sample_input(batch, c, *size, dtype=dtype, seed=draw.getrandbits(30) + i)
        inputs.append(LAYOUTS[layout](x.to(autocast) if lowered else x))
        layouts.append(f"{list(x.shape)} {layout}")
    number = str(dtype).removeprefix("torch.") + (" autocast" if autocast else "")
    number += " of bfloat16 maps" if lowered else ""
    text = f"{family} {words} | {', '.join(layouts)} {number} | {mode}, {'train' if block.training else 'eval'}"
    text += (f", frozen {' '.join(frozen)}" if frozen else "") + (", inputs detached" if detach else "")
    return Case(text, family, Asked(block, detach), tuple(inputs), mode, autocast)


def randomise(block: nn.Module) -> None:
    """Affine parameters and running statistics away from ones and zeros."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_()  # type: ignore[operator, union-attr]
                    module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]


def short(norm: nn.Module) -> str:
    """A norm in few words."""
    options = [name for name in ("affine", "track_running_stats") if getattr(norm, name, False)]
    return " ".join([type(norm).__name__, *(f"of {g}" for g in [getattr(norm, "num_groups", 0)] if g), *options])


def draw_branch(draw: Draw, channels: int, size: tuple[int, int]) -> tuple[nn.Module, str]:
    """One to three units whose inner widths change, and what they are in words."""
    units = draw.choice((1, 1, 2, 2, 3))
    widths = [channels, *(draw.choice(INNER) for _ in range(units - 1)), channels]
    layers: list[nn.Module] = []
    words = []
    for given, made in itertools.pairwise(widths):
        norm, activation = draw_norm(draw, given, size), draw.choice(list(ACTIVATIONS))
        layers += [norm, ACTIVATIONS[activation]()]
        kernel = draw.choice((1, 3, 3, 5))
        groups = draw.choice([g for g in range(1, given + 1) if given % g == 0 and made % g == 0] + [1] * 3)
        bias, dilation = draw.random() < 0.7, draw.choice((1, 1, 1, 2))
        padding = dilation * (kernel - 1) // 2
        layers.append(nn.Conv2d(given, made, kernel, padding=padding, bias=bias, groups=groups, dilation=dilation))
        words.append(
            f"{short(norm)} {activation} {kernel}x{kernel}:{made} g{groups} d{dilation}{' bias' if bias else ''}"
        )
    if draw.random() < 0.2:
        layers.append(draw_norm(draw, channels, size))
        words.append(short(layers[-1]))
    return nn.Sequential(*layers), "; ".join(words)


def draw_tableau(draw: Draw) -> Tableau:
    """A scheme of one to four stages with rows of alpha that sum to one, some entries zero."""
    alpha, beta = [], []
    for stage in range(1, draw.randint(1, 4) + 1):
        row = [draw.choice((0.0, 0.25, 0.5, -0.25)) for _ in range(stage - 1)]
        alpha.append((*row, 1.0 - sum(row)))
        beta.append((*(draw.choice((0.0, 0.2, -0.1)) for _ in range(stage - 1)), draw.choice((0.3, 0.5))))
    return Tableau("drawn", tuple(alpha), tuple(beta), order=1)


# Of each family: the block, what it is in words, and (channels, stride) of each of its inputs.
Made = tuple[nn.Module, str, list[tuple[int, int]]]


def one_step(make: Callable[[Draw, nn.Module], tuple[nn.Module, str]]) -> Callable[[Draw, int, tuple[int, int]], Made]:
    """A family of one-step blocks from what wraps a branch."""

    def made(draw: Draw, channels: int, size: tuple[int, int]) -> Made:
        branch, words = draw_branch(draw, channels, size)
        block, more = make(draw, branch)
        return block, f"{more}({words})", [(channels, 1)]

    return made


def implicit(draw: Draw, branch: nn.Module) -> tuple[nn.Module, str]:
    """An IE-Skip of one to three steps."""
    options = {"steps": draw.randint(1, 3), "theta": draw.choice((1.0, 0.5, 0.0)), "detach": draw.random() < 0.3}
    return reference.IESkip(branch, step_size=draw.choice((0.05, 0.1)), **options), str(options)


def exactly(draw: Draw, branch: nn.Module) -> tuple[nn.Module, str]:
    """An exact implicit Euler step, of a branch so small that most have a solution."""
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(0.5)
    tol = draw.choice((1e-2, 1e-4))
    return reference.ExactIE(branch, tol), f"tol {tol} "


def any_tableau(draw: Draw, branch: nn.Module) -> tuple[nn.Module, str]:
    """A scheme of a random tableau."""
    tableau = draw_tableau(draw)
    return reference.ShuOsher(branch, tableau), f"{tableau.alpha} {tableau.beta}"


def learned(draw: Draw, branch: nn.Module) -> tuple[nn.Module, str]:
    """An Ark block."""
    return reference.Ark(branch, learn_a21=draw.random() < 0.5, learn_b10=draw.random() < 0.5), ""


def draw_field(draw: Draw, channels: int, size: tuple[int, int]) -> tuple[reference.SkewPair, str]:
    """A skew pair from `channels` to any number."""
    made, stride, gamma = draw.choice(CHANNELS), draw.choice((1, 2)), draw.choice((0.0, 0.3))
    activation = draw.choice([a for a in ACTIVATIONS if a != "relu in place"])
    field = reference.SkewPair(
        channels, made, stride, gamma, ACTIVATIONS[activation], lambda c: draw_norm(draw, c, size)
    )
    norms = ", ".join(short(norm) for name, norm in field.named_children() if name != "activation")
    return field, f"{channels}->{made} stride {stride} gamma {gamma} {activation} ({norms})"


def pair(draw: Draw, channels: int, size: tuple[int, int]) -> Made:
    """A field alone."""
    field, words = draw_field(draw, channels, size)
    return field, words, [(field.weight.shape[0], 1), (channels, field.stride)]


def solution(draw: Draw, channels: int, size: tuple[int, int]) -> Made:
    """A field's solution by equal steps."""
    field, words = draw_field(draw, channels, size)
    solver, steps = draw.choice(("euler", "midpoint", "rk4")), draw.randint(1, 2)
    block = reference.SOBlock(field, solver=solver, steps=steps, t1=draw.choice((0.5, 1.0)))
    return block, f"{solver} {steps} {words}", [(channels, field.stride)]


def draw_solver(draw: Draw, field: nn.Module) -> fastode.Solver:
    """A solver with steps by error."""
    tolerance, method = draw.choice((0.1, 1e-2)), draw.choice(("dopri5", "bosh3", "adaptive_heun", "fehlberg2"))
    gradient = draw.choice(("solver", "constant"))
    coupled = any(isinstance(module, nn.BatchNorm2d) for module in field.modules())
    per_sample = draw.random() < 0.3 and not coupled
    first_step = draw.choice((None, None, 0.3, 3.0))
    return fastode.Solver(
        method,
        tolerance,
        tolerance,
        draw.choice((0.5, 1.0)),
        gradient=gradient,
        per_sample=per_sample,
        first_step=first_step,
    )


def by_error(draw: Draw, channels: int, size: tuple[int, int]) -> Made:
    """A field's solution with steps by error."""
    field, words = draw_field(draw, channels, size)
    solver = draw_solver(draw, field)
    return reference.SOBlock(field, solver), f"{solver} {words}", [(channels, field.stride)]


def single_map(by_error: bool) -> Callable[[Draw, int, tuple[int, int]], Made]:
    """The solution of a branch's equation, some of whose convolutions see the time."""

    def made(draw: Draw, channels: int, size: tuple[int, int]) -> Made:
        branch, words = draw_branch(draw, channels, size)
        for name, conv in list(branch.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.dilation == (1, 1) and draw.random() < 0.6:
                side = conv.kernel_size[0]
                bias = conv.bias is not None
                timed = reference.TimeConv2d(conv.in_channels, conv.out_channels, side, padding=side // 2, bias=bias)
                branch._modules[name] = timed
                words += f" timed {name}"
        if by_error:
            solver = draw_solver(draw, branch)
        else:
            method, steps = draw.choice(("euler", "midpoint", "rk4")), draw.randint(1, 2)
            solver = fastode.Solver(method, steps=steps, t1=draw.choice((0.5, 1.0)))
        return reference.ODEBlock(branch, solver), f"{solver} ({words})", [(channels, 1)]

    return made


# Families whose steps are chosen by their error: rounding may reject one that is accepted by less than rejudge.CLOSE.
BY_ERROR = ("adaptive", "ode_error")
# The exact implicit Euler step, whose iterations end by a residual: rounding may decide after how many.
EXACT = "exact_ie"

FAMILIES: dict[str, Callable[[Draw, int, tuple[int, int]], Made]] = {
    "ie": one_step(implicit),
    EXACT: one_step(exactly),
    "shu_osher": one_step(any_tableau),
    "ssp2": one_step(lambda draw, f: (reference.SSP2(f), "")),
    "ssp3": one_step(lambda draw, f: (reference.SSP3(f), "")),
    "midpoint": one_step(lambda draw, f: (reference.Midpoint(f), "")),
    "ark": one_step(learned),
    "polyblock": one_step(lambda draw, f: (reference.PolyBlock(f, draw.choice((0.5, 1.0))), "")),
    "resblock": one_step(lambda draw, f: (reference.ResBlock(f, draw.choice((0.5, 1.0))), "")),
    "skew_pair": pair,
    "soblock": solution,
    "adaptive": by_error,
    "odeblock": single_map(False),
    "ode_error": single_map(True),
}


def viewed(x: Tensor) -> Tensor:
    """channels_last with the strides that a view gives an axis of one entry."""
    return x.contiguous(memory_format=torch.channels_last).view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "viewed": lambda x: viewed(x) if x.shape[0] == 1 else x,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    # Not of few pixels, whose batch norm would be one of constants.
    "expanded": lambda x: x[:1].expand(x.shape) if x.shape[2] * x.shape[3] >= FEWEST else x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def can_run(engine: str, block: nn.Module, x: Any) -> bool:
    """Whether an engine can run a fused block on x."""
    return engine == "auto" or choice.can_use(engine, block, x)[0]


def region(case: Case) -> torch.autocast:
    """The autocast region of a case, or one that does nothing."""
    return torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None)


def run_case(seed: int, index: int) -> tuple[list[tuple[str, str]], list[Failure]]:
    """Judge each engine on one case: (family, engine) of each that ran, and the failures."""
    case = draw_case(seed, index)
    inputs: Any = case.inputs if len(case.inputs) > 1 else case.inputs[0]
    counted, failures = [], []
    judge = Judge(case.plain, inputs, mode=case.mode, autocast=case.autocast)
    for engine in ENGINES:
        fused = copy.deepcopy(case.plain)
        fastode.fuse(fused)
        fused.block.engine = engine  # type: ignore[assignment]
        with region(case):
            able = can_run(engine, fused.block, inputs)
        if not able:
            continue
        counted.append((case.family, engine))
        what = judged(judge, fused, case)
        excuse = excused(judge, fused, case) if what else ""
        if excuse:
            print(f"left out, {excuse}: {case.text}", flush=True)
        elif what:
            failures.append(Failure(seed, index, engine, case.text, what))
    return counted, failures


def excused(judge: Judge, fused: nn.Module, case: Case) -> str:
    """Why a fused block that is not equal cannot be compared; empty if it can."""
    if case.family in BY_ERROR and is_close(fused, case):
        return f"a step was accepted or rejected by less than {rejudge.CLOSE}"
    if case.family == EXACT and not took_the_same(judge, fused, case):
        return "its solves took other numbers of iterations, or did not converge"
    try:
        comparison = judge.compare(fused)
    except Exception:  # which is the failure
        return ""
    if is_misconvolved(case):
        return "PyTorch's convolution is wrong on its maps"
    if is_rounding(judge, comparison, case):
        return "what differs is the rounding of gradients that are zero, behind a norm of constants"
    return ""


def took_the_same(judge: Judge, fused: nn.Module, case: Case) -> bool:
    """Whether the implicit steps of both versions, and their gradients, converged in as many iterations."""
    found = []
    for block in (case.plain, fused):
        with fastode.record_steps() as log:
            judge.run(block)
        found.append([(solve.what, solve.iterations, solve.products, solve.converged) for solve in log.implicit])
    return found[0] == found[1] and all(converged for *_, converged in found[0])


def is_close(fused: nn.Module, case: Case) -> bool:
    """Whether an attempt of either version has an error of nearly what is tolerated."""
    with fastode.record_steps() as log, torch.no_grad():
        for block in (copy.deepcopy(case.plain), fused):
            block(*case.inputs)
    ratios = [ratio for solve in log for ratio in (*solve.ratios, *(attempt[2] for attempt in solve.rejected))]
    return any(abs(ratio - 1) < rejudge.CLOSE for ratio in ratios)


def is_misconvolved(case: Case) -> bool:
    """Whether PyTorch's convolution in bfloat16 is wrong on the maps of a skew pair (docs/pytorch-faults.md, 5)."""
    field = next((module for module in case.plain.modules() if isinstance(module, reference.SkewPair)), None)
    if field is None or torch.bfloat16 not in (case.autocast, field.weight.dtype):
        return False
    pair = (sample_input(*case.inputs[-1].shape).bfloat16(), field.weight.detach().bfloat16())
    found, exact = (
        F.conv2d(z, weight, stride=field.stride, padding=PADDING).double()
        for z, weight in (pair, tuple(t.double() for t in pair))
    )
    return not torch.linalg.vector_norm(found - exact) <= 0.1 * torch.linalg.vector_norm(exact)


NOTHING = 1e-8  # relative to the others: what is smaller in float64 is rounding, however often a norm has raised it
MOST_RATIO = 10.0  # of such rounding to what the reference's few samples of it allow


def is_rounding(judge: Judge, comparison: Comparison, case: Case) -> bool:
    """Whether all that differs is gradients that are zero in exact arithmetic, and a norm is given constants.

    A norm multiplies rounding by its 1/√ε there, and two of them by its square.
    """
    exact, found = copy.deepcopy(case.plain).double(), []
    for module in exact.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            module.register_forward_pre_hook(lambda norm, given: found.append(sees_constants(norm, given[0])))
    doubled = tuple(x.double() for x in case.inputs)
    truths = run(exact, doubled, judge.cotangents, case.mode)
    sizes = {name: float(t.norm()) for name, t in truths.items() if name.startswith("gradient") and t is not None}
    zero = [name for name, size in sizes.items() if size <= NOTHING * max(sizes.values())]
    return any(found) and all(row.ok or (row.name in zero and row.ratio <= MOST_RATIO) for row in comparison.rows)


def sees_constants(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm that takes its statistics from x finds a set of one value in it."""
    if isinstance(norm, nn.GroupNorm):
        sets = x.reshape(x.shape[0] * norm.num_groups, -1)
    elif not norm.training and getattr(norm, "running_mean", None) is not None:
        return False
    else:
        sets = x.transpose(0, 1).flatten(1) if isinstance(norm, nn.BatchNorm2d) else x.flatten(0, 1).flatten(1)
    return bool((sets.std(1, correction=0) <= NOTHING * sets.abs().amax(1)).any())


def judged(judge: Judge, fused: nn.Module, case: Case) -> str:
    """What is wrong with a fused block; empty if nothing is."""
    try:
        comparison = rejudge.compare_by_either(
            judge, case.plain, fused, case.mode, case.autocast, by_error=case.family in BY_ERROR
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if comparison.ok else "\n".join(row for row in comparison.describe().splitlines() if row[:4] == "FAIL")


def indices(seconds: float | None, index: int | None) -> Iterator[int]:
    """One index, or all from zero until time is up."""
    if index is not None:
        yield index
        return
    end = time.monotonic() + (seconds or 0.0)
    count = 0
    while time.monotonic() < end:
        yield count
        count += 1


def main(arguments: list[str] | None = None) -> int:
    """Draw and judge; the exit status is 1 where anything failed or nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; the clock's by default")
    parser.add_argument("--index", type=int, default=None, help="run this one case of the seed")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000_000
    ran: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = cases = 0
    for index in indices(options.seconds, options.index):
        counted, failures = run_case(seed, index)
        ran.update(counted)
        cases += 1
        failed += len(failures)
        for failure in failures:
            print(failure, flush=True)
        if options.index is not None:
            print(draw_case(seed, index).text)
    for family in FAMILIES:
        counts = "  ".join(f"{engine} {ran[family, engine]}" for engine in ENGINES if ran[family, engine])
        print(f"{family:10} {counts}" if counts else f"{family:10} -")
    print(f"seed {seed}: {cases} blocks, {sum(ran.values())} comparisons, {failed} failed")
    return int(failed > 0 or not ran)


if __name__ == "__main__":
    sys.exit(main())
