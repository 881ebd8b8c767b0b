"""The order of samples: a pure function of the seed and the epoch, the same for every number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def order(seed: int, epoch: int, weights: np.ndarray, samples: int) -> np.ndarray:
    """Rows of one epoch, drawn one after the other, without replacement, in proportion to the weights that are left.

    Efraimidis & Spirakis 2006: row i gets the key u_i ** (1 / w_i) with u_i uniform, and the rows with the largest keys
    are taken. They come largest key first, so rows of high weight tend to come early in the epoch. An epoch shorter
    than the split leaves out mostly rows of low weight, other ones each time. With equal weights this is a shuffle.
    Keys are computed as logarithms, since u ** (1 / w) underflows for a small w.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
        weights: float [N], above 0.
        samples: Rows to draw, at most N.

    Returns:
        int64 [samples].
    """
    generator = np.random.default_rng([seed, epoch])
    keys = np.log1p(-generator.random(len(weights))) / weights
    return np.argsort(-keys, kind="stable")[:samples]


class PositionSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from a position in the endless sequence epoch 0, epoch 1, ...

    Rank r of W takes the positions start + r, start + r + W, ... so that every optimizer step of all ranks together
    covers one stretch of the sequence, whatever W is. The number of samples seen is therefore the whole data state.
    """

    def __init__(
        self, weights: np.ndarray, samples_per_epoch: int, *, seed: int, batch_size: int, rank: int, world_size: int
    ):
        self.weights, self.samples_per_epoch, self.seed = weights, samples_per_epoch, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start = 0

    def row_at(self, position: int) -> int:
        """Row of the sample at a position of the sequence."""
        epoch, place = divmod(position, self.samples_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._rows = epoch, order(self.seed, epoch, self.weights, self.samples_per_epoch)
        return int(self._rows[place])

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank
        while True:
            batch = [self.row_at(position + i * self.world_size) for i in range(self.batch_size)]
            position += self.batch_size * self.world_size
            yield batch


def share_of(rows: int, rank: int, world_size: int) -> list[int]:
    """Rows of a split that one rank evaluates: each row belongs to one rank; counts differ by one at most."""
    return list(range(rank, rows, world_size))
