"""Which photos an epoch shows, how often and in what order: the same for every number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

VERSION = 2
"""Raised whenever the same seed comes to give another sequence, so that no run resumes in the middle of one."""
# Keep these generators apart from each other and from those of `Mixture` and of a stream, whose seeds start alike.
SELECTION, PERMUTATION = 0x73656C656374, 0x7065726D757465
# The fractional parts of u, u + g, u + 2 g, ... spread most evenly over [0, 1) at every length if g is the golden
# ratio's (three-distance theorem; Knuth, The Art of Computer Programming 3, section 6.4).
GOLDEN = (5**0.5 - 1) / 2


def expected_counts(weights: np.ndarray, samples: int, max_repeats: int) -> np.ndarray:
    """How often an epoch shows each row on average: min(max_repeats, level * weight), adding up to `samples`.

    The level is found by water-filling: what the cap cuts off goes to the other rows, in proportion to their weights.

    Args:
        weights: float [N], above 0; only their ratios count.
        samples: Length of the epoch, at most N * max_repeats.
        max_repeats: The cap.

    Returns:
        float64 [N].
    """
    descending = np.sort(weights)[::-1]
    rest = np.cumsum(descending[::-1])[::-1]
    # The level if the k heaviest rows were capped. With too few capped, the heaviest of the others is above the cap.
    levels = (samples - max_repeats * np.arange(len(weights))) / rest
    capped = min(int((levels * descending > max_repeats).sum()), len(weights) - 1)
    return np.minimum(levels[capped] * weights, max_repeats)


class SystematicDraw:
    """How often each epoch shows each row, and in what order: a pure function of the seed and the epoch.

    Systematic sampling with probabilities proportional to size (Madow 1949): rows lie one after the other on a line,
    each as long as its expected count, and a comb with teeth at distance 1 is laid on the line. A row is shown as often
    as a tooth hits it, which is its expected count rounded down or up. Rows of a stratum lie together, so the same
    holds for the sum over a stratum. Inside it they lie in a random order that the seed decides.

    The comb starts at a uniform random place, and moves on by the golden ratio from epoch to epoch. Each row thus takes
    its turn with being rounded up: an expected count of 0.8 never leaves a photo out of two epochs in a row.

    The order of an epoch is drawn afterwards, by a generator of its own, so place and weight are independent.
    """

    def __init__(
        self,
        weights: np.ndarray,
        samples: int,
        *,
        seed: int,
        max_repeats: int,
        strata: np.ndarray | None = None,
    ):
        """Take the rows of a split.

        Args:
            weights: float [N], above 0.
            samples: Rows of one epoch, at most N * max_repeats.
            seed: The run's seed.
            max_repeats: The most often that an epoch shows one row.
            strata: Each row's stratum, int [N]; without them, all rows are one.
        """
        self.seed, self.samples = seed, samples
        self.expected = expected_counts(weights, samples, max_repeats)
        """How often an epoch shows each row on average, float64 [N]."""
        generator = np.random.default_rng([seed, SELECTION])
        shuffled = generator.permutation(len(weights))
        self._line = shuffled if strata is None else shuffled[np.argsort(strata[shuffled], kind="stable")]
        self._ends = np.cumsum(self.expected[self._line])
        self._ends[-1] = samples
        self._start = generator.random()

    def __len__(self) -> int:
        """Rows of the split."""
        return len(self._line)

    @property
    def most(self) -> int:
        """The most often that an epoch shows a row."""
        return int(np.ceil(self.expected.max() - 1e-9))  # rounding adds no repeat

    def counts(self, epoch: int) -> np.ndarray:
        """How often an epoch shows each row, int64 [N]."""
        start = (self._start + epoch * GOLDEN) % 1
        teeth = np.minimum(np.floor(self._ends + start), self.samples).astype(np.int64)
        counts = np.empty_like(teeth)
        counts[self._line] = np.diff(teeth, prepend=0)
        return counts

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order, int64 [samples]."""
        rows = np.repeat(np.arange(len(self)), self.counts(epoch))
        return np.random.default_rng([self.seed, epoch, PERMUTATION]).permutation(rows)


class PositionSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from a position in the endless sequence epoch 0, epoch 1, ...

    Rank r of W takes the positions start + r, start + r + W, ... so that every optimizer step of all ranks together
    covers one stretch of the sequence, whatever W is. The number of samples seen is therefore the whole data state.
    """

    def __init__(self, draw: SystematicDraw, *, batch_size: int, rank: int, world_size: int):
        """Take the epochs that `draw` decides; `batch_size` is that of one rank's micro-batch."""
        self.draw = draw
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start = 0
        self._epoch, self._numbers = -1, np.empty(0, dtype=np.int64)

    def numbers(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in their order, as the data set numbers them: int64 [samples]."""
        return self.draw.order(epoch)

    def number_at(self, position: int) -> int:
        """The sample at a position of the sequence."""
        epoch, place = divmod(position, self.draw.samples)
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, self.numbers(epoch)
        return int(self._numbers[place])

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank
        while True:
            batch = [self.number_at(position + i * self.world_size) for i in range(self.batch_size)]
            position += self.batch_size * self.world_size
            yield batch


def share_of(rows: int, rank: int, world_size: int) -> list[int]:
    """Rows of a split that one rank evaluates: each row belongs to one rank; counts differ by one at most."""
    return list(range(rank, rows, world_size))
