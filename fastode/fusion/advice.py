"""What one change to a fused model, or to how it is called, would help most: by the times of an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..dispatch import choice
from ..dispatch.engines import AUTO, ENGINES, REFERENCE, is_reference
from ..dispatch.registry import is_twin
from ..foreign.graph import Unreadable
from ..foreign.reading import adds
from .example import Measured, Seen, engines_of
from .report import FusionRow, percent, times_as_fast

LEAST = 0.05  # of the forward: one measurement does not tell of less
LEAST_OF_CALLS = 0.1  # two forwards of the same network differ by some per cent
_DOUBLINGS = 8

Block = tuple[FusionRow, nn.Module]


class Change(NamedTuple):
    """A change, and the share of the forward's time that it is expected to save."""

    saves: float
    text: str


def advise(model: nn.Module, blocks: Sequence[Block], used: dict[nn.Module, Seen], times: Measured, read: bool) -> str:
    """The change that is expected to save most.

    Args:
        model: as it was fused.
        blocks: the rows of the report, each with its block.
        used: what each fused block has used.
        times: of the example.
        read: whether the forwards of unknown modules were read already.
    """
    gain = _gain_of_fused(blocks, times)
    changes = [
        *_of_blocks(blocks, used, times, gain),
        *_of_slow_blocks(blocks),
        *_of_the_rest(model, blocks, times, gain, read),
    ]
    for what, other in times.otherwise.items():
        saved = 1 - other.total / times.fused.total
        if saved >= LEAST_OF_CALLS:
            changes.append(Change(saved, f"{what}: a forward then took {percent(saved)} less time"))
    best = max(changes, key=lambda change: change.saves, default=None)
    if best is None or best.saves < LEAST:
        return f"nothing stands out: no change that is known of is expected to save {percent(LEAST)} of the forward"
    return best.text


def _gain_of_fused(blocks: Sequence[Block], times: Measured) -> float | None:
    """How many times as fast what runs fused is; None where nothing does, or it was not measured."""
    fused = {block for row, block in blocks if row.is_fused}
    seconds = times.fused.of(fused)
    if times.reference is None or not seconds:
        return None
    return times.reference.of(fused) / seconds


def _saves(share: float, gain: float | None) -> float:
    """Of a share that would run fused: what the fused rest gained, or all of it where nothing tells."""
    return share if gain is None else share * max(0.0, 1 - 1 / gain)


def _of_blocks(
    blocks: Sequence[Block], used: dict[nn.Module, Seen], times: Measured, gain: float | None
) -> list[Change]:
    """A change for each thing that keeps blocks from a fused engine; those that PyTorch runs faster need none.

    What holds other blocks is none: of most of its time these tell.
    """
    groups: dict[str, list[Block]] = {}
    for row, block in blocks:
        if row.share and not row.is_fused and not _holds_another(block, blocks):
            text = _cure(row, block, used.get(block))
            if text:
                groups.setdefault(text, []).append((row, block))
    changes = []
    for text, group in groups.items():
        share = times.fused.share({block for _, block in group})
        if share >= LEAST:
            first = max(group, key=lambda each: each[0].share or 0.0)[0]
            names = _names(first.name, first.reference.__name__, len(group) - 1)
            changes.append(Change(_saves(share, gain), text.format(names=names, share=percent(share))))
    return changes


def _holds_another(block: nn.Module, blocks: Sequence[Block]) -> bool:
    inside = {*block.modules()}
    return any(other in inside for _, other in blocks if other is not block)


def _of_slow_blocks(blocks: Sequence[Block]) -> list[Change]:
    """To leave out the blocks that were slower fused."""
    slow = [row for row, _ in blocks if row.gain is not None and row.gain < 1]
    if not slow:
        return []
    saves = [(row.share or 0.0) * (1 - (row.gain or 1.0)) for row in slow]
    worst = slow[saves.index(max(saves))]
    names = _names(worst.name, worst.reference.__name__, len(slow) - 1)
    text = (
        f"to leave out {names} by filter=, if that is so again: it ran at {times_as_fast(worst.gain or 1.0)} the "
        "reference's speed"
    )
    return [Change(sum(saves), text)]


def _names(name: str, kind: str, others: int) -> str:
    first = f"{name or '(model)'} ({kind})"
    return f"{first} and {others} more like it" if others else first


def _cure(row: FusionRow, block: nn.Module, seen: Seen | None) -> str:
    """What would let a block run fused, with places for the names and the share; empty where nothing would help."""
    reason = row.reason.replace("{", "{{").replace("}", "}}")
    kept = f"to fuse {{names}}, {{share}} of the forward: {reason}"
    if not is_twin(type(block)):
        return kept
    if is_reference(getattr(block, "engine", AUTO)):
        return f"engine={AUTO!r} for {{names}}, {{share}} of the forward"
    if seen is None or seen.like is None or not isinstance(block, choice.Asked):
        return kept if reason else ""
    here = [engine for engine in ENGINES if engine is not REFERENCE and not engine.elsewhere(seen.like)]
    x = _like(seen, seen.shape[0]) if seen.shape else seen.like
    if any(not choice.can_use(engine.name, block, x)[0] for engine in here[:1]):
        return kept
    if seen.like.device.type != "cpu":  # where a trial decides, which is not to be made of what nobody has called
        return ""
    for doubled in range(1, _DOUBLINGS + 1) if len(seen.shape) == 4 else ():
        batch = seen.shape[0] * 2**doubled
        if _runs_fused(block, _like(seen, batch)):
            return (
                f"a larger batch: from {batch} samples on, instead of {seen.shape[0]}, {{names}}, {{share}} of the "
                "forward, would run fused"
            )
    return ""


def _like(seen: Seen, batch: int) -> Tensor:
    """A tensor like a block's input with another batch, whose values nobody reads."""
    assert seen.like is not None
    return seen.like.new_empty((batch, *seen.shape[1:]))


def _runs_fused(block: nn.Module, x: Tensor) -> bool:
    able, _ = engines_of(block, x)
    return not all(map(is_reference, able[:1]))


def _of_the_rest(
    model: nn.Module, blocks: Sequence[Block], times: Measured, gain: float | None, read: bool
) -> list[Change]:
    """A change for what stands outside of all blocks."""
    inside = {part for _, block in blocks for part in block.modules()}
    outside = [(name, part) for name, part in model.named_modules() if inside.isdisjoint(part.modules())]
    seconds = {part: times.fused.of({part}) for _, part in outside}
    outside = [(name, part) for name, part in outside if seconds[part]]
    kinds: dict[type, bool] = {}
    for _, part in outside if not read else ():
        if type(part) not in kinds:
            kinds[type(part)] = _adds(part)
    adding = [(name, part) for name, part in outside if kinds.get(type(part))]
    share = times.fused.share({part for _, part in adding})
    if share >= LEAST:
        name, part = max(adding, key=lambda each: seconds[each[1]])
        names = _names(name, type(part).__name__, len(adding) - 1)
        text = f"fastode.fuse(model, read=True): it reads {names}, {percent(share)} of the forward"
        return [Change(_saves(share, gain), text)]
    leaves = [(name, part) for name, part in outside if next(part.children(), None) is None]
    if not leaves:
        return []
    name, part = max(leaves, key=lambda each: seconds[each[1]])
    share = times.fused.share({part})
    text = (
        f"a block around {_names(name, type(part).__name__, 0)}, {percent(share)} of the forward outside of all "
        "blocks: fastode.reference.Chain is fused, and fastode.adapt tells what others' blocks are"
    )
    return [Change(_saves(share, gain), text)] if share >= LEAST else []


def _adds(module: nn.Module) -> bool:
    """Whether a module of another's class adds maps in its own forward."""
    if type(module).__module__.split(".")[0] == "torch" or type(module).forward is nn.Module.forward:
        return False
    try:
        return adds(module)
    except Unreadable:
        return False
