"""The optimizers that arms are trained with: the one place that knows how a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import OptimConfig, build_optimizer, lr_at

Batch = dict[str, torch.Tensor]


class Stepper(Protocol):
    """Takes optimizer steps."""

    def step(self, number: int, batch: Batch, keep_all: bool) -> float:
        """Take a step.

        Args:
            number: Of the step, from 0.
            batch: Arguments of the model's forward pass, targets included.
            keep_all: Prune nothing in this step.

        Returns:
            The loss before the step. One that isn't finite leaves the weights as they are.
        """


class AdamWStepper:
    """AdamW with the trainer's schedule and clipping."""

    def __init__(self, model: RoadworkModel, config: OptimConfig, steps: int):
        self.model, self.config, self.steps = model, config, steps
        self.optimizer = build_optimizer(model, config)

    def step(self, number: int, batch: Batch, keep_all: bool) -> float:
        """See `Stepper.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(number, self.steps, self.config)
        self.optimizer.zero_grad()
        loss = self.model(**batch, keep_all=keep_all).loss
        assert loss is not None
        if loss.isfinite():
            loss.backward()
            if self.config.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
        return float(loss.detach())


OPTIMIZERS: dict[str, Callable[[RoadworkModel, OptimConfig, int], Stepper]] = {"adamw": AdamWStepper}
"""Each but AdamW becomes an arm of the group `optimizers`, and a claim about the steps that it takes."""
