"""Baseline heads on the same frozen backbone, with which the roadwork head is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from pipeline.model.config import ModelConfig
from pipeline.model.encoder import Encoded
from pipeline.model.evidence import CellEvidence, as_logits
from pipeline.model.output import RoadworkOutput


class Baseline(nn.Module, ABC):
    """A head that sees one vector per view, and no metadata."""

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Logits [B, 2], and the views' importance where the baseline has one; metadata is not read."""
        logits, importance = self.judge(self._describe_views(encoded), encoded.mask)
        return RoadworkOutput(
            logits=logits, view_importance=importance, view_indices=encoded.indices, view_boxes=encoded.boxes,
            view_mask=encoded.mask,
        )  # fmt: skip

    @abstractmethod
    def judge(self, views: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [B, 2], and the importance [B, K] of the views [B, K, 3D] that exist in `mask` [B, K], if known."""

    def _describe_views(self, encoded: Encoded) -> torch.Tensor:
        """One vector per view, of CLS, mean and max over its patch tokens: [B, K, 3D] in the dtype of the weights.

        A baseline's encoder has no weights, so it does not know whether an engine has made those of the head bf16.
        """
        mean, peak = encoded.cells.chunk(2, dim=-1)
        vectors = torch.cat([encoded.cls, mean.mean(dim=2), peak.amax(dim=2)], dim=-1)
        return vectors.to(next(self.parameters()).dtype)


class SingleView(Baseline):
    """A linear classifier of the global view alone, its input normed without weights."""

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        self.classify = nn.Sequential(nn.LayerNorm(3 * dim, elementwise_affine=False), nn.Linear(3 * dim, 2))

    def judge(self, views: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Baseline`."""
        return self.classify(views[:, 0]), None


class MeanPool(Baseline):
    """A two-layer perceptron on the mean over all views."""

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        self.classify = nn.Sequential(
            nn.LayerNorm(3 * dim),
            nn.Linear(3 * dim, config.width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, 2),
        )

    def judge(self, views: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Baseline`."""
        present = mask[..., None].to(views.dtype)
        mean = (views * present).sum(dim=1) / present.sum(dim=1)
        return self.classify(mean), None


class AttentionMIL(Baseline):
    """Gated attention pooling over the views as a bag of instances (Ilse, Tomczak & Welling 2018, eq. 9)."""

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        width = config.width
        self.embed = nn.Sequential(nn.LayerNorm(3 * dim), nn.Linear(3 * dim, width), nn.SiLU())
        self.content = nn.Linear(width, width // 4)
        self.gate = nn.Linear(width, width // 4)
        self.attend = nn.Linear(width // 4, 1)
        self.classify = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, 2))

    def judge(self, views: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Baseline`; the attention weights are the views' importance."""
        instances = self.embed(views)
        scores = self.attend(self.content(instances).tanh() * self.gate(instances).sigmoid()).squeeze(-1)
        attention = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return self.classify((attention[..., None] * instances).sum(dim=1)), attention


class CellMIL(nn.Module):
    """Cell evidence alone, over the cells of all views: the strongest opponent that costs little.

    A cell is judged without its place, its view or any other cell. It learns from labels, and from masks if there are
    any.
    """

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        self.evidence = CellEvidence(dim, config.dropout)

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Logits [B, 2], and the log-odds of each cell; metadata is not read."""
        cells = encoded.cells.to(next(self.parameters()).dtype)
        log_odds, found = self.evidence(cells, encoded.mask)
        return RoadworkOutput(
            logits=as_logits(log_odds), evidence_map=found, view_indices=encoded.indices, view_boxes=encoded.boxes,
            view_mask=encoded.mask,
        )  # fmt: skip


BASELINES: dict[str, type[nn.Module]] = {
    "single_view": SingleView, "mean_pool": MeanPool, "attention_mil": AttentionMIL, "cell_mil": CellMIL,
}  # fmt: skip
