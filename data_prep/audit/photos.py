"""The photos that the audit compares: every photo of the shards, read and decoded once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from data_prep.photos.inspection import LIBRARIES, Appearance, appearance_of
from data_prep.work.parallel import FEW_PHOTOS, Workers
from pipeline.data.index import SPLITS, Index, Sample
from pipeline.data.integrity import Damage, read_record
from pipeline.data.photo import BadPhoto
from pipeline.data.record import Record
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.progress import track

# Each process keeps the tars that it reads open.
_folder = cache(open_folder)


@dataclass(frozen=True)
class Entry:
    """A sample, and the tar that holds it."""

    sample: Sample
    split: str
    place: str
    """Folder or URL of the shards."""
    tar: str

    def read(self, extension: str) -> bytes:
        """Read one member; raises the errors of `Folder.read_range`."""
        offset, size = self.sample.members[extension]
        return _folder(self.place).read_range(self.tar, offset, offset + size)

    def read_photo(self) -> bytes:
        """The photo's bytes."""
        return self.read(self.sample.photo_extension)


@dataclass(frozen=True)
class Look:
    """A photo's record, and what the photo's bytes say, whatever the record says."""

    record: Record
    sha256: str
    appearance: Appearance


@dataclass(frozen=True)
class Photos:
    """All photos, split after split in the order of the index; arrays have a row for each."""

    entries: list[Entry]
    records: list[Record]
    """The photos' records without their text vectors, which are large and not compared."""
    sha256: np.ndarray
    hashes: np.ndarray
    """Perceptual hashes, uint64 [N]."""
    thumbnails: np.ndarray
    """Grey levels of the thumbnails' C cells, uint8 [N, C]."""

    @cached_property
    def splits(self) -> np.ndarray:
        """The split of each photo, as its position in `SPLITS`: int64 [N]."""
        return np.array([SPLITS.index(entry.split) for entry in self.entries], dtype=np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels: 0, 1 or -1 for unknown, int64 [N]."""
        return np.array([-1 if r.label is None else r.label for r in self.records], dtype=np.int64)

    @cached_property
    def points(self) -> np.ndarray:
        """Latitude and longitude in degrees, [N, 2], NaN for NULL."""
        return np.array([r.metadata.gps or (np.nan, np.nan) for r in self.records])

    @cached_property
    def clusters(self) -> np.ndarray:
        """The GPS cluster of each photo, as its number: int64 [N]."""
        return np.array([r.gps_cluster for r in self.records], dtype=np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """Sampling weights, [N]."""
        return np.array([r.sample_weight for r in self.records])


def read_photos(shards: str, index: Index, workers: int) -> Photos:
    """Read every record and decode every photo.

    Args:
        shards: Folder or URL of the shards.
        index: The index of the shards.
        workers: Processes; 0 takes every core.

    Raises:
        UserError: There are no samples, or one cannot be read.
    """
    entries = [
        Entry(sample, name, shards, split.shards[sample.shard].name)
        for name, split in ((name, index.splits[name]) for name in SPLITS)
        for sample in split.samples
    ]
    if not entries:
        raise UserError(f"{shards} has no samples to audit")
    looks = []
    with Workers(workers, preload=(__name__, *LIBRARIES)) as pool:
        for entry, look in track(pool.map(look_at, entries, FEW_PHOTOS), len(entries), "auditing"):
            if isinstance(look, str):
                raise UserError(
                    f"the sample {entry.sample.key} in {entry.place}/{entry.tar} cannot be audited: {look}; "
                    f"`python -m data_prep verify --shards {shards}` lists all that is damaged"
                )
            looks.append(look)
    return Photos(
        entries=entries,
        records=[look.record for look in looks],
        sha256=np.array([look.sha256 for look in looks]),
        hashes=np.array([look.appearance.phash for look in looks], dtype=np.uint64),
        thumbnails=np.stack([np.frombuffer(look.appearance.thumbnail, dtype=np.uint8) for look in looks]),
    )


def look_at(entry: Entry) -> Look | str:
    """Look at one sample; returns a sentence instead where it is damaged."""
    try:
        data = entry.read_photo()
        appearance = appearance_of(data)
        record = read_record(entry.sample, entry.split, entry.read("json"))
    except FileNotFoundError:
        return "the tar is missing"
    except (BadPhoto, Damage) as damage:
        return str(damage)
    return Look(replace(record, text_vector=None), hashlib.sha256(data).hexdigest(), appearance)
