"""The trained head of the complete model: components 4 to 9, from the kept views' tokens to the three answers."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.model.attention import GatedLayer
from pipeline.model.config import ModelConfig
from pipeline.model.cpu_kernels import RMSNorm
from pipeline.model.encoder import Encoded
from pipeline.model.evidence import CellEvidence, cell_boxes, join
from pipeline.model.fusion import build_fusion, log_gates
from pipeline.model.heads import BinaryHead, SegmentationHead, WeatherHead
from pipeline.model.metadata import METADATA_WIDTH, MetadataEncoder
from pipeline.model.output import RoadworkOutput
from pipeline.model.projection import InputProjection
from pipeline.model.pyramid import Pyramid


class Trunk(nn.Module):
    """Gated attention over the kept views' cells, gated fusion, metadata, and three heads; cell evidence beside it."""

    def __init__(self, config: ModelConfig, dim: int):
        """Build the layers for the width D of the backbone's tokens."""
        super().__init__()
        width = config.width
        self.evidence_share = config.evidence_share
        self.pool_grid = config.pool_grid
        self.projection = InputProjection(dim, width)
        self.pyramid = Pyramid(width, config.pool_grid) if config.pyramid else nn.Identity()
        self.layers = nn.ModuleList(GatedLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(width)
        self.view_vector = nn.Linear(2 * width, width)
        self.fusion = build_fusion(config)
        self.metadata = MetadataEncoder(config)
        self.join = nn.Sequential(
            nn.Linear(width + METADATA_WIDTH, width), nn.SiLU(), nn.Dropout(config.dropout), nn.Linear(width, width)
        )
        self.binary = BinaryHead(width, config.dropout)
        self.weather = WeatherHead(width, config.dropout)
        self.segmentation = SegmentationHead(width, config.mask_side, config.pool_grid)
        # Built last, so that the trunk starts from the same weights with and without it.
        self.evidence = CellEvidence(dim, config.dropout) if config.evidence else None

    def embed(self, encoded: Encoded) -> torch.Tensor:
        """Tokens [B, K, 1 + g*g, H] of the kept views, each with the place that it shows."""
        boxes = torch.cat([encoded.boxes[:, :, None], cell_boxes(encoded.boxes, self.pool_grid)], dim=2)
        tokens: torch.Tensor = self.pyramid(self.projection(encoded.cls, encoded.cells, boxes))
        return tokens

    def attend(self, encoded: Encoded, token_mask: torch.Tensor) -> torch.Tensor | None:
        """The layers' attention mask [B, T]: the log of the pruner's gates, so that a view is gated on every path."""
        per_view = token_mask.shape[1] // encoded.mask.shape[1]
        return log_gates(encoded.gates, encoded.mask).repeat_interleave(per_view, dim=1)

    def fuse(self, vectors: torch.Tensor, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The views' vectors [B, K, H] fused into one, [B, H], and their importance [B, K]."""
        fused: tuple[torch.Tensor, torch.Tensor | None] = self.fusion(vectors, encoded.mask, encoded.gates)
        return fused

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """Answer for B photos from their kept views; see `RoadworkOutput` for the shapes."""
        views = self.embed(encoded)
        batch, kept, per_view, _ = views.shape
        token_mask = encoded.mask[..., None].expand(-1, -1, per_view).flatten(1)
        tokens, router_logits = views.flatten(1, 2), []
        attend = self.attend(encoded, token_mask)
        for layer in self.layers:
            tokens, routed = layer(tokens, attend)
            if routed is not None:
                router_logits.append(routed)
        views = self.norm(tokens).unflatten(1, (kept, per_view))
        # CLS and the maximum over the cells: in a mean a view's vector would lose small objects.
        vectors = self.view_vector(torch.cat([views[:, :, 0], views[:, :, 1:].amax(dim=2)], dim=-1))
        fused, importance = self.fuse(vectors, encoded)
        known = self.metadata(metadata, batch, null_metadata, encoded.mix)
        logits: torch.Tensor = self.binary(fused + self.join(torch.cat([fused, known], dim=-1)))
        output = RoadworkOutput(
            logits=logits,
            weather_logits=self.weather(fused),
            mask_logits=self.segmentation(views[:, :, 1:], encoded.boxes, encoded.mask),
            view_logits=self.binary(vectors),
            view_scores=encoded.scores,
            view_importance=importance,
            router_logits=tuple(router_logits) or None,
            view_indices=encoded.indices,
            view_boxes=encoded.boxes,
            view_mask=encoded.mask,
            token_mask=token_mask,
        )
        if self.evidence is not None:
            log_odds, cells = self.evidence(encoded.cells, encoded.mask)
            output.logits, output.fused_logits = join(logits, log_odds, self.evidence_share), logits
            output.evidence_logits, output.evidence_map = log_odds, cells
        return output
