"""Read a feature cache: any row in one read at a known offset, each row checked; nothing is unpickled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from pipeline.data.feature_key import STORED_DTYPE
from pipeline.data.features import (
    COLUMNS,
    FORMAT,
    MASK_DTYPE,
    FeatureCache,
    FeatureIndex,
    FeaturePhoto,
    StoredRow,
    remedy,
    stale,
)
from pipeline.data.integrity import CheckedFiles, Damage
from pipeline.names import MASK_CLASSES
from pipeline.parsing.typed_json import Malformed, Whole, load_json, to_type

MOST_HEADER_BYTES = 1 << 20
LENGTH_BYTES = 8  # of the little-endian number that a safetensors file starts with
DTYPES = {"BF16": STORED_DTYPE, "F16": MASK_DTYPE, "F32": torch.float32, "BOOL": torch.bool, "U8": torch.uint8,
          "I32": torch.int32}  # fmt: skip
SMALL = ("boxes", "view_mask", "mask_classes", "has_mask")  # tensors that are read whole, once
LARGE = ("cls", "cells", "regions", "masks")  # tensors of which a row is read when it is wanted, in their order
ROWS, SIZES = "rows", "record_sizes"  # tensors of the present format alone

Shape = tuple[int, ...]
Shapes = dict[str, tuple[torch.dtype, Shape]]


class FeatureReader(CheckedFiles, ABC):
    """Reads any row of a cache, and checks it: the file's length and layout, and the row's checksum."""

    kept: tuple[str, ...] = SMALL
    """Tensors that are read whole, once."""

    def __init__(self, cache: FeatureCache, split: str, keys: Sequence[str]):
        """Find the photos of a split in the cache.

        Args:
            cache: The feature cache, of the format that the class reads.
            split: Name of the split, for messages.
            keys: Keys of the split's samples, in their order.

        Raises:
            UserError: The cache lacks photos, or is damaged.
        """
        self.index, shards = cache.index, cache.index.shards
        where = {photo.key: (number, place) for number, s in enumerate(shards) for place, photo in enumerate(s.photos)}
        absent = sum(key not in where for key in keys)
        if absent:
            raise stale(cache.place, f"it lacks {absent} of {len(keys)} photos of the split {split!r}")
        self.places = [where[key] for key in keys]
        self.copies = max(len(self.photo(row).checksums) for row in range(len(keys)))
        """Most rows that a photo has: itself and its augmented copies."""
        self._heads: dict[int, _Head] = {}
        used = sorted({shard for shard, _ in self.places})
        super().__init__(cache.place, shards, remedy(cache.place), used)

    def photo(self, row: int) -> FeaturePhoto:
        """The cache's entry for a photo of the split."""
        shard, place = self.places[row]
        return self.index.shards[shard].photos[place]

    def read(self, row: int, copy: int) -> StoredRow:
        """Read one copy of a photo of the split.

        Args:
            row: The photo's row in the split.
            copy: 0 for the photo itself, else the number of an augmented one that it has.

        Raises:
            UserError: The data is damaged.
        """
        number, place = self.places[row]
        photo = self.photo(row)
        with self.naming(number, photo):
            head = self._head(number)
            at = place * len(photo.checksums) + copy
            small = {name: head.small[name][at] for name in SMALL}
            stored = StoredRow(**self._large(number, head, at), **small)
            if stored.checksum() != photo.checksums[copy]:
                raise Damage("its bytes have changed")
        return stored

    def present(self, row: int, copy: int) -> tuple[int, int]:
        """How many useful views one copy of a photo has, and how many classes its mask; see `read`."""
        number, place = self.places[row]
        photo = self.photo(row)
        with self.naming(number, photo):
            head, at = self._head(number), place * len(photo.checksums) + copy
            views, classes = (int(ends[at + 1] - ends[at]) for ends in (head.view_ends, head.class_ends))
        return views, classes

    @abstractmethod
    def _layout(self, rows: int, shapes: dict[str, Shape]) -> Shapes:
        """Type and shape of the tensors of a file with this many rows that are not `SMALL`; sizes that only their masks
        decide are those of `shapes`, the shapes in the file's header.
        """

    @abstractmethod
    def _fits(self, head: _Head) -> bool:
        """Whether the large tensors of a file have the sizes that its masks ask for."""

    @abstractmethod
    def _large(self, number: int, head: _Head, at: int) -> dict[str, torch.Tensor]:
        """The tensors `LARGE` and the record of the row at a position of a file."""

    def _head(self, number: int) -> _Head:
        """A file's header and its small tensors; read once in each process."""
        if number not in self._heads:
            head = self._header(number)
            for name in self.kept:
                head.small[name] = self._rows(number, head, name, slice(0, head.layout[name][1][0]))
            flags = [tensor.view(torch.uint8) for tensor in head.small.values() if tensor.dtype == torch.bool]
            if any(bool((flag > 1).any()) for flag in flags) or not self._fits(head):
                raise Damage("its masks do not fit its tokens")
            self._heads[number] = head
        return self._heads[number]

    def _header(self, number: int) -> _Head:
        """A file's header, without the small tensors. The tensors fill the file, so none is larger than it."""
        size = self.index.shards[number].bytes
        length = int.from_bytes(self.read_range(number, 0, LENGTH_BYTES), "little")
        if length > min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
            raise Damage("its header cannot be read")
        try:
            values = to_type(load_json(self.read_range(number, LENGTH_BYTES, LENGTH_BYTES + length)), dict[str, Any])
            values.pop("__metadata__", None)
            entries = to_type(values, dict[str, _Entry])
            expected = self._expected(number, {name: entry.shape for name, entry in entries.items()})
        except (Malformed, KeyError, ValueError, IndexError) as error:
            raise Damage("its header cannot be read") from error
        if {name: (DTYPES.get(entry.dtype), entry.shape) for name, entry in entries.items()} != expected:
            raise Damage("its tensors are not those that the index describes")
        begin = end = LENGTH_BYTES + length
        starts = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            dtype, shape = expected[name]
            starts[name], end = end, end + prod(shape) * dtype.itemsize
            if entry.data_offsets != (starts[name] - begin, end - begin):
                raise Damage("its tensors do not follow each other")
        if end != size:
            raise Damage("its tensors do not fill it")
        return _Head(self.index, expected, starts, {})

    def _expected(self, number: int, shapes: dict[str, Shape]) -> Shapes:
        """Type and shape of every tensor of a file."""
        rows = sum(len(photo.checksums) for photo in self.index.shards[number].photos)
        small = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in small_shapes(self.index).items()}
        return {**self._layout(rows, shapes), **small}

    def _rows(self, number: int, head: _Head, name: str, rows: slice) -> torch.Tensor:
        """Consecutive rows of a tensor of a file."""
        dtype, (_, *shape) = head.layout[name]
        size = prod(shape) * dtype.itemsize
        data = self._bytes(number, head.starts[name] + rows.start * size, (rows.stop - rows.start) * size)
        return data.view(dtype).view(-1, *shape)

    def _bytes(self, number: int, start: int, size: int) -> torch.Tensor:
        """Bytes of a file, uint8 [size], which they are read into directly."""
        data = torch.empty(size, dtype=torch.uint8)
        if size:  # a URL's driver may take an empty range for the whole file
            self.read_into(number, start, data.numpy().data)
        return data


class RowReader(FeatureReader):
    """A `FeatureReader` of the present format: a row of all large tensors and the record is one read.

    Besides the tensors `SMALL`, a file has a tensor `rows`, uint8: row after row, the bytes of the tensors `LARGE`, and
    of the record; and a tensor `record_sizes`, int32, with the record's length in each row. Where a row begins follows
    from the masks and sizes of the rows before it.
    """

    kept = (*SMALL, SIZES)

    def _layout(self, rows: int, shapes: dict[str, Shape]) -> Shapes:
        (size,) = shapes[ROWS]
        return {ROWS: (torch.uint8, (size,)), SIZES: (torch.int32, (rows,))}

    def _fits(self, head: _Head) -> bool:
        # In Python's integers, since sizes from a file could overflow NumPy's.
        rows, views, classes = len(head.view_ends) - 1, int(head.view_ends[-1]), int(head.class_ends[-1])
        tokens = large_bytes(self.index, views, classes) + (rows - 1) * large_bytes(self.index, 0, 0)
        sizes = head.small[SIZES]
        return int(sizes.min()) >= 0 and head.layout[ROWS][1] == (tokens + int(sizes.sum()),)

    def _large(self, number: int, head: _Head, at: int) -> dict[str, torch.Tensor]:
        start, end = map(int, head.row_ends[at : at + 2])
        data = self._bytes(number, head.starts[ROWS] + start, end - start)
        views, classes = (int(ends[at + 1] - ends[at]) for ends in (head.view_ends, head.class_ends))
        found, begin = {}, 0
        for name, (dtype, shape) in shapes_of(self.index, views, classes).items():
            size = prod(shape) * dtype.itemsize
            found[name] = data[begin : begin + size].view(dtype).view(shape)
            begin += size
        return {**found, "record": data[begin:]}


class ColumnReader(FeatureReader):
    """A `FeatureReader` of the format `COLUMNS`: a file has the tensors `SMALL` and `LARGE`, each with all its rows."""

    def _layout(self, rows: int, shapes: dict[str, Shape]) -> Shapes:
        whole = shapes_of(self.index, shapes["cls"][0], shapes["masks"][0])
        dtype, shape = whole["regions"]
        return {**whole, "regions": (dtype, (rows, *shape))}

    def _fits(self, head: _Head) -> bool:
        ends = head.view_ends[-1], head.class_ends[-1]
        return bool(ends == (head.layout["cls"][1][0], head.layout["masks"][1][0]))

    def _large(self, number: int, head: _Head, at: int) -> dict[str, torch.Tensor]:
        views, classes = (slice(*map(int, ends[at : at + 2])) for ends in (head.view_ends, head.class_ends))
        rows = {"cls": views, "cells": views, "regions": slice(at, at + 1), "masks": classes}
        found = {name: self._rows(number, head, name, place) for name, place in rows.items()}
        return {**found, "regions": found["regions"][0], "record": torch.empty(0, dtype=torch.uint8)}


READERS: dict[str, type[FeatureReader]] = {FORMAT: RowReader, COLUMNS: ColumnReader}


def open_reader(cache: FeatureCache, split: str, keys: Sequence[str]) -> FeatureReader:
    """The reader of a cache's format; see `FeatureReader`."""
    return READERS[cache.index.format](cache, split, keys)


def shapes_of(index: FeatureIndex, views: int, classes: int) -> Shapes:
    """Type and shape of the tensors `LARGE` of a row with this many useful views, and classes in its mask."""
    key, dim = index.key, index.dim
    return {
        "cls": (STORED_DTYPE, (views, dim)),
        "cells": (STORED_DTYPE, (views, key.pool_grid**2, 2 * dim)),
        "regions": (STORED_DTYPE, (key.num_views, dim)),
        "masks": (MASK_DTYPE, (classes, key.mask_side, key.mask_side)),
    }


def small_shapes(index: FeatureIndex) -> Shapes:
    """Type and shape of the tensors `SMALL` of a row."""
    views = index.key.num_views
    return {
        "boxes": (torch.float32, (views, 4)),
        "view_mask": (torch.bool, (views,)),
        "mask_classes": (torch.bool, (len(MASK_CLASSES),)),
        "has_mask": (torch.bool, ()),
    }


def large_bytes(index: FeatureIndex, views: int, classes: int) -> int:
    """Bytes of the tensors `LARGE` of a row with this many useful views, and classes in its mask."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in shapes_of(index, views, classes).values())


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[Whole, ...]
    data_offsets: tuple[Whole, Whole]
    """Begin and end in the part of the file after the header, in bytes."""


@dataclass(frozen=True)
class _Head:
    """The part of a file that is kept in memory."""

    index: FeatureIndex
    layout: Shapes
    starts: dict[str, int]
    """Start of each tensor, in bytes from the file's start."""
    small: dict[str, torch.Tensor]
    """The tensors that a reader keeps, whole."""

    @cached_property
    def view_ends(self) -> np.ndarray:
        """Position of each row's first view among all of the file's views: int [rows + 1]."""
        return _ends(self.small["view_mask"])

    @cached_property
    def class_ends(self) -> np.ndarray:
        """Position of each row's first mask among all of the file's masks: int [rows + 1]."""
        return _ends(self.small["mask_classes"])

    @cached_property
    def row_ends(self) -> np.ndarray:
        """Start of each row in `rows`, in bytes: int [rows + 1]."""
        fixed = large_bytes(self.index, 0, 0)
        view, mask = large_bytes(self.index, 1, 0) - fixed, large_bytes(self.index, 0, 1) - fixed
        rows: np.ndarray = np.arange(len(self.view_ends))
        records = np.concatenate([[0], self.small[SIZES].numpy().cumsum(dtype=np.int64)])
        return fixed * rows + view * self.view_ends + mask * self.class_ends + records


def _ends(present: torch.Tensor) -> np.ndarray:
    return np.concatenate([[0], present.sum(1).cumsum(0).numpy()])
