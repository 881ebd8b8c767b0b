"""The mixture that training sees: photos, mild copies of them, and copies in the older form of the NATIX challenge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.copies import AUGMENTED, STREETVISION
from pipeline.data.sampler import PositionSampler, SystematicDraw

# Keeps these draws apart from those of `SystematicDraw` and of a stream's passes, whose seeds start alike.
STREAM = 0x6D697874757265


@dataclass(frozen=True)
class Mixture:
    """Which copies of each photo an epoch shows: a pure function of the seed, the epoch and the photo's row."""

    seed: int = 0
    """The run's seed."""
    augment_share: float = 0.0
    """Share of samples that are mild copies."""
    streetvision_share: float = 0.0
    """Share of samples that are copies of the kind `STREETVISION`."""
    copies: int | None = None
    """Number of stored copies of each photo, see `make_copy`; None where copies are made on demand."""

    def copies_at(self, epoch: int, photos: int, repeats: int = 1) -> np.ndarray:
        """What an epoch shows of each photo the first time that it comes, the second time, and so on.

        The kind is drawn anew for each photo, epoch and time. Copies that are made on demand are new each time. Stored
        ones of a kind take turns: a photo that comes again in an epoch shows the next one, and the next epoch begins
        with the one after the first of this epoch. So no copy comes twice in an epoch before all of its kind have come.

        Args:
            epoch: Number of the epoch, from 0.
            photos: Photos N of the training split.
            repeats: The most often R that an epoch shows one photo, the same for all epochs.

        Returns:
            int64 [R, N], 0 for the photo itself, else a number for `make_copy`.
        """
        found = np.zeros((repeats, photos), dtype=np.int64)
        draw = np.random.default_rng([self.seed, epoch, STREAM]).random(found.shape)
        client = draw < self.streetvision_share
        mild = ~client & (draw < self.streetvision_share + self.augment_share)
        for chosen, kind in ((client, STREETVISION), (mild, AUGMENTED)):
            if chosen.any():
                again = np.cumsum(chosen, axis=0)[chosen] - 1
                stored = None if self.copies is None else kind.count(self.copies)
                found[chosen] = kind.number(epoch * repeats + again if stored is None else (epoch + again) % stored)
        return found


class MixtureSampler(PositionSampler):
    """Samples numbers `copy * N + row` instead of rows, with the copies that a mixture chooses.

    Like the photo, the copy follows from the position in the sequence alone.
    """

    def __init__(self, draw: SystematicDraw, *, mixture: Mixture, **options: Any):
        """See `PositionSampler`; the seeds of `draw` and `mixture` are the run's."""
        super().__init__(draw, **options)
        self.mixture = mixture

    def numbers(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in their order, int64 [samples]."""
        rows = super().numbers(epoch)
        if not self.mixture.augment_share + self.mixture.streetvision_share:
            return rows
        copies = self.mixture.copies_at(epoch, len(self.draw), self.draw.most)
        return copies[times_before(rows), rows] * len(self.draw) + rows


def times_before(rows: np.ndarray) -> np.ndarray:
    """How often the row of each place came at earlier places, int64 [n]."""
    places = np.argsort(rows, kind="stable")
    grouped = rows[places]
    found = np.empty_like(places)
    found[places] = np.arange(len(rows)) - np.searchsorted(grouped, grouped)
    return found
