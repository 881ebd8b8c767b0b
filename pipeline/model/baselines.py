"""Baseline heads on the same frozen backbone, with which the roadwork head is compared."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.model.config import ModelConfig
from pipeline.model.encoder import Encoded
from pipeline.model.output import RoadworkOutput


def describe_views(encoded: Encoded, head: nn.Module) -> torch.Tensor:
    """One vector per view, of CLS, mean and max over its patch tokens: [B, K, 3D] in the dtype of the head's weights.

    A baseline's encoder has no weights, so it does not know whether an engine has made those of the head bf16.
    """
    mean, peak = encoded.cells.chunk(2, dim=-1)
    vectors = torch.cat([encoded.cls, mean.mean(dim=2), peak.amax(dim=2)], dim=-1)
    return vectors.to(next(head.parameters()).dtype)


class SingleView(nn.Module):
    """A linear classifier of the global view alone, its input normed without weights."""

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        self.classify = nn.Sequential(nn.LayerNorm(3 * dim, elementwise_affine=False), nn.Linear(3 * dim, 2))

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Logits [B, 2]; metadata is not read."""
        logits = self.classify(describe_views(encoded, self)[:, 0])
        return RoadworkOutput(logits=logits, view_indices=encoded.indices, view_mask=encoded.mask)


class MeanPool(nn.Module):
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

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Logits [B, 2]; metadata is not read."""
        vectors = describe_views(encoded, self)
        present = encoded.mask[..., None].to(vectors.dtype)
        mean = (vectors * present).sum(dim=1) / present.sum(dim=1)
        return RoadworkOutput(logits=self.classify(mean), view_indices=encoded.indices, view_mask=encoded.mask)


class AttentionMIL(nn.Module):
    """Gated attention pooling over the views as a bag of instances (Ilse, Tomczak & Welling 2018, eq. 9)."""

    def __init__(self, config: ModelConfig, dim: int):
        super().__init__()
        width = config.width
        self.embed = nn.Sequential(nn.LayerNorm(3 * dim), nn.Linear(3 * dim, width), nn.SiLU())
        self.content = nn.Linear(width, width // 4)
        self.gate = nn.Linear(width, width // 4)
        self.attend = nn.Linear(width // 4, 1)
        self.classify = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, 2))

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Logits [B, 2], with the attention weights as the views' importance; metadata is not read."""
        instances = self.embed(describe_views(encoded, self))
        scores = self.attend(self.content(instances).tanh() * self.gate(instances).sigmoid()).squeeze(-1)
        attention = scores.masked_fill(~encoded.mask, -torch.inf).softmax(dim=-1)
        bag = (attention[..., None] * instances).sum(dim=1)
        return RoadworkOutput(
            logits=self.classify(bag),
            view_importance=attention,
            view_indices=encoded.indices,
            view_mask=encoded.mask,
        )


BASELINES = {"single_view": SingleView, "mean_pool": MeanPool, "attention_mil": AttentionMIL}


def build_baseline(config: ModelConfig, dim: int) -> nn.Module:
    """The baseline that `model.head` names, for backbone tokens of width `dim`."""
    return BASELINES[config.head](config, dim)
