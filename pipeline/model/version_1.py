"""The trunk of models whose config.json has format version 1 or none, so that they answer as they always did.

Two things were different. All tokens of a view had the place of the view, so a cell's own place was unknown. And the
pruner's gates multiplied the tokens before the first layer, whose RMSNorm undoes that, and did not weigh the views in
attention and fusion.
"""

from __future__ import annotations

import torch

from pipeline.model.encoder import Encoded
from pipeline.model.trunk import Trunk


class TrunkV1(Trunk):
    """`Trunk` as version 1 computed it, with the same weights."""

    def embed(self, encoded: Encoded) -> torch.Tensor:
        """See `Trunk.embed`."""
        views = self.projection(encoded.cls, encoded.cells, encoded.boxes[:, :, None])
        gated: torch.Tensor = self.pyramid(views) * encoded.gates[..., None, None]
        return gated

    def attend(self, encoded: Encoded, token_mask: torch.Tensor) -> torch.Tensor | None:
        """See `Trunk.attend`."""
        return None if bool(token_mask.all()) else token_mask

    def fuse(self, vectors: torch.Tensor, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Trunk.fuse`."""
        fused: tuple[torch.Tensor, torch.Tensor | None] = self.fusion(vectors, encoded.mask, None)
        return fused
