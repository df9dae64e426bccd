"""The numbers that C++ and Python must agree on, as csrc/constants.h states them.

They are read from its text rather than asked of an operator: so they are there where no compiler is and before anything
is built, and torch.compile sees plain integers.
"""

from __future__ import annotations

import re
from pathlib import Path

from .toolchain import constants, enumeration, source_root

_ROOT = source_root(Path(__file__).resolve().parents[1])
if _ROOT is None:
    raise ImportError(
        f"fastode was installed without its C++ sources: csrc/ is missing beside {Path(__file__).parents[1]}"
    )
_FOUND = constants(_ROOT)

# The operators' codes.
NORM_CODE = {"group": _FOUND["kGroupNorm"], "batch": _FOUND["kBatchNorm"], "fixed": _FOUND["kFixedNorm"]}
ACTIVATION_CODE = {
    re.sub(r"(?<!^)([A-Z])", r"_\1", name.removeprefix("k")).lower(): code
    for name, code in enumeration(_ROOT, "Activation").items()
    if name != "kIdentity"
}

# What a forward operator leaves to backward.
KEEP_NOTHING, KEEP_PIECES, KEEP_TICKET = (_FOUND[f"kKeep{what}"] for what in ("Nothing", "Pieces", "Ticket"))

MOST_TERMS = _FOUND["kMostTerms"]
MOST_PAIR_CHANNELS = _FOUND["kMostChannels"]

UNIT_INTEGERS = _FOUND["kUnitIntegers"]
# The bits of what is present of a norm and of a convolution.
WEIGHT, BIAS, RUNNING = _FOUND["kWeight"], _FOUND["kBias"], _FOUND["kRunning"]
CONV_WEIGHT, CONV_BIAS = _FOUND["kConvWeight"], _FOUND["kConvBias"]

# What the programs of csrc/cuda take: units, stages and steps at most, and for maps of (channels, side) the units at
# most, and the warps of a block.
MOST_UNITS, MOST_STAGES, MOST_STEPS = (_FOUND[f"kMost{what}"] for what in ("Units", "Stages", "Steps"))
_EACH = re.compile(r"\beach\((\d+), (\d+), (\d+), (\d+)\)")
_LISTED = [tuple(map(int, numbers)) for numbers in _EACH.findall((_ROOT / "constants.h").read_text())]
TILES = {(channels, side): units for channels, side, _, units in _LISTED}
WARPS = {(channels, side): warps for channels, side, warps, _ in _LISTED}
