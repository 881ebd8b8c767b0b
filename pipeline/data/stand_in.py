"""Noise in the shape of photos, for a dry run where no shards exist yet."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from pipeline.data.dataset import mask_targets, metadata_tensors
from pipeline.data.record import Metadata
from pipeline.data.views import useful_views, view_boxes

PHOTO_SIZE = (4032, 3024)


class StandIn(Dataset[dict[str, torch.Tensor]]):
    """Samples as `ShardDataset` gives them, of noise, half of them labelled roadwork."""

    def __init__(self, samples: int, side: int, num_views: int, mask_side: int, text_dim: int):
        self.samples, self.side, self.num_views, self.mask_side = samples, side, num_views, mask_side
        self.text_dim = text_dim

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """See `ShardDataset`."""
        generator = torch.Generator().manual_seed(row)
        shape = (self.num_views, 3, self.side, self.side)
        return {
            "views": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "boxes": view_boxes(*PHOTO_SIZE, self.side)[: self.num_views],
            "view_mask": useful_views(*PHOTO_SIZE, self.side)[: self.num_views],
            **metadata_tensors(Metadata(), text_dim=self.text_dim),
            "null_metadata": torch.tensor(False),
            "labels": torch.tensor(row % 2),
            "mask_targets": mask_targets(None, self.mask_side),
            "row": torch.tensor(row),
        }
