"""Component 4: input projection of backbone tokens, with an embedding of the box that each token shows."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.model.cpu_kernels import Linear, RMSNorm

BOX_FREQUENCIES = 8


def sinusoids(values: torch.Tensor, frequencies: int = BOX_FREQUENCIES) -> torch.Tensor:
    """Sine and cosine at octaves, from half a period per unit on: [..., n] to [..., n * 2 * frequencies]."""
    scale = math.pi * 2.0 ** torch.arange(frequencies, dtype=values.dtype, device=values.device)
    angles = values[..., None] * scale
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class InputProjection(nn.Module):
    """Linear D -> H for CLS tokens and 2D -> H for cells, RMSNorm, and an added embedding of each token's box."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.cls = Linear(dim, width)
        self.cells = Linear(2 * dim, width)
        self.norm = RMSNorm(width)
        self.box = Linear(4 * 2 * BOX_FREQUENCIES, width)

    def forward(self, cls: torch.Tensor, cells: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Project tokens of B photos with K views.

        Args:
            cls: [B, K, D].
            cells: [B, K, g*g, 2D].
            boxes: The part of the photo that each token shows, as x0, y0, x1, y1 in [0, 1], CLS first: [B, K, 1 + g*g,
                4], or [B, K, 1, 4] for one box for all tokens of a view.

        Returns:
            Tokens [B, K, 1 + g*g, H], CLS first.
        """
        low, high = boxes[..., :2], boxes[..., 2:]
        centre_and_size = torch.cat([(low + high) / 2, high - low], dim=-1)
        place = self.box(sinusoids(centre_and_size).to(cls.dtype))
        tokens = torch.cat([self.cls(cls)[:, :, None], self.cells(cells)], dim=2)
        projected: torch.Tensor = self.norm(tokens) + place
        return projected
