"""The output of the model and of the baseline heads."""

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
    """The answer: logits of none and roadwork, [B, 2]; heads are averaged, and cell evidence has joined."""
    fused_logits: torch.Tensor | None = None
    """The trunk's own logits, [B, 2], where cell evidence joins them; None where they are the answer."""
    evidence_logits: torch.Tensor | None = None
    """Log-odds of roadwork by the cell evidence alone, [B]."""
    evidence_map: torch.Tensor | None = None
    """Log-odds that a cell of a kept view shows roadwork, [B, K, g*g]."""
    weather_logits: torch.Tensor | None = None
    """Logits of the weather words, [B, 8]."""
    mask_logits: torch.Tensor | None = None
    """Logits of the six object classes on a grid over the photo, [B, 6, m, m]."""
    view_logits: torch.Tensor | None = None
    """Logits of each kept view's own prediction, [B, K, 2]."""
    view_scores: torch.Tensor | None = None
    """The pruner's scores, [B, V]."""
    view_importance: torch.Tensor | None = None
    """The gates of the fusion, [B, K]."""
    router_logits: tuple[torch.Tensor, ...] | None = None
    """The routers' logits, [B, T, E] for each layer."""
    view_indices: torch.Tensor | None = None
    """Numbers of the kept views, int64 [B, K]."""
    view_boxes: torch.Tensor | None = None
    """Boxes of the kept views as x0, y0, x1, y1 in [0, 1], [B, K, 4]."""
    view_mask: torch.Tensor | None = None
    """Which of the kept views exist, bool [B, K]."""
    token_mask: torch.Tensor | None = None
    """Which tokens exist, bool [B, T]."""
    loss_terms: dict[str, torch.Tensor] | None = None
    """Values per sample, [B], by loss term, before weighting."""
    members: tuple[RoadworkOutput, ...] | None = None
    """The outputs of the single heads, where there are several; the parts above are then their means."""

    @property
    def trunk_logits(self) -> torch.Tensor | None:
        """The logits [B, 2] that the trunk, or a baseline head, gives without the cell evidence."""
        return self.logits if self.fused_logits is None else self.fused_logits

    @property
    def kept_all(self) -> bool:
        """Whether no view was pruned, so that the fusion's importance can teach the pruner."""
        if self.view_scores is None or self.view_indices is None:
            return False
        return self.view_indices.shape == self.view_scores.shape
