"""The suites: what each measures, against whom and for how long. "cpu" and "networks" are of parts, a record each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import families
from .contenders import THEN_COMPILED
from .workloads import BLOCK_MODES, Workload

SUITES = ("default", "cpu", "networks", "all")
# Seconds of timed rounds for one measurement, once its least number of rounds is done.
SECONDS = {"default": 4.0, "cpu": 2.5, "networks": 2.5, "all": 8.0}
MODES = {
    "forward": "forward",
    "input_grad": "input gradient",
    "train": "training step",
    "pgd_step": "PGD step",
    "attack_step": "attack step",
    "pgd10": "PGD-10",
    "adv_train": "PGD-10 training step",
    "trades": "TRADES step",
}
# The default suite's one row against compiled: (id, variant, shape, mode) and the contender.
COMPILED_ROW = ("ie", "k1", "64@8", "input_grad")
COMPILED_RIVAL = "vjp-compile"


@dataclass(frozen=True)
class Item:
    """One measurement to make.

    Args:
        workload: what to run.
        mode: one of its modes.
        dtype: a key of measure.DTYPES.
        rivals: contenders beside the two layouts of the reference and the project.
        own: "fused" for every engine that can run it, "fused:auto" for the project's own choice.
        rounds: the least and the largest number of rounds.
    """

    workload: Workload
    mode: str
    dtype: str
    rivals: tuple[str, ...]
    own: str = "fused"
    rounds: tuple[int, int] = (7, 40)

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.mode} {self.dtype}"


@dataclass(frozen=True)
class Part:
    """One file of a suite of parts: at most nine minutes on two idle cores.

    Args:
        name: of the part, and in the file's name.
        id: of its workloads.
        variants: of its workloads.
        rivals: the compiled contenders; the better one of each row counts.
        modes: of its rows.
        rounds: the least and the largest number of rounds of a row; fewer where one turn takes seconds.
    """

    name: str
    id: str
    variants: tuple[str, ...]
    rivals: tuple[str, ...] = ("compile", "compile-cl")
    modes: tuple[str, ...] = BLOCK_MODES
    rounds: tuple[int, int] = (7, 40)


COMPILED = ("compile", "compile-cl", f"fused:auto{THEN_COMPILED}")
NETWORK_MODES, WHOLE_MODES, ADVERSARIAL_MODES = (
    ("train", "pgd_step"),
    ("train", "attack_step", "forward"),
    ("adv_train", "trades"),
)
# The parts by dtype; "autocast" is float32 under autocast to bfloat16, against eager under autocast.
CPU_PARTS: dict[str, tuple[Part, ...]] = {
    "float32": (
        Part("ie", "ie", ("k1",), ("compile", "compile-cl", "vjp-compile")),
        Part("ssp2", "ssp2", ("",)),
        Part("ssp3", "ssp3", ("",)),
        Part("ark", "ark", ("",)),
        Part("skew-pair", "skew", ("pair",)),
        Part("skew-euler", "skew", ("soblock-euler",)),
        Part("skew-rk4", "skew", ("soblock-rk4",), rounds=(3, 40)),
        Part("solve", "solve", ("dopri5",), (), rounds=(3, 40)),
        Part("solve-constant", "solve", ("dopri5-constant",), ("torchdiffeq",), rounds=(3, 40)),
        Part("solve-per-sample", "solve", ("per-sample",), ("torchode",), rounds=(3, 40)),
        Part("convolution", "conv", ("8 in a row",), (), ("forward",)),
        Part("ie-resnet", "nets", ("ie-resnet-1-18",), (), NETWORK_MODES, (3, 40)),
        Part("sspnet", "nets", ("sspnet-3",), (), NETWORK_MODES, (3, 40)),
        Part("sonet", "nets", ("sonet-32",), (), NETWORK_MODES, (3, 40)),
        Part("soblock-resnet10", "nets", ("soblock-resnet10-32",), (), NETWORK_MODES, (3, 40)),
        Part("odenet", "nets", ("odenet",), (), NETWORK_MODES, (3, 40)),
    ),
    "bfloat16": (
        Part("ie", "ie", ("k1",), (), ("forward", "train")),
        Part("ssp3", "ssp3", ("",), (), ("forward", "train")),
        Part("skew-pair", "skew", ("pair",), (), ("forward", "train")),
        Part("skew-euler", "skew", ("soblock-euler",), (), ("forward", "train")),
        Part("skew-rk4", "skew", ("soblock-rk4",), (), ("forward", "train"), (3, 40)),
    ),
}
_WHOLE = tuple(
    Part(name, "networks", (variant,), (), WHOLE_MODES, (3, 40))
    for name, variant in {
        "ie-resnet-w16": "ie-resnet-1-18-w16",
        "ie-resnet-w64": "ie-resnet-1-18-w64",
        "sspnet": "sspnet-3",
        "resnet10": "resnet10-w32",
        "soblock-resnet10": "soblock-resnet10-w32",
        "resnet18": "resnet18-224",
        "preact-resnet18": "preact-resnet18",
    }.items()
)
_ADVERSARIAL = (
    Part("adversarial-ie-resnet", "networks", ("ie-resnet-1-18-w16",), (), ADVERSARIAL_MODES, (3, 20)),
    Part("adversarial-sspnet", "networks", ("sspnet-3",), (), ADVERSARIAL_MODES, (3, 20)),
)
PARTS: dict[str, dict[str, tuple[Part, ...]]] = {
    "cpu": CPU_PARTS,
    "networks": {"float32": (*_WHOLE, *_ADVERSARIAL), "autocast": (*_WHOLE, *_ADVERSARIAL)},
}


def parts(
    suite: str, dtypes: Sequence[str], only: Sequence[str], rivals: Sequence[str] = ()
) -> Iterator[tuple[str, list[Item]]]:
    """The chosen parts of a suite, each as the name of its record and its measurements.

    Args:
        suite: "cpu" or "networks".
        dtypes: "float32", "bfloat16" of the former, "float32", "autocast" of the latter.
        only: names of parts; empty for all.
        rivals: contenders beside those of the parts.
    """
    known = families.everything()
    for dtype in dtypes:
        for part in PARTS[suite].get(dtype, ()):
            if only and part.name not in only:
                continue
            found = [w for w in known if w.id == part.id and w.variant in part.variants]
            against = tuple(dict.fromkeys((*part.rivals, *rivals)))
            items = [Item(w, mode, dtype, against, "fused:auto", part.rounds) for w in found for mode in part.modes]
            yield recorded_as(suite, (dtype,), (part.name,)), items


def plan(suite: str, device: torch.device, dtypes: Sequence[str]) -> list[Item]:
    """Every measurement of "default" or "all", in order; in "default" all but one leave the compiled contenders out."""
    items = []
    for workload in families.everything():
        if suite == "default" and not workload.default:
            continue
        for dtype in dtypes:
            for mode in workload.modes:
                rivals = workload.rivals
                if suite == "default":
                    row = (workload.id, workload.variant, workload.shape, mode)
                    rivals = (COMPILED_RIVAL,) if row == COMPILED_ROW else ()
                elif device.type == "cuda" and "compile-cl" in rivals:
                    rivals = (*rivals, "compile-ro")
                items.append(Item(workload, mode, dtype, rivals))
    return items


def recorded_as(suite: str, dtypes: Sequence[str], only: Sequence[str]) -> str:
    """The name of a record: the suite, the dtypes if not float32 alone, and the part of it.

    Example:
        >>> recorded_as("cpu", ["bfloat16"], ["ie"])
        'cpu-bfloat16-ie'
    """
    return "-".join([suite, *(dtypes if list(dtypes) != ["float32"] else []), *only])
