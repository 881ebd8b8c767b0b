"""Two-stage encoding: the global view first, then only the views that the pruner keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.model.backbone import FrozenBackbone, pool_cells, pool_regions
from pipeline.model.config import ModelConfig
from pipeline.model.pruning import ViewPruner, choose_views


@dataclass
class Encoded:
    """The kept views of B photos."""

    cls: torch.Tensor
    """[B, K, D]."""
    cells: torch.Tensor
    """[B, K, g*g, 2D], mean and max of the patch tokens of each cell."""
    boxes: torch.Tensor
    """[B, K, 4]."""
    mask: torch.Tensor
    """bool [B, K], False for views that do not exist."""
    indices: torch.Tensor
    """int64 [B, K], which views these are; the global one first."""
    scores: torch.Tensor | None
    """[B, V], the pruner's; None where nothing is ever pruned."""
    gates: torch.Tensor
    """[B, K], what the views' tokens are multiplied by: sigmoid(score), through which the pruner learns, and 1 for the
    global view, which is always kept."""


class TwoStageEncoder(nn.Module):
    """Scores views from the global view's tokens, and spends the backbone on the best ones only.

    Baselines encode every view that they use; only the roadwork head prunes.
    """

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        self.config = config
        self.pruner = ViewPruner(dim, config.num_views) if config.head == "roadwork" else None
        # No nn.Module, so it is in no state_dict and no parameter list.
        self.backbone: FrozenBackbone | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's weights; the baselines' encoder has none and hands on what the backbone computes in."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def forward(self, views: torch.Tensor, boxes: torch.Tensor, view_mask: torch.Tensor, keep_all: bool) -> Encoded:
        """Encode.

        Args:
            views: uint8 [B, V, 3, S, S].
            boxes: [B, V, 4] as x0, y0, x1, y1 in [0, 1].
            view_mask: bool [B, V].
            keep_all: Prune nothing.

        Returns:
            The kept views' tokens.
        """
        assert self.backbone is not None
        device = self.backbone.device
        boxes, view_mask = boxes.to(device), view_mask.to(device)
        global_cls, global_patches = self.backbone(views[:, 0])
        if self.pruner is None:
            scores = None
            indices = torch.arange(views.shape[1], device=device).expand(len(views), -1)
        else:
            regions = pool_regions(global_patches, boxes)
            scores = self.pruner(regions.to(self.dtype), global_cls.to(self.dtype))
            mode = "off" if keep_all else self.config.pruning
            indices = choose_views(scores, view_mask, self.config.keep_views, mode, explore=self.training)
        mask = view_mask.gather(1, indices)
        cls, cells = self._encode_rest(views, indices, mask, global_cls, global_patches)
        return Encoded(
            cls=cls.to(self.dtype),
            cells=cells.to(self.dtype),
            boxes=boxes.gather(1, indices[..., None].expand(-1, -1, 4)),
            mask=mask,
            indices=indices,
            scores=scores,
            gates=self._gates(scores, indices),
        )

    def _encode_rest(
        self,
        views: torch.Tensor,
        indices: torch.Tensor,
        mask: torch.Tensor,
        global_cls: torch.Tensor,
        global_patches: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Second stage: the kept views beside the global one, without those that are masked."""
        assert self.backbone is not None
        grid = self.config.pool_grid
        batch, kept = indices.shape
        cells_of_global = pool_cells(global_patches, grid)
        cls = global_cls.new_zeros((batch, kept, global_cls.shape[-1]))
        cells = cells_of_global.new_zeros((batch, kept, *cells_of_global.shape[1:]))
        cls[:, 0], cells[:, 0] = global_cls, cells_of_global
        wanted = mask.clone()
        wanted[:, 0] = False
        photo, place = wanted.nonzero(as_tuple=True)
        if len(photo):
            chosen = views[photo.to(views.device), indices[photo, place].to(views.device)]
            chosen_cls, chosen_patches = self.backbone(chosen)
            cls[photo, place], cells[photo, place] = chosen_cls, pool_cells(chosen_patches, grid)
        return cls, cells

    @staticmethod
    def _gates(scores: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor:
        if scores is None:
            return torch.ones_like(indices, dtype=torch.float32)
        gates = scores.sigmoid().gather(1, indices)
        return torch.cat([torch.ones_like(gates[:, :1]), gates[:, 1:]], dim=1)
