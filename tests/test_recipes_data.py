"""The images of recipes: each kind of file, what is refused, and that nothing is downloaded unless it is asked for."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastode.recipes import Images, data, download
from fastode.recipes.__main__ import main

RANDOM = torch.Generator().manual_seed(0)
GREY = torch.randint(256, (6, 1, 5, 4), generator=RANDOM, dtype=torch.uint8)
COLOUR = torch.randint(256, (6, 3, 32, 32), generator=RANDOM, dtype=torch.uint8)
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


def idx(values: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.dim())) + sizes + bytes(values.flatten().tolist())


def mnist(folder: Path, end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, images, labels in (("train", GREY, CLASSES), ("t10k", GREY[:3], CLASSES[:3])):
        for name, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            content = idx(values)
            path = folder / f"{part}-{name}-ubyte{end}"
            path.write_bytes(gzip.compress(content) if end else content)
    return folder


def rows(labels: Tensor, images: Tensor, coarse: bool = False) -> bytes:
    return b"".join(
        bytes([*([9] if coarse else []), int(label), *image.flatten().tolist()])
        for label, image in zip(labels, images, strict=True)
    )


def cifar10(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(rows(CLASSES[i : i + 1], COLOUR[i : i + 1]))
    (folder / "test_batch.bin").write_bytes(rows(CLASSES[:2], COLOUR[:2]))
    return folder


def keras(path: Path, **changed: Any) -> Path:
    arrays = {
        "x_train": COLOUR.permute(0, 2, 3, 1).numpy(), "y_train": CLASSES.numpy()[:, None],
        "x_test": COLOUR[:2].permute(0, 2, 3, 1).numpy(), "y_test": CLASSES.numpy()[:2, None],
    } | changed  # fmt: skip
    numpy.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def folders(path: Path, images: Tensor = COLOUR) -> Path:
    for part, count in (("train", 6), ("test", 3)):
        for number, (image, label) in enumerate(zip(images[:count], CLASSES[:count].tolist(), strict=True)):
            target = path / part / ("cat", "dog", "eel")[label] / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(target)
    return path


def same(found: Images, images: Tensor, tests: int) -> None:
    for (pixels, classes), count in ((found.train, None), (found.test, tests)):
        order = classes.argsort(stable=True), CLASSES[:count].argsort(stable=True)
        assert torch.equal(pixels[order[0]], images[:count][order[1]].float() / 255)
        assert torch.equal(classes[order[0]], CLASSES[:count][order[1]]) and classes.dtype == torch.int64


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnists_own_files(tmp_path: Path, end: str) -> None:
    found = data.load(mnist(tmp_path / "raw", end).parent)
    same(found, GREY, 3)
    assert found.source == "MNIST, 6 training and 3 test images" and (found.channels, found.classes) == (1, 3)


def test_cifars_binary_files(tmp_path: Path) -> None:
    found = data.load(cifar10(tmp_path / "cifar-10-batches-bin").parent)
    assert torch.equal(found.train[0], COLOUR[:5].float() / 255) and torch.equal(found.train[1], CLASSES[:5])
    fine = tmp_path / "cifar-100-binary"
    fine.mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        (fine / name).write_bytes(rows(CLASSES, COLOUR, coarse=True))
    found = data.load(fine)
    assert torch.equal(found.test[0], COLOUR.float() / 255) and torch.equal(found.test[1], CLASSES)


def test_keras_layout(tmp_path: Path) -> None:
    same(data.load(keras(tmp_path / "a.npz")), COLOUR, 2)
    grey = keras(tmp_path / "b.npz", x_train=GREY[:, 0].numpy(), x_test=GREY[:2, 0].numpy())
    same(data.load(str(grey)), GREY, 2)
    floats = {name: COLOUR[:count].permute(0, 2, 3, 1).numpy() / numpy.float32(255)
              for name, count in (("x_train", 6), ("x_test", 2))}  # fmt: skip
    same(data.load(keras(tmp_path / "c.npz", **floats)), COLOUR, 2)


@pytest.mark.parametrize("images", [COLOUR, GREY], ids=["colour", "grey"])
def test_folders_of_images(tmp_path: Path, images: Tensor) -> None:
    found = data.load(folders(tmp_path / "pictures", images))
    same(found, images, 3)
    assert found.source == "pictures, 6 training and 3 test images"


def _short(path: Path) -> Path:
    target = mnist(path) / "train-images-idx3-ubyte"
    target.write_bytes(target.read_bytes()[:-1])
    return path


def _pickled(path: Path) -> Path:
    path.mkdir()
    (path / "data_batch_1").write_bytes(b"")
    return path


def _other_size(path: Path) -> Path:
    folders(path)
    Image.new("RGB", (8, 8)).save(path / "train" / "eel" / "9.png")
    return path


def _no_picture(path: Path) -> Path:
    folders(path)
    (path / "train" / "cat" / "0.png").write_bytes(b"nothing")
    return path


def _without(name: str, make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        (make(path) / name).unlink()
        return path

    return made


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda path: path, "data must be a path that exists, got {path}"),
    "an empty folder": (lambda path: path.mkdir() or path, "{path} with nothing in it"),
    "another file": (lambda path: path.write_bytes(b"abc") and path, "{path} with 3 bytes"),
    "no .npz file": (lambda path: (path.with_suffix(".npz").write_bytes(b"abc"), path.with_suffix(".npz"))[1],
                     "data must be an .npz file with x_train and y_train, got {path}.npz, which cannot be read"),
    "an .npz file is cut": (lambda path: (keras(path.with_suffix(".npz")), os.truncate(path.with_suffix(".npz"), 9000),
                                          path.with_suffix(".npz"))[2], "got {path}.npz, which cannot be read"),
    "a name is missing": (lambda path: keras(path.with_suffix(".npz"), y_test=None),
                          "with x_test and y_test, got {path}.npz with x_train, y_train, x_test"),
    "floats": (lambda path: keras(path.with_suffix(".npz"), x_train=numpy.full((6, 32, 32, 3), 2.0)),
               "x_train must be of dtype uint8, or of floats in [0, 1], got 2 to 2"),
    "numbers": (lambda path: keras(path.with_suffix(".npz"), x_train=numpy.zeros((6, 32, 32, 3), "int64")),
                "x_train must be of dtype uint8, or of floats in [0, 1], got int64"),
    "objects": (lambda path: keras(path.with_suffix(".npz"), y_train=numpy.array([{}] * 6)), "which cannot be read"),
    "words": (lambda path: keras(path.with_suffix(".npz"), y_train=numpy.array(["a"] * 6)),
              "y_train must be classes of an integer dtype, got <U1"),
    "too few classes": (lambda path: keras(path.with_suffix(".npz"), y_train=numpy.zeros(5, int)),
                        "y_train must be one class for each of 6 images, got shape [5]"),
    "a class of tests only": (lambda path: keras(path.with_suffix(".npz"), y_train=numpy.zeros(6, int)),
                              "test must have classes from 0 to train's last, 0, got others"),
    "two shapes": (lambda path: keras(path.with_suffix(".npz"), x_test=COLOUR[:2, :, :8].permute(0, 2, 3, 1).numpy()),
                   "train and test must have images of one shape, got (3, 32, 32) and (3, 8, 32)"),
    "a file is cut": (_short, "in MNIST's format, got {path}/train-images-idx3-ubyte of 135 bytes"),
    "a file of MNIST is missing": (_without("t10k-labels-idx1-ubyte", mnist),
                                   "got {path} without t10k-labels-idx1-ubyte"),
    "a file of CIFAR is missing": (_without("data_batch_4.bin", cifar10), "got {path} without data_batch_4.bin"),
    "pickles": (_pickled, "data must be CIFAR-10's binary version (data_batch_1.bin), got Python's pickles in {path}"),
    "pictures of two sizes": (_other_size, "got 3×32×32 (0.png) and 3×8×8 (9.png) in {path}/train"),
    "no picture": (_no_picture, "data must be images, got {path}/train/cat/0.png"),
    "a class of test folders only": (lambda path: (folders(path), (path / "test" / "fox").mkdir(), path)[2],
                                     "data must have the classes of train in test, got fox in {path}/test only"),
    "no pictures": (lambda path: ((path / "train" / "cat").mkdir(parents=True), (path / "test").mkdir(), path)[2],
                    "in {path}/train/CLASS, got none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message.format(path=tmp_path / "data"))):
        data.load(make(tmp_path / "data"))


def test_the_command_says_why_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = keras(tmp_path / "a.npz", x_train=numpy.zeros((6, 32, 32, 3), "int64"))
    assert main(["run", "001-table1", "--data", str(path)]) == 2
    assert "fastode.recipes: x_train must be of dtype uint8" in capsys.readouterr().err


def test_images_have_a_class_each() -> None:
    part = (GREY.float() / 255, CLASSES)
    with pytest.raises(ValueError, match=r"train must have a class for each of its images, at least one, got 6 .* 5 "):
        Images((part[0], CLASSES[:5]), part, "made")


def test_batches_go_over_all_images_in_an_order_of_the_global_generator() -> None:
    batches = data.Batches(GREY.float(), CLASSES, 4)

    def epoch(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [int(row.flatten()[0]) for images, _ in batches for row in images]

    assert sorted(epoch(0)) == sorted(GREY[:, 0, 0, 0].tolist()) and epoch(0) == epoch(0) != epoch(1)
    assert len(batches) == 2


def test_images_are_moved_and_mirrored_and_no_more() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 2] = 1.0
    torch.manual_seed(0)
    (moved,) = (images for images, _ in data.Batches(image.repeat(500, 1, 1, 1), torch.zeros(500), 500, augment=True))
    assert moved.shape == (500, 1, 9, 9) and moved.is_contiguous()
    places = {(int(row), int(column)) for _, _, row, column in moved.nonzero()}
    assert {row for row, _ in places} == set(range(9))
    assert {column for _, column in places} == set(range(9)), "2 ± 4 and, mirrored, 6 ± 4"
    assert set(moved.sum((1, 2, 3)).tolist()) == {0.0, 1.0}, "a pixel is there once, or was moved out"


def test_patches_of_training_and_test_share_no_pixel_and_are_of_both_photographs() -> None:
    found = data.photographs(step=64)
    assert found.train[0].shape[1:] == (3, 32, 32) and found.classes == 2
    for _, classes in (found.train, found.test):
        assert classes.float().mean() == 0.5
    whole = data.sample_photographs()[0]
    assert whole.shape == (3, 427, 640) and whole.dtype == torch.uint8


def test_small_digits_are_whole_and_no_image_is_in_both_parts() -> None:
    found = data.small_digits()
    assert (found.channels, found.classes, len(found.train[0]), len(found.test[0])) == (1, 10, 1437, 360)
    whole = torch.cat([found.train[0], found.test[0]])
    assert whole.shape[1:] == (1, 28, 28) and (float(whole.min()), float(whole.max())) == (0.0, 1.0)
    assert len(torch.unique(whole.flatten(1), dim=0)) == len(whole)
    for _, classes in (found.train, found.test):
        assert classes.bincount().min() > 0.07 * len(classes)


def archive() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        for name, part in (
            *((f"data_batch_{i + 1}.bin", rows(CLASSES[i : i + 1], COLOUR[i : i + 1])) for i in range(5)),
            ("test_batch.bin", rows(CLASSES[:2], COLOUR[:2])),
            ("../readme.html", b"words"),
        ):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(part)
            file.addfile(member, io.BytesIO(part))
    return content.getvalue()


@pytest.fixture
def keepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in place of the data sets' addresses."""
    folder = mnist(tmp_path / "keepers", ".gz")
    (folder / "cifar-10-binary.tar.gz").write_bytes(archive())
    known: dict[str, dict[str, str]] = {}
    for name, addresses in download.SOURCES.items():
        files = [folder / address.rpartition("/")[2] for address in addresses]
        known[name] = {f"file://{file}": hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(download, "SOURCES", known)
    return folder


def test_what_is_downloaded_can_be_read_and_is_kept(
    keepers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same(data.load(download.download("mnist", tmp_path / "mnist")), GREY, 3)
    found = data.load(download.download("cifar10", tmp_path / "cifar"))
    assert torch.equal(found.test[0], COLOUR[:2].float() / 255)
    assert not (tmp_path / "readme.html").exists() and len(list((tmp_path / "cifar").iterdir())) == 6

    def fetched(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was fetched again")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    download.download("mnist", tmp_path / "mnist")
    download.download("cifar10", tmp_path / "cifar")


def test_a_download_that_is_not_what_it_should_be(keepers: Path, tmp_path: Path) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    (keepers / name).write_bytes(b"other")
    with pytest.raises(ValueError, match=f"{name} must have the MD5 [0-9a-f]{{32}}, got [0-9a-f]{{32}}"):
        download.download("mnist", tmp_path / "mnist")
    assert not (tmp_path / "mnist" / name).exists()
    (keepers / name).unlink()
    with pytest.raises(OSError, match=f"{name} could not be fetched"):
        download.download("mnist", tmp_path / "mnist")


def test_nothing_is_downloaded_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetched(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "001-table1", "--paper"]) == 2
    assert main(["run", "001-table1", "--paper", "--data", "mnist"]) == 2
    assert "data must be a path that exists, got mnist" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="was fetched"):
        main(["run", "001-table1", "--paper", "--download", "mnist"])
