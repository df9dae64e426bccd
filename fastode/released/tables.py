"""The names of the released codes: data. Their names stand left, ours right; `{i}`, `{j}` are numbers.

Sources: github.com/homles11/IE-ResNet (models/sirResNet.py, sResNet.py), github.com/matbambbang/sspnet (model/block.py,
cifar10.py, mnist.py), github.com/yao-lab/SONet, which github.com/silkylove/SONet equals (models/misc.py, sonet_s.py,
resnet.py, resXsonet.py, odenet_tq.py).
"""

from __future__ import annotations

from .names import COPY, COUNTER, NEGATED_TRANSPOSE, SAME, Row, Size, Table

# --- IE-ResNet -------------------------------------------------------------------------------------------------------

_IE_ENDS = (Row("conv1", "stem"), Row("final_bn", "head.0"), Row("fc", "head.4"))
_IE_SIZES = (
    Size("width", "conv1.0.weight", 0),
    Size("in_channels", "conv1.0.weight", 1),
    Size("num_classes", "fc.weight", 0),
)
# The blocks that change the shape.
_IE_FIRST = tuple(
    row
    for theirs, ours in (("4", "stage2.0"), ("6", "stage3.0"), ("8", "stage4.0"))
    for row in (Row(f"conv{theirs}", f"{ours}.branch"), Row(f"d{theirs}", f"{ours}.shortcut"))
)
# Of each IE-Skip and each inner step they hold a second branch, written over by the first at every call.
_IE_18 = tuple(
    row
    for theirs, ours in (
        ("conv2", "stage1.0.branch"),
        ("conv3", "stage1.1.branch"),
        ("conv5", "stage2.1.branch"),
        ("conv7", "stage3.1.branch"),
        ("conv9", "stage4.1.branch"),
        ("conv9", "stage4.1.euler.branch"),  # with follow="code"
    )
    for row in (Row(theirs, ours), Row(f"{theirs}_d.{{k}}", ours, COPY))
)
_IE_34_FIRST = (Row("conv2", "stage1.0.branch"), Row("conv2_d.{k}", "stage1.0.branch", COPY))
_IE_50_FIRST = (Row("conv2", "stage1.0.branch"), Row("d2", "stage1.0.shortcut"))
_IE_REST = (("conv3", "stage1"), ("conv5", "stage2"), ("conv7", "stage3"), ("conv9", "stage4"))
_IE_34_REST = (
    *(Row(f"{theirs}.{{j}}", f"{stage}.{{j+1}}.branch") for theirs, stage in _IE_REST),
    *(Row(f"{theirs}_d.{{j}}.{{k}}", f"{stage}.{{j+1}}.branch", COPY) for theirs, stage in _IE_REST),
    Row("conv9.{j}", "stage4.{j+1}.euler.branch"),  # with follow="code"
    Row("conv9_d.{j}.{k}", "stage4.{j+1}.euler.branch", COPY),
)
# Of a bottleneck the copies' last norm and convolution are not written over: with follow="code" they are tensors of
# their own, beside the first layers, which are f's.
_IE_50_REST = (
    *_IE_34_REST[:8],
    *(Row(f"{theirs}.{{j}}", f"{stage}.{{j+1}}.euler.branch") for theirs, stage in _IE_REST),
    *(
        Row(f"{theirs}.{{j}}.{n}", f"{stage}.{{j+1}}.inner.{{k}}.branch.{n}")
        for theirs, stage in _IE_REST
        for n in (0, 2, 3, 5)
    ),
    *(
        Row(f"{theirs}_d.{{j}}.{{k}}.{n}", f"{stage}.{{j+1}}.inner.{{k}}.branch.{n}", COPY if n < 6 else SAME)
        for theirs, stage in _IE_REST
        for n in (0, 2, 3, 5, 6, 8)
    ),
)
_RESNET = tuple(
    row
    for theirs, ours in (("conv2_x", "stage1"), ("conv3_x", "stage2"), ("conv4_x", "stage3"), ("conv5_x", "stage4"))
    for row in (
        Row(f"{theirs}.{{j}}.residual_function", f"{ours}.{{j}}.branch"),
        *(() if theirs == "conv2_x" else (Row(f"{theirs}.{{j}}.shortcut", f"{ours}.{{j}}.shortcut"),)),
    )
)
_RESNET_50 = (*_RESNET, Row("conv2_x.{j}.shortcut", "stage1.{j}.shortcut"))

# --- SSPNet ----------------------------------------------------------------------------------------------------------

# Each branch is there twice: by its layers' names, and as a sequence of these. (n1, relu, conv1, n2, relu, conv2)
_LAYERS = (("n1", "0"), ("conv1", "2"), ("n2", "3"), ("conv2", "5"))
_SSP_BLOCKS = {  # ours: (what holds the branch, the sequence's name)
    "res": ("", "residual"),
    "midpoint": ("", "residual"),
    "ssp2": (".block", "residual"),
    "ssp3": (".block", "residual"),
    "ark": ("", "f"),
}


def _group(theirs: str, ours: str, block: str) -> tuple[Row, ...]:
    holder, sequence = _SSP_BLOCKS[block]
    rows = [Row(f"{theirs}.{{i}}{holder}.{layer}", f"{ours}.{{i}}.branch.{place}") for layer, place in _LAYERS]
    rows.append(Row(f"{theirs}.{{i}}{holder}.{sequence}", f"{ours}.{{i}}.branch"))
    if block == "ark":
        rows += [Row(f"{theirs}.{{i}}.{name}", f"{ours}.{{i}}.{name}") for name in ("a21", "b10")]
    return tuple(rows)


# Its first norm and ReLU are in front of our block, so that the rest counts from its first convolution.
_EXPAND = tuple(
    Row(f"sub{{i}}.{theirs}", f"expand{{i}}.{ours}")
    for theirs, ours in (
        ("n1", "preactivation.0"),
        ("conv1", "block.branch.0"),
        ("n2", "block.branch.1"),
        ("conv2", "block.branch.3"),
        ("residual.0", "preactivation.0"),
        ("residual.2", "block.branch.0"),
        ("residual.3", "block.branch.1"),
        ("residual.5", "block.branch.3"),
        ("downsample", "block.shortcut"),
    )
)
_SSP_SIZES = (
    Size("width", "conv.weight", 0),
    Size("in_channels", "conv.weight", 1),
    Size("num_classes", "fc.weight", 0),
    Size("n", "block1.{i}"),
)
_MNIST_SIZES = (
    Size("width", "downsample.0.weight", 0),
    Size("in_channels", "downsample.0.weight", 1),
    Size("num_classes", "linear.4.weight", 0),
    Size("n", "blocks.{i}"),
)


def _sspnet(*blocks: str) -> Table:
    """The table of a network whose three groups have these blocks."""
    groups = tuple(row for i, block in enumerate(blocks, 1) for row in _group(f"block{i}", f"group{i}", block))
    rows = (Row("conv", "stem"), *groups, *_EXPAND, Row("fc", "head.2"))
    return Table(rows, _SSP_SIZES, "state_dict")


def _sspnet_mnist(block: str) -> Table:
    rows = (Row("downsample", "stem"), *_group("blocks", "group3", block), Row("linear", "head"))
    return Table(rows, _MNIST_SIZES, "state_dict")


# --- SONet -----------------------------------------------------------------------------------------------------------


def _skew(theirs: str, ours: str) -> tuple[Row, ...]:
    """A skew-symmetric block: of its norms, the first number is before or after the pair, the second y or z."""
    return (
        Row(f"{theirs}.odefunc.kernel", f"{ours}.field.weight"),
        Row(f"{theirs}.odefunc.norm1_1", f"{ours}.field.pre_norm_y"),
        Row(f"{theirs}.odefunc.norm1_2", f"{ours}.field.pre_norm_z"),
        Row(f"{theirs}.odefunc.norm2_1", f"{ours}.field.post_norm_y"),
        Row(f"{theirs}.odefunc.norm2_2", f"{ours}.field.post_norm_z"),
        Row(f"{theirs}.odefunc.nfe", f"{ours}.field.weight", COUNTER),
    )


# Their y is the features and their z the classes, ours the other way about: W is −Wᵀ, and the bias begins with z's.
_SO_CLASSIFIER = (
    Row("linear.odefunc.weight", "head.field.weight", NEGATED_TRANSPOSE),
    Row("linear.odefunc.bias", ("head.field.bias_z", "head.field.bias_y")),
    Row("linear.odefunc.nfe", "head.field.weight", COUNTER),
)
_BASIC_BLOCKS = tuple(
    Row(f"layer{{i}}.{{j}}.{theirs}", f"block{{i}}.{{j}}.{ours}")
    for theirs, ours in (
        ("conv1", "branch.0"),
        ("bn1", "branch.1"),
        ("conv2", "branch.3"),
        ("bn2", "branch.4"),
        ("shortcut", "shortcut"),
    )
)
_LAYER_SIZE = Size("blocks", "layer{i}.{j}")
_SKEW_SIZES = (Size("width", "conv1.odefunc.kernel", 0), Size("in_channels", "conv1.odefunc.kernel", 1), _LAYER_SIZE)
_LINEAR_SIZE = Size("num_classes", "linear.weight", 0)

TABLES: dict[str, Table] = {
    "ie_resnet18": Table((*_IE_ENDS, *_IE_FIRST, *_IE_18), (*_IE_SIZES, Size("steps", "conv2_d.{k}"))),
    "ie_resnet34": Table(
        (*_IE_ENDS, *_IE_FIRST, *_IE_34_FIRST, *_IE_34_REST), (*_IE_SIZES, Size("steps", "conv2_d.{k}"))
    ),
    "ie_resnet50": Table(
        (*_IE_ENDS, *_IE_FIRST, *_IE_50_FIRST, *_IE_50_REST), (*_IE_SIZES, Size("steps", "conv3_d.0.{k}"))
    ),
    "resnet18": Table((*_IE_ENDS, *_RESNET), _IE_SIZES),
    "resnet34": Table((*_IE_ENDS, *_RESNET), _IE_SIZES),
    "resnet50": Table((*_IE_ENDS, *_RESNET_50), _IE_SIZES),
    "sspnet res": _sspnet("res", "res", "res"),
    "sspnet midpoint": _sspnet("midpoint", "midpoint", "midpoint"),
    "sspnet ssp2": _sspnet("ssp2", "ssp2", "ssp2"),
    "sspnet ssp3": _sspnet("ssp3", "ssp3", "ssp3"),
    "sspnet adap": _sspnet("ark", "res", "ssp2"),
    "sspnet_mnist res": _sspnet_mnist("res"),
    "sspnet_mnist ssp2": _sspnet_mnist("ssp2"),
    "sspnet_mnist ssp3": _sspnet_mnist("ssp3"),
    "sspnet_mnist adap": _sspnet_mnist("ark"),
    "sonet": Table(
        (*_skew("conv1", "block0"), *_skew("layer{i}.{j}", "block{i}.{j}"), *_SO_CLASSIFIER),
        (*_SKEW_SIZES, Size("num_classes", "linear.odefunc.weight", 1)),
        "net",
    ),
    "soblock_resnet10": Table(
        (*_skew("conv1", "stem"), *_BASIC_BLOCKS, Row("linear", "head.2")), (*_SKEW_SIZES, _LINEAR_SIZE), "net"
    ),
    "resnet10": Table(
        (Row("conv1", "stem.0"), Row("bn1", "stem.1"), *_BASIC_BLOCKS, Row("linear", "head.2")),
        (Size("width", "conv1.weight", 0), Size("in_channels", "conv1.weight", 1), _LAYER_SIZE, _LINEAR_SIZE),
        "net",
    ),
    "odenet": Table(
        (
            Row("conv.{i}.ode_conv.odefunc", "block{i}.field"),
            Row("conv.{i}.ode_conv.odefunc.nfe", "block{i}.field.norm1.weight", COUNTER),
            Row("norm", "norm"),
            Row("linear", "head"),
        ),
        (Size("width", "norm.weight", 0), Size("blocks", "conv.{i}"), _LINEAR_SIZE),
        "net",
    ),
}
