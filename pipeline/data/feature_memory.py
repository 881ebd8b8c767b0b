"""A split's cached features in memory, read once with all checks: a step gathers its batch there and opens no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from pipeline.data.batch import Batch, BatchSource, batches_of
from pipeline.data.copies import is_streetvision
from pipeline.data.dataset import metadata_tensors
from pipeline.data.feature_dataset import FeatureDataset
from pipeline.data.feature_reader import LARGE, SMALL, Shapes, shapes_of, small_shapes
from pipeline.data.features import StoredRow
from pipeline.data.index import Split
from pipeline.data.record import Metadata
from pipeline.devices import uses_gpu

PHOTOS_AT_ONCE = 16  # that a worker reads before it hands them over
ALIGNMENT = 64  # bytes, of each tensor in shared memory
TOKENS = ("cls", "cells", "regions")  # what the head reads of the cache, 99 % of its bytes
PACKED = {"cls", "cells", "masks"}  # tensors of which a row has as many parts as it has useful views or classes


class FeatureMemory(BatchSource):
    """The rows of a `FeatureDataset` in memory, and batches of them that equal those from the files bit for bit.

    Views that add nothing take no space here either: a batch takes one row of zeros in their place. `fill` must have
    read all photos, in this process or in others that share the memory, before the first batch.
    """

    def __init__(self, data: FeatureDataset):
        """Find out how much memory the split needs, from the small tensors of its files; none is taken yet.

        Raises:
            UserError: A file of the cache is damaged.
        """
        self.data = data
        counts = [len(data.reader.photo(row).checksums) for row in range(len(data))]
        present = [data.reader.present(row, copy) for row, count in enumerate(counts) for copy in range(count)]
        self.copies = np.array(counts)
        """Rows of each photo, itself and its augmented copies: int [N]."""
        self.row_ends, self.view_ends, self.class_ends = map(_ends, (counts, *zip(*present, strict=True)))
        index, rows = data.reader.index, len(present)
        # One more view, of zeros, and two more masks: of a class that is absent, and of a photo without a mask.
        shapes: Shapes = shapes_of(index, int(self.view_ends[-1]) + 1, int(self.class_ends[-1]) + 2)
        dtype, shape = shapes["regions"]
        about = {**metadata_tensors(Metadata(), None, data.text_dim), "labels": torch.tensor(0)}
        self.shapes: Shapes = {
            **shapes,
            "regions": (dtype, (rows, *shape)),
            **{name: (dtype, (rows, *shape)) for name, (dtype, shape) in small_shapes(index).items()},
            **{name: (value.dtype, (len(data), *value.shape)) for name, value in about.items()},
        }
        self.tensors: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.data)

    @property
    def split(self) -> Split:
        """The split of the shards."""
        return self.data.split

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens."""
        return sum(_bytes(*self.shapes[name]) for name in TOKENS)

    @property
    def bytes(self) -> int:
        """Bytes of everything, with the gaps that `use` leaves."""
        return sum(_aligned(_bytes(*shape)) for shape in self.shapes.values())

    def allocate(self, device: torch.device) -> None:
        """Take memory of this process: the tokens on `device`, all that the loss counts on the CPU."""
        self.tensors = {
            name: torch.empty(shape, dtype=dtype, device=device if name in TOKENS else "cpu")
            for name, (dtype, shape) in self.shapes.items()
        }

    def use(self, memory: torch.Tensor) -> None:
        """Keep everything in memory that was taken elsewhere, uint8 of `bytes`."""
        start = 0
        for name, (dtype, shape) in self.shapes.items():
            self.tensors[name] = memory[start : start + _bytes(dtype, shape)].view(dtype).view(shape)
            start += _aligned(_bytes(dtype, shape))

    def fill(self, rows: range, workers: int) -> Iterator[int]:
        """Read photos into the memory, each with the checks of every read.

        Args:
            rows: Rows of the photos in the split, one after the other.
            workers: Processes that read and check.

        Yields:
            Each photo's row, once it is in memory.

        Raises:
            UserError: The data is damaged.
        """
        for name, row, value in (("cls", -1, 0), ("cells", -1, 0), ("masks", -2, 0), ("masks", -1, torch.nan)):
            self.tensors[name][row] = value
        loader = batches_of(Subset(_Photos(self.data), rows), PHOTOS_AT_ONCE, workers, _packed)
        row = rows.start
        for packed in loader:
            photos = slice(row, row + len(packed["labels"]))
            stored = slice(*self.row_ends[[photos.start, photos.stop]])
            views, classes = (slice(*ends[[stored.start, stored.stop]]) for ends in (self.view_ends, self.class_ends))
            places = {**dict.fromkeys((*LARGE, *SMALL), stored), "cls": views, "cells": views, "masks": classes}
            for name, tensor in packed.items():
                self.tensors[name][places.get(name, photos)].copy_(tensor, non_blocking=True)
            yield from range(photos.start, photos.stop)
            row = photos.stop

    def __getitems__(self, numbers: list[int]) -> Batch:
        """The batch of the samples with these numbers, see `FeatureDataset.load`; tokens are on the memory's device."""
        copies, rows = np.divmod(np.array(numbers), len(self))
        copies = np.where(copies < self.copies[rows], copies, 0)
        at = self.row_ends[rows] + copies
        stored, photos = torch.from_numpy(at), torch.from_numpy(rows)
        views = _places(self._take("view_mask", stored), self.view_ends[at], self.tensors["cls"].shape[0] - 1)
        views = views[:, : self.data.spec.num_views]
        none = self.tensors["masks"].shape[0] - 2
        masks = _places(self._take("mask_classes", stored), self.class_ends[at], none)
        masks = masks.where(self._take("has_mask", stored)[:, None], none + 1)
        known = {name: self._take(name, photos) for name in self.shapes if name not in (*LARGE, *SMALL)}
        return {
            **known,
            "cls": self._take("cls", views),
            "cells": self._take("cells", views),
            "regions": self._take("regions", stored)[:, : views.shape[1]],
            "boxes": self._take("boxes", stored)[:, : views.shape[1]],
            "view_mask": self._take("view_mask", stored)[:, : views.shape[1]],
            "mask_targets": self._take("masks", masks).float(),
            "null_metadata": torch.tensor([is_streetvision(copy) for copy in copies.tolist()]),
            "row": photos,
        }

    def _take(self, name: str, places: torch.Tensor) -> torch.Tensor:
        """Rows of a tensor: [*places.shape, ...]; those on the CPU in pinned memory where a GPU will read them."""
        tensor, shape = self.tensors[name], (*places.shape, *self.tensors[name].shape[1:])
        flat = places.flatten()
        if tensor.is_cuda:
            return tensor.index_select(0, flat.pin_memory().to(tensor.device, non_blocking=True)).view(shape)
        taken = torch.empty((len(flat), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=uses_gpu())
        return torch.index_select(tensor, 0, flat, out=taken).view(shape)


class _Photos(Dataset[tuple[dict[str, torch.Tensor], list[StoredRow]]]):
    """The photos of a split: what is known of each, and all of its rows as they are stored."""

    def __init__(self, data: FeatureDataset):
        self.data = data

    def __getitem__(self, row: int) -> tuple[dict[str, torch.Tensor], list[StoredRow]]:
        """See the class."""
        reader = self.data.reader
        rows = [reader.read(row, copy) for copy in range(len(reader.photo(row).checksums))]
        about = self.data.about(row, self.data.record_with(row, rows[0]))
        return {name: value for name, value in about.items() if name not in ("row", "null_metadata")}, rows


def _packed(photos: Sequence[tuple[dict[str, torch.Tensor], list[StoredRow]]]) -> Batch:
    """The tensors of consecutive photos in the form of `FeatureMemory`."""
    rows = list(chain.from_iterable(stored for _, stored in photos))
    about = {name: torch.stack([known[name] for known, _ in photos]) for name in photos[0][0]}
    joined = ((name, [getattr(row, name) for row in rows]) for name in (*LARGE, *SMALL))
    return about | {name: torch.cat(parts) if name in PACKED else torch.stack(parts) for name, parts in joined}


def _places(present: torch.Tensor, first: np.ndarray, absent: int) -> torch.Tensor:
    """Places of parts of which only those that are present were kept, one after the other: int64 [B, n].

    Args:
        present: bool [B, n].
        first: Place of the first part that each of the B has, int [B].
        absent: What takes the place of the others.
    """
    places = torch.from_numpy(first)[:, None] + present.cumsum(dim=1) - 1
    return places.where(present, absent)


def _ends(counts: Sequence[int]) -> np.ndarray:
    """Where each of some stretches begins, and where the last one ends: int64 [n + 1]."""
    return np.cumsum([0, *counts])


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return prod(shape) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
