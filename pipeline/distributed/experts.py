"""Sharded experts: the settings of DeepSpeed's AutoEP, and conversion between its parameters and the model's own names.

AutoEP replaces a `Qwen3MoeSparseMoeBlock` by a layer that holds E / N of the experts, sends every token to the
processes of its experts and back, and keeps the gate and up projections apart. Everything here that depends on its
internals is guarded by `check_version`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from pipeline.errors import UserError
from pipeline.model.config import ModelConfig
from pipeline.model.moe import SortedExperts, SparseExperts

KNOWN_DEEPSPEED = "0.19.8"
GROUPED_KERNELS = ("use_grouped_mm", "use_triton_grouped_mm")
GROUPED_MULTIPLE = 8  # rows of 16 bytes in bf16
EXPERT_WEIGHTS = ("w1", "w2", "w3")  # gate, down and up projection, each [E / N, out, in]


def resolve_expert_parallel(wanted: int, experts: int | None, world_size: int, stage: int, grad_clip: float) -> int:
    """The number of processes that share each layer's experts; with 1 every process has them all.

    Args:
        wanted: `train.expert_parallel`.
        experts: Experts per layer; None for a head without experts.
        world_size: Processes of the run.
        stage: ZeRO stage.
        grad_clip: `optim.grad_clip`.

    Raises:
        UserError: The experts cannot be spread that way; the message says why.
    """
    if wanted == 1:
        return 1
    if experts is None:
        raise UserError(f"train.expert_parallel is {wanted}, but a baseline head has no experts; set it to 1")
    if experts % wanted:
        raise UserError(
            f"train.expert_parallel is {wanted}, which does not divide the {experts} experts of a layer (model.experts)"
        )
    if world_size == 1:
        return 1
    if world_size % wanted:
        fitting = [size for size in range(1, experts + 1) if experts % size == 0 and world_size % size == 0]
        raise UserError(
            f"train.expert_parallel is {wanted}, which does not divide the {world_size} processes of this run; "
            f"choose {' or '.join(map(str, fitting))}"
        )
    if stage == 0 and grad_clip > 0:
        raise UserError(
            "train.expert_parallel needs ZeRO stage 1, 2 or 3, or optim.grad_clip 0: at stage 0 DeepSpeed takes the "
            "mean of the processes' gradient norms, as if all had the same experts, and would clip at another norm"
        )
    return wanted


def check_grouped_mm(grouped_mm: bool, model: ModelConfig, size: int, precision: str) -> None:
    """Refuse grouped products for a head that has no use for them, or whose widths they cannot have.

    Args:
        grouped_mm: `train.grouped_mm`.
        model: The model's sizes.
        size: Processes that share the experts of a layer.
        precision: "bf16" or "fp32"; shared experts use grouped products in bf16.

    Raises:
        UserError: What is wrong and what to do.
    """
    if grouped_mm and (model.head != "roadwork" or model.experts == 1):
        raise UserError("train.grouped_mm is true, but this head has no experts; set it to false")
    key, off = ("train.grouped_mm", "false") if grouped_mm else ("train.expert_parallel", "1")
    fits = model.width % GROUPED_MULTIPLE == 0 and model.expert_width % GROUPED_MULTIPLE == 0
    if (grouped_mm or (size > 1 and precision == "bf16")) and not fits:
        raise UserError(
            f"{key}{'' if grouped_mm else ' in bf16'} needs multiples of {GROUPED_MULTIPLE} as model.width and "
            f"model.expert_width, which are {model.width} and {model.expert_width}; choose such widths, or set {key} "
            f"to {off}"
        )


def expert_settings(size: int, precision: str) -> dict[str, Any]:
    """The section `expert_parallel` of the DeepSpeed configuration; empty where experts stay whole."""
    if size == 1:
        return {}
    check_version()
    return {
        "expert_parallel": {
            "enabled": True,
            "autoep_size": size,
            "moe_layer_pattern": r"head\.(members\.\d+\.)?layers\.\d+\.mlp\.block",
            "num_experts_attr": "experts",
            "top_k_attr": "experts_per_token",
            # The grouped product is a bf16 kernel; the loop over experts does the same in fp32.
            "use_grouped_mm": precision == "bf16",
        }
    }


def check_version() -> None:
    """Refuse a DeepSpeed whose sharded layer may look different from what this file expects."""
    found = version("deepspeed")
    if found != KNOWN_DEEPSPEED:
        raise UserError(
            f"experts are sharded with private parts of deepspeed {KNOWN_DEEPSPEED}, and this is {found}; install that "
            "version or set train.expert_parallel to 1"
        )


def expert_parallel_size(accelerator: Accelerator) -> int:
    """The number of processes that share the experts of a layer in this run."""
    size: int = accelerator.deepspeed_plugin.deepspeed_config.get("expert_parallel", {}).get("autoep_size", 1)
    return size


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is AutoEP's replacement of a block of experts."""
    return getattr(module, "_is_autoep_layer", False)


def sharded_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the layers whose experts are sharded."""
    return ((name, module) for name, module in model.named_modules() if is_sharded(module))


def watch_routers(model: nn.Module) -> None:
    """Let `SparseExperts` read the router's logits in AutoEP's layers, as it does in its own blocks."""
    for module in model.modules():
        if isinstance(module, SparseExperts) and is_sharded(module.block):
            block: Any = module.block
            module.watch(block.router.gate)


def merge_experts(model: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert this process's experts and the engine's names to all experts and the unsharded model's names.

    Collective.

    Args:
        model: The engine's module.
        values: Weights, or tensors of their shapes, by the names of the module's parameters; those of some of the
            sharded blocks will do, the same ones on every rank.
    """
    merged = dict(values)
    for name, block in sharded_blocks(model):
        if f"{name}.router.gate.weight" not in merged:
            continue
        gate, down, up = (_all_experts(block, merged.pop(f"{name}.experts.{weight}")) for weight in EXPERT_WEIGHTS)
        merged[f"{name}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        merged[f"{name}.experts.down_proj"] = down
        merged[f"{name}.gate.weight"] = merged.pop(f"{name}.router.gate.weight")
    return merged


def split_experts(model: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `merge_experts`."""
    split = dict(values)
    for name, block in sharded_blocks(model):
        gate, up = split.pop(f"{name}.experts.gate_up_proj").chunk(2, dim=1)
        first = block.ep_rank * block.num_local_experts
        for weight, whole in zip(EXPERT_WEIGHTS, (gate, split.pop(f"{name}.experts.down_proj"), up), strict=True):
            split[f"{name}.experts.{weight}"] = whole[first : first + block.num_local_experts].contiguous()
        split[f"{name}.router.gate.weight"] = split.pop(f"{name}.gate.weight")
    return split


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all trained parameters by the names of the unsharded model, in any topology."""
    shapes = {name: _whole_shape(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, block in sharded_blocks(model):
        (_, width, dim), _, _ = (shapes.pop(f"{name}.experts.{weight}") for weight in EXPERT_WEIGHTS)
        experts = block.ep_size * block.num_local_experts
        shapes[f"{name}.experts.gate_up_proj"] = (experts, 2 * width, dim)
        shapes[f"{name}.experts.down_proj"] = (experts, dim, width)
        shapes[f"{name}.gate.weight"] = shapes.pop(f"{name}.router.gate.weight")
    return shapes


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the parameter itself is empty


@contextmanager
def second_derivatives(model: nn.Module) -> Iterator[None]:
    """Let second derivatives pass through the layers of experts.

    The loop over experts replaces the grouped product, a kernel for bf16, since second derivatives are taken in fp32.
    AutoEP's all-to-all sends its gradient by a collective that autograd does not see, so second derivatives are lost
    there, silently. Here the gradient goes through the same all-to-all with the splits swapped, whose derivative
    autograd knows.
    """
    shared: list[Any] = [block.experts for _, block in sharded_blocks(model)]
    whole: list[Any] = [module for module in model.modules() if isinstance(module, SortedExperts)]
    switches = [(experts, key) for experts in shared for key in GROUPED_KERNELS]
    switches += [(experts, "grouped_mm") for experts in whole]
    usual = [getattr(experts, key) for experts, key in switches]
    for experts, key in switches:
        setattr(experts, key, False)
    try:
        with _differentiable_exchange() if shared else nullcontext():
            yield
    finally:
        for (experts, key), value in zip(switches, usual, strict=True):
            setattr(experts, key, value)


@contextmanager
def _differentiable_exchange() -> Iterator[None]:
    check_version()
    from deepspeed.module_inject.auto_ep_layer import _AllToAllV

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        return None, _AllToAllV.apply(ctx.group, gradient, ctx.output_splits, ctx.input_splits), None, None

    usual = _AllToAllV.backward
    _AllToAllV.backward = staticmethod(backward)
    try:
        yield
    finally:
        _AllToAllV.backward = staticmethod(usual)


def _all_experts(block: Any, mine: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(mine) for _ in range(block.ep_size)]
    dist.all_gather(parts, mine.contiguous(), group=block.ep_group)
    return torch.cat(parts)
