"""An optimizer over the trainable parameters, with weight decay only where it helps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.model.moe import SparseExperts
from pipeline.model.trunk import Trunk
from pipeline.optim.config import OptimConfig
from pipeline.optim.sophia import Sophia


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group: `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_optimizer(model: nn.Module, config: OptimConfig, expert_parallel: int = 1) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) or Sophia over the parameters of `model` that require a gradient.

    Args:
        model: The model as it was built, before an engine shards it.
        config: The optimizer, its rates and decay.
        expert_parallel: Processes that share a layer's experts. With several, the experts get a parameter group of
            their own, marked for DeepSpeed and named after the process group that holds the same experts. DeepSpeed
            requires that either all groups have a name or none has.
    """
    experts = set()
    if expert_parallel > 1:
        blocks = [m for m in model.modules() if isinstance(m, SparseExperts)]
        experts = {id(p) for block in blocks for p in block.block.experts.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    branches = [m.evidence for m in model.modules() if isinstance(m, Trunk) and m.evidence is not None]
    evidence = {id(p) for branch in branches for p in branch.parameters()}
    groups: list[dict[str, Any]] = []
    for kind, scale, members in (
        ("", 1.0, [p for p in trainable if id(p) not in evidence | experts]),
        ("evidence_", config.evidence_lr_scale, [p for p in trainable if id(p) in evidence]),
    ):
        decay = [p for p in members if p.ndim >= 2 and id(p) not in embeddings]
        rest = [p for p in members if p.ndim < 2 or id(p) in embeddings]
        groups += [
            {"name": f"{kind}decay", "params": decay, "weight_decay": config.weight_decay, "lr_scale": scale},
            {"name": f"{kind}no_decay", "params": rest, "weight_decay": 0.0, "lr_scale": scale},
        ]
    groups += [
        {
            "name": f"ep_size_{expert_parallel}",
            "params": [p for p in trainable if id(p) in experts],
            "weight_decay": config.weight_decay,
            "lr_scale": 1.0,
            "moe": True,
        },
    ]
    groups = [group for group in groups if group["params"]]
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.epsilon}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **shared, fused=True)
    return Sophia(groups, **shared, gamma=config.gamma, squared=config.name == "sophia_g")
