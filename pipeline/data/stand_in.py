"""Noise in the shape of photos, for a dry run before shards exist."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from pipeline.data.dataset import mask_targets, metadata_tensors
from pipeline.data.record import Metadata
from pipeline.data.views import useful_views, view_boxes
from pipeline.model.config import InputSpec

PHOTO_SIZE = (4032, 3024)


class StandIn(Dataset[dict[str, torch.Tensor]]):
    """Samples of noise in the form of `ShardDataset`'s, half of them labelled roadwork."""

    def __init__(self, samples: int, spec: InputSpec, text_dim: int):
        self.samples, self.spec, self.text_dim = samples, spec, text_dim

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """See `ShardDataset`."""
        generator = torch.Generator().manual_seed(row)
        side, num_views = self.spec.view_side, self.spec.num_views
        return {
            "views": torch.randint(0, 256, (num_views, 3, side, side), dtype=torch.uint8, generator=generator),
            "boxes": view_boxes(*PHOTO_SIZE, side)[:num_views],
            "view_mask": useful_views(*PHOTO_SIZE, side)[:num_views],
            **metadata_tensors(Metadata(), text_dim=self.text_dim),
            "null_metadata": torch.tensor(False),
            "labels": torch.tensor(row % 2),
            "mask_targets": mask_targets(None, self.spec.mask_side),
            "row": torch.tensor(row),
        }
