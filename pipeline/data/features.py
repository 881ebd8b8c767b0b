"""The feature cache: the backbone's tokens of every photo, computed once, read at random by any number of processes.

A cache is a folder with safetensors files and an `index.json`, which is written last. A file holds a stretch of one
split, each photo with all of its copies. One row is one copy; views that add nothing take no room.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.feature_key import STORED_DTYPE, FeatureKey
from pipeline.data.index import INDEX_NAME, Index
from pipeline.data.integrity import Damage
from pipeline.data.storage import open_folder
from pipeline.errors import UserError

FORMAT = "roadwork features 1"
SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")
MOST_HEADER_BYTES = 1 << 20
LENGTH_BYTES = 8  # of the number, little-endian, that a safetensors file begins with
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "BOOL": torch.bool}


@dataclass(frozen=True)
class FeaturePhoto:
    """One photo of a cache."""

    key: str
    """Of the sample in the shards."""
    sha256: str
    """Of the photo's bytes."""
    checksums: tuple[int, ...]
    """CRC-32 of each row: the photo itself, then its augmented copies."""


@dataclass(frozen=True)
class FeatureShard:
    """One file of a cache."""

    name: str
    bytes: int
    sha256: str
    photos: tuple[FeaturePhoto, ...]
    """In the order of their rows; all have as many copies."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FeatureShard:
        """The inverse of `asdict` after a trip through JSON."""
        photos = (FeaturePhoto(photo["key"], photo["sha256"], tuple(photo["checksums"])) for photo in values["photos"])
        return cls(values["name"], values["bytes"], values["sha256"], tuple(photos))


@dataclass(frozen=True)
class FeatureIndex:
    """The whole of a cache's `index.json`."""

    key: FeatureKey
    dim: int
    """Width D of the backbone's tokens."""
    source_sha256: str
    """Fingerprint of the photos' shards."""
    copies: int
    """Augmented ones of each training photo."""
    precision: str
    """That the backbone computed in."""
    version: str
    """Of the program that made the cache."""
    shards: tuple[FeatureShard, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache."""

    place: str
    """Folder or URL."""
    index: FeatureIndex

    def check(self, wanted: FeatureKey) -> None:
        """Refuse a cache that was made with anything else than what is wanted.

        Raises:
            UserError: With what differs.
        """
        difference = self.index.key.difference(wanted)
        if difference is not None:
            raise stale(self.place, f"it was made with the {difference}")

    def check_source(self, shards: Index) -> None:
        """Refuse a cache of other photos.

        Raises:
            UserError: The shards are not those that it was made from.
        """
        mine, other = self.index.source_sha256, shards.source_sha256
        if mine != other:
            raise stale(self.place, f"it was made from other shards ({mine[:12]}, and not {other[:12]})")


@dataclass(frozen=True)
class PhotoTokens:
    """What the backbone says about one photo, or about one augmented copy."""

    cls: torch.Tensor
    """[V, D]."""
    cells: torch.Tensor
    """[V, g*g, 2D], see `pool_cells`."""
    regions: torch.Tensor
    """[V, D], of the global view under each view's box, see `pool_regions`."""
    boxes: torch.Tensor
    """float32 [V, 4]."""
    view_mask: torch.Tensor
    """bool [V]; views that add nothing are zeros in `cls` and `cells`."""


def open_cache(place: str, shards: Index) -> FeatureCache | None:
    """The cache at a folder or URL, if it is of the photos in `shards`; None where no place is given.

    Raises:
        UserError: There is none, or it is of other photos.
    """
    if not place:
        return None
    cache = FeatureCache(place, read_features(place))
    cache.check_source(shards)
    return cache


def read_features(place: Path | str) -> FeatureIndex:
    """Read the index of a cache in a folder or at a URL.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        values = json.loads(open_folder(place).read(INDEX_NAME))
    except FileNotFoundError as error:
        raise UserError(
            f"no finished feature cache in {place}: there is no {INDEX_NAME}; `./launch.sh prep features` makes one, "
            "and goes on where it was cut off"
        ) from error
    except ValueError as error:
        raise UserError(f"{place}/{INDEX_NAME} is no JSON; extract it again") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{place} holds no feature cache of this program's format ({FORMAT}); extract it again")
    try:
        key, shards = FeatureKey(**values.pop("key")), values.pop("shards")
        index = FeatureIndex(key=key, shards=tuple(FeatureShard.from_json(shard) for shard in shards), **values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}/{INDEX_NAME} does not describe a feature cache; extract it again") from error
    for shard in index.shards:
        if not SAFE_NAME.fullmatch(shard.name):
            raise UserError(f"{place}/{INDEX_NAME} names {shard.name!r}, which is no plain file name; extract again")
    return index


class FeatureReader:
    """Reads any row of a cache, and checks it: the file's length and layout, and the row's checksum."""

    def __init__(self, cache: FeatureCache, split: str, keys: Sequence[str]):
        """Find the photos of a split in the cache.

        Args:
            cache: See there.
            split: Name of the split, for what is said.
            keys: Of its samples, in their order.

        Raises:
            UserError: The cache lacks photos, or is damaged.
        """
        self.place, self.folder, self.index = cache.place, open_folder(cache.place), cache.index
        shards = self.index.shards
        where = {photo.key: (number, place) for number, s in enumerate(shards) for place, photo in enumerate(s.photos)}
        absent = sum(key not in where for key in keys)
        if absent:
            raise stale(self.place, f"it lacks {absent} of {len(keys)} photos of the split {split!r}")
        self.places = [where[key] for key in keys]
        self.copies = min(len(self.photo(row).checksums) for row in range(len(keys)))
        """Rows that every photo has: itself and its augmented copies."""
        self._heads: dict[int, _Head] = {}
        used = sorted({shard for shard, _ in self.places})
        sizes = self.folder.sizes([shards[number].name for number in used])
        for number, size in zip(used, sizes, strict=True):
            with self._naming(number):
                if size != shards[number].bytes:
                    raise Damage(f"it is missing or not {shards[number].bytes} bytes long")

    def photo(self, row: int) -> FeaturePhoto:
        """What the cache knows about a photo of the split."""
        shard, place = self.places[row]
        return self.index.shards[shard].photos[place]

    def read(self, row: int, copy: int) -> PhotoTokens:
        """The tokens of a photo of the split.

        Args:
            row: Of the photo in the split.
            copy: 0 for the photo itself, up to `copies` - 1 for an augmented one.

        Raises:
            UserError: They are damaged.
        """
        number, place = self.places[row]
        photo = self.photo(row)
        with self._naming(number, photo.key):
            head = self._head(number)
            at = place * len(photo.checksums) + copy
            mask, boxes = head.view_mask[at], head.boxes[at]
            first, last = (int(count) for count in head.ends[at : at + 2])
            found = {"cls": (first, last), "cells": (first, last), "regions": (at, at + 1)}
            parts = {name: self._read_rows(number, head, name, *rows) for name, rows in found.items()}
            small = (boxes.numpy().tobytes(), mask.numpy().tobytes())
            if checksum(*parts.values(), *small) != photo.checksums[copy]:
                raise Damage("its bytes have changed")
        views = len(mask)
        return PhotoTokens(
            cls=_spread(_tensor(parts["cls"], (last - first, self.index.dim)), mask),
            cells=_spread(_tensor(parts["cells"], (last - first, *head.shapes["cells"][1:])), mask),
            regions=_tensor(parts["regions"], (views, self.index.dim)),
            boxes=boxes,
            view_mask=mask,
        )

    def _head(self, number: int) -> _Head:
        """A file's header, masks and boxes; read once in each process."""
        if number not in self._heads:
            shard = self.index.shards[number]
            length = int.from_bytes(self._read_range(number, 0, LENGTH_BYTES), "little")
            if length > min(MOST_HEADER_BYTES, shard.bytes):
                raise Damage("its header cannot be read")
            try:
                header = json.loads(self._read_range(number, LENGTH_BYTES, LENGTH_BYTES + length))
                layout = {name: value for name, value in header.items() if name != "__metadata__"}
                shapes = {name: tuple(value["shape"]) for name, value in layout.items()}
                starts = {name: LENGTH_BYTES + length + value["data_offsets"][0] for name, value in layout.items()}
                expected = self._shapes(number, shapes["cls"][0])
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise Damage("its header cannot be read") from error
            dtypes = {name: DTYPES.get(value["dtype"]) for name, value in layout.items()}
            if {name: (dtypes[name], shapes[name]) for name in layout} != expected:
                raise Damage("its tensors are not those that the index describes")
            small = {}
            for name in ("boxes", "view_mask"):
                size = prod(shapes[name]) * expected[name][0].itemsize
                data = bytearray(self._read_range(number, starts[name], starts[name] + size))
                small[name] = torch.frombuffer(data, dtype=expected[name][0]).view(shapes[name])
            ends = np.concatenate([[0], small["view_mask"].sum(1).cumsum(0).numpy()])
            if ends[-1] != shapes["cls"][0]:
                raise Damage("its masks do not fit its tokens")
            self._heads[number] = _Head(shapes, starts, small["boxes"], small["view_mask"], ends)
        return self._heads[number]

    def _shapes(self, number: int, views: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of a file that holds so many views."""
        key, dim = self.index.key, self.index.dim
        rows = sum(len(photo.checksums) for photo in self.index.shards[number].photos)
        return {
            "cls": (STORED_DTYPE, (views, dim)),
            "cells": (STORED_DTYPE, (views, key.pool_grid**2, 2 * dim)),
            "regions": (STORED_DTYPE, (rows, key.num_views, dim)),
            "boxes": (torch.float32, (rows, key.num_views, 4)),
            "view_mask": (torch.bool, (rows, key.num_views)),
        }

    def _read_rows(self, number: int, head: _Head, name: str, first: int, last: int) -> bytes:
        size = prod(head.shapes[name][1:]) * STORED_DTYPE.itemsize
        start = head.starts[name]
        return self._read_range(number, start + first * size, start + last * size)

    def _read_range(self, number: int, start: int, end: int) -> bytes:
        data = self.folder.read_range(self.index.shards[number].name, start, end)
        if len(data) != end - start:
            raise Damage(f"it ends before its byte {end}")
        return data

    @contextmanager
    def _naming(self, number: int, key: str = "") -> Iterator[None]:
        """Name the file, and the sample, in what is said about damage."""
        try:
            yield
        except (Damage, FileNotFoundError) as problem:
            what = "it is gone" if isinstance(problem, FileNotFoundError) else str(problem)
            where = f"{self.place}/{self.index.shards[number].name}" + (f", sample {key}" if key else "")
            raise UserError(f"{where}: {what}; {remedy(self.place)}") from problem


@dataclass(frozen=True)
class _Head:
    """What is kept in memory of a file."""

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]
    """Where each tensor begins, in bytes from the file's start."""
    boxes: torch.Tensor
    view_mask: torch.Tensor
    ends: np.ndarray
    """int [rows + 1], where each row's views begin among all."""


def stale(place: str, why: str) -> UserError:
    """What is said about a cache that must not be used."""
    return UserError(f"the feature cache {place} is stale: {why}; {remedy(place)}")


def remedy(place: str) -> str:
    """What to do about a cache that cannot be used."""
    return (
        f"remove {place} and make it anew with `./launch.sh prep features`, or do without it: --data.features '' in "
        "training, --features '' in evaluate"
    )


def checksum(*parts: bytes) -> int:
    """CRC-32 of several stretches of bytes, one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def _tensor(data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=STORED_DTYPE).view(shape)


def _spread(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the rows of the views that are there into their places, with zeros between."""
    if bool(mask.all()):
        return rows
    spread = rows.new_zeros((len(mask), *rows.shape[1:]))
    spread[mask] = rows
    return spread
