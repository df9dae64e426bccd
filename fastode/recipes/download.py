"""MNIST and CIFAR-10 from where their authors keep them: only when asked for, and checked by their digests."""

from __future__ import annotations

import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .records import replaced

__all__ = ["download"]

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# By data set: each file's address and the MD5 that its keepers give.
SOURCES: Mapping[str, Mapping[str, str]] = {
    "mnist": {
        f"{MNIST}train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        f"{MNIST}train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        f"{MNIST}t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        f"{MNIST}t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "cifar10": {
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    },
}


def download(name: str, folder: Path) -> Path:
    """A data set's own files, in a folder; those that are there already are kept.

    Args:
        name: "mnist" or "cifar10".
        folder: is made.

    Returns:
        The folder, which `load` reads.

    Raises:
        ValueError: the name is not known, or a file is not what it should be.
        OSError: a file could not be fetched or written.
    """
    if name not in SOURCES:
        raise ValueError(f"a data set to download must be one of {', '.join(SOURCES)}, got {name!r}")
    for address, digest in SOURCES[name].items():
        archive = address.endswith(".tar.gz")
        target = folder / address.rpartition("/")[2]
        if (folder / "data_batch_1.bin").exists() if archive else target.exists():
            continue
        content = _fetched(address, digest)
        for path, part in _parts(folder, content) if archive else [(target, content)]:
            replaced(path, lambda beside, part=part: beside.write_bytes(part))  # type: ignore[misc]
    return folder


def _fetched(address: str, digest: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content: bytes = answer.read()
    except urllib.error.URLError as error:
        raise OSError(f"{address} could not be fetched: {error.reason}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != digest:
        raise ValueError(f"{address} must have the MD5 {digest}, got {found}")
    return content


def _parts(folder: Path, content: bytes) -> list[tuple[Path, bytes]]:
    """The .bin files of an archive; the first of them last, whose being there says that all are."""
    first, found = "data_batch_1.bin", {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            target = folder / PurePosixPath(member.name).name
            file = archive.extractfile(member) if target.suffix == ".bin" else None
            if file is not None:
                found[target] = file.read()
    return sorted(found.items(), key=lambda part: part[0] == folder / first)
