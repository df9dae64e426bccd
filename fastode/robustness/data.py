"""Images and classes from an .npz file in Keras' layout."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_images"]


def read_images(path: str | os.PathLike[str], part: str = "test") -> tuple[Tensor, Tensor]:
    """Images and classes from an .npz file in Keras' layout: `x_test` and `y_test`, or those of another part.

    Args:
        path: of the file.
        part: "test" or "train".

    Returns:
        Images [N, C, H, W], float32 in [0, 1], from uint8 or floating-point ones [N, H, W, C] or [N, H, W]; and classes
        [N], int64, from integers [N] or [N, 1].

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: what is in it is something else.
        ImportError: numpy is not installed.

    Example:
        >>> read_images("no-such-file.npz")
        Traceback (most recent call last):
        FileNotFoundError: data must be an .npz file with x_test and y_test, got no-such-file.npz, which is not there
    """
    wanted = f"data must be an .npz file with x_{part} and y_{part}"
    try:
        import numpy  # only here: torch does not need it
    except ImportError:
        raise ImportError("an .npz file needs numpy: pip install numpy") from None
    try:
        with zipfile.ZipFile(path):  # numpy would take other files for other things
            pass
        with numpy.load(path, allow_pickle=False) as found:
            names = found.files
            arrays = {name: found[name] for name in names if name in (f"x_{part}", f"y_{part}")}
    except FileNotFoundError:
        raise FileNotFoundError(f"{wanted}, got {path}, which is not there") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{wanted}, got {path}, which cannot be read: {error}") from error
    if len(arrays) < 2:
        raise ValueError(f"{wanted}, got {path} with {', '.join(names) or 'no names'}")
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    return _images(x, part), _classes(y, len(x), part)


def _images(x: Any, part: str) -> Tensor:
    if x.dtype.kind not in "fu" or (x.dtype.kind == "u" and x.dtype.itemsize > 1):
        raise TypeError(f"x_{part} must be of dtype uint8, or of floats in [0, 1], got {x.dtype}")
    if x.ndim not in (3, 4) or not len(x) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        wanted = "[N, H, W], or [N, H, W, C] with one channel or three"
        raise ValueError(f"x_{part} must be images {wanted}, got shape {list(x.shape)}")
    images = torch.from_numpy(x).float() / (255 if x.dtype.kind == "u" else 1)
    images = images.unsqueeze(1) if x.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"x_{part} must be of dtype uint8, or of floats in [0, 1], got {low:.6g} to {high:.6g}")
    return images


def _classes(y: Any, count: int, part: str) -> Tensor:
    if y.dtype.kind not in "iu":
        raise TypeError(f"y_{part} must be classes of an integer dtype, got {y.dtype}")
    if y.shape not in ((count,), (count, 1)):
        raise ValueError(f"y_{part} must be one class for each of {count} images, got shape {list(y.shape)}")
    if count and int(y.min()) < 0:
        raise ValueError(f"y_{part} must be classes of at least 0, got {int(y.min())}")
    return torch.from_numpy(y.astype("int64")).flatten()
