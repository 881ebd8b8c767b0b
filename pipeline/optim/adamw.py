"""AdamW over the trainable parameters, with weight decay only where it helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import require
from pipeline.model.moe import SparseExperts


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    final_lr_ratio: float = 0.02
    """The learning rate at the last step, as a share of `lr`."""
    warmup_share: float = 0.05
    """Share of all steps that the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    beta1: float = 0.9
    """Decay of the mean of the gradient."""
    beta2: float = 0.99
    """Decay of the mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    grad_clip: float = 1.0
    """Largest norm of the global gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(0 <= self.final_lr_ratio <= 1, "optim.final_lr_ratio", self.final_lr_ratio, "in [0, 1]")
        require(0 <= self.warmup_share < 1, "optim.warmup_share", self.warmup_share, "in [0, 1)")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta1 < 1, "optim.beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.grad_clip >= 0, "optim.grad_clip", self.grad_clip, "0 or more")


def build_optimizer(model: nn.Module, config: OptimConfig, expert_parallel: int = 1) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the parameters of `model` that require a gradient.

    Args:
        model: As it was built, before an engine shards it.
        config: Rates and decay.
        expert_parallel: Processes that share a layer's experts. Where there are several, the experts have a group of
            their own, marked as DeepSpeed asks for; it is named after the process group that holds the same experts.
            Every group has a name, as DeepSpeed wants as soon as one has.
    """
    experts = set()
    if expert_parallel > 1:
        blocks = [m for m in model.modules() if isinstance(m, SparseExperts)]
        experts = {id(p) for block in blocks for p in block.block.experts.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings | experts]
    rest = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"name": "decay", "params": decay, "weight_decay": config.weight_decay},
        {"name": "no_decay", "params": rest, "weight_decay": 0.0},
        {
            "name": f"ep_size_{expert_parallel}",
            "params": [p for p in trainable if id(p) in experts],
            "weight_decay": config.weight_decay,
            "moe": True,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
