"""Samples from the shards: bytes at known offsets, then views, metadata and targets as tensors."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from pipeline.data.index import Sample, Split
from pipeline.data.photo import decode
from pipeline.data.record import Metadata, Record
from pipeline.data.views import extract_views, useful_views, view_boxes
from pipeline.data.vocabulary import DAYTIME, MASK_CLASSES, SCENE, WEATHER
from pipeline.errors import UserError

PHOTO_EXTENSIONS = ("jpg", "png", "webp")
VIEW_KEYS = ("views", "boxes", "view_mask")
METADATA_KEYS = ("gps", "weather", "daytime", "scene")


def prepare(data: bytes, side: int, num_views: int) -> dict[str, torch.Tensor]:
    """Decode a photo and cut its views.

    Args:
        data: The photo's file, of any format.
        side: View side S in pixels.
        num_views: V, from the first view on.

    Returns:
        views uint8 [V, 3, S, S], boxes float32 [V, 4] and view_mask bool [V].

    Raises:
        BadPhoto: The bytes are no usable photo.
    """
    image = decode(data)
    height, width = image.shape[:2]
    return {
        "views": extract_views(image, side, num_views),
        "boxes": view_boxes(width, height, side)[:num_views],
        "view_mask": useful_views(width, height, side)[:num_views],
    }


def metadata_tensors(metadata: Metadata) -> dict[str, torch.Tensor]:
    """gps float64 [2] and weather float32 [8], both NaN where NULL; daytime and scene int64 [], 0 where NULL."""
    gps = torch.full((2,), torch.nan, dtype=torch.float64)
    if metadata.gps is not None:
        gps = torch.tensor(metadata.gps, dtype=torch.float64)
    weather = torch.full((len(WEATHER),), torch.nan)
    if metadata.weather is not None:
        weather = torch.tensor([float(word in metadata.weather) for word in WEATHER])
    return {
        "gps": gps,
        "weather": weather,
        "daytime": torch.tensor(0 if metadata.daytime is None else 1 + DAYTIME.index(metadata.daytime)),
        "scene": torch.tensor(0 if metadata.scene is None else 1 + SCENE.index(metadata.scene)),
    }


def mask_targets(data: bytes | None, side: int) -> torch.Tensor:
    """Share of each cell that each class covers: float32 [6, side, side], all NaN without a mask.

    Args:
        data: A mask PNG whose value c + 1 marks class c, or None.
        side: Cells per side.
    """
    if data is None:
        return torch.full((len(MASK_CLASSES), side, side), torch.nan)
    mask = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    targets = torch.zeros(len(MASK_CLASSES), side, side)
    for class_, target in enumerate(targets):
        covered = mask == class_ + 1
        if covered.any():  # most classes are in few photos
            target.copy_(F.adaptive_avg_pool2d(torch.from_numpy(covered)[None].float(), side)[0])
    return targets


class ShardDataset(Dataset[dict[str, torch.Tensor]]):
    """One split of a folder of shards, any sample in one read; the tars are never scanned."""

    def __init__(self, folder: Path, split: Split, side: int, num_views: int, mask_side: int):
        """See `prepare` and `mask_targets` for the sizes."""
        self.folder, self.split = folder, split
        self.side, self.num_views, self.mask_side = side, num_views, mask_side
        self._files: dict[int, int] = {}
        for shard in split.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"the shard {path} is missing or not {shard.bytes} bytes long; shard again")

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Views, metadata and targets of a sample; `labels` is -1 where unknown, `row` its place in the split."""
        sample = self.split.samples[row]
        mask = self._read(sample, "mask.png") if "mask.png" in sample.members else None
        return {
            **prepare(self.photo(row), self.side, self.num_views),
            **metadata_tensors(self.record(row).metadata),
            "labels": torch.tensor(-1 if sample.label is None else sample.label),
            "mask_targets": mask_targets(mask, self.mask_side),
            "row": torch.tensor(row),
        }

    def photo(self, row: int) -> bytes:
        """The photo's original bytes."""
        sample = self.split.samples[row]
        return self._read(sample, next(e for e in PHOTO_EXTENSIONS if e in sample.members))

    def record(self, row: int) -> Record:
        """The sample's record."""
        return Record.from_json(json.loads(self._read(self.split.samples[row], "json")))

    def _read(self, sample: Sample, extension: str) -> bytes:
        offset, size = sample.members[extension]
        if sample.shard not in self._files:
            self._files[sample.shard] = os.open(self.folder / self.split.shards[sample.shard].name, os.O_RDONLY)
        return os.pread(self._files[sample.shard], size, offset)

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors do not travel to spawned workers; each opens its own.
        return {**self.__dict__, "_files": {}}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples into a batch, key by key."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's forward takes from a batch: views and metadata, no targets."""
    return {key: batch[key] for key in (*VIEW_KEYS, *METADATA_KEYS)}
