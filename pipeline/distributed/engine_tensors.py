"""Whole weights, optimizer state and weight average of a DeepSpeed engine by parameter name, in any topology.

Two things spread a model over processes: ZeRO, which cuts parameters or their optimizer state into flat pieces, and
sharded experts. Here both are undone, so that the names and shapes are those of the model as it was built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

from pipeline.distributed.experts import merge_experts, sharded_blocks, split_experts
from pipeline.optim.config import MOMENTS
from pipeline.optim.ema import WeightAverage
from pipeline.optim.sophia import Sophia

Tensors = dict[str, torch.Tensor]


def gather_tensors(engine: Any) -> tuple[Tensors, Tensors]:
    """Copies of all `whole_weights` and `whole_moments`, on the CPU of every rank. Collective."""
    return _to_cpu(whole_weights(engine)), _to_cpu(whole_moments(engine))


def whole_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and fp32 values of the weights, each whole on every rank, on the engine's device. Collective.

    They come one after the other, so that a rank that keeps none needs memory for one only. A tensor may be the
    engine's own, which its next step changes.
    """
    return _gather(engine, None)


def whole_moments(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's moments by `name/kind`, in the way of `whole_weights`. Collective."""
    for kind in _moments(engine):
        yield from ((f"{name}/{kind}", value) for name, value in _gather(engine, kind))


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

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The average by the names of the model as it was built, in the way of `whole_weights`. Collective."""
        return _whole_values(self.model, lambda name, parameter: _whole(parameter, self.tensors[name]))

    def gathered(self) -> Tensors:
        """A copy of the whole average, on the CPU of every rank. Collective."""
        return _to_cpu(self.whole())

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


def _gather(engine: Any, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    return _whole_values(engine.module, lambda _, parameter: _get(engine, parameter, kind))


def _whole_values(module: nn.Module, get: Callable[[str, Any], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole values by the names of the model as it was built, one after the other. Collective.

    Args:
        module: The engine's module.
        get: Gathers the value of a parameter, given its name in the module and itself; of sharded experts only this
            process's.
    """
    blocks = [name for name, _ in sharded_blocks(module)]
    # The parameters of a sharded block come together, since one of the built model's is merged from several.
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, parameter in _trained(module):
        groups.setdefault(next((block for block in blocks if name.startswith(f"{block}.")), name), []).append(
            (name, parameter)
        )
    for owner, parameters in groups.items():
        values = {name: get(name, parameter) for name, parameter in parameters}
        yield from (merge_experts(module, values) if owner in blocks else values).items()


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


def _to_cpu(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
