"""Weights and optimizer state of a DeepSpeed engine by parameter name, whole, whatever the topology."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from pipeline.optim.ema import copy_into

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_tensors(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """fp32 weights by name, and optimizer moments by name and kind, whole, on the CPU. Collective."""
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        weights[name] = safe_get_full_fp32_param(parameter).cpu()
        for kind in MOMENTS:
            moments[f"{name}/{kind}"] = safe_get_full_optimizer_state(parameter, kind).cpu()
    return weights, moments


def set_tensors(engine: Any, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], step: int) -> None:
    """The inverse of `gather_tensors`, for any world size."""
    create_optimizer_state(engine, step)
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}/{kind}"].to(parameter.device), kind)
    copy_into(parameters, weights)


def create_optimizer_state(engine: Any, step: int = 0) -> None:
    """Give the base optimizer the state that it otherwise creates at its first step, and link it to the parameters.

    DeepSpeed links the moments to the parameters inside the first step, before those of the second and later
    parameter groups exist; and before the first step there is nothing to set. So every engine starts here.
    """
    zero = engine.optimizer
    for group in zero.optimizer.param_groups:
        for partition in group["params"]:
            zero.optimizer.state[partition] = {
                "step": torch.tensor(float(step), device=partition.device),
                **{kind: torch.zeros_like(partition) for kind in MOMENTS},
            }
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
