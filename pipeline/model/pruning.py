"""Component 3: view pruning, decided from the global view alone, before the backbone sees the others."""

from __future__ import annotations

import torch
from torch import nn


class ViewPruner(nn.Module):
    """Scores views by what the global view shows under them, and keeps the best.

    score s_v = MLP([LayerNorm(region_v); LayerNorm(global CLS); view embedding]).
    """

    def __init__(self, dim: int, views: int, width: int = 128, embedding: int = 32):
        super().__init__()
        self.region_norm = nn.LayerNorm(dim)
        self.cls_norm = nn.LayerNorm(dim)
        self.view_embedding = nn.Embedding(views, embedding)
        self.mlp = nn.Sequential(nn.Linear(2 * dim + embedding, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, regions: torch.Tensor, global_cls: torch.Tensor) -> torch.Tensor:
        """Score every view.

        Args:
            regions: [B, V, D], means of the global view's patch tokens under each view's box.
            global_cls: [B, D].

        Returns:
            Scores [B, V].
        """
        batch, views, _ = regions.shape
        parts = [
            self.region_norm(regions),
            self.cls_norm(global_cls)[:, None].expand(-1, views, -1),
            self.view_embedding.weight[:views].expand(batch, -1, -1),
        ]
        scores: torch.Tensor = self.mlp(torch.cat(parts, dim=-1)).squeeze(-1)
        return scores


@torch.no_grad()
def choose_views(scores: torch.Tensor, view_mask: torch.Tensor, keep: int, mode: str, explore: bool) -> torch.Tensor:
    """Indices of the kept views, the global view (0) first, the others in their own order.

    Args:
        scores: [B, V].
        view_mask: bool [B, V], False for views that do not exist.
        keep: Views to keep, K.
        mode: `scored`, `random` (the control) or `off`, which keeps all V.
        explore: Add Gumbel noise to the scores, which samples without replacement in proportion to exp(score)
            (Kool et al. 2019, arXiv 1903.06059); for training only.

    Returns:
        int64 [B, K].
    """
    batch, views = scores.shape
    if mode == "off" or keep >= views:
        return torch.arange(views, device=scores.device).expand(batch, -1)
    ranking = torch.zeros_like(scores, dtype=torch.float32) if mode == "random" else scores.float()
    if explore or mode == "random":
        ranking = ranking - torch.empty_like(ranking).exponential_().log()
    ranking = ranking.masked_fill(~view_mask, -torch.inf)
    ranking[:, 0] = torch.inf
    return ranking.topk(keep, dim=1).indices.sort(dim=1).values
