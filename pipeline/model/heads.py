"""Component 9: the three heads: roadwork, weather, and six-class segmentation."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.model.backbone import interval_overlap as overlap
from pipeline.names import MASK_CLASSES, WEATHER

PRIOR = 0.01  # share of cells in which a class is seen


class ClassifierHead(nn.Module):
    """A classifier with one hidden layer: H -> H/2 -> classes."""

    def __init__(self, width: int, classes: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width // 2), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width // 2, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify vectors [..., H]; returns logits [..., classes]."""
        logits: torch.Tensor = self.layers(x)
        return logits


class BinaryHead(ClassifierHead):
    """Classifies roadwork or none, for the photo and for each of its views."""

    def __init__(self, width: int, dropout: float):
        super().__init__(width, 2, dropout)


class WeatherHead(ClassifierHead):
    """Classifies the weather from the image's vector before metadata joins it, since metadata has the answer."""

    def __init__(self, width: int, dropout: float):
        super().__init__(width, len(WEATHER), dropout)


class SegmentationHead(nn.Module):
    """Six classes on a grid over the whole photo, from the kept views' cells, stitched by their boxes."""

    def __init__(self, width: int, side: int, grid: int):
        super().__init__()
        self.side, self.grid = side, grid
        self.classify = nn.Linear(width, len(MASK_CLASSES))
        # Objects cover few cells. A bias at their rarity, as in RetinaNet (arXiv 1708.02002, section 4.1), spares the
        # trunk a first phase in which it only learns to predict nothing.
        nn.init.constant_(self.classify.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, cells: torch.Tensor, boxes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Stitch the cells of all views to one grid over each photo, and classify its points.

        Args:
            cells: [B, K, g*g, H].
            boxes: [B, K, 4] as x0, y0, x1, y1 in [0, 1].
            mask: bool [B, K]. The global view is always there, so that every point is covered.

        Returns:
            Logits [B, 6, side, side]: at each point the mean over the cells that cover it, weighted by overlap area
            over the area of their view, so that finer views count more.
        """
        logits = self.classify(cells).unflatten(2, (self.grid, self.grid))
        return stitch(logits.permute(0, 1, 4, 2, 3), boxes, mask, self.side)


def stitch(cells: torch.Tensor, boxes: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    """Values of the cells of overlapping views on one grid over the photo.

    Args:
        cells: [B, K, C, g, g].
        boxes: [B, K, 4] as x0, y0, x1, y1 in [0, 1].
        mask: bool [B, K], views that count; together they cover the photo.
        side: Points per side of the grid.

    Returns:
        [B, C, side, side]: at each point the mean over the cells that cover it, weighted by overlap area over the area
        of their view, so that finer views count more.
    """
    grid = cells.shape[-1]
    step = torch.arange(grid + 1, device=boxes.device) / grid
    x = boxes[..., :1] + (boxes[..., 2:3] - boxes[..., :1]) * step
    y = boxes[..., 1:2] + (boxes[..., 3:] - boxes[..., 1:2]) * step
    across = overlap(x[..., :-1], x[..., 1:], side).to(cells.dtype)
    down = overlap(y[..., :-1], y[..., 1:], side).to(cells.dtype)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    weight = (mask / area).to(cells.dtype)
    total = torch.einsum("bknrc,bkry,bkcx,bk->bnyx", cells, down, across, weight)
    cover = torch.einsum("bky,bkx,bk->byx", down.sum(2), across.sum(2), weight)
    stitched: torch.Tensor = total / cover[:, None]
    return stitched
