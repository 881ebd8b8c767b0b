"""Read a feature cache: any row in a few reads at known offsets, each row checked; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from pipeline.data.feature_key import STORED_DTYPE
from pipeline.data.features import MASK_DTYPE, FeatureCache, FeaturePhoto, PhotoTokens, checksum, remedy, stale
from pipeline.data.integrity import CheckedFiles, Damage
from pipeline.names import MASK_CLASSES

MOST_HEADER_BYTES = 1 << 20
LENGTH_BYTES = 8  # of the little-endian number that a safetensors file starts with
DTYPES = {"BF16": STORED_DTYPE, "F16": MASK_DTYPE, "F32": torch.float32, "BOOL": torch.bool}
SMALL = ("boxes", "view_mask", "mask_classes", "has_mask")  # tensors that are read whole, once


class FeatureReader(CheckedFiles):
    """Reads any row of a cache, and checks it: the file's length and layout, and the row's checksum."""

    def __init__(self, cache: FeatureCache, split: str, keys: Sequence[str]):
        """Find the photos of a split in the cache.

        Args:
            cache: The feature cache.
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

    def read(self, row: int, copy: int) -> tuple[PhotoTokens, torch.Tensor]:
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
            views, classes = (slice(*map(int, ends[at : at + 2])) for ends in (head.view_ends, head.class_ends))
            rows = {"cls": views, "cells": views, "regions": slice(at, at + 1), "masks": classes}
            parts = {name: self._read_rows(number, head, name, place) for name, place in rows.items()}
            small = {name: tensor[at] for name, tensor in head.small.items()}
            if checksum(*map(bytes_of, (parts | small).values())) != photo.checksums[copy]:
                raise Damage("its bytes have changed")
        mask = small["view_mask"]
        tokens = PhotoTokens(
            cls=spread(parts["cls"], mask),
            cells=spread(parts["cells"], mask),
            regions=parts["regions"][0],
            boxes=small["boxes"],
            view_mask=mask,
        )
        targets = spread(parts["masks"], small["mask_classes"])
        return tokens, targets if small["has_mask"] else torch.full_like(targets, torch.nan)

    def _head(self, number: int) -> _Head:
        """A file's header and its small tensors; read once in each process."""
        if number not in self._heads:
            shard = self.index.shards[number]
            length = int.from_bytes(self.read_range(number, 0, LENGTH_BYTES), "little")
            if length > min(MOST_HEADER_BYTES, shard.bytes):
                raise Damage("its header cannot be read")
            try:
                header = json.loads(self.read_range(number, LENGTH_BYTES, LENGTH_BYTES + length))
                layout = {name: value for name, value in header.items() if name != "__metadata__"}
                shapes = {name: tuple(value["shape"]) for name, value in layout.items()}
                starts = {name: LENGTH_BYTES + length + value["data_offsets"][0] for name, value in layout.items()}
                expected = self._expected(number, shapes["cls"][0], shapes["masks"][0])
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise Damage("its header cannot be read") from error
            if {name: (DTYPES.get(value["dtype"]), shapes[name]) for name, value in layout.items()} != expected:
                raise Damage("its tensors are not those that the index describes")
            head = _Head(expected, starts, {})
            for name in SMALL:
                head.small[name] = self._read_rows(number, head, name, slice(0, shapes[name][0]))
            if head.view_ends[-1] != shapes["cls"][0] or head.class_ends[-1] != shapes["masks"][0]:
                raise Damage("its masks do not fit its tokens")
            self._heads[number] = head
        return self._heads[number]

    def _expected(self, number: int, views: int, masks: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of a file that holds this many views and masks."""
        key, dim = self.index.key, self.index.dim
        rows = sum(len(photo.checksums) for photo in self.index.shards[number].photos)
        return {
            "cls": (STORED_DTYPE, (views, dim)),
            "cells": (STORED_DTYPE, (views, key.pool_grid**2, 2 * dim)),
            "regions": (STORED_DTYPE, (rows, key.num_views, dim)),
            "masks": (MASK_DTYPE, (masks, key.mask_side, key.mask_side)),
            "boxes": (torch.float32, (rows, key.num_views, 4)),
            "view_mask": (torch.bool, (rows, key.num_views)),
            "mask_classes": (torch.bool, (rows, len(MASK_CLASSES))),
            "has_mask": (torch.bool, (rows,)),
        }

    def _read_rows(self, number: int, head: _Head, name: str, rows: slice) -> torch.Tensor:
        dtype, (_, *shape) = head.layout[name]
        size, start = prod(shape) * dtype.itemsize, head.starts[name]
        data = self.read_range(number, start + rows.start * size, start + rows.stop * size)
        if not data:  # which `frombuffer` refuses
            return torch.empty(0, *shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, *shape)


@dataclass(frozen=True)
class _Head:
    """The part of a file that is kept in memory."""

    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    starts: dict[str, int]
    """Start of each tensor, in bytes from the file's start."""
    small: dict[str, torch.Tensor]
    """The tensors that `SMALL` names, whole."""

    @cached_property
    def view_ends(self) -> np.ndarray:
        """Position of each row's first view among all of the file's views: int [rows + 1]."""
        return _ends(self.small["view_mask"])

    @cached_property
    def class_ends(self) -> np.ndarray:
        """Position of each row's first mask among all of the file's masks: int [rows + 1]."""
        return _ends(self.small["mask_classes"])


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's values as they are stored in a file."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _ends(present: torch.Tensor) -> np.ndarray:
    return np.concatenate([[0], present.sum(1).cumsum(0).numpy()])


def spread(rows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Put the stored rows at their positions, with zeros between.

    Args:
        rows: [M, ...].
        present: bool [N], with M of them true.
    """
    if bool(present.all()):
        return rows
    whole = rows.new_zeros((len(present), *rows.shape[1:]))
    whole[present] = rows
    return whole
