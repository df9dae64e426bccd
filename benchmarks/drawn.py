"""The random blocks of `make fuzz`: each is drawn from a seed and an index alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastode
from fastode import reference
from fastode.tableau import Tableau
from fastode.testing import sample_input

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
