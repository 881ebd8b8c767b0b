"""Plan the files of a feature cache, write them, and note with a receipt that a file is whole."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save

from data_prep.features.extraction import Item, Row
from data_prep.work.receipts import Receipts, explain_full_disk
from pipeline.data.feature_key import FeatureKey
from pipeline.data.feature_reader import LARGE, ROWS, SIZES, SMALL
from pipeline.data.features import MASK_DTYPE, FeatureIndex, FeaturePhoto, FeatureShard, StoredRow, bytes_of
from pipeline.data.index import Index
from pipeline.files import write_bytes

FILES_AHEAD = 2  # being written while the backbone computes; more would only fill the memory


@dataclass(frozen=True)
class PlannedShard:
    """A file to be written: a stretch of a split, each photo with all of its copies."""

    name: str
    split: str
    first: int
    """Row of the file's first photo in the split."""
    photos: int
    copies: int
    """Number of rows of each photo: the photo itself and its augmented copies."""

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return self.photos * self.copies

    @property
    def items(self) -> list[Item]:
        """The file's photos, in their order."""
        return [Item(self.split, row, self.copies) for row in range(self.first, self.first + self.photos)]


@dataclass(frozen=True)
class Plan:
    """All that decides the content of a cache; equal plans give equal files."""

    format: str
    """How rows lie in the files, as in `FeatureIndex`."""
    key: FeatureKey
    dim: int
    """Width of the backbone's tokens."""
    source_sha256: str
    """Fingerprint of the photos' shards."""
    copies: int
    precision: str
    """Precision in which the backbone computes."""
    version: str
    """Version of the program."""
    shards: tuple[PlannedShard, ...]
    tars: tuple[str, ...]
    """As in `FeatureIndex`."""

    def index(self, written: tuple[FeatureShard, ...]) -> FeatureIndex:
        """The index of the cache, when its files are written."""
        return FeatureIndex(**{**vars(self), "shards": written})

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: The values are not those of a plan.
        """
        shards = tuple(PlannedShard(**shard) for shard in values["shards"])
        return cls(**{**values, "key": FeatureKey(**values["key"]), "shards": shards, "tars": tuple(values["tars"])})


def plan_shards(index: Index, copies: int, row_bytes: int, shard_mb: float) -> list[PlannedShard]:
    """Cut every split into files of about `shard_mb`; augmented copies are for training only.

    Args:
        index: The index of the photos' shards.
        copies: Augmented copies of each training photo.
        row_bytes: Most bytes of one row.
        shard_mb: Size of a file in megabytes.
    """
    planned = []
    for split, content in index.splits.items():
        per_photo = 1 + (copies if split == "train" else 0)
        photos = max(1, int(shard_mb * 1e6 / (row_bytes * per_photo)))
        for number, first in enumerate(range(0, len(content.samples), photos)):
            size = min(photos, len(content.samples) - first)
            planned.append(PlannedShard(f"{split}-{number:05d}.safetensors", split, first, size, per_photo))
    return planned


class FeatureWriter:
    """Writes files in the background, in the order in which their rows arrive."""

    def __init__(self, folder: Path, index: Index, shards: list[PlannedShard]):
        """Await the rows of `shards`, one after the other; `index` is the index of the photos' shards."""
        self.folder, self.index = folder, index
        self._awaited = iter(shards)
        self._rows: list[Row] = []
        self._current = next(self._awaited, None)
        self._pool = ThreadPoolExecutor(1)
        self._writing: list[Future[None]] = []

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self._settle(0)

    def add(self, row: Row) -> None:
        """Take the next row; the last one of a file has it written.

        Raises:
            UserError: The disk is full.
        """
        assert self._current is not None
        self._rows.append(row)
        if len(self._rows) == self._current.rows:
            self._settle(FILES_AHEAD - 1)
            self._writing.append(self._pool.submit(write_shard, self.folder, self.index, self._current, self._rows))
            self._current, self._rows = next(self._awaited, None), []

    def _settle(self, left: int) -> None:
        """Wait until no more than `left` files are under way, and raise what went wrong."""
        while len(self._writing) > left:
            self._writing.pop(0).result()


def write_shard(folder: Path, index: Index, shard: PlannedShard, rows: list[Row]) -> None:
    """Write one file, then its receipt: a file with a receipt is never computed again.

    Raises:
        UserError: The disk is full.
    """
    stored = [stored_row(row) for row in rows]
    large = torch.cat([bytes_of(getattr(one, name)) for one in stored for name in (*LARGE, "record")])
    sizes = torch.tensor([len(one.record) for one in stored], dtype=torch.int32)
    small = {name: torch.stack([getattr(one, name) for one in stored]) for name in SMALL}
    data = save({ROWS: large, SIZES: sizes, **small})
    samples = index.splits[shard.split].samples
    checksums = tuple(one.checksum() for one in stored)
    photos = tuple(
        FeaturePhoto(samples[rows[first].photo].key, rows[first].sha256, checksums[first : first + shard.copies])
        for first in range(0, len(rows), shard.copies)
    )
    receipt = FeatureShard(shard.name, len(data), hashlib.sha256(data).hexdigest(), photos)
    with explain_full_disk(folder, "files"):
        write_bytes(folder / shard.name, data)
        Receipts(folder).write(shard.name, asdict(receipt))


def stored_row(row: Row) -> StoredRow:
    """What a file holds of a computed row."""
    targets = row.mask_targets.to(MASK_DTYPE)
    has_mask = ~targets.isnan().any()
    classes = targets.flatten(1).any(dim=1) & has_mask
    record = torch.frombuffer(bytearray(row.record), dtype=torch.uint8)
    return StoredRow(**vars(row.tokens), masks=targets[classes], mask_classes=classes, has_mask=has_mask, record=record)
