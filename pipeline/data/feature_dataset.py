"""Training and validating from the feature cache: the index gives labels, the cache gives all else in one read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_reader import open_reader
from pipeline.data.features import FeatureCache, StoredRow, stale
from pipeline.data.index import Index
from pipeline.data.integrity import read_record
from pipeline.data.record import Record
from pipeline.model.config import InputSpec


class FeatureDataset(ShardDataset):
    """A split of the shards with tokens from a feature cache; photos and masks are never opened.

    The cache has a row for each photo and each of its augmented copies, so there are no numbers from
    `copies * len(self)` on. In a fold some photos may have fewer copies than others: those of the shards' validation
    split have none. In the place of a copy that is not there comes the photo itself.
    """

    def __init__(self, *shards: Any, cache: FeatureCache, **options: Any):
        """Open a split; the arguments but `cache` are those of `ShardDataset`.

        Raises:
            UserError: The cache lacks photos of the split, or is damaged.
        """
        super().__init__(*shards, **options)
        self.reader = open_reader(cache, self.name, [sample.key for sample in self.split.samples])
        self.copies = self.reader.copies
        self._tars = frozenset(cache.index.tars)

    def load(self, number: int) -> tuple[Record, dict[str, torch.Tensor]]:
        """The record, and tokens, metadata and targets; see `ShardDataset`, with `PhotoTokens` instead of views."""
        copy, row = divmod(number, len(self))
        copy = copy if copy < len(self.reader.photo(row).checksums) else 0
        stored = self.reader.read(row, copy)
        record = self.record_with(row, stored)
        return record, {
            **{name: value[: self.spec.num_views] for name, value in vars(stored.tokens()).items()},
            **self.about(row, record, copy),
            "mask_targets": stored.mask_targets(),
        }

    def record(self, row: int) -> Record:
        """The sample's record.

        Raises:
            UserError: The data is damaged, or the cache holds another photo under the sample's key.
        """
        return self._of_this_photo(row, super().record(row))

    def record_with(self, row: int, stored: StoredRow) -> Record:
        """The sample's record, from a row of the cache if the tars are still those that it was made from."""
        sample = self.split.samples[row]
        if self.split.shards[sample.shard].sha256 not in self._tars:
            return self.record(row)
        with self.reader.naming(self.reader.places[row][0], sample):
            return self._of_this_photo(row, read_record(sample, self._homes[row], stored.record.numpy().tobytes()))

    def _of_this_photo(self, row: int, record: Record) -> Record:
        if record.sha256 != self.reader.photo(row).sha256:
            raise stale(str(self.reader.place), f"it holds another photo as {record.key}")
        return record


def open_split(
    shards: Path | str, index: Index, name: str, spec: InputSpec, cache: FeatureCache | None = None
) -> ShardDataset:
    """Open a split's samples as a model takes them, from the feature cache if there is one.

    Args:
        shards: Folder or URL of the shards.
        index: The shards' index.
        name: Name of the split.
        spec: The model's input spec.
        cache: Feature cache of the photos in the shards, with the model's key.
    """
    if cache is None:
        return ShardDataset(shards, index, name, spec)
    return FeatureDataset(shards, index, name, spec, cache=cache)
