"""Mixup (Zhang et al. 2018, arXiv 1710.09412) of photos in pairs, on the frozen backbone's tokens.

Training from photos and training from the feature cache both have these tokens, so both mix the same. It is manifold
mixup (Verma et al. 2019, arXiv 1806.05236) right after the backbone: everything that learns sees the mixed photo, the
pruner included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.devices import upload
from pipeline.model.moe import at_least_float32

# The views of a pair are mixed one by one, so they must show the same part of their photos, up to this share of a side.
# Tiles always do, and so do crops of photos whose aspects are close.
BOX_TOLERANCE = 0.02


@dataclass(frozen=True)
class Mix:
    """Which photos are mixed, and how much stays of each."""

    partner: torch.Tensor
    """Row of each photo's partner: int64 [B], its own inverse; a photo without a partner is its own."""
    share: torch.Tensor
    """Share of the photo itself: float32 [B] in [0.5, 1]; the same for both of a pair, and 1 without a partner."""

    def to(self, device: torch.device) -> Mix:
        """The same mix on another device."""
        return Mix(upload(self.partner, device), upload(self.share, device))

    def blend(self, value: torch.Tensor) -> torch.Tensor:
        """Mix `share` of each row with the rest of its partner's: [B, ...] to the same shape, in float32 or more."""
        value = at_least_float32(value)
        share = self.share.to(value.dtype).view(-1, *[1] * (value.dim() - 1))
        return share * value + (1 - share) * value[self.partner]


def draw_mix(boxes: torch.Tensor, view_mask: torch.Tensor, alpha: float) -> Mix:
    """Pair the photos of a batch at random, and draw for each pair how much stays of each photo.

    The share is max(x, 1 - x) with x ~ Beta(alpha, alpha), since either photo of a pair may count as the photo itself.
    All draws come from PyTorch's CPU generator, which the trainer seeds for every step and rank.

    Only photos with the same views at the same boxes are paired; others stay as they are.

    Args:
        boxes: [B, V, 4] as x0, y0, x1, y1 in [0, 1].
        view_mask: bool [B, V].
        alpha: Above 0; the larger, the more even the shares.
    """
    boxes, view_mask = boxes.cpu(), view_mask.cpu()
    count = len(boxes)
    shares = torch.distributions.Beta(alpha, alpha).sample((count,)).float()
    partner, share = torch.arange(count), torch.ones(count)
    waiting: list[int] = []
    for photo in torch.randperm(count).tolist():
        fits = (
            other
            for other in waiting
            if torch.equal(view_mask[photo], view_mask[other])
            and (boxes[photo] - boxes[other]).abs().max() <= BOX_TOLERANCE
        )
        other = next(fits, None)
        if other is None:
            waiting.append(photo)
            continue
        waiting.remove(other)
        partner[photo], partner[other] = other, photo
        share[photo] = share[other] = max(float(shares[photo]), 1 - float(shares[photo]))
    return Mix(partner, share)
