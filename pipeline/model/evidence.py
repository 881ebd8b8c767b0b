"""Cell evidence: every cell of the kept views judged on its own, beside the trunk.

A small perceptron sees one frozen cell at a time. The photo's log-odds are the log of the sum of its cells' odds, so
one cell that shows a cone is enough, and each cell's log-odds can be drawn as a heat map. The branch shares no weight
with the trunk and has losses of its own. A single loss on the sum of both would leave the trunk untrained: the branch
learns first, and then there is nothing left to learn.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.model.backbone import interval_overlap
from pipeline.model.cpu_kernels import Linear
from pipeline.model.heads import stitch
from pipeline.model.moe import at_least_float32
from pipeline.model.output import RoadworkOutput

WIDTH = 128
PRIOR = 0.005  # share of cells that show roadwork
FULL_COVER = 0.05  # share of a cell's area that objects must cover for the cell to count fully as roadwork


class CellEvidence(nn.Module):
    """Log-odds of roadwork for single cells: LayerNorm, Linear 2D -> 128, SiLU, dropout, Linear 128 -> 1."""

    def __init__(self, dim: int, dropout: float):
        """Take the width D of the backbone's tokens."""
        super().__init__()
        last = nn.Linear(WIDTH, 1)
        nn.init.constant_(last.bias, math.log(PRIOR / (1 - PRIOR)))
        self.judge = nn.Sequential(nn.LayerNorm(2 * dim), Linear(2 * dim, WIDTH), nn.SiLU(), nn.Dropout(dropout), last)

    def forward(self, cells: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge the cells of B photos.

        Args:
            cells: [B, K, g*g, 2D].
            mask: bool [B, K], False for views that do not exist.

        Returns:
            The photos' log-odds [B], over the cells of existing views, and those of each cell, [B, K, g*g].
        """
        found: torch.Tensor = self.judge(cells).squeeze(-1)
        present = at_least_float32(found).masked_fill(~mask[..., None], -torch.inf)
        return present.flatten(1).logsumexp(dim=1).to(found.dtype), found


def as_logits(log_odds: torch.Tensor) -> torch.Tensor:
    """Log-odds of roadwork [B] as logits of none and roadwork [B, 2]."""
    return torch.stack([torch.zeros_like(log_odds), log_odds], dim=-1)


def join(fused: torch.Tensor, evidence: torch.Tensor, share: float) -> torch.Tensor:
    """The weighted mean of two answers in log-odds.

    Args:
        fused: The trunk's logits of none and roadwork, [B, 2].
        evidence: Log-odds of the cells, [B].
        share: Weight of the evidence, in [0, 1].

    Returns:
        Logits [B, 2].
    """
    return (1 - share) * fused + share * as_logits(evidence)


def cell_boxes(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """The part of the photo that each cell shows.

    Args:
        boxes: The views' boxes as x0, y0, x1, y1 in [0, 1], [B, K, 4].
        grid: Cells per side g.

    Returns:
        [B, K, g*g, 4], row-major.
    """
    steps = torch.arange(grid, dtype=boxes.dtype, device=boxes.device) / grid
    row, column = torch.meshgrid(steps, steps, indexing="ij")
    corner = torch.stack([column, row], dim=-1).flatten(0, 1)  # [g*g, 2], x first
    low, size = boxes[..., None, :2], boxes[..., None, 2:] - boxes[..., None, :2]
    return torch.cat([low + size * corner, low + size * (corner + 1 / grid)], dim=-1)


def cell_targets(masks: torch.Tensor, boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """How much each cell shows of any object: 0 for none, 1 where objects cover 5 % of its area or more.

    Args:
        masks: Share of each cell of a grid over the photo that each class covers, [B, 6, m, m].
        boxes: The views' boxes, [B, K, 4].
        grid: Cells per side g of a view.

    Returns:
        [B, K, g*g].
    """
    any_class = masks.sum(dim=1).clamp(max=1)
    places = cell_boxes(boxes, grid)
    across = interval_overlap(places[..., 0], places[..., 2], masks.shape[-1]).to(masks.dtype)
    down = interval_overlap(places[..., 1], places[..., 3], masks.shape[-1]).to(masks.dtype)
    covered = torch.einsum("byx,bkcy,bkcx->bkc", any_class, down, across)
    area = down.sum(dim=-1) * across.sum(dim=-1)
    return (covered / (area * FULL_COVER)).clamp(max=1)


def evidence_mask_loss(output: RoadworkOutput, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of each cell with what it shows, averaged over the cells of existing views: [B].

    Args:
        output: An output with `evidence_map`.
        masks: Share of each cell of a grid over the photo that each class covers, without NaN, [B, 6, m, m].
    """
    assert output.evidence_map is not None
    assert output.view_boxes is not None
    assert output.view_mask is not None
    logits = at_least_float32(output.evidence_map)
    targets = cell_targets(masks.to(logits.dtype), output.view_boxes, round(math.sqrt(logits.shape[-1])))
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)
    present = output.view_mask.to(entropy.dtype)
    return (entropy * present).sum(dim=1) / present.sum(dim=1)


def stitch_map(output: RoadworkOutput, side: int) -> torch.Tensor:
    """The heat map of a photo: the probability that a place shows roadwork, as the cells that cover it judge.

    Args:
        output: An output with `evidence_map`.
        side: Points per side of the map.

    Returns:
        [B, side, side] in [0, 1]; finer views count more.
    """
    assert output.evidence_map is not None
    assert output.view_boxes is not None
    assert output.view_mask is not None
    grid = round(math.sqrt(output.evidence_map.shape[-1]))
    cells = output.evidence_map.float().sigmoid().unflatten(2, (grid, grid))
    return stitch(cells[:, :, None], output.view_boxes, output.view_mask, side)[:, 0]
