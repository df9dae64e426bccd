"""The one rule by which a fused block equals its reference; tests and benchmarks both use it and know no other.

Truth is the reference in float64. R is the worst of four runs of the reference in the working precision: NCHW and
channels_last, each on the input and on the input moved by one unit in the last place at random. A tensor t passes when

    err(t) <= 2 err(R) + 2 eps(dtype) + 8 eps(accumulator) sqrt(longest reduction),    err(t) = |t - truth| / |truth|

in the Euclidean norm, and in the largest entry as well where no pre-activation is within rounding of a kink.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .. import checks
from .inputs import moved
from .record import Recorder, across_kinks, warm_up
from .rule import Comparison, Row, Rule, Tensors

Mode = Literal["train", "input_grad", "forward"]
Inputs = Tensor | tuple[Tensor, ...]
# What a block in float64 yields in more digits, from its inputs, the cotangents (None for the default) and the mode.
Truth = Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...] | None, Mode], Tensors]

MODES: tuple[Mode, ...] = ("train", "input_grad", "forward")


def _tuple(value: Inputs) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    if channels_last and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}[{i}]" for i in range(count)]


def _copied(block: nn.Module) -> nn.Module:
    """A deep copy; a module has a dozen empty dictionaries, which cost most of `copy.deepcopy`'s time."""
    attributes = (value for module in block.modules() for value in vars(module).values())
    empty = (value for value in attributes if type(value) in (dict, OrderedDict) and not value)
    # An empty OrderedDict may have attributes of its own, as that of a module's state has.
    memo = {id(value): type(value)() for value in empty if not getattr(value, "__dict__", None)}
    return copy.deepcopy(block, memo)


def run(
    block: nn.Module,
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...] | None,
    mode: Mode,
    autocast: torch.dtype | None = None,
    around: AbstractContextManager[object] | None = None,
) -> Tensors:
    """Everything one call of a copy of the block yields: outputs, gradients and buffers, by name.

    The forward, but not the backward, runs within `around`.
    """
    block = _copied(block)
    block.zero_grad(set_to_none=True)
    if mode == "input_grad":
        block.requires_grad_(False)
    leaves = tuple(x.detach().requires_grad_(mode != "forward") for x in inputs)
    kept = [x.detach().clone() for x in inputs]
    with contextlib.ExitStack() as stack:
        if around is not None:
            stack.enter_context(around)
        if autocast is not None:
            stack.enter_context(torch.autocast(inputs[0].device.type, autocast))
        if mode == "forward":
            stack.enter_context(torch.no_grad())
        outputs = _tuple(block(*leaves))
    found: Tensors = dict(zip(_names("output", len(outputs)), (y.detach() for y in outputs), strict=True))
    if mode != "forward":
        given = cotangents or cotangents_of(outputs)
        pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, given, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        for name, leaf in zip(_names("gradient of input", len(leaves)), leaves, strict=True):
            found[name] = leaf.grad
    if mode == "train":
        found.update({f"gradient of {name}": p.grad for name, p in block.named_parameters()})
    found.update({f"buffer {name}": buffer.detach() for name, buffer in block.named_buffers()})
    for name, leaf, before in zip(_names("input afterwards", len(leaves)), leaves, kept, strict=True):
        # Zero where untouched, so that any change at all is an error.
        found[name] = (leaf.detach() != before).logical_and(before == before).to(torch.int64)
    return found


def cotangents_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One fixed normal cotangent per output, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(20)
    return tuple(
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, torch.bfloat16).to(y.dtype)
        for y in outputs
    )


def _leaning_cotangents(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """For a block with parameters of one entry: the normal cotangents, turned towards what each of these moves.

    Such a gradient is one inner product <cotangent, dy/dp>. Under a cotangent that knows nothing of dy/dp it cancels to
    1/sqrt(n) of its terms, and what is then compared is rounding.

    Args:
        block: in float64.
        inputs: in float64.

    Returns:
        One cotangent per output, or None where there is no such parameter.
    """
    names = [name for name, p in block.named_parameters() if p.numel() == 1 and p.requires_grad]
    if not names:
        return None

    def outputs(name: str = "", shift: float = 0.0) -> list[Tensor]:
        changed = _copied(block)
        if name:
            changed.get_parameter(name).data.add_(shift)
        found = run(changed, inputs, None, "forward")
        return [y for key, y in found.items() if key.startswith("output") and y is not None]

    def size(tensors: Sequence[Tensor]) -> float:
        return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors))

    here = outputs()
    normal = cotangents_of(tuple(here))
    found = list(normal)
    step = 1e-3
    for name in names:
        slopes = [(up - down) / (2 * step) for up, down in zip(outputs(name, step), outputs(name, -step), strict=True)]
        # One that moves nothing in exact arithmetic (Ark's a21) has no direction to turn to.
        if size(slopes) > math.sqrt(torch.finfo(torch.float64).eps) * size(here):
            scale = size(normal) / size(slopes)
            found = [g + scale * slope for g, slope in zip(found, slopes, strict=True)]
    return tuple(g.to(torch.bfloat16).to(g.dtype) for g in found)


class Judge:
    """A reference's runs on one input, by which any number of blocks is judged.

    Each run is made once, when a judgement first asks for it, under its flags and contexts, but of the reference, the
    input and the cotangent as they were when the judge was made. The modules are deep-copied for every run, so nothing
    that a call changes outlives it.

    Args:
        reference: the reference block, in the working precision.
        x: the input [N, C, H, W], or a tuple of inputs for a block of several.
        cotangent: the gradient of the output(s); by default a fixed random one, turned towards dy/dp where the block
            has parameters p of one entry.
        mode: "train" compares every gradient; "input_grad" freezes the parameters; "forward" runs under no_grad.
        autocast: the dtype of an autocast region around the forward, or None.
        moves: moved inputs per layout, at least 1. The rule takes 1; a mask that one move in ten flips, as some does
            among millions of pre-activations, is seen in most judgements by 16.
        truth: computes the truth where float64 is itself what is judged; by default it is a run in float64.

    Raises:
        TypeError: x is no tensor or tuple of tensors, or autocast no dtype.
        ValueError: the mode is not one of the three, or there are no moves.

    Example:
        >>> from fastode.testing import sample_input
        >>> block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        >>> Judge(block, sample_input(2, 3, 4, 4)).compare(block).ok
        True
    """

    def __init__(
        self,
        reference: nn.Module,
        x: Inputs,
        *,
        cotangent: Inputs | None = None,
        mode: Mode = "train",
        autocast: torch.dtype | None = None,
        moves: int = 1,
        truth: Truth | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        for t in x if isinstance(x, tuple) else (x,):
            if not isinstance(t, Tensor):
                raise TypeError(f"x must be a tensor or a tuple of tensors, got {checks.what(t)}")
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"autocast must be a torch.dtype or None, got {checks.what(autocast)}")
        if moves < 1:
            raise ValueError(f"moves must be at least 1, got {moves}")
        _warm_once()
        self.inputs, self.mode, self.autocast = _tuple(x), mode, autocast
        # The reference runs again when a judgement asks for it; what the caller does to its own is of no effect then.
        self._reference, self._given = _copied(reference), tuple(t.detach().clone() for t in self.inputs)
        exact_block = _copied(reference).double()
        doubled = tuple(_layout(t.detach().double(), False) for t in self.inputs)
        if cotangent is not None:
            self.cotangents: tuple[Tensor, ...] | None = tuple(g.detach().clone() for g in _tuple(cotangent))
        else:
            self.cotangents = _leaning_cotangents(exact_block, doubled) if mode == "train" else None
        wide = None if self.cotangents is None else tuple(g.double() for g in self.cotangents)

        def exact(values: tuple[Tensor, ...], around: AbstractContextManager[object] | None) -> Tensors:
            return run(exact_block, values, wide, mode, around=around)

        truth_record = Recorder()
        in_double = exact(doubled, truth_record)
        self._dtype = autocast or self.inputs[0].dtype
        longest = max(truth_record.longest, *(_longest_of(exact_block, t) for t in self.inputs))
        again = functools.cache(lambda: exact(tuple(_layout(moved(t, 7), True) for t in doubled), None))
        truths = in_double if truth is None else truth(exact_block, doubled, wide, mode)
        self._moves, self._truth_record = moves, truth_record
        self._rule_of = partial(Rule, truths, longest=longest, dtype=self._dtype, again=again)
        self._exact, self._in_double = partial(exact, doubled), in_double

    def _run_reference(self, channels_last: bool, move: int, recorder: Recorder | None) -> Tensors:
        """A run of the reference in the working precision, on the input (move 0) or on a moved one."""
        count = len(self._given)
        seeds = [2 * i + channels_last + 2 * count * (move - 1) for i in range(count)]
        values = [moved(t, seed, self.autocast) if move else t for t, seed in zip(self._given, seeds, strict=True)]
        inputs = tuple(_layout(t, channels_last) for t in values)
        return run(self._reference, inputs, self.cotangents, self.mode, self.autocast, recorder)

    @functools.cached_property
    def _first(self) -> tuple[Tensors, Recorder]:
        recorder = Recorder()
        return self._run_reference(False, 0, recorder), recorder

    @functools.cached_property
    def _all(self) -> tuple[list[Tensors], list[Recorder]]:
        """The runs, and recorders of those that tell about kinks: on the input and the first moved one."""
        runs, recorders = [self._first[0]], [self._first[1]]
        for channels_last in (False, True):
            for move in range(0 if channels_last else 1, self._moves + 1):
                recorder = Recorder() if move < 2 else None
                runs.append(self._run_reference(channels_last, move, recorder))
                recorders += [recorder] if recorder else []
        return runs, recorders

    @functools.cached_property
    def across(self) -> list[Tensor] | None:
        """What moves pre-activations within rounding of a kink to its other side: a sparse tensor for each call.

        None where it cannot be told.
        """
        _, recorders = self._all
        found = across_kinks(self._truth_record, recorders, torch.finfo(self._dtype).eps)
        for recorder in (self._truth_record, *recorders):
            recorder.pre_activations.clear()  # nothing else asks for them, and they may be large
        return found

    @property
    def smooth(self) -> bool:
        """Whether no pre-activation is within rounding of a kink."""
        return self.across is not None and not any(steps._nnz() for steps in self.across)

    @functools.cached_property
    def _rule(self) -> Rule:
        return self._rule_of(references=self._all[0], pointwise=self.smooth)

    @functools.cached_property
    def _quick_rule(self) -> Rule:
        """By the first run alone, and in the largest entry everywhere: whatever passes it passes the rule as well."""
        return self._rule_of(references=[self._first[0]], pointwise=True)

    @functools.cached_property
    def _is_finite(self) -> bool:
        return _is_finite(self._quick_rule.truths) and _is_finite(self._first[0])

    def compare(
        self, fused: nn.Module, x: Inputs | None = None, mode: Mode | None = None, *, quick: bool = False
    ) -> Comparison:
        """The comparison of a block, one row per tensor.

        Args:
            fused: the block to judge; same parameter and buffer names.
            x: the same input in the layout that this block is to get; by default as the judge got it.
            mode: of the block's run: the judge's, which is the default, or one that asks for less.
            quick: as `verdict` takes it.
        """
        return self.verdict(self.run(fused, x, mode), mode=mode, quick=quick)

    def run(self, fused: nn.Module, x: Inputs | None = None, mode: Mode | None = None) -> Tensors:
        """What a block yields, by name, to be judged by `verdict`; the arguments are those of `compare`."""
        inputs = self.inputs if x is None else _tuple(x)
        return run(fused, inputs, self.cotangents, mode or self.mode, self.autocast)

    def effect(self, change: AbstractContextManager[object]) -> dict[str, Tensor]:
        """What the truth changes by, by name, where its forward runs within a context, as `Shifted` of pre-activations.

        Args:
            change: entered once.
        """
        there = self._exact(change)
        pairs = ((name, there[name], here) for name, here in self._in_double.items())
        return {name: t - here for name, t, here in pairs if t is not None and here is not None}

    def verdict(
        self,
        found: Tensors,
        effect: Mapping[str, Tensor] | None = None,
        mode: Mode | None = None,
        *,
        quick: bool = False,
    ) -> Comparison:
        """The comparison of what a block yields in a mode.

        Args:
            found: what `run` returned.
            effect: a change of the truth that the block is to be excused for.
            mode: of the block's run.
            quick: whether the first run of the reference may decide where it can: what passes with R of that run alone,
                in the largest entry everywhere, passes the rule, unless another run overflows where this one does not.
                The rows then show what that run allows. Where it cannot decide, or a value is not finite, the other
                runs are made.
        """
        if quick and self._is_finite and _is_finite(found):
            comparison = self._by(self._quick_rule, found, effect, mode)
            if comparison.ok:
                return comparison
        return self._by(self._rule, found, effect, mode)

    def _by(self, rule: Rule, found: Tensors, effect: Mapping[str, Tensor] | None, mode: Mode | None) -> Comparison:
        truths = [name for name in rule.truths if _is_of(name, mode or self.mode)]
        excused = effect or {}
        rows = [
            rule.row(name, found[name], excused.get(name))
            if name in found
            else Row(name, math.inf, 0.0, None, "missing")
            for name in truths
        ]
        rows += [Row(name, math.inf, 0.0, None, "not in the reference") for name in found if name not in truths]
        return Comparison(tuple(rows))


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t is not None)


def _is_of(name: str, mode: Mode) -> bool:
    """Whether a run in this mode yields the tensor of this name."""
    if mode == "train" or not name.startswith("gradient"):
        return True
    return mode == "input_grad" and name.startswith("gradient of input")


def compare_blocks(
    reference: nn.Module,
    fused: nn.Module,
    x: Inputs,
    *,
    cotangent: Inputs | None = None,
    mode: Mode = "train",
    autocast: torch.dtype | None = None,
    quick: bool = False,
) -> Comparison:
    """Compare a block with its reference by the one rule: outputs, gradients, buffers, and the input left untouched.

    Args:
        reference: as in Judge.
        fused: the block to judge; same parameter and buffer names.
        x: as in Judge.
        cotangent: as in Judge.
        mode: as in Judge.
        autocast: as in Judge.
        quick: whether the first run of the reference may decide where it can, as in `Judge.verdict`: for a caller who
            asks whether they are equal, and not how nearly.

    Returns:
        The comparison, one row per tensor.

    Raises:
        TypeError, ValueError: as in Judge.

    Example:
        >>> from fastode.testing import sample_input
        >>> block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        >>> compare_blocks(block, block, sample_input(2, 3, 4, 4)).ok
        True
    """
    return Judge(reference, x, cotangent=cotangent, mode=mode, autocast=autocast).compare(fused, quick=quick)


def _longest_of(block: nn.Module, x: Tensor) -> int:
    """A parameter of one entry (Ark's coefficients) has a gradient summed over the whole map."""
    return x.numel() if any(p.numel() == 1 for p in block.parameters()) else 1


@functools.cache
def _warm_once() -> None:
    warm_up()


def assert_blocks_equal(
    reference: nn.Module,
    fused: nn.Module,
    x: Inputs,
    *,
    cotangent: Inputs | None = None,
    mode: Mode | Sequence[Mode] = "train",
    autocast: torch.dtype | None = None,
) -> None:
    """Raise where compare_blocks finds a difference.

    Args:
        reference: as in compare_blocks.
        fused: as in compare_blocks.
        x: as in compare_blocks.
        cotangent: as in compare_blocks.
        mode: as in compare_blocks, or several: the reference runs in the one with most gradients alone.
        autocast: as in compare_blocks.

    Raises:
        AssertionError: a tensor fails the rule; the message is the table of all of them.

    Example:
        >>> from fastode.testing import sample_input
        >>> assert_blocks_equal(nn.Tanh(), nn.Tanh(), sample_input(1, 2, 3, 3))
    """
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    judge = Judge(reference, x, cotangent=cotangent, mode=most_of(modes), autocast=autocast)
    for each in modes:
        comparison = judge.compare(fused, mode=each, quick=True)
        if not comparison.ok:
            raise AssertionError(f"{comparison.describe()}\nin mode {each}")


def most_of(modes: Sequence[Mode]) -> Mode:
    """The mode among these with most gradients, which can judge all of them.

    Raises:
        ValueError: one is none of the three, or there is none.
    """
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"mode must be one of {', '.join(MODES)}, or several, got {modes!r}")
    return min(modes, key=MODES.index)


def compare_tensors(
    outputs: Mapping[str, Tensor],
    truths: Mapping[str, Tensor],
    references: Sequence[Mapping[str, Tensor]],
    longest_reduction: int,
    *,
    dtype: torch.dtype | None = None,
    pointwise: bool = False,
) -> Comparison:
    """Compare a raw operator's tensors by the same rule.

    Args:
        outputs: what the operator returned, by name.
        truths: the same in float64.
        references: runs of plain PyTorch in the working precision (R is the worst of them); may be empty.
        longest_reduction: the longest sum behind any of the tensors.
        dtype: the working precision; by default each tensor's own.
        pointwise: judge the largest entry as well.

    Returns:
        The comparison, one row per tensor.

    Example:
        >>> x = torch.ones(3)
        >>> compare_tensors({"sum": x.sum()}, {"sum": x.double().sum()}, [], 3).ok
        True
    """
    runs: list[Tensors] = [dict(run) for run in references]
    exact: Tensors = dict(truths)
    rule = Rule(exact, runs, longest_reduction, dtype, pointwise, lambda: exact)
    return Comparison(tuple(rule.row(name, outputs[name]) for name in truths))
