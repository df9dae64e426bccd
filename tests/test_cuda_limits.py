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

AMPERE = 166912  # bytes of shared memory that a block can have on an A100


@pytest.mark.parametrize(("channels", "side"), TILES)
def test_the_shared_memory_is_what_the_device_code_says(channels: int, side: int) -> None:
    simulator.load()
    for units in range(1, TILES[channels, side] + 1):
        said = torch.ops.fastode_simt.shared_bytes(channels, side, units)
        assert card.shared_bytes(channels, side, units) == said > 0


@pytest.mark.parametrize(
    ("size", "shape", "reason"),
    [
        (
            (64, 16),
            "two_layers",
            f"its program for such maps needs {card.shared_bytes(64, 16, 2)} bytes of shared memory, and a block has "
            "166912 on this card",
        ),
        ((64, 16), "one_layer", ""),
        ((64, 8), "two_layers", ""),
        ((16, 32), "three_layers", ""),
    ],
)
def test_a_card_with_less_shared_memory_is_refused_what_it_has_no_room_for(
    size: tuple[int, int], shape: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, side = size
    case = case_of("ssp3", channels=channels, shape=shape, dtype=torch.bfloat16, batch=1)
    block = make_pair(case)[1]
    monkeypatch.setattr(cuda_library, "why_not", lambda index=None: "")
    monkeypatch.setattr(cuda_library, "shared_bytes", lambda index: AMPERE)
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call))
    x = torch.zeros(1, channels, side, side, dtype=torch.bfloat16)
    assert choice.can_use(Resident.name, block, x) == (not reason, reason)
    monkeypatch.setattr(cuda_library, "shared_bytes", lambda index: 232448)
    assert choice.can_use(Resident.name, block, x) == (True, "")


def test_a_card_with_too_little_for_the_gradients_of_weights_is_refused_a_training_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = make_pair(case_of("ssp3", channels=16, dtype=torch.bfloat16, batch=1))[1]
    monkeypatch.setattr(cuda_library, "why_not", lambda index=None: "")
    monkeypatch.setattr(cuda_library, "shared_bytes", lambda index: 101376)  # of sm_86, sm_89 and sm_120
    monkeypatch.setattr(Resident, "refuses", lambda self, call: card.refuses(call))
    x = torch.zeros(1, 16, 32, 32, dtype=torch.bfloat16)
    needed = card.weights_shared_bytes(16, 32, 2)
    reason = f"its program for such maps needs {needed} bytes of shared memory, and a block has 101376 on this card"
    assert choice.can_use(Resident.name, block, x) == (False, reason)
    block.requires_grad_(False)
    assert choice.can_use(Resident.name, block, x.requires_grad_()) == (True, "")


def test_the_shared_memory_of_each_card_is_read_when_the_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "_shared", {})
    assert cuda_library.shared_bytes(None) is None and cuda_library.shared_bytes(0) is None
    properties = type("Properties", (), {"shared_memory_per_block_optin": AMPERE})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda_library, "_path", None)
    monkeypatch.setattr(cuda_library, "_reason", "")
    monkeypatch.setattr(cuda_library, "wanted", lambda: True)
    monkeypatch.setattr(cuda_library, "_check_nvcc", lambda: None)
    monkeypatch.setattr(cuda_library, "find_or_build", lambda announce: None)
    monkeypatch.setattr(cuda_library, "open_library", lambda path: path)
    monkeypatch.setattr(cuda_library.nvcc, "capabilities", lambda: [(8, 0), (8, 0)])
    assert cuda_library.load() == ""
    assert (cuda_library.shared_bytes(0), cuda_library.shared_bytes(1), cuda_library.shared_bytes(2)) == (
        AMPERE, AMPERE, None,
    )  # fmt: skip
