"""What a run will do before it does it: batches, steps, learning rate, parameters and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from pipeline.config import Config, TrainConfig
from pipeline.data.index import Split
from pipeline.errors import UserError
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import lr_at


@dataclass(frozen=True)
class Batching:
    """batch_size = world_size * micro_batch_size * accumulation."""

    batch_size: int
    """Samples per optimizer step, over all processes."""
    micro_batch_size: int
    """Samples of one process in one forward pass."""
    accumulation: int
    """Forward passes of one process per optimizer step."""


def plan_batches(config: TrainConfig, world_size: int) -> Batching:
    """Split `train.batch_size` evenly; the largest micro-batch that divides a process's share is taken.

    Raises:
        UserError: The batch cannot be shared evenly among the processes.
    """
    share, rest = divmod(config.batch_size, world_size)
    if rest or share == 0:
        below, above = max(1, share) * world_size, (share + 1) * world_size
        raise UserError(
            f"train.batch_size is {config.batch_size}, which {world_size} processes cannot share evenly; "
            f"choose {below} or {above}"
        )
    micro = next(size for size in range(min(share, config.micro_batch_size), 0, -1) if share % size == 0)
    return Batching(config.batch_size, micro, share // micro)


@dataclass(frozen=True)
class Schedule:
    """The length of a run."""

    samples_per_epoch: int
    steps: int
    """Optimizer steps in all; the last may reach a little into an epoch beyond."""
    validation_steps: frozenset[int]
    """After which steps the run validates."""


def plan_schedule(config: Config, samples: int) -> Schedule:
    """Steps for `train.epochs` over a training split of `samples` photos."""
    per_epoch = max(1, round(config.data.epoch_share * samples))
    steps = -(-config.train.epochs * per_epoch // config.train.batch_size)
    validations = config.train.epochs * config.train.validations_per_epoch
    at = {max(1, round(steps * (i + 1) / validations)) for i in range(validations)}
    return Schedule(per_epoch, steps, frozenset(at))


def sampling_weights(config: Config, split: Split) -> np.ndarray:
    """float64 [N], by `data.sampling`."""
    return split.weights if config.data.sampling == "weighted" else np.ones(len(split.samples))


def describe_schedule(config: Config, batching: Batching, schedule: Schedule, world_size: int) -> Iterator[str]:
    """The part of the plan that needs no model."""
    yield (
        f"batch      {batching.batch_size} photos per optimizer step = {world_size} processes x "
        f"{batching.micro_batch_size} x {batching.accumulation} accumulated"
    )
    yield (
        f"steps      {schedule.steps} = {config.train.epochs} epochs of {schedule.samples_per_epoch} photos; "
        f"{len(schedule.validation_steps)} validations"
    )
    first, last = (lr_at(step, schedule.steps, config.optim) for step in (0, schedule.steps - 1))
    yield f"lr         {first:.2e} at the first step, {config.optim.lr:.2e} at its peak, {last:.2e} at the last"


def describe_model(config: Config, model: RoadworkModel, precision: str, world_size: int) -> Iterator[str]:
    """The part of the plan that needs the model."""
    trainable = count_parameters(model)
    frozen = model.backbone.num_parameters
    yield f"parameters {trainable / 1e6:.2f} M trainable, {frozen / 1e6:.2f} M frozen ({config.model.backbone})"
    gib = memory_bytes(trainable, frozen, precision, world_size) / 2**30
    yield f"memory     {gib:.2f} GiB per process for weights, gradients and optimizer; activations come on top"


def count_parameters(module: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def memory_bytes(trainable: int, frozen: int, precision: str, world_size: int) -> float:
    """What a process holds whatever the batch, under ZeRO-2 with AdamW.

    Weights and the weight average are whole on every process; gradients, fp32 master weights and the two moments are
    partitioned (ZeRO, arXiv 1910.02054, section 3).
    """
    low = 2 if precision == "bf16" else 4
    partitioned = low + 4 + 4 + 4
    return frozen * low + trainable * (low + 4 + partitioned / world_size)
