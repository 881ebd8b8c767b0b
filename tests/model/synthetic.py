"""Photos as cached tokens of noise in which one cell of one view shows the roadwork, and heads that learn from them."""

from __future__ import annotations

from dataclasses import asdict

import torch

from pipeline.data.batch import Batch
from pipeline.data.views import view_boxes
from pipeline.model.config import LossConfig
from pipeline.model.encoder import Encoded
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from tests.small_run import small_config

DIM, VIEWS, GRID = 16, 12, 2
SIGNAL = 4.0


def photos(count: int, seed: int) -> Batch:
    """Cached tokens of some photos; the sign is in the first numbers of a cell, of its view's CLS and of its region."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels = torch.arange(count), torch.randint(2, (count,), generator=generator)
    view, cell = (torch.randint(low, high, (count,), generator=generator) for low, high in ((1, VIEWS), (0, GRID**2)))
    cls, regions = (torch.randn(count, VIEWS, DIM, generator=generator) for _ in range(2))
    cells = torch.randn(count, VIEWS, GRID**2, 2 * DIM, generator=generator)
    shown = SIGNAL * labels[:, None]
    cells[rows, view, cell, :6] += shown
    cls[rows, view, :6] += shown / 2
    regions[rows, view, :6] += shown
    return {
        "cls": cls, "cells": cells, "regions": regions, "labels": labels,
        "boxes": view_boxes(4032, 3024, 32).expand(count, -1, -1).contiguous(),
        "view_mask": torch.ones(count, VIEWS, dtype=torch.bool),
    }  # fmt: skip


def learner(
    seed: int, loss: LossConfig | None = None, heads: int = 1, version: int = 2, **sizes: object
) -> RoadworkModel:
    """A small model without a backbone, for these tokens."""
    config = small_config("none", **{"keep_views": 6, "experts": 1, "metadata": (), **sizes})
    torch.manual_seed(seed)
    built = RoadworkConfig(**asdict(config), backbone_dim=DIM, ensemble=heads, format_version=version)
    return RoadworkModel(built, loss or LossConfig())


def train(model: RoadworkModel, steps: int, batch: int = 24, lr: float = 5e-3) -> RoadworkModel:
    """Some steps as the trainer takes them: dropout, pruning with exploration, all views in every fourth step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        output = model(photos(batch, 1 + step), with_loss=True, keep_all=step % 4 == 0)
        assert output.loss is not None
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def all_views(batch: Batch) -> Encoded:
    """What an encoder without a pruner gives for a batch of tokens."""
    count, views = batch["view_mask"].shape
    return Encoded(
        cls=batch["cls"], cells=batch["cells"], boxes=batch["boxes"], mask=batch["view_mask"],
        indices=torch.arange(views).expand(count, -1), scores=None, gates=torch.ones(count, views),
    )  # fmt: skip
