"""Component 6, second half: sparse mixture of experts and its router losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from pipeline.model.config import ModelConfig
from pipeline.model.cpu_kernels import Linear, linear, trains_on_cpu

INIT_STD = 0.02
# On a CPU an expert's slice is padded to a multiple: oneDNN prepares a kernel for each number of rows, and keeps it.
ROWS_PER_BLOCK = 64


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
        self.block = Qwen3MoeSparseMoeBlock(settings)
        self.block.experts = SortedExperts(settings)
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


class SortedExperts(Qwen3MoeExperts):
    """`Qwen3MoeExperts` that sorts the tokens by their experts once, and gives each expert a slice of them.

    The loop over experts has one wait of the host for a GPU, for the numbers of tokens. The grouped product has none.
    """

    grouped_mm = False
    """Multiply by the weights of all experts in one call of `torch.nn.functional.grouped_mm`. Not measured on a GPU
    yet."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Send tokens to their experts.

        Args:
            x: [N, H].
            chosen: The experts of each token, int64 [N, k].
            weights: Their weights in the sum, [N, k].

        Returns:
            [N, H].
        """
        experts = chosen.flatten()
        order = experts.argsort(stable=True)  # of the tokens' copies, one for each of their experts
        counts = (experts[:, None] == torch.arange(self.num_experts, device=x.device)).sum(dim=0)
        slots = torch.arange(len(experts), device=x.device)
        if self.grouped_mm:
            rows, compute = len(experts), partial(self._grouped, ends=counts.cumsum(dim=0, dtype=torch.int32))
        else:
            block = ROWS_PER_BLOCK if trains_on_cpu(x) else 1
            padded = (counts + block - 1) // block * block
            unused = padded - counts
            slots += (unused.cumsum(dim=0) - unused)[experts[order]]
            sizes = padded.tolist()
            rows, compute = sum(sizes), partial(self._in_turn, sizes=sizes)
        tokens = slots.new_zeros(rows).index_copy_(0, slots, order // chosen.shape[1])
        places = torch.empty_like(order).index_copy_(0, order, slots)
        shares = weights.new_zeros(rows).index_copy(0, places, weights.flatten())
        places = places.view_as(chosen)
        answers = compute(_Spread.apply(x, tokens, places)) * shares[:, None]
        update: torch.Tensor = _Gather.apply(answers, tokens, places)
        return update

    def _in_turn(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        weights = zip(self.gate_up_proj, self.down_proj, strict=True)
        parts = zip(x.split(sizes), weights, strict=True)
        return torch.cat([linear(_swiglu(linear(part, up)), down) for part, (up, down) in parts if len(part)])

    def _grouped(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        hidden = _swiglu(F.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=ends))
        return F.grouped_mm(hidden, self.down_proj.transpose(1, 2), offs=ends)


def set_grouped_mm(model: nn.Module, grouped_mm: bool) -> None:
    """Say how all layers of a model that have whole experts compute them, see `SortedExperts`."""
    for module in model.modules():
        if isinstance(module, SortedExperts):
            module.grouped_mm = grouped_mm


class _Spread(torch.autograd.Function):
    """Copies tokens [N, H] to slots [R, H].

    A slot has the token that `tokens` [R] names, and `places` [N, k] names the slots of each token's copies. What is in
    a slot that no place names is never used. The gradient adds up copies in the order of their tokens: on a GPU it is
    the same each time, which adding rows to their tokens (`index_add`) would not be.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Gather.apply(gradient, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Sums of each token's copies, slots [R, H] to tokens [N, H]: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, places)
        return x.index_select(0, places.flatten()).unflatten(0, places.shape).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Spread.apply(gradient, *ctx.saved_tensors), None, None


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class DenseFeedForward(nn.Module):
    """One SwiGLU for all tokens: down(SiLU(gate x) * up x), initialised at the experts' scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.expert_width, bias=False)
        self.up_proj = Linear(config.width, config.expert_width, bias=False)
        self.down_proj = Linear(config.expert_width, config.width, bias=False)
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
