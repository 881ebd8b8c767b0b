"""The optimizers that arms are trained with: the one place that knows how a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import OptimConfig, build_optimizer, lr_at

Loss = Callable[[], torch.Tensor]


class Stepper(Protocol):
    """Takes optimizer steps."""

    def step(self, number: int, loss: Loss) -> float:
        """Take step `number`, from 0.

        Args:
            number: Of the step.
            loss: Runs the model on the step's batch; it may be called again, for the same batch.

        Returns:
            The loss before the step. One that isn't finite leaves the weights as they are.
        """


class AdamWStepper:
    """AdamW with the trainer's schedule and clipping."""

    def __init__(self, model: RoadworkModel, config: OptimConfig, steps: int):
        self.model, self.config, self.steps = model, config, steps
        self.optimizer = build_optimizer(model, config)

    def step(self, number: int, loss: Loss) -> float:
        """See `Stepper.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(number, self.steps, self.config)
        self.optimizer.zero_grad()
        value = loss()
        if value.isfinite():
            value.backward()
            if self.config.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
        return float(value.detach())


OPTIMIZERS: dict[str, Callable[[RoadworkModel, OptimConfig, int], Stepper]] = {"adamw": AdamWStepper}
"""Each but AdamW becomes an arm of the group `optimizers`, and a claim about the steps that it takes."""
