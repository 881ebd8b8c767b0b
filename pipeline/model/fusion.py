"""Component 7: gated attention fusion (GAFM) of the kept views into one vector."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.model.config import ModelConfig

EPS = 1e-6


class GatedFusion(nn.Module):
    """Fuses view vectors under learned gates, which are also reported as the views' importance.

    The published module (Diagnostics 2025, 15(11):1361) gives no equations that can be checked; ours are
    g_i = sigmoid(W2 SiLU(W1 x_i)), C = x + MHA(x), R = C + MHA(C), out = sum s_i g_i R_i / (sum s_i g_i + eps), with
    the pruner's gates s_i, whose logarithms are added to the attention logits of their views. So a gate of 0 is the
    same as leaving the view out, and the gradient tells the pruner which views help the answer.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, width // 4), nn.SiLU(), nn.Linear(width // 4, 1))
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.refine = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(
        self, views: torch.Tensor, mask: torch.Tensor, pruner_gates: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse the views of each photo.

        Args:
            views: [B, K, H], one vector per view.
            mask: bool [B, K], False for views that do not exist.
            pruner_gates: [B, K] in [0, 1], see `Encoded.gates`; None for no gates.

        Returns:
            The fused vector [B, H] and the fusion's own gates g [B, K], zero where masked.
        """
        gates = self.gate(views).squeeze(-1).sigmoid() * mask
        absent = ~mask if pruner_gates is None else log_gates(pruner_gates, mask).to(views.dtype)
        crossed = views + self.cross(views, views, views, absent, need_weights=False)[0]
        refined = crossed + self.refine(crossed, crossed, crossed, absent, need_weights=False)[0]
        weights = gates if pruner_gates is None else gates * pruner_gates
        fused = (weights[..., None] * refined).sum(dim=1) / (weights.sum(dim=1, keepdim=True) + EPS)
        return fused, gates


class MeanFusion(nn.Module):
    """The mean of the views' vectors under the pruner's gates alone, for comparison; it gives no importance."""

    def forward(
        self, views: torch.Tensor, mask: torch.Tensor, pruner_gates: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """The mean over existing views, [B, H], and no importance; see `GatedFusion.forward` for the arguments."""
        weights = (mask if pruner_gates is None else mask * pruner_gates).to(views.dtype)[..., None]
        return (views * weights).sum(dim=1) / weights.sum(dim=1), None


def log_gates(gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What is added to the attention logits of each view's tokens: log of its gate, -inf where it does not exist.

    Args:
        gates: [B, K] in [0, 1].
        mask: bool [B, K].

    Returns:
        [B, K].
    """
    return gates.clamp(min=torch.finfo(gates.dtype).tiny).log().masked_fill(~mask, -torch.inf)


def build_fusion(config: ModelConfig) -> nn.Module:
    """The fusion that `model.fusion` names."""
    return GatedFusion(config.width, config.fusion_heads) if config.fusion == "gated" else MeanFusion()
