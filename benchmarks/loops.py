"""The bare training loop of the benchmarks, and the trainer on any DeepSpeed file.

`benchmarks.parity_cells` has a loop and an estimate of the Hessian of its own: they are the reference for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.distributed.settings import engine_settings
from pipeline.distributed.startup import start, world_size
from pipeline.model.losses import Targets, count_targets
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer, set_lr
from pipeline.optim.config import OptimConfig
from pipeline.optim.hessian import hutchinson, rademacher
from pipeline.optim.sampled_loss import draws_needed, sampled_loss, uniform
from pipeline.optim.schedule import lr_at
from pipeline.optim.sophia import Sophia
from pipeline.trainer import Trainer
from pipeline.training.loader import TrainLoader
from pipeline.training.plan import Schedule
from pipeline.training.run_folder import RunFolder


class BareLoop:
    """Takes optimizer steps in one process by PyTorch alone, with the trainer's schedule, clipping and estimates."""

    def __init__(self, model: RoadworkModel, config: OptimConfig, steps: int):
        """Build the optimizer of a model that was built with a `LossConfig`."""
        self.model, self.config, self.steps = model, config, steps
        self.optimizer = build_optimizer(model, config)

    def step(self, number: int, batches: Sequence[Batch], keep_all: bool = False) -> float:
        """Take a step.

        Args:
            number: Counts the steps from 0.
            batches: Micro-batches of equal size, with their targets. With Sophia there is one.
            keep_all: Prune nothing in this step.

        Returns:
            The loss before the step. One that isn't finite leaves the weights as they are.
        """
        if isinstance(self.optimizer, Sophia) and number % self.config.hessian_every == 0:
            self.estimate(number, *batches, keep_all=keep_all)
        set_lr(self.optimizer, lr_at(number, self.steps, self.config))
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self._loss(batch, keep_all) / len(batches)
            loss.backward()
            total += float(loss.detach())
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        if math.isfinite(total):
            self.optimizer.step()
        return total

    def estimate(self, number: int, batch: Batch, *, keep_all: bool) -> None:
        """Add an estimate of the Hessian's diagonal to Sophia's mean; one that isn't finite is left out.

        Only the probes or the drawn labels are random: there is no dropout and no exploration.
        """
        assert isinstance(self.optimizer, Sophia)
        self.optimizer.zero_grad()
        self.model.eval()
        weights, seed = dict(self.model.named_parameters()), torch.initial_seed()
        if self.optimizer.squared:
            output, targets = self.model(batch, keep_all=keep_all), Targets.from_batch(batch)
            draws = uniform(range(len(targets.labels)), draws_needed(output), seed, number)
            assert self.model.loss_config is not None
            sampled_loss(output, targets, count_targets(targets), self.model.loss_config, draws).backward()
        else:
            probes = rademacher({name: tuple(weight.shape) for name, weight in weights.items()}, seed, number)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                products = hutchinson(self._loss(batch, keep_all), weights, probes)
            for name, weight in weights.items():
                weight.grad = products[name]
        self.model.train()
        if all(weight.grad is None or weight.grad.isfinite().all() for weight in weights.values()):
            with self.optimizer.estimating():
                self.optimizer.step()

    def _loss(self, batch: Batch, keep_all: bool) -> torch.Tensor:
        loss: torch.Tensor | None = self.model(batch, with_loss=True, keep_all=keep_all).loss
        assert loss is not None
        return loss


def make_trainer(
    config: Config,
    model: RoadworkModel,
    deepspeed_file: Path,
    schedule: Schedule,
    *,
    loader: TrainLoader | None = None,
    folder: RunFolder | None = None,
    precision: str = "fp32",
) -> Trainer:
    """A trainer that doesn't validate; without a loader its steps are taken by hand.

    A process may make one after the other; the process group stays.
    """
    AcceleratorState._reset_state()
    engine = engine_settings(config, deepspeed_file, world_size(), precision)
    accelerator = start(engine, [], config.train.hang_minutes)
    data: Any = loader
    return Trainer(config, accelerator, model, data, None, engine.batching, schedule, folder)


def engine_step(trainer: Trainer, batches: Sequence[Batch], keep_all: bool = False) -> None:
    """The shortest step that trains the trainer's engine: no seeds, no counts, no average, no log."""
    for batch in batches:
        with trainer.accelerator.accumulate(trainer.engine):
            trainer.accelerator.backward(trainer.engine(batch, with_loss=True, keep_all=keep_all).loss)
