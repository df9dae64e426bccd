"""fuse and unfuse: what changes (the class of a block), what does not (everything else), and what the report says."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastode
from fastode import nets, reference
from fastode import nn as fused
from fastode.dispatch.engines import NAMES
from fastode.dispatch.registry import _twins
from fastode.native import operators
from fastode.tableau import SSP3

ENGINES = ", ".join(repr(name) for name in NAMES)

BLOCKS = {
    "IESkip": lambda branch: reference.IESkip(branch, steps=2, step_size=0.05, theta=0.5),
    "ExactIE": lambda branch: reference.ExactIE(branch, tol=1e-6, max_iterations=9),
    "ResBlock": lambda branch: reference.ResBlock(branch, 0.5),
    "PolyBlock": lambda branch: reference.PolyBlock(branch, 0.5),
    "SSP2": reference.SSP2,
    "SSP3": reference.SSP3,
    "Midpoint": reference.Midpoint,
    "Ark": reference.Ark,
    "ShuOsher": lambda branch: reference.ShuOsher(branch, SSP3),
}
TYPES = {name: getattr(reference, name) for name in BLOCKS}


def block(name="SSP2", **options):
    return BLOCKS[name](reference.PreActBranch(4, **{"norm": "batch", **options}))


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block("IESkip"), nn.Dropout(), block("SSP3"), nn.Flatten())


def values(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(before, module):
    after = module.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def own_block():
    """A block of a user's own, and its twin; forgotten afterwards."""

    class Own(nn.Module):
        def forward(self, x):
            return x + x

    @fastode.register(Own)
    class FusedOwn(Own):
        def forward(self, x):
            return 2 * x

    yield Own, FusedOwn
    del _twins[Own]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_model_itself_is_swapped_and_back(name):
    module = block(name)
    attributes, state, tensors = dict(module.__dict__), values(module), list(module.state_dict(keep_vars=True).values())
    report = fastode.fuse(module)
    assert type(module) is getattr(fused, name)
    assert [(row.name, row.reference, row.fused) for row in report.rows] == [("", TYPES[name], type(module))]
    candidates = (
        ("staged", "reference") if name.startswith(("Skew", "SO", "Exact")) else ("resident", "staged", "reference")
    )
    assert report.rows[0].engines == candidates and report.fused == 1 and report.unfused == 0
    assert {key: value for key, value in module.__dict__.items() if key != "engine"} == attributes
    back = fastode.unfuse(module)
    assert type(module) is TYPES[name] and module.__dict__ == attributes
    assert [(row.reference, row.fused) for row in back.rows] == [(TYPES[name], None)]
    assert same(state, module)
    now = module.state_dict(keep_vars=True).values()
    assert all(old is new for old, new in zip(tensors, now, strict=True))


def test_unfuse_says_which_blocks_stay_fused():
    module = nn.Sequential(block("Ark"), block())
    fastode.fuse(module)
    parametrize.register_parametrization(module[0], "b10", nn.Softplus())
    rows = fastode.unfuse(module).rows
    assert [(row.name, row.reference, row.fused) for row in rows] == [
        ("0", reference.Ark, type(module[0])),
        ("1", reference.SSP2, None),
    ]
    reason = "ParametrizedArk was made of the fused Ark, and stays fused: unfuse before it is made"
    assert rows[0].reason == reason and isinstance(module[0], fused.Ark)
    parametrize.remove_parametrizations(module[0], "b10")
    assert fastode.unfuse(module).rows[0].fused is None and type(module[0]) is reference.Ark


def test_every_reference_block_has_a_twin_that_adds_no_state():
    for kind, twin in _twins.items():
        assert issubclass(twin, kind) and twin.__name__ == kind.__name__
        assert twin.__module__.startswith("fastode.nn") and kind.__module__.startswith("fastode.reference")


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dicts_are_interchangeable(name):
    old, new = block(name), block(name)
    fastode.fuse(new)
    assert list(old.state_dict()) == list(new.state_dict())
    new.load_state_dict(old.state_dict())
    old.load_state_dict(new.state_dict())


def test_blocks_are_found_wherever_they_are():
    inner, outer = block(), nn.ModuleDict({"a": nn.ModuleList([block("Ark")]), "b": nn.Identity()})
    module = nn.Sequential(outer, nn.Sequential(nn.Sequential(inner)))
    report = fastode.fuse(module)
    assert [row.name for row in report.rows] == ["0.a.0", "1.0.0"]
    assert type(inner) is fused.SSP2 and type(outer["a"][0]) is fused.Ark


def test_a_shared_block_stays_shared_and_has_one_row():
    shared = block()
    module = nn.Sequential(shared, nn.ReLU(), shared)
    assert [row.name for row in fastode.fuse(module).rows] == ["0"]
    assert module[0] is module[2] is shared and type(shared) is fused.SSP2


def test_hooks_mode_dtype_and_requires_grad_survive():
    module = model().double().eval()
    module[1].branch.requires_grad_(False)
    calls = []
    module[1].register_forward_hook(lambda *_: calls.append("forward"))
    module[3].register_full_backward_hook(lambda *_: calls.append("backward"))
    frozen = [parameter.requires_grad for parameter in module.parameters()]
    fastode.fuse(module)
    assert not module[1].training and not module[3].branch.training
    assert [parameter.requires_grad for parameter in module.parameters()] == frozen
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    module(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    assert calls == ["forward", "backward"]
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())


def test_optimizer_state_survives():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), block("IESkip"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 4, 4)

    def step():
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    step()
    momenta = {name: optimizer.state[tensor]["momentum_buffer"] for name, tensor in module.named_parameters()}
    fastode.fuse(module)
    weight = module[1].branch[2].weight
    before = weight.detach().clone()
    step()
    assert weight is module[1].branch[2].weight and not torch.equal(weight, before)
    assert all(
        optimizer.state[tensor]["momentum_buffer"] is momenta[name] for name, tensor in module.named_parameters()
    )


# Process groups that outlive their test. Where a wrapper's end is a group's, too, PyTorch joins the group's threads and
# holds the interpreter's lock, which one of them may be waiting for: of 300 such ends in a row one hangs.
GROUPS = []


def test_a_distributed_wrapper_is_seen_through(tmp_path):
    module = nn.Sequential(block(norm="group"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    GROUPS.append(torch.distributed.group.WORLD)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        report = fastode.fuse(wrapped, example=torch.randn(2, 4, 4, 4))
        assert [(row.name, row.engines) for row in report.rows] == [("module.0", ("resident",))]
        wrapped(torch.randn(2, 4, 4, 4)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert type(module[0]) is fused.SSP2
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_fused_model_are_fused(clone):
    module = model()
    fastode.fuse(module, engine="reference")
    other = clone(module)
    assert type(other[1]) is fused.IESkip and other[1].engine == "reference"
    assert same(values(module), other) and other[1].branch[2].weight is not module[1].branch[2].weight
    fastode.unfuse(other)
    assert type(other[1]) is reference.IESkip and type(module[1]) is fused.IESkip


def test_fusing_twice_is_fusing_once():
    module = model()
    first = fastode.fuse(module)
    assert fastode.fuse(module) == first
    assert fastode.unfuse(module).unfused == 2
    assert fastode.unfuse(module).rows == ()


def test_a_second_call_sets_the_engine():
    module = block()
    fastode.fuse(module)
    assert module.engine == "auto"
    assert fastode.fuse(module, engine="reference").rows[0].engines == ("reference",)
    assert module.engine == "reference"


def test_the_filter_is_asked_by_name_and_module():
    module = model()
    asked = []

    def filter(name, module):
        asked.append((name, type(module)))
        return name == "3"

    report = fastode.fuse(module, filter=filter)
    assert asked == [("1", reference.IESkip), ("3", reference.SSP3)]
    assert type(module[1]) is reference.IESkip and type(module[3]) is fused.SSP3
    assert [(row.fused, row.reason) for row in report.rows] == [(None, "left out by the filter"), (fused.SSP3, "")]


def test_a_fused_block_left_out_by_the_filter_stays_fused():
    module = block()
    fastode.fuse(module, engine="reference")
    row = fastode.fuse(module, filter=lambda name, module: False).rows[0]
    assert (row.fused, row.engines, row.reason) == (fused.SSP2, ("reference",), "left out by the filter")
    assert module.engine == "reference"


def test_a_subclass_of_a_block_is_reported_and_left_alone():
    class Own(reference.SSP2):
        def forward(self, x):
            return super().forward(x) + 1

    module = nn.Sequential(Own(reference.PreActBranch(4)))
    row = fastode.fuse(module).rows[0]
    assert type(module[0]) is Own
    assert (row.reference, row.fused, row.engines) == (reference.SSP2, None, ("reference",))
    assert row.reason == "Own is a subclass of SSP2, and no twin is registered for it"


def test_a_block_whose_own_forward_was_replaced_is_left_alone():
    module = block()
    module.forward = torch.sin
    row = fastode.fuse(module).rows[0]
    assert type(module) is reference.SSP2 and row.reason == "its forward was replaced on this very module"


def test_what_cannot_be_read_runs_as_the_reference_and_the_report_says_why():
    module = nn.Sequential(reference.SSP2(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Mish())))
    x = torch.randn(2, 4, 4, 4)
    expected = module(x)
    why = "resident, staged: branch.1 (Mish) is of a type the reader does not know."
    for report in (fastode.fuse(module), fastode.fuse(module, example=x)):
        assert [(row.fused, row.engines, row.reason) for row in report.rows] == [(fused.SSP2, ("reference",), why)]
        assert report.fused == 0 and report.unfused == 1
    assert torch.equal(module(x), expected)


def test_a_user_registers_a_block(own_block):
    kind, twin = own_block
    module = nn.Sequential(kind(), kind())
    report = fastode.fuse(module, example=torch.ones(2))
    assert type(module[0]) is twin and type(module[1]) is twin
    assert [row.engines for row in report.rows] == [("own",), ("own",)] and report.fused == 2
    fastode.unfuse(module)
    assert type(module[0]) is kind


def test_a_twin_must_be_a_subclass_of_its_reference():
    with pytest.raises(TypeError, match=r"^twin must be a subclass of SSP2, got <class 'torch.nn.modules"):
        fastode.register(reference.SSP2)(nn.Identity)
    with pytest.raises(TypeError, match=r"^reference must be a subclass of nn.Module, got 3$"):
        fastode.register(3)


def test_an_example_leaves_no_trace():
    module = model().train()
    state, random = values(module), torch.get_rng_state()
    versions = [buffer._version for buffer in module.buffers()]
    report = fastode.fuse(module, example=torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert report.measured and [row.engines for row in report.rows] == [("resident",), ("resident",)]
    assert same(state, module) and torch.equal(torch.get_rng_state(), random)
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())
    # In eval mode nothing is written to, not even the same value: a graph may hold the buffers.
    versions = [buffer._version for buffer in module.eval().buffers()]
    fastode.fuse(module, example=(torch.randn(2, 3, 4, 4),))
    assert [buffer._version for buffer in module.buffers()] == versions


def test_a_buffer_that_the_example_replaces_is_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return x

    module = nn.Sequential(Counter(), block())
    count = module[0].count
    fastode.fuse(module, example=torch.randn(2, 4, 3, 3))
    assert module[0].count is count and count == 0


def test_the_report_tells_of_the_inputs_the_engine_cannot_take():
    module = nn.Sequential(block(norm="group")).half()
    row = fastode.fuse(module, example=torch.randn(2, 4, 3, 3).half()).rows[0]
    assert (row.engines, row.reason) == (("reference",), "resident, staged: there are no CPU kernels for torch.float16")


def test_a_block_the_example_does_not_reach_is_named():
    module = block()
    module.spare = block()
    report = fastode.fuse(module, example=torch.randn(2, 4, 3, 3))
    assert [(row.name, row.engines, row.reason) for row in report.rows] == [
        ("", ("resident",), ""),
        ("spare", (), "the example did not reach it"),
    ]


def test_a_part_that_a_fused_block_runs_itself_is_reported():
    module = reference.SOBlock(reference.SkewPair(4, 4), solver="euler")
    report = fastode.fuse(module, example=torch.randn(2, 4, 4, 4))
    assert [(row.name, row.engines) for row in report.rows] == [("", ("resident",)), ("field", ("resident",))]


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_failing_example_leaves_the_model_as_it_was(engine):
    module = nn.Sequential(block("IESkip"), block("SSP3", norm="group"), nn.Linear(5, 5))
    fastode.fuse(module[1], engine="reference")
    kinds = [type(part) for part in module.modules()]
    attributes = [dict(part.__dict__) for part in module.modules()]
    state, random = values(module), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fastode.fuse(module, engine=engine, example=torch.ones(2, 4, 3, 3))
    assert [type(part) for part in module.modules()] == kinds
    assert [dict(part.__dict__) for part in module.modules()] == attributes
    assert same(state, module) and torch.equal(torch.get_rng_state(), random)


def test_a_named_engine_that_cannot_run_is_an_error_at_the_call():
    module = reference.SSP2(nn.Sequential(nn.Mish()))
    why = "branch.0 (Mish) is of a type the reader does not know."
    report = fastode.fuse(module, engine="staged")
    assert (report.rows[0].engines, report.rows[0].reason) == ((), f"staged: {why}")
    message = f"engine must be one that can run this block, got 'staged': {why}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        module(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "model must be an nn.Module, got 3", (3,), {}),
        (ValueError, f"engine must be one of {ENGINES}, got 'fast'", (), {"engine": "fast"}),
        (TypeError, f"engine must be one of {ENGINES}, got None", (), {"engine": None}),
        (TypeError, "example must be a tensor or a tuple of arguments, got 3", (), {"example": 3}),
        (TypeError, "filter must be a function of (name, module), got 'layer1'", (), {"filter": "layer1"}),
    ],
)
def test_wrong_arguments_are_refused(error, message, arguments, options):
    module = block()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fastode.fuse(*(arguments or (module,)), **options)
    assert type(module) is reference.SSP2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    message = "model must be an nn.Module that is not scripted yet, got a torch.jit.ScriptModule"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fastode.fuse(torch.jit.trace(nn.ReLU(), torch.ones(1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_reported(own_block):
    kind, _ = own_block
    scripted = torch.jit.trace(kind(), torch.ones(1))
    module = nn.Sequential(scripted, kind())
    report = fastode.fuse(module)
    assert [row.reason for row in report.rows] == ["compiled by TorchScript: fuse before scripting", ""]


def test_the_operators_are_loaded_once_and_only_when_needed(monkeypatch):
    calls = []
    monkeypatch.setattr(operators, "load", lambda: calls.append("load"))
    fastode.fuse(nn.Sequential(nn.ReLU()))
    fastode.fuse(block(), engine="reference")
    fastode.fuse(block(), filter=lambda name, module: False)
    assert calls == []
    fastode.fuse(model())
    assert calls == ["load"]


def test_a_compiled_model_is_fused_inside():
    module = nn.Sequential(block(norm="group"))
    x = torch.randn(2, 4, 3, 3)
    compiled = torch.compile(module, backend="eager")
    compiled(x)
    report = fastode.fuse(compiled, example=x)
    assert [(row.name, row.engines) for row in report.rows] == [("_orig_mod.0", ("resident",))]
    assert type(module[0]) is fused.SSP2
    assert torch.equal(compiled(x), module(x))


def test_the_report_is_a_plain_table():
    module = nn.Sequential(block(), reference.SSP3(nn.Tanh()), reference.Ark(nn.Mish()))
    fastode.fuse(module[0], engine="reference")
    text = str(fastode.fuse(module, filter=lambda name, module: name != "1"))
    assert text.splitlines() == [
        "block  type  twin             engines                      why",
        "0      SSP2  fastode.nn.SSP2  resident, staged, reference",
        "1      SSP3  -                reference                    left out by the filter",
        "2      Ark   fastode.nn.Ark   reference                    "
        "resident, staged: branch (Mish) is of a type the reader does not know.",
        "1 fused, 2 as the reference",
    ]
    assert str(fastode.fuse(nn.ReLU())) == "no block that fastode knows"


def test_a_whole_network_is_fused_and_back():
    module = nets.ie_resnet18(width=8)
    kinds = [type(part) for part in module.modules()]
    report = fastode.fuse(module)
    assert report.fused >= 5 and report.fused + report.unfused == len(report.rows)
    fastode.unfuse(module)
    assert [type(part) for part in module.modules()] == kinds


@pytest.mark.parametrize("example", [None, torch.zeros(2, 8, 4, 4)], ids=["report", "example"])
def test_a_block_that_cannot_be_described_leaves_the_model_as_it_was(example: Tensor | None) -> None:
    """What its step was replaced by is refused as its row is made."""
    model = nn.Sequential(reference.IESkip(reference.PreActBranch(8)), reference.ResBlock(reference.PreActBranch(8)))
    model[1].step_size = torch.tensor(0.5)
    with pytest.raises(TypeError, match="step_size must be a finite number > 0, got a tensor"):
        fastode.fuse(model, example=example)
    assert [type(block) for block in model] == [reference.IESkip, reference.ResBlock]
