"""Photos of noise as a batch, and models that give a loss."""

from __future__ import annotations

import torch

from pipeline.data.batch import Batch
from pipeline.model.config import LossConfig
from pipeline.model.encoder import all_tokens
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import SIDE

BATCH, VIEWS = 3, 12
METADATA = {
    "gps": torch.tensor([[55.7, 13.2], [52.5, 13.4], [torch.nan, torch.nan]]),
    "weather": torch.tensor([[1.0] + [0.0] * 7, [0.0] * 7 + [1.0], [torch.nan] * 8]),
    "daytime": torch.tensor([1, 2, 0]),
    "scene": torch.tensor([1, 0, 3]),
}


def random_photos() -> Batch:
    """Views, boxes and masks of `BATCH` photos, all of whose views exist."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(BATCH, VIEWS, 2, generator=generator) * 0.5
    boxes = torch.cat([corner, corner + 0.4], dim=-1)
    boxes[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return {
        "views": torch.randint(0, 256, (BATCH, VIEWS, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "boxes": boxes,
        "view_mask": torch.ones(BATCH, VIEWS, dtype=torch.bool),
    }


def cached(model: RoadworkModel, photos: Batch) -> Batch:
    """What stands in for the views of some photos in a batch from the feature cache."""
    tokens = all_tokens(model.backbone, photos["views"], photos["boxes"], photos["view_mask"], 2)
    return {**tokens._asdict(), "boxes": photos["boxes"], "view_mask": photos["view_mask"]}


def with_loss(model: RoadworkModel, **weights: float) -> RoadworkModel:
    """The same model, built with a `LossConfig` of these fields, in evaluation mode."""
    copy = RoadworkModel(model.config, LossConfig(**weights)).eval()
    copy.load_state_dict(model.state_dict())
    return copy.attach(model.backbone)
