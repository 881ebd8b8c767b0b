"""Memory of one process before anything runs: what ZeRO leaves on it, buffers, and activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from pipeline.config import Config
from pipeline.data.feature_key import STORED_DTYPE
from pipeline.data.stand_in import StandIn
from pipeline.distributed.settings import Sharding
from pipeline.model.config import MAX_VIEWS_PER_PASS
from pipeline.model.moe import SparseExperts
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel

MOMENTS_AND_MASTER = 4 + 4 + 4
AVERAGE = 4
LOADERS, PREFETCH = 2, 2  # training's and validation's, each with torch's default of batches per worker
ESTIMATE = 4  # fp32 numbers per weight in one of sophia_h's estimates: weight, gradient, sign, product


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    shared: int
    """Trained parameters outside the experts."""
    experts: int
    """Trained parameters of all experts."""
    frozen: int

    @classmethod
    def of(cls, head: nn.Module, frozen: int) -> Parameters:
        """Count the parameters of a head; `frozen` is the number of the backbone's."""
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        experts = sum(p.numel() for block in expert_blocks(head) for p in block.parameters())
        return cls(trained - experts, experts, frozen)

    @property
    def trained(self) -> int:
        """All trained parameters."""
        return self.shared + self.experts


@dataclass(frozen=True)
class Need:
    """Bytes that one process needs."""

    states: float
    """Trained weights, gradients, optimizer state and average."""
    buffers: float
    """Buffers of communication."""
    backbone: float
    """Weights of the frozen backbone."""
    activations: float
    host: float
    """Offloaded state, in the host's memory."""

    @property
    def device(self) -> float:
        """Bytes on the GPU, or without one, in the process."""
        return self.states + self.buffers + self.backbone + self.activations


def state_bytes(parameters: Parameters, precision: str, sharding: Sharding) -> tuple[float, float]:
    """Bytes of trained weights, gradients, two moments and the weight average: on the device, and on the host.

    ZeRO (arXiv 1910.02054, section 3) with W processes: stage 1 cuts fp32 master weights and both moments into W
    pieces, 2 the gradients too, 3 the weights and here the average as well. Experts are spread over `expert_parallel`
    processes first, and their pieces over those that hold the same experts. Stage 0 in fp32 needs no master weights.
    """
    low = 2 if precision == "bf16" else 4
    device = host = 0.0
    for count, copies in (
        (parameters.shared, sharding.world_size),
        (parameters.experts / sharding.expert_parallel, sharding.world_size / sharding.expert_parallel),
    ):
        state = MOMENTS_AND_MASTER / copies
        if sharding.stage == 0 and precision == "fp32":
            state = MOMENTS_AND_MASTER - 4
        gradient = (4 if sharding.adds_in_fp32 else low) / copies if sharding.stage >= 2 else low
        if sharding.offload:
            host += count * (state + gradient)
            state = gradient = 0.0
        weights = (low + AVERAGE) / copies if sharding.stage == 3 else low + AVERAGE
        device += count * (weights + gradient + state)
    return device, host


def copy_bytes(parameters: Parameters) -> int:
    """Bytes of a checkpoint's copy in host memory, from which it is written: weights, two moments and the average."""
    return (MOMENTS_AND_MASTER + AVERAGE) * parameters.trained


def buffer_bytes(parameters: Parameters, precision: str, sharding: Sharding) -> float:
    """Bytes of reduction buckets and, under stage 3, of the parameters that are gathered at the same time."""
    low = 2 if precision == "bf16" else 4
    gathered = min(parameters.trained, sharding.live) if sharding.stage == 3 else 0
    copied = 4 if sharding.reduces_in_fp32 and low < 4 else 0
    return low * gathered + (low + copied) * (sharding.bucket if sharding.stage > 0 else 0)


def need(config: Config, backbone: DINOv3ViTConfig, precision: str, sharding: Sharding, micro_batch: int) -> Need:
    """The memory of one process in training.

    Args:
        config: The run's configuration.
        backbone: The frozen backbone's configuration.
        precision: "bf16" or "fp32".
        sharding: How the trained parameters are spread over processes.
        micro_batch: Photos of one forward pass.
    """
    low = 2 if precision == "bf16" else 4
    parameters = count(config, backbone)
    states, host = state_bytes(parameters, precision, sharding)
    fixed, per_photo = saved_by_the_head(config, backbone)
    activations = (fixed + per_photo * micro_batch) * low
    if config.optim.name == "sophia_h":
        mine = parameters.shared + parameters.experts / sharding.expert_parallel
        activations = (fixed + per_photo * micro_batch + ESTIMATE * mine) * 4.0
    if not config.data.features:
        activations += backbone_activations(config, backbone, precision, micro_batch)
    buffers = buffer_bytes(parameters, precision, sharding)
    return Need(states, buffers, low * parameters.frozen, activations, host)


def count(config: Config, backbone: DINOv3ViTConfig) -> Parameters:
    """Count the parameters of head and backbone without allocating them."""
    with torch.device("meta"):
        head, frozen = build_head(config, backbone), DINOv3ViTModel(backbone)
    return Parameters.of(head, sum(p.numel() for p in frozen.parameters()))


def build_head(config: Config, backbone: DINOv3ViTConfig) -> RoadworkModel:
    """The trained head without a backbone."""
    sizes = RoadworkConfig(**asdict(config.model), backbone_dim=backbone.hidden_size, ensemble=config.train.heads)
    return RoadworkModel(sizes, config.loss)


def expert_blocks(head: nn.Module) -> Iterator[nn.Module]:
    """The experts of each layer."""
    return (module.block.experts for module in head.modules() if isinstance(module, SparseExperts))


def saved_by_the_head(config: Config, backbone: DINOv3ViTConfig) -> tuple[float, float]:
    """Elements that a training step keeps for its backward pass: a fixed number, and a number per photo.

    With `sophia_h` an estimate's second backward pass is counted instead, which keeps several times as many.

    Measured with one and two photos of noise, all views kept, as in every `train.distil_every`-th step. The weights are
    the same every time, since experts pad their rows, and weights decide who gets how many.
    """
    twice = config.optim.name == "sophia_h"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = build_head(config, backbone).train()
        one, two = (_saved(head, noise(config, backbone, photos), twice) for photos in (1, 2))
    return 2 * one - two, two - one


def noise(config: Config, backbone: DINOv3ViTConfig, photos: int) -> dict[str, torch.Tensor]:
    """A batch for the forward pass: noise as cached tokens, boxes and targets."""
    model, generator = config.model, torch.Generator().manual_seed(0)
    stand_in = StandIn(photos, replace(config.input_spec, view_side=16), model.text_dim)
    rows = [stand_in[row] for row in range(photos)]
    batch = {
        name: torch.stack([row[name] for row in rows]) for name in ("boxes", "view_mask", "labels", "mask_targets")
    }
    views, dim = model.num_views, backbone.hidden_size
    return {
        **batch,
        "view_mask": torch.ones_like(batch["view_mask"]),
        "cls": torch.randn(photos, views, dim, generator=generator),
        "cells": torch.randn(photos, views, model.pool_grid**2, 2 * dim, generator=generator),
        "regions": torch.randn(photos, views, dim, generator=generator),
    }


def _saved(head: RoadworkModel, batch: dict[str, torch.Tensor], twice: bool) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor.detach()  # an output that held its own graph would never be freed

    # As in the estimate, attention without a fused kernel.
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(), saved_tensors_hooks(note, lambda tensor: tensor):
        output = head(batch, keep_all=True, with_loss=True)
        if twice:
            weights = [p for p in head.parameters() if p.requires_grad]
            torch.autograd.grad(output.loss, weights, create_graph=True, allow_unused=True)
    del output
    return sum(kept.values())


def backbone_activations(config: Config, backbone: DINOv3ViTConfig, precision: str, micro_batch: int) -> float:
    """Bytes at the peak of the frozen forward pass.

    The largest chunk has min(192, 11 micro-batches) views of T = (S / 16)^2 + 1 + registers tokens. A layer holds the
    residual stream, its norm and the output of width D, and in the gated MLP three tensors of width I. The pixels are
    fp32, held twice while they are normalised. The views of the micro-batch lie beside them as bytes.
    """
    low = 2 if precision == "bf16" else 4
    side = config.model.view_side
    views = min(MAX_VIEWS_PER_PASS, max(1, config.model.num_views - 1) * micro_batch)
    patch = backbone.patch_size
    assert isinstance(patch, int)
    tokens = (side // patch) ** 2 + 1 + backbone.num_register_tokens
    layer = low * tokens * (3 * backbone.hidden_size + 3 * backbone.intermediate_size)
    pixels = 3 * side**2 * 4
    uploaded = 3 * side**2 * config.model.num_views * micro_batch
    return views * (max(layer, pixels) + pixels) + uploaded


def waiting_bytes(config: Config, backbone: DINOv3ViTConfig, workers: int, micro_batch: int) -> int:
    """Bytes of the batches that wait for one process in shared memory, at most.

    Each worker holds `PREFETCH` batches. While a run validates, the workers of its training wait with theirs.

    Args:
        config: The run's configuration.
        backbone: The frozen backbone's configuration.
        workers: Processes that read for this one.
        micro_batch: Photos of one batch.
    """
    if config.data.features_in != "disk":  # whose batches come from memory, without workers
        return 0
    model, sample = config.model, StandIn(1, config.input_spec, config.model.text_dim)[0]
    size = sum(tensor.nbytes for tensor in sample.values())
    if config.data.features:
        tokens = model.num_views * (2 + 2 * model.pool_grid**2)
        size += tokens * backbone.hidden_size * STORED_DTYPE.itemsize - sample["views"].nbytes
    return LOADERS * workers * PREFETCH * micro_batch * size
