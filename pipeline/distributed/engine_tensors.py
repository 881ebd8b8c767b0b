"""Whole weights, optimizer state and weight average of a DeepSpeed engine by parameter name, in any topology.

Two things spread a model over processes: ZeRO, which cuts parameters or their optimizer state into flat pieces, and
sharded experts. Here both are undone, so that the names and shapes are those of the model as it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from pipeline.distributed.experts import merge_experts, split_experts
from pipeline.optim.config import MOMENTS
from pipeline.optim.ema import WeightAverage
from pipeline.optim.sophia import Sophia

Tensors = dict[str, torch.Tensor]


def gather_tensors(engine: Any) -> tuple[Tensors, Tensors]:
    """fp32 weights by name, and optimizer moments by `name/kind`, whole, on the CPU. Collective."""
    weights, kinds = _gather(engine, None), _moments(engine)
    moments = {kind: _gather(engine, kind) for kind in kinds}
    return weights, {f"{name}/{kind}": moments[kind][name] for name in weights for kind in kinds}


def set_tensors(engine: Any, weights: Tensors, moments: Tensors, step: int) -> None:
    """The inverse of `gather_tensors`, for any world size, ZeRO stage and placement of experts. Collective."""
    create_optimizer_state(engine, step)
    module = engine.module
    mine = split_experts(module, weights)
    values: dict[str | None, Tensors] = {None: mine}
    for kind in _moments(engine):
        values[kind] = split_experts(module, {name: moments[f"{name}/{kind}"] for name in weights})
    for name, parameter in _trained(module):
        for what, tensors in values.items():
            _set(engine, parameter, what, tensors[name].to(parameter.device))
    load_held(module, mine)


def create_optimizer_state(engine: Any, step: int = 0) -> None:
    """Give the base optimizer the state that it otherwise creates at its first step, and link it to the parameters.

    DeepSpeed links moments to parameters inside the first step, before the moments of the second and later parameter
    groups exist; and before the first step there is nothing to restore into. So this is called for every engine.
    """
    optimizer = base_optimizer(engine)
    pieces = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3, which has groups of its own
    if pieces is None:
        pieces = [piece for group in optimizer.param_groups for piece in group["params"]]
    for piece in pieces:
        optimizer.state[piece] = {
            "step": torch.tensor(float(step), device=piece.device),
            **{kind: torch.zeros_like(piece, requires_grad=False) for kind in _moments(engine)},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def load_held(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set the weights that the forward pass reads; `values` have the names and shapes of the module's parameters."""
    for name, parameter in _trained(module):
        _held(parameter).copy_(_piece(parameter, values[name]))
        # A small one of ZeRO-3, which stays whole between the steps.
        if hasattr(parameter, "ds_tensor") and parameter.data.numel() == parameter.ds_numel:
            parameter.data.copy_(values[name])


class EngineAverage(WeightAverage):
    """The average of an engine's weights; each process averages its own part, and sends nothing until it is read."""

    def _held(self) -> Tensors:
        return {name: _held(parameter) for name, parameter in _trained(self.model)}

    def gathered(self) -> Tensors:
        """The whole average by the names of the model as it was built, on the CPU. Collective."""
        whole = {name: _whole(parameter, self.tensors[name]) for name, parameter in _trained(self.model)}
        return _to_cpu(merge_experts(self.model, whole))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gathered`."""
        values = split_experts(self.model, tensors)
        for name, parameter in _trained(self.model):
            self.tensors[name].copy_(_piece(parameter, values[name]))


def _trained(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps; ZeRO-0 in fp32 has no wrapper."""
    base: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return base


def _moments(engine: Any) -> tuple[str, ...]:
    return MOMENTS["sophia_h" if isinstance(base_optimizer(engine), Sophia) else "adamw"]


def _gather(engine: Any, kind: str | None) -> Tensors:
    values = {name: _get(engine, parameter, kind) for name, parameter in _trained(engine.module)}
    return _to_cpu(merge_experts(engine.module, values))


def _get(engine: Any, parameter: Any, kind: str | None) -> torch.Tensor:
    """The whole fp32 weight or moment of a parameter; of sharded experts only this process's."""
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):  # ZeRO-0
        return parameter.detach() if kind is None else base_optimizer(engine).state[parameter][kind]
    whole = safe_get_full_fp32_param(parameter) if kind is None else safe_get_full_optimizer_state(parameter, kind)
    return torch.as_tensor(whole)


def _set(engine: Any, parameter: Any, kind: str | None, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        # DeepSpeed's setter for full values ignores the padding of a parameter's last piece.
        parameter._z3_optimizer.set_local_hp_param(_piece(parameter, value), parameter, kind)
    elif hasattr(parameter, "_hp_mapping"):
        if kind is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    elif kind is not None:
        base_optimizer(engine).state[parameter][kind].copy_(value)


def _held(parameter: Any) -> torch.Tensor:
    """This process's part of a weight: under ZeRO-3 a flat piece, else all of it."""
    held: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return held


def _piece(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole value: under ZeRO-3 a flat piece, padded as DeepSpeed pads it, else all of it."""
    if not hasattr(parameter, "ds_tensor"):
        return value
    size = parameter.ds_tensor.ds_numel
    rank = dist.get_rank(parameter.ds_process_group)
    piece = torch.zeros(size, dtype=value.dtype, device=value.device)
    part = value.flatten()[rank * size : (rank + 1) * size]
    piece[: part.numel()] = part
    return piece


def _whole(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Undo `_piece`; without ZeRO-3 the value is whole already. Collective."""
    if not hasattr(parameter, "ds_tensor"):
        return value
    pieces = [torch.empty_like(value) for _ in range(dist.get_world_size(parameter.ds_process_group))]
    dist.all_gather(pieces, value, group=parameter.ds_process_group)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def _to_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
