"""What a tracer is told of the resident operators' results is what they return: on the CPU and for a card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import simulator
import torch
from block_cases import case_of, make_branch, make_input

from fastode.dispatch.one_step import constant_table, describe_call, tableau_step
from fastode.native import fake, operators
from fastode.ops.plan import Plan
from fastode.ops.resident.call import encode
from fastode.tableau import SSP2

NAMES = ("resident_ie_forward", "resident_ie_backward", "resident_rk_forward", "resident_rk_backward")
UTILITIES = ("test_schema", "test_faketensor")


@pytest.fixture
def programs() -> Iterator[Any]:
    """The operators of the test machine, with the fakes of those that they stand for."""
    simulator.load()
    library = torch.library.Library("fastode_simt", "FRAGMENT")
    for name in NAMES:
        torch.library.register_fake(f"fastode_simt::{name}", fake._FAKES[name], lib=library)
    yield torch.ops.fastode_simt
    library._destroy()


def check(ops: Any, norm: str, layout: str, convolution: str, dtype: torch.dtype) -> None:
    case = case_of(
        norm=norm, layout=layout, convolution=convolution, dtype=dtype, channels=16, size=(8, 8), batch=3
    )  # fmt: skip
    branch, x = make_branch(case), make_input(case)
    step = tableau_step(SSP2)
    call = describe_call(step, branch, (x,))
    assert isinstance(call.program, Plan)
    tensors = encode(call.program, [None if tensor is None else tensor.detach() for tensor in call.tensors])
    table, cotangent = constant_table(step), torch.ones_like(x)
    rule = (2, 0.1, 0.5)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "resident_ie_forward": [(x, *tensors, *rule, False, False)],
        "resident_rk_forward": [(x, *tensors, table, False, False)],
        "resident_ie_backward": [
            (x, cotangent, [], *tensors, *rule, detach, wanted, False)
            for detach in (False, True) for wanted in (False, True)
        ],
        "resident_rk_backward": [
            (x, cotangent, [], *tensors, table, wanted, False, False) for wanted in (False, True)
        ],
    }  # fmt: skip
    for name in NAMES:
        for arguments in calls[name]:
            torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("convolution", ["3x3", "3x3_no_bias"])
@pytest.mark.parametrize("norm", ["group", "layer_bare", "batch", "batch_eval", "none"])
def test_on_the_cpu(norm: str, convolution: str, layout: str) -> None:
    assert operators.load() is None
    check(torch.ops.fastode, norm, layout, convolution, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("convolution", ["3x3", "3x3_no_bias"])
@pytest.mark.parametrize("norm", ["group", "layer_bare", "batch_eval", "none"])
def test_for_a_card(programs: Any, norm: str, convolution: str, layout: str) -> None:
    check(programs, norm, layout, convolution, torch.bfloat16)
