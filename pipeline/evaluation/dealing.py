"""Batches of a list, dealt to several processes.

The list is cut into batches first. So a batch holds the same samples however many processes share the work, and each
answer on a CPU has the same bits as if one process had computed them all with as many threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T")


class Deal(Sequence[int]):
    """The positions of the samples in some of a list's batches, in order; for `torch.utils.data.Subset`.

    A loader with the same batch size gets whole batches of the list: only the list's last one is shorter, and it is
    the last one of its deal.
    """

    def __init__(self, total: int, batch_size: int, numbers: Sequence[int] | np.ndarray):
        """Deal these batches.

        Args:
            total: Length of the list.
            batch_size: Samples per batch.
            numbers: The batches, by number, ascending.
        """
        self.numbers, self.batch_size = numbers, batch_size
        missing = -total % batch_size if len(numbers) and numbers[-1] == count(total, batch_size) - 1 else 0
        self._length = len(numbers) * batch_size - missing

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        """The position in the list of the sample at a place of this deal."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        number, row = divmod(place, self.batch_size)
        return int(self.numbers[number]) * self.batch_size + row


def count(total: int, batch_size: int) -> int:
    """The number of batches of a list."""
    return -(-total // batch_size)


def deal(total: int, batch_size: int, rank: int, world_size: int) -> Deal:
    """Every `world_size`-th batch, from number `rank` on."""
    return Deal(total, batch_size, range(rank, count(total, batch_size), world_size))


def undeal(hands: Sequence[Iterable[T]], batch_size: int) -> list[T]:
    """What all processes made of their deals, one thing per sample and in the order of ranks, in the list's order."""
    rests = [iter(hand) for hand in hands]
    found: list[T] = []
    while batch := [item for rest in rests for item in islice(rest, batch_size)]:
        found += batch
    return found
