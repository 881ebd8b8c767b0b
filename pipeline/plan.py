"""What a run will do before it does it: batches, steps, learning rate, parameters and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import Config, TrainConfig
from pipeline.data.index import Split
from pipeline.errors import UserError
from pipeline.memory import Parameters, Sharding, expert_blocks, state_bytes
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import OptimConfig, lr_at


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


def check_mixup(alpha: float, batching: Batching) -> None:
    """Refuse mixup where no photo has another one beside it.

    Args:
        alpha: `loss.mixup_alpha`.
        batching: Of the run.

    Raises:
        UserError: Each forward pass has a single photo.
    """
    if alpha > 0 and batching.micro_batch_size == 1:
        raise UserError(
            f"loss.mixup_alpha is {alpha:g}, but each forward pass has one photo and nothing to mix it with; raise "
            "train.micro_batch_size, or train.batch_size, to two per process or more, or set loss.mixup_alpha to 0"
        )


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
    if config.optim.name == "adamw":
        for key in ("gamma", "hessian_every"):
            value = getattr(config.optim, key)
            if value != getattr(OptimConfig(), key):
                yield f"note       optim.{key} {value} is for Sophia and changes nothing: optim.name is adamw"


def describe_model(config: Config, model: RoadworkModel, precision: str, sharding: Sharding) -> Iterator[str]:
    """The part of the plan that needs the model."""
    parameters = count_parameters(model)
    yield (
        f"parameters {parameters.trained / 1e6:.2f} M trainable, {parameters.frozen / 1e6:.2f} M frozen "
        f"({config.model.backbone})"
    )
    device, host = state_bytes(parameters, precision, sharding)
    gib = (device + parameters.frozen * (2 if precision == "bf16" else 4)) / 2**30
    waiting = f" and {host / 2**30:.2f} GiB of the host's" if host else ""
    yield f"memory     {gib:.2f} GiB per process for weights, gradients and optimizer{waiting}; activations come on top"


def count_parameters(model: RoadworkModel) -> Parameters:
    """Of a model as it was built, before an engine shards it."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = sum(p.numel() for block in expert_blocks(model) for p in block.parameters())
    return Parameters(trained - experts, experts, model.backbone.num_parameters)
