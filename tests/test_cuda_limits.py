"""What a card must have for the CUDA programs, and what is said of one that has not."""

from __future__ import annotations

import pytest
import simulator
import torch
from block_cases import case_of, make_pair

from fastode.dispatch import choice
from fastode.native import cuda_library
from fastode.native.constants import TILES
from fastode.ops.resident import card
from fastode.ops.resident.engine import Resident

# Bytes of shared memory that a block can have on an A100 and on an H100.
AMPERE, HOPPER = 166912, 232448


@pytest.mark.parametrize(("channels", "side"), TILES)
def test_the_shared_memory_is_what_the_device_code_says(channels: int, side: int) -> None:
    simulator.load()
    for units in range(1, TILES[channels, side] + 1):
        said = torch.ops.fastode_simt.shared_bytes(channels, side, units)
        assert card.shared_bytes(channels, side, units) == said > 0


@pytest.mark.parametrize(
    ("size", "shape", "units", "fits"),
    [
        ((64, 16), "two_layers", 2, False),
        ((64, 16), "one_layer", 1, True),
        ((32, 16), "three_layers", 3, True),
        ((16, 32), "three_layers", 3, True),
    ],
)
def test_a_card_with_less_shared_memory_is_refused_what_it_has_no_room_for(
    size: tuple[int, int], shape: str, units: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, side = size
    case = case_of("ssp3", channels=channels, shape=shape, dtype=torch.bfloat16, batch=1)
    block = make_pair(case)[1]
    monkeypatch.setattr(cuda_library, "why_not", lambda index=None: "")
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call))
    x, needed = torch.zeros(1, channels, side, side, dtype=torch.bfloat16), card.shared_bytes(channels, side, units)
    assert (needed <= AMPERE) == fits
    for there, able in ((AMPERE, fits), (HOPPER, True), (needed, True), (needed - 1, False)):
        monkeypatch.setattr(cuda_library, "shared_bytes", lambda index, there=there: there)
        assert choice.can_use(Resident.name, block, x) == (
            able,
            ""
            if able
            else f"its program for such maps needs {needed} bytes of shared memory, and a block has {there} "
            "on this card",
        )


def test_the_shared_memory_of_each_card_is_read_when_the_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "_shared", {})
    assert cuda_library.shared_bytes(None) is None and cuda_library.shared_bytes(0) is None
    properties = type("Properties", (), {"shared_memory_per_block_optin": AMPERE})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_reason", "")
    monkeypatch.setattr(cuda_library, "wanted", lambda: True)
    monkeypatch.setattr(cuda_library, "find_or_build", lambda announce: None)
    monkeypatch.setattr(cuda_library, "open_library", lambda path: path)
    monkeypatch.setattr(cuda_library.nvcc, "capabilities", lambda: [(8, 0), (8, 0)])
    assert cuda_library.load() == ""
    assert (cuda_library.shared_bytes(0), cuda_library.shared_bytes(1), cuda_library.shared_bytes(2)) == (
        AMPERE, AMPERE, None,
    )  # fmt: skip
