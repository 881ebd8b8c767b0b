"""What the model answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class RoadworkOutput(ModelOutput):
    """What the model answers; a baseline head leaves None what it has not."""

    loss: torch.Tensor | None = None
    """Scalar, when labels were given."""
    logits: torch.Tensor | None = None
    """[B, 2]."""
    weather_logits: torch.Tensor | None = None
    """[B, 8]."""
    mask_logits: torch.Tensor | None = None
    """[B, 6, m, m]."""
    view_logits: torch.Tensor | None = None
    """[B, K, 2], each kept view's own prediction."""
    view_scores: torch.Tensor | None = None
    """[B, V], the pruner's."""
    view_importance: torch.Tensor | None = None
    """[B, K], the gates of the fusion."""
    router_logits: tuple[torch.Tensor, ...] | None = None
    """Per layer [B, T, E]."""
    view_indices: torch.Tensor | None = None
    """int64 [B, K], which views were kept."""
    view_mask: torch.Tensor | None = None
    """bool [B, K], which of the kept views exist."""
    token_mask: torch.Tensor | None = None
    """bool [B, T]."""
    loss_terms: dict[str, torch.Tensor] | None = None
    """Per term and sample, before weighting: [B]."""

    @property
    def kept_all(self) -> bool:
        """No view was pruned, so the fusion's importance can teach the pruner."""
        if self.view_scores is None or self.view_indices is None:
            return False
        return self.view_indices.shape == self.view_scores.shape
