"""torch.export and ONNX export of whole networks, fused and not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import nets, reference
from fastode.testing import compare_tensors, sample_input

NETS = {
    "ie_resnet18": lambda: nets.ie_resnet18(width=4),
    "sspnet": lambda: nets.sspnet("ssp3", n=1, width=4),
    "batch norm": lambda: nets.ie_resnet18(width=4, norm="batch"),
    "sonet": lambda: nets.sonet(width=8, solver="euler"),
}
DYNAMIC = {"static": None, "dynamic": {0: torch.export.Dim("batch", min=2, max=64)}}


def made(name: str, engine: str) -> nn.Module:
    """A fused network whose one-step blocks and solutions ask for an engine."""
    torch.manual_seed(2)
    model = NETS[name]().eval()
    fastode.fuse(model)
    for block in model.modules():
        if isinstance(block, fastode.nn.IESkip | fastode.nn.ShuOsher | fastode.nn.SOBlock):
            block.engine = engine
    return model


def operators_in(program: torch.export.ExportedProgram) -> set[str]:
    """The project's own operators that a program calls."""
    targets = {str(node.target) for node in program.graph.nodes}
    return {target for target in targets if target.startswith("fastode.")}


@pytest.mark.parametrize("engine", ["auto", "staged"])
@pytest.mark.parametrize("batch", DYNAMIC)
@pytest.mark.parametrize("name", NETS)
def test_fused_networks_export(name: str, batch: str, engine: str) -> None:
    model = made(name, engine)
    shapes: Any = None if DYNAMIC[batch] is None else (DYNAMIC[batch],)
    x = sample_input(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        others = [x] if shapes is None else [x, sample_input(5, 3, 8, 8, seed=1)]
        exported = program.module()
        for given in others:
            check(exported(given), model, given)
    wanted = "fastode.norm_act" if engine == "staged" else "fastode.resident_"
    found = operators_in(program)
    assert found and any(target.startswith(wanted) for target in found)


def check(found: Tensor, model: nn.Module, x: Tensor) -> None:
    """Equal to the fused model's own output, by the rule."""
    with torch.no_grad():
        run = model(x)
        truth = in_float64(model, x)
    comparison = compare_tensors({"y": found}, {"y": truth}, [{"y": run}], 9 * 32)
    assert comparison.ok, comparison.describe()


def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    plain = copy.deepcopy(model)
    fastode.unfuse(plain)
    return plain.double()(x.double())


def test_the_reference_ie_skip_says_why_it_cannot_be_exported() -> None:
    model = NETS["ie_resnet18"]().eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="the reference IESkip cannot be exported"):
        torch.export.export(model, (sample_input(2, 3, 8, 8),))


def test_onnx_wants_an_unfused_model() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), reference.SSP2(reference.PreActBranch(8))), sample_input(2, 3, 8, 8)
    model.eval()
    assert torch.onnx.export(model, (x,), dynamo=True, verbose=False) is not None
    fastode.fuse(model)
    with pytest.raises(Exception, match=r"call fastode\.unfuse\(model\) before the export"):
        torch.onnx.export(model, (x,), dynamo=True, verbose=False)


def test_steps_by_error_are_exported_on_the_engine_that_takes_them_inside() -> None:
    block = reference.SOBlock(reference.SkewPair(8, 8, 1, 0.1, "tanh"))
    fastode.fuse(block, engine="resident")
    block.eval()
    x, other = sample_input(2, 8, 6, 6), sample_input(2, 8, 6, 6, seed=1)
    with torch.no_grad():
        exported = torch.export.export(block, (x,)).module()
        assert torch.equal(exported(other), block(other))
