"""Component 6, first half: gated attention, and the layer that combines it with the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.model.config import ModelConfig
from pipeline.model.cpu_kernels import Linear, RMSNorm, biased_attention, trains_on_cpu
from pipeline.model.moe import build_feed_forward


class GatedAttention(nn.Module):
    """Bidirectional attention whose output passes an elementwise sigmoid gate before the output projection.

    The gate is computed from the layer's normed input (Gated Attention, arXiv 2505.06708, position G1, as in
    `Qwen3NextAttention` of transformers). Queries and keys are RMS-normed per head.
    """

    def __init__(self, width: int, heads: int, gated: bool = True):
        """Build the layer; without `gated` it is plain attention, for comparison."""
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=False)
        self.gate_proj = Linear(width, width, bias=False) if gated else None
        self.o_proj = Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Let every token attend to the tokens of its photo.

        Args:
            x: [B, T, H], already normed.
            mask: bool [B, T], False for tokens that are not attended to, or numbers [B, T] that are added to their
                attention logits; None if there are none, since SDPA has no flash kernel with a mask.

        Returns:
            [B, T, H].
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = (part.transpose(1, 2) for part in (self.q_norm(query), self.k_norm(key), value))
        joined = _attend(query, key, value, mask).transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            joined = joined * self.gate_proj(x).sigmoid()
        output: torch.Tensor = self.o_proj(joined)
        return output


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value)
    if mask.requires_grad and trains_on_cpu(value):
        return biased_attention(query, key, value, mask)
    attend = mask[:, None, None, :]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attend if attend.dtype == torch.bool else attend.to(value.dtype)
    )


class GatedLayer(nn.Module):
    """A pre-norm layer: x += Attn(RMSNorm(x)); x += MoE(RMSNorm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = GatedAttention(config.width, config.heads, config.attention_gate)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = build_feed_forward(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on [B, T, H]; returns the new x and the router's logits [B, T, E], None without a router."""
        x = x + self.attention(self.attention_norm(x), mask)
        update, router_logits = self.mlp(self.mlp_norm(x))
        return x + update, router_logits
