"""What a run will do, known before it starts: batches, steps, learning rate, parameters and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.data.index import Split, shares
from pipeline.data.sampler import SystematicDraw
from pipeline.distributed.settings import EngineSettings
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.config import OptimConfig
from pipeline.optim.schedule import lr_at
from pipeline.training.memory import Parameters, state_bytes

CLUSTERS_TOLD = 2


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


@dataclass(frozen=True)
class Sampling:
    """Which photos of a training split the epochs show, and how often."""

    split: Split
    weights: np.ndarray
    """Sampling weight of each photo by `data.sampling`, float64 [N]."""
    max_repeats: int
    draw: SystematicDraw

    @property
    def asked(self) -> np.ndarray:
        """How often an epoch would show each photo without `data.max_repeats`, float64 [N]."""
        return self.draw.samples * self.weights / self.weights.sum()

    def report(self) -> dict[str, Any]:
        """Shares of each cluster and class among the photos, as the weights ask for, and in epoch 0; see `shares`.

        Later epochs have the same numbers of each, up to one photo.
        """
        amounts = {"photos": np.ones(len(self.weights)), "asked": self.weights, "obtained": self.draw.counts(0)}
        return {name: shares(amount, self.split.clusters, self.split.labels) for name, amount in amounts.items()}


def plan_sampling(config: Config, split: Split) -> Sampling:
    """The epochs that `data.sampling`, `data.epoch_share` and `data.max_repeats` ask for."""
    weights = split.weights if config.data.sampling == "weighted" else np.ones(len(split.samples))
    draw = SystematicDraw(
        weights, plan_schedule(config, len(weights)).samples_per_epoch,
        seed=config.train.seed, strata=split.strata, max_repeats=config.data.max_repeats,
    )  # fmt: skip
    return Sampling(split, weights, config.data.max_repeats, draw)


def describe_sampling(sampling: Sampling) -> Iterator[tuple[str, str]]:
    """The part of the plan about what an epoch shows, as (about, text): roadwork, and the clusters that change most."""
    tables = list(sampling.report().values())
    roadwork = [sum(classes.get("roadwork", 0.0) for classes in table.values()) for table in tables]
    clusters = {f"cluster {name}": [sum(table[name].values()) for table in tables] for name in tables[0]}
    changes = {name: round(max(values) - min(values), 3) for name, values in clusters.items()}
    most = sorted(changes, key=lambda name: -changes[name])[:CLUSTERS_TOLD]
    told = [("roadwork", roadwork), *((name, clusters[name]) for name in most if changes[name])]
    texts = (f"{about} {' -> '.join(f'{share:.1%}' for share in values)}" for about, values in told)
    yield "sampling", f"share of the photos -> asked -> of an epoch: {'; '.join(texts)}"
    held = sampling.asked > sampling.max_repeats * (1 + 1e-9)
    if held.any():
        yield (
            "note",
            f"data.max_repeats {sampling.max_repeats} holds {held.sum()} photos back, which the weights ask for up to "
            f"{sampling.asked.max():.1f} times an epoch",
        )


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
