"""Images in files: .npz in Keras' layout, MNIST's own files, CIFAR's binary version, and folders of images."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..robustness.data import read_images

__all__ = ["Found", "read"]

Part = tuple[Tensor, Tensor]  # uint8, or float32 in [0, 1], [N, C, H, W]; int64 [N]

MNIST = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
CIFAR10 = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR100 = {"train": ("train.bin",), "test": ("test.bin",)}
INNER = ("", "raw", "MNIST/raw", "cifar-10-batches-bin", "cifar-100-binary")  # where archives put their files
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
KINDS = (
    "an .npz file in Keras' layout, or a folder with MNIST's files, CIFAR's binary files, "
    "or train/CLASS/IMAGE and test/CLASS/IMAGE"
)


@dataclass(frozen=True)
class Found:
    """What a path has.

    Attributes:
        parts: "train" and "test": pixels [N, C, H, W], uint8 or float32 in [0, 1], and classes [N].
        source: in words.
    """

    parts: dict[str, Part]
    source: str


def read(path: Path) -> Found:
    """The images at a path, by what is found there.

    Args:
        path: as in `data.load`.

    Raises:
        TypeError, ValueError: it has no such data.
        OSError: it cannot be read.
        ImportError: numpy or pillow is needed, and not installed.
    """
    if not path.exists():
        raise ValueError(f"data must be a path that exists, got {path}")
    if path.suffix == ".npz":
        return Found({part: read_images(path, part) for part in ("train", "test")}, path.name)
    if path.is_dir():
        for inner in INNER:
            folder = path / inner
            if _mnist_file(folder, MNIST["train"][0]):
                return Found({name: _mnist(folder, *names) for name, names in MNIST.items()}, "MNIST")
            if (folder / CIFAR10["train"][0]).exists():
                return Found({name: _cifar(folder, names, 1) for name, names in CIFAR10.items()}, "CIFAR-10")
            if (folder / CIFAR100["train"][0]).exists():
                return Found({name: _cifar(folder, names, 2) for name, names in CIFAR100.items()}, "CIFAR-100")
        if (path / "train").is_dir() and (path / "test").is_dir():
            return _folders(path)
        pickled = next(
            (found for found in (path, path / "cifar-10-batches-py") if (found / "data_batch_1").exists()), None
        )
        if pickled:
            raise ValueError(
                f"data must be CIFAR-10's binary version (data_batch_1.bin), got Python's pickles in {pickled}, "
                "which are programs"
            )
    raise ValueError(f"data must be {KINDS}, got {path} with {_listed(path)}")


def _listed(path: Path) -> str:
    if not path.is_dir():
        return f"{path.stat().st_size} bytes"
    names = sorted(each.name for each in path.iterdir())
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "nothing in it"


def _mnist_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _mnist(folder: Path, images: str, labels: str) -> Part:
    return _idx(folder, images, 3)[:, None], _idx(folder, labels, 1).long()


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """An array of bytes in MNIST's format: 0, 0, 8, the number of dimensions, each as four bytes, then the values."""
    path = _mnist_file(folder, name)
    if path is None:
        raise ValueError(f"data must have MNIST's four files, got {folder} without {name}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"data must be whole, got {path}: {error}") from None
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + math.prod(shape):
        raise ValueError(f"data must be an array of bytes in MNIST's format, got {path} of {len(content)} bytes")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


def _cifar(folder: Path, names: Sequence[str], labels: int) -> Part:
    """CIFAR's rows: a label, or a coarse and a fine one, and 3 × 32 × 32 bytes."""
    row, rows = labels + 3 * 32 * 32, []
    for name in names:
        path = folder / name
        if not path.exists():
            raise ValueError(f"data must have all of CIFAR's files, got {folder} without {name}")
        content = path.read_bytes()
        if not content or len(content) % row:
            raise ValueError(f"data must be rows of {row} bytes, got {path} of {len(content)} bytes")
        rows.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, row))
    whole = torch.cat(rows)
    return whole[:, labels:].reshape(-1, 3, 32, 32), whole[:, labels - 1].long()


def _folders(path: Path) -> Found:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('folders of images need pillow: pip install "fastode[recipes]"') from None
    classes = sorted(each.name for each in (path / "train").iterdir() if each.is_dir())
    if not classes:
        raise ValueError(f"data must have a folder for each class, got {path / 'train'} with {_listed(path / 'train')}")
    extra = {each.name for each in (path / "test").iterdir() if each.is_dir()} - set(classes)
    if extra:
        raise ValueError(f"data must have the classes of train in test, got {min(extra)} in {path / 'test'} only")

    def opened(file: Path) -> Tensor:
        with Image.open(file) as picture:
            mode = "L" if picture.mode in ("1", "L") else "RGB"
            content, size = picture.convert(mode).tobytes(), picture.size
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(size[1], size[0], -1).permute(2, 0, 1)

    return Found({name: _part(path / name, classes, opened) for name in ("train", "test")}, path.resolve().name)


def _part(folder: Path, classes: Sequence[str], opened: Callable[[Path], Tensor]) -> Part:
    pixels, labels, first = [], [], None
    for label, name in enumerate(classes):
        for file in sorted(each for each in folder.glob(f"{name}/*") if each.suffix.lower() in PICTURES):
            try:
                image = opened(file)
            except (OSError, SyntaxError) as error:  # which pillow raises for a broken PNG
                raise ValueError(f"data must be images, got {file}: {error}") from None
            first = first or (file, image.shape)
            if image.shape != first[1]:
                raise ValueError(
                    f"data must be images of one size and one number of colours, got {_size(first[1])} "
                    f"({first[0].name}) and {_size(image.shape)} ({file.name}) in {folder}"
                )
            pixels.append(image)
            labels.append(label)
    if not pixels:
        raise ValueError(f"data must have images ({', '.join(PICTURES)}) in {folder}/CLASS, got none")
    return torch.stack(pixels), torch.tensor(labels)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}×{shape[1]}×{shape[2]}"
