"""The mixture that training sees: photos, mild copies of them, and copies in the older form of the NATIX challenge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.copies import AUGMENTED, STREETVISION
from pipeline.data.sampler import PositionSampler

# Keeps these draws apart from those of `order` and of a stream's passes, whose seeds start with the same numbers.
STREAM = 0x6D697874757265


@dataclass(frozen=True)
class Mixture:
    """Which copy of each photo an epoch sees: a pure function of the seed, the epoch and the photo's row."""

    seed: int = 0
    """The run's seed."""
    augment_share: float = 0.0
    """Share of samples that are mild copies."""
    streetvision_share: float = 0.0
    """Share of samples that are copies of the kind `STREETVISION`."""
    copies: int | None = None
    """Number of stored copies of each photo, see `make_copy`; None where copies are made on demand."""

    def copies_at(self, epoch: int, photos: int) -> np.ndarray:
        """The copy of each photo that an epoch sees.

        The kind is drawn anew for each photo and epoch. The copies of a kind take turns from epoch to epoch, so a cache
        with fewer copies than there are epochs starts again with the first one.

        Args:
            epoch: Number of the epoch, from 0.
            photos: Photos N of the training split.

        Returns:
            int64 [N], 0 for the photo itself, else a number for `make_copy`.
        """
        found = np.zeros(photos, dtype=np.int64)
        draw = np.random.default_rng([self.seed, epoch, STREAM]).random(photos)
        client = draw < self.streetvision_share
        mild = ~client & (draw < self.streetvision_share + self.augment_share)
        for chosen, kind in ((client, STREETVISION), (mild, AUGMENTED)):
            if chosen.any():
                found[chosen] = kind.number(epoch if self.copies is None else epoch % kind.count(self.copies))
        return found


class MixtureSampler(PositionSampler):
    """Samples numbers `copy * N + row` instead of rows, with the copies that a mixture chooses.

    Like the photo, the copy follows from the position in the sequence alone.
    """

    def __init__(self, *order: Any, mixture: Mixture, **options: Any):
        """See `PositionSampler`, whose seed is the mixture's."""
        super().__init__(*order, seed=mixture.seed, **options)
        self.mixture = mixture

    def row_at(self, position: int) -> int:
        """Number of the sample at a position of the sequence."""
        row, epoch = super().row_at(position), position // self.samples_per_epoch
        if getattr(self, "_mixed_epoch", None) != epoch:
            self._mixed_epoch, self._copies = epoch, self.mixture.copies_at(epoch, len(self.weights))
        return int(self._copies[row]) * len(self.weights) + row
