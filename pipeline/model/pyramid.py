"""Component 5: three levels of resolution inside each view, fused into its cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.model.cpu_kernels import Linear, RMSNorm


class Pyramid(nn.Module):
    """Fuses levels g x g at H, g/2 x g/2 at H/2, 1 at H/4: upsampled, concatenated, added to the cells, RMS-normed."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.to_half = Linear(width, width // 2)
        self.to_quarter = nn.Linear(width, width // 4)
        self.fuse = Linear(width + width // 2 + width // 4, width)
        self.norm = RMSNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Fuse the levels.

        Args:
            tokens: [B, K, 1 + g*g, H], CLS first.

        Returns:
            Tokens of the same shape, the CLS token unchanged.
        """
        batch, views, _, width = tokens.shape
        cls, cells = tokens[:, :, :1], tokens[:, :, 1:]
        level = cells.reshape(batch * views, self.grid, self.grid, width).permute(0, 3, 1, 2)
        half = self.to_half(F.avg_pool2d(level, 2).permute(0, 2, 3, 1))
        half = half.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        half = half.reshape(batch, views, -1, width // 2)
        whole = self.to_quarter(cells.mean(dim=2, keepdim=True)).expand(-1, -1, cells.shape[2], -1)
        fused = self.norm(self.fuse(torch.cat([cells, half, whole], dim=-1)) + cells)
        return torch.cat([cls, fused], dim=2)
