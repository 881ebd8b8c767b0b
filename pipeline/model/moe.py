"""Component 6, second half: sparse mixture of experts and its router losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pipeline.model.config import ModelConfig

INIT_STD = 0.02


class SparseExperts(nn.Module):
    """`Qwen3MoeSparseMoeBlock`: fp32 softmax router, top k of E renormalised, SwiGLU experts.

    The block does not return its router's logits; a hook on the router takes them, for the router losses.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        settings = Qwen3MoeConfig(
            hidden_size=config.width,
            moe_intermediate_size=config.expert_width,
            num_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            norm_topk_prob=True,
            hidden_act="silu",
        )
        settings._experts_implementation = "eager"
        self.block = Qwen3MoeSparseMoeBlock(settings)
        # transformers leaves these empty, and the router zero, which would tie all experts.
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=INIT_STD)
        self._logits: torch.Tensor | None = None
        self.watch(self.block.gate)

    def watch(self, router: nn.Module) -> None:
        """Take the logits from this router's output: a tensor [B*T, E], or a tuple that starts with it."""
        router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, router: nn.Module, inputs: Any, output: Any) -> None:
        self._logits = output[0] if isinstance(output, tuple) else output

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send every token [B, T, H] to its experts; returns the update [B, T, H] and the logits [B, T, E]."""
        update = self.block(x)
        logits, self._logits = self._logits, None
        assert logits is not None
        return update, logits.unflatten(0, x.shape[:2])


class DenseFeedForward(nn.Module):
    """One SwiGLU for all tokens: down(SiLU(gate x) * up x), initialised at the experts' scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.expert_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.expert_width, bias=False)
        self.down_proj = nn.Linear(config.expert_width, config.width, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The update of [B, T, H], and None for the router's logits."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


def build_feed_forward(config: ModelConfig) -> nn.Module:
    """Build experts, or one dense SwiGLU where `model.experts` is 1."""
    return SparseExperts(config) if config.experts > 1 else DenseFeedForward(config)


def balance_loss(router_logits: torch.Tensor, token_mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load balancing loss E * sum_e f_e P_e of each image (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e is the share of an image's assignments that expert e receives, and P_e its mean router probability. It is taken
    per image, so that the mean over images does not depend on their split into micro-batches and ranks.

    Args:
        router_logits: [B, T, E].
        token_mask: bool [B, T], tokens that count.
        top_k: Experts per token.

    Returns:
        [B], 1 when perfectly even.
    """
    probabilities = at_least_float32(router_logits).softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    experts = router_logits.shape[-1]
    weight = token_mask.to(probabilities.dtype)[..., None]
    tokens = weight.sum(dim=1).clamp(min=1)
    share = (F.one_hot(chosen, experts).sum(dim=-2) * weight).sum(dim=1) / (tokens * top_k)
    mean = (probabilities * weight).sum(dim=1) / tokens
    return experts * (share * mean).sum(dim=-1)


def z_loss(router_logits: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): mean squared log-sum-exp of an image's logits, [B]."""
    squared = at_least_float32(router_logits).logsumexp(dim=-1) ** 2
    weight = token_mask.to(squared.dtype)
    return (squared * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert to at least float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
