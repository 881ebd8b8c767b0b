"""What a run will do, known before it starts: batches, steps, learning rate, parameters and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import Config
from pipeline.data.index import Split
from pipeline.distributed.settings import EngineSettings
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.config import OptimConfig
from pipeline.optim.schedule import lr_at
from pipeline.training.memory import Parameters, state_bytes


@dataclass(frozen=True)
class Schedule:
    """The length of a run."""

    samples_per_epoch: int
    steps: int
    """Optimizer steps in all; the last may reach a little past the last epoch."""
    validation_steps: frozenset[int]
    """Steps after which the run validates."""


def plan_schedule(config: Config, samples: int) -> Schedule:
    """Steps for `train.epochs` over a training split of `samples` photos."""
    per_epoch = max(1, round(config.data.epoch_share * samples))
    steps = -(-config.train.epochs * per_epoch // config.train.batch_size)
    validations = config.train.epochs * config.train.validations_per_epoch
    at = {max(1, round(steps * (i + 1) / validations)) for i in range(validations)}
    return Schedule(per_epoch, steps, frozenset(at))


def sampling_weights(config: Config, split: Split) -> np.ndarray:
    """Sampling weight of each row of the split by `data.sampling`: float64 [N]."""
    return split.weights if config.data.sampling == "weighted" else np.ones(len(split.samples))


def describe_schedule(config: Config, schedule: Schedule) -> Iterator[tuple[str, str]]:
    """The part of the plan that needs no model, as (about, text)."""
    yield (
        "steps",
        f"{schedule.steps} = {config.train.epochs} epochs of {schedule.samples_per_epoch} photos; "
        f"{len(schedule.validation_steps)} validations",
    )
    first, last = (lr_at(step, schedule.steps, config.optim) for step in (0, schedule.steps - 1))
    yield "lr", f"{first:.2e} at the first step, {config.optim.lr:.2e} at its peak, {last:.2e} at the last"
    if config.optim.name == "adamw":
        for key in ("gamma", "hessian_every"):
            value = getattr(config.optim, key)
            if value != getattr(OptimConfig(), key):
                yield "note", f"optim.{key} {value} is for Sophia and changes nothing: optim.name is adamw"


def describe_model(config: Config, model: RoadworkModel, engine: EngineSettings) -> Iterator[tuple[str, str]]:
    """The part of the plan that needs the model, as (about, text)."""
    parameters = Parameters.of(model, model.backbone.num_parameters)
    yield (
        "parameters",
        f"{parameters.trained / 1e6:.2f} M trainable, {parameters.frozen / 1e6:.2f} M frozen ({config.model.backbone})",
    )
    device, host = state_bytes(parameters, engine.precision, engine.sharding)
    gib = (device + parameters.frozen * (2 if engine.precision == "bf16" else 4)) / 2**30
    waiting = f" and {host / 2**30:.2f} GiB of the host's" if host else ""
    yield (
        "memory",
        f"{gib:.2f} GiB per process for weights, gradients and optimizer{waiting}; activations come on top",
    )
