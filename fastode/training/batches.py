"""The batches of an epoch: which of them a process gets, and the random numbers that they are drawn by."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Batch = tuple[Tensor, Tensor]  # images [N, C, H, W] and labels [N]


class Share:
    """Every n-th of a sampler's batches, so that n processes together take its batches in turns.

    The sampler is read whole when an epoch begins: its random numbers do not depend on what is drawn later. Batches at
    the end that do not go round all processes are left out.

    Attributes:
        batches: the indices of each batch.
        rank: of this process.
        world: how many processes there are.
    """

    def __init__(self, batches: Iterable[list[int]], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        every = list(self.batches)
        return iter(every[: len(every) // self.world * self.world][self.rank :: self.world])

    def __len__(self) -> int:
        return len(self.batches) // self.world  # type: ignore[arg-type]


def shared(loader: Any, rank: int, world: int) -> Iterable[Batch]:
    """The batches of a process.

    Args:
        loader: a DataLoader, or batches (images, labels) that can be gone through once an epoch.
        rank: of this process.
        world: how many processes there are.

    Raises:
        TypeError: it is neither.
    """
    drawn = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if drawn and loader.batch_sampler is not None:
        return DataLoader(
            loader.dataset,
            batch_sampler=Share(loader.batch_sampler, rank, world),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=loader.in_order,
        )
    if not isinstance(loader, Iterable) or isinstance(loader, (Iterator, Tensor)):
        raise TypeError(
            "loader must be a DataLoader or batches (images, labels) to go through each epoch, got "
            f"an object of type {type(loader).__name__}"
        )
    return loader if world == 1 else _Turns(loader, rank, world)


class _Turns:
    """Every n-th batch of any loader, where each process makes them all.

    The first ones are made when an epoch begins, so that the loader draws its order by a seed that all processes share.
    """

    def __init__(self, loader: Iterable[Batch], rank: int, world: int) -> None:
        self.loader, self.rank, self.world = loader, rank, world

    def __iter__(self) -> Iterator[Batch]:
        stream = iter(self.loader)
        first = list(islice(stream, self.world))
        return self._taken(chain(first, stream))

    def _taken(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        while len(turn := list(islice(stream, self.world))) == self.world:
            yield turn[self.rank]


def generators_of(*things: Any) -> list[torch.Generator]:
    """The random generators of loaders and their samplers, and those bound to functions by functools.partial."""
    found: dict[int, torch.Generator] = {}
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, torch.Generator):
            found[id(thing)] = thing
        elif isinstance(thing, partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        else:
            held = ("generator", "sampler", "batch_sampler")
            waiting += [each for name in held if (each := getattr(thing, name, None)) is not None]
    return list(found.values())


def seed_everything(*numbers: int) -> None:
    """Seed the global generators of torch, Python and NumPy (where it is loaded) by some numbers.

    Args:
        numbers: the same ones give the same seeds, and others have nothing to do with them.
    """
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
