"""The model's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class RoadworkOutput(ModelOutput):
    """The model's output; a baseline head leaves None what it does not predict."""

    loss: torch.Tensor | None = None
    """Scalar loss, if it was asked for."""
    logits: torch.Tensor | None = None
    """[B, 2]."""
    weather_logits: torch.Tensor | None = None
    """[B, 8]."""
    mask_logits: torch.Tensor | None = None
    """[B, 6, m, m]."""
    view_logits: torch.Tensor | None = None
    """[B, K, 2], each kept view's own prediction."""
    view_scores: torch.Tensor | None = None
    """[B, V], the pruner's scores."""
    view_importance: torch.Tensor | None = None
    """[B, K], the gates of the fusion."""
    router_logits: tuple[torch.Tensor, ...] | None = None
    """[B, T, E] for each layer."""
    view_indices: torch.Tensor | None = None
    """int64 [B, K], which views were kept."""
    view_mask: torch.Tensor | None = None
    """bool [B, K], which of the kept views exist."""
    token_mask: torch.Tensor | None = None
    """bool [B, T], which tokens exist."""
    loss_terms: dict[str, torch.Tensor] | None = None
    """[B] by term, before weighting."""

    @property
    def kept_all(self) -> bool:
        """Whether no view was pruned, so that the fusion's importance can teach the pruner."""
        if self.view_scores is None or self.view_indices is None:
            return False
        return self.view_indices.shape == self.view_scores.shape
