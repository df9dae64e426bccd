"""fastode.robustness: what is judged and how, intervals, curves, the command, its files and its refusals."""

from __future__ import annotations

import json
import math
import pkgutil
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from fastode import attacks, nets, robustness
from fastode.attacks.report import MASKED
from fastode.robustness import planned
from fastode.robustness.__main__ import main
from fastode.robustness.evaluation import EXACT


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above a half: an image is as far from the boundary as its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.asked = nn.Parameter(torch.tensor(10.0)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        mean = self.slope * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-mean, mean], 1)


MEANS = torch.tensor([0.45, 0.35, 0.2, 0.65, 0.9])
IMAGES = MEANS.view(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous()
LABELS = torch.tensor([0, 0, 0, 1, 0])  # the last one is wrong without an attack


def test_an_image_is_right_where_the_attack_reaches_no_boundary() -> None:
    """A mean is a radius from the boundary in the maximum norm, and four radii in the Euclidean one (16 pixels)."""
    found = robustness.evaluate(Brightness(), IMAGES, LABELS, attacks=["fgsm", "pgd3"], eps=0.1)
    assert [row.name for row in found.rows] == ["clean", "fgsm", "pgd3", "worst of all"]
    assert [row.right.tolist() for row in found.rows[:2]] == [[True] * 4 + [False], [False, True, True, True, False]]
    assert [row.accuracy for row in found.rows] == pytest.approx([0.8, 0.6, 0.6, 0.6])
    euclidean = robustness.evaluate(
        Brightness(), IMAGES, LABELS, attacks=["pgd3"], eps=0.7, norm="l2", radii=(0.1, 1.3)
    )
    assert [row.accuracy for row in euclidean.curves["pgd3"]] == pytest.approx([0.8, 0.8, 0.2, 0.0])
    assert [row.eps for row in euclidean.curves["pgd3"]] == [0.0, 0.1, 0.7, 1.3]
    assert euclidean.rows[1].accuracy == pytest.approx(0.2)


def test_the_worst_of_all_takes_each_image_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
        """Darkens; another one brightens."""
        return (images - eps).clamp(0, 1)

    def other(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
        return (images + eps).clamp(0, 1)

    monkeypatch.setitem(attacks.ATTACKS, "fgsm", half)  # type: ignore[misc]
    monkeypatch.setitem(attacks.ATTACKS, "bim", other)  # type: ignore[misc]
    found = robustness.evaluate(Brightness(), IMAGES, LABELS, attacks=["fgsm", "bim"], eps=0.2)
    right = {row.name: row.right.tolist() for row in found.rows}
    assert right["fgsm"] == [True, True, True, False, False]
    assert right["bim"] == [False, False, True, True, False]
    assert right["worst of all"] == [False, False, True, False, False]


def test_attacks_that_look_for_the_least_change_run_once_and_are_judged_by_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []

    def least(model: nn.Module, images: Tensor, labels: Tensor, *, generator: Any, steps: int = 1) -> Tensor:
        runs.append((steps, generator.initial_seed()))
        return (images + 1.02 * (0.5 - images.mean((1, 2, 3), keepdim=True))).clamp(0, 1)

    monkeypatch.setitem(attacks.ATTACKS, "boundary", least)  # type: ignore[misc]
    monkeypatch.setitem(planned._LIBRARIES, "boundary", lambda: None)
    for norm, scale in (("linf", 1), ("l2", 4)):
        runs.clear()
        found = robustness.evaluate(
            Brightness(), IMAGES, LABELS, attacks=["boundary7"], eps=0.2 * scale, norm=norm, seed=3,
            radii=[0.1 * scale, 0.4 * scale],
        )  # fmt: skip
        assert runs == [(7, 3)]
        assert found.rows[1].right.tolist() == [False, False, True, False, False]
        assert [row.accuracy for row in found.curves["boundary7"]] == pytest.approx([0.8, 0.6, 0.2, 0.0])
        assert found.curves["worst of all"][2].right.equal(found.rows[2].right)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (3, 10), (912, 1000)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    """Its ends are the probabilities from which the observed part is z standard deviations away."""
    low, high = robustness.wilson(right, count)
    part = right / count
    assert 0 <= low <= part <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(part - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_names_of_attacks_are_read() -> None:
    found = robustness.plan(["pgd", "spsa7", "di2_fgsm12", "fgsm"])
    assert [(each.attack, each.options) for each in found] == [
        ("pgd", {"norm": "linf", "steps": 20}),
        ("spsa", {"steps": 7}),
        ("di2_fgsm", {"steps": 12}),
        ("fgsm", {}),
    ]
    custom = planned.Planned("pgd by hand", "pgd", "linf", {"steps": 2, "random_start": False})
    found = robustness.evaluate(Brightness(), IMAGES, LABELS, attacks=[custom, "fgsm"], eps=0.1)
    assert found.rows[1].name == "pgd by hand" and found.rows[1].queries.gradient == 2 * 5


def test_cw_is_that_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cw_l2", "cw_linf"):
        monkeypatch.setitem(planned._LIBRARIES, name, lambda: None)
    assert robustness.plan(["cw"])[0].attack == "cw_linf"
    assert robustness.plan(["cw30"], "l2")[0] == planned.Planned("cw30", "cw_l2", "l2", {"steps": 30})


@pytest.mark.parametrize(
    ("names", "norm", "message"),
    [
        ([], "linf", "attacks must be some names, got an object of type list"),
        (["deepfool"], "linf", "attacks must be each one of fgsm, pgd, .*, got 'deepfool'"),
        (["pgd2o"], "linf", "attacks must be each one of .*, got 'pgd2o'"),
        (["fgsm3"], "linf", "attacks must be without a number of steps where they have none, got 'fgsm3'"),
        (["pgd0"], "linf", "steps of pgd must be an int >= 1, got 0"),
        (["spsa"], "l2", "attacks must be of norm 'l2', got 'spsa', which is of the maximum norm"),
        (["pgd2", "pgd2"], "linf", "attacks must be different ones, got pgd2, pgd2"),
        (["pgd2"], "l1", "norm must be one of 'linf', 'l2', got 'l1'"),
    ],
)
def test_names_that_are_none_are_refused(names: list[str], norm: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        robustness.plan(names, norm)


def write(folder: Path, **arrays: Any) -> Path:
    numpy.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def test_images_of_keras_layout_are_read(tmp_path: Path) -> None:
    grey = numpy.arange(2 * 3 * 4, dtype="uint8").reshape(2, 3, 4)
    images, labels = robustness.read_images(write(tmp_path, x_test=grey, y_test=numpy.array([3, 1], "uint8")))
    assert images.shape == (2, 1, 3, 4) and labels.tolist() == [3, 1] and labels.dtype == torch.int64
    torch.testing.assert_close(images[1, 0], torch.arange(12.0, 24.0).view(3, 4) / 255)
    colour = numpy.random.default_rng(0).random((2, 3, 4, 3))
    images, labels = robustness.read_images(write(tmp_path, x_train=colour, y_train=[[1], [0]]), "train")
    assert images.is_contiguous() and images.dtype == torch.float32 and labels.tolist() == [1, 0]
    torch.testing.assert_close(images[1, 2], torch.from_numpy(colour[1, :, :, 2]).float())


GOOD = numpy.zeros((2, 4, 4), "uint8")


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"x": GOOD}, ValueError, "data must be an .npz file with x_test and y_test, got {path} with x"),
        ({"x_test": GOOD.astype("int64"), "y_test": [0, 1]}, TypeError,
         "x_test must be of dtype uint8, or of floats in [0, 1], got int64"),
        ({"x_test": GOOD + 2.0, "y_test": [0, 1]}, ValueError,
         "x_test must be of dtype uint8, or of floats in [0, 1], got 2 to 2"),
        ({"x_test": GOOD[0], "y_test": [0] * 4}, ValueError,
         "x_test must be images [N, H, W], or [N, H, W, C] with one channel or three, got shape [4, 4]"),
        ({"x_test": GOOD, "y_test": [0.0, 1.0]}, TypeError, "y_test must be classes of an integer dtype, got float64"),
        ({"x_test": GOOD, "y_test": [0]}, ValueError, "y_test must be one class for each of 2 images, got shape [1]"),
        ({"x_test": GOOD, "y_test": [0, -1]}, ValueError, "y_test must be classes of at least 0, got -1"),
    ],
)  # fmt: skip
def test_data_that_is_none_is_refused(
    arrays: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **arrays)
    with pytest.raises(error) as caught:
        robustness.read_images(path)
    assert str(caught.value) == message.format(path=path)


def test_files_that_hold_no_arrays_are_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"hello"), ("empty", b""), ("zip", b"PK\x03\x04 cut off")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^data must be .* and y_test, got {path}, which cannot be read: "):
            robustness.read_images(path)
    numpy.save(tmp_path / "single.npy", GOOD)
    with pytest.raises(ValueError, match=r"single\.npy, which cannot be read"):
        robustness.read_images(tmp_path / "single.npy")


def test_numpy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"^an \.npz file needs numpy: pip install numpy$"):
        robustness.read_images("a.npz")


MODULE = """
from test_robustness import Brightness
from fastode import Solver, nets, reference
from torch import nn

made = []

def bright():
    made.append(Brightness())
    return made[-1]

def adaptive(tolerance=0.1):
    block = reference.ODEBlock(reference.PreActBranch(2), Solver("dopri5", tolerance, tolerance))
    return nn.Sequential(nn.Conv2d(1, 2, 3), block, nn.Flatten(), nn.Linear(8, 2))

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that one is in, with a user's module, a checkpoint and data."""
    (tmp_path / "mine.py").write_text(MODULE)
    torch.save(Brightness().state_dict(), tmp_path / "a.pt")
    (tmp_path / "text.pt").write_text("hello")
    numpy.savez(tmp_path / "data.npz", x_test=IMAGES[:, 0].numpy(), y_test=LABELS.numpy())
    numpy.savez(tmp_path / "three.npz", x_test=IMAGES[:, 0].numpy(), y_test=LABELS.numpy() + 2)
    numpy.savez(tmp_path / "none.npz", x_test=IMAGES[:0, 0].numpy(), y_test=LABELS[:0].numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as python -m does with the folder that one is in
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


RUN = "a.pt --model mine:bright --data data.npz"


def test_the_command_prints_a_table_and_writes_numbers_and_a_figure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"{RUN} --attacks fgsm,pgd3 --eps 1/10 --json a.json --figure a.png --radii 0.04,2/5")) == 0
    shown = capsys.readouterr()
    assert "5 images, maximum norm, radius 0.1" in shown.out
    lines = {
        line[: line.index("%")].rsplit(None, 1)[0]: line for line in shown.out.splitlines() if line.count("%") == 3
    }
    assert list(lines) == ["clean", "fgsm", "pgd3", "worst of all"]
    assert "60.00%  23.07% –  88.24%" in lines["fgsm"]
    assert "fgsm: 60.00%" in shown.err and "written: a.json" in shown.err
    found = json.loads((folder / "a.json").read_text())
    assert found["checkpoint"] == "a.pt" and found["eps"] == 0.1 and found["images"] == 5
    assert [row["right"] for row in found["rows"]] == [4, 3, 3, 3]
    assert [(row["eps"], row["right"]) for row in found["curves"]["worst of all"]] == [
        (0.0, 4), (0.04, 4), (0.1, 3), (0.4, 0),
    ]  # fmt: skip
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_speaks_of_the_gradient_of_adaptive_solvers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(pkgutil.resolve_name("mine:adaptive")().state_dict(), folder / "b.pt")
    run = "b.pt --model mine:adaptive --options '{\"tolerance\": 0.3}' --data data.npz --images 2"
    for extra, due in (
        ("--attacks pgd1", MASKED),
        ("--attacks pgd1 --solver-gradient exact", EXACT),
        ("--attacks spsa1", ""),
    ):
        assert main(shlex.split(f"{run} {extra}")) == 0
        out = capsys.readouterr().out
        assert "2 images" in out
        assert [note for note in (MASKED, EXACT) if f"note: {note}" in out] == [due][: len(due)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text.pt --model mine:bright --data data.npz",
         "checkpoint must be a file of tensors and plain values, got text.pt: "),
        ("no.pt --model mine:bright --data data.npz",
         "checkpoint must be a file of tensors and plain values, got no.pt, which is not there"),
        ("a.pt --model mine:adaptive --data data.npz",
         "checkpoint must be one of this network, got a.pt, where 0.bias is missing; "),
        ("a.pt --model mine --data data.npz", "model must be MODULE:FUNCTION, got 'mine'"),
        ("a.pt --model yours:bright --data data.npz",
         "model must be MODULE:FUNCTION, got 'yours:bright': No module named 'yours'"),
        ("a.pt --model mine:dark --data data.npz", "model must be MODULE:FUNCTION, got 'mine:dark': "),
        ("a.pt --model mine:number --data data.npz", "model must make an nn.Module, got an object of type int"),
        (f"{RUN} --options 3", "options must be a JSON object, got '3'"),
        (f"{RUN} --options x", "options must be JSON, got 'x': "),
        ("a.pt --model mine:bright --data no.npz",
         "data must be an .npz file with x_test and y_test, got no.npz, which is not there"),
        ("a.pt --model mine:bright --data none.npz", "x_test must be images [N, H, W], or"),
        ("a.pt --model mine:bright --data three.npz", "labels must be below the model's 2 classes, got 3"),
        (f"{RUN} --eps 0", "eps must be above 0, got 0"),
        (f"{RUN} --eps 8/x", "eps must be a number or a fraction, as 8/255, got '8/x'"),
        (f"{RUN} --radii 0.1", "radii must come with a figure, got them without"),
        (f"{RUN} --attacks pgd20,deepfool", "attacks must be each one of "),
        (f"{RUN} --json no/such/a.json", "output must be a file in a folder that exists, got no/such/a.json"),
        (f"{RUN} --figure a.xyz", "figure must be a file that ends in one of "),
        (f"{RUN} --device quantum", "device must be one that torch can use here, got 'quantum': "),
        (f"{RUN} --attacks fgsm,boundary", 'this attack needs foolbox: pip install "fastode[attacks]" '),
    ],
)  # fmt: skip
def test_the_command_refuses_before_work_starts(
    change: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(change))
    shown = capsys.readouterr()
    assert caught.value.code == 2 and not shown.out
    assert f"error: {message}" in shown.err
    models = sys.modules["mine"].made if "mine" in sys.modules else []
    assert sum(model.asked for model in models) == ("three" in change)  # once, to see how many classes there are


def test_other_arguments_are_refused() -> None:
    def refused(message: str, **change: Any) -> None:
        options = {"attacks": ["fgsm"], "eps": 0.1, **change}
        with pytest.raises((TypeError, ValueError)) as caught:
            robustness.evaluate(Brightness(), IMAGES, LABELS, **options)
        assert str(caught.value) == message

    refused("attacks must be some names, got 'fgsm'", attacks="fgsm")
    refused("attacks must be of the norm 'linf', got a of 'l2'", attacks=[planned.Planned("a", "pgd", "l2")])
    refused(
        "attacks must have different names, got fgsm, fgsm", attacks=["fgsm", planned.Planned("fgsm", "pgd", "linf")]
    )
    refused("radii must be a finite number > 0, got 0", radii=[0])
    refused("batch_size must be an int >= 1, got 0", batch_size=0)
    refused("seed must be an int >= 0, got -1", seed=-1)
    with pytest.raises(ValueError, match=r"^right must be at most count, 2, got 3$"):
        robustness.wilson(3, 2)
    with pytest.raises(ValueError, match=r"^found must be an evaluation with radii, got one without$"):
        robustness.plot_accuracy(robustness.evaluate(Brightness(), IMAGES, LABELS, attacks=["fgsm"], eps=0.1))


def test_a_network_of_the_package_is_evaluated() -> None:
    torch.manual_seed(0)
    model = nets.sspnet_mnist("ssp3", n=1, width=4)
    found = robustness.evaluate(model.train(), torch.rand(4, 1, 28, 28), torch.arange(4), attacks=["pgd2"], eps=0.1)
    assert found.rows[2].right.equal(found.rows[1].right & found.rows[0].right) and model.training
