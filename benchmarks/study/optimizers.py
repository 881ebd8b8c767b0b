"""The optimizers that arms are trained with: the one place that knows how a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.data.batch import targets_of
from pipeline.model.losses import count_targets
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer
from pipeline.optim.config import OptimConfig
from pipeline.optim.hessian import hutchinson, rademacher
from pipeline.optim.sampled_loss import draws_needed, sampled_loss, uniform
from pipeline.optim.schedule import lr_at
from pipeline.optim.sophia import Sophia

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


class SophiaStepper(AdamWStepper):
    """Sophia-H and Sophia-G in one process, with the estimates that `pipeline.training.hessian_step` makes.

    As there, nothing in an estimate is random but the probes or the drawn labels: no dropout, no exploration.
    """

    def step(self, number: int, batch: Batch, keep_all: bool) -> float:
        """See `Stepper.step`."""
        if number % self.config.hessian_every == 0:
            self.estimate(number, batch, keep_all)
        return super().step(number, batch, keep_all)

    def estimate(self, number: int, batch: Batch, keep_all: bool) -> None:
        """Take an estimate of the Hessian's diagonal into its mean; one that isn't finite is left out."""
        assert isinstance(self.optimizer, Sophia)
        self.optimizer.zero_grad()
        self.model.eval()
        weights = dict(self.model.named_parameters())
        if self.config.name == "sophia_h":
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            probes = rademacher(shapes, torch.initial_seed(), number)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                loss = self.model(**batch, keep_all=keep_all).loss
                assert loss is not None
                for name, product in hutchinson(loss, weights, probes).items():
                    weights[name].grad = product
        else:
            output, targets = self.model(**batch, keep_all=keep_all), targets_of(batch)
            draws = uniform(range(len(targets.labels)), draws_needed(output), torch.initial_seed(), number)
            sampled_loss(output, targets, count_targets(targets), self.model.loss_config, draws).backward()
        self.model.train()
        if all(weight.grad is None or weight.grad.isfinite().all() for weight in weights.values()):
            with self.optimizer.estimating():
                self.optimizer.step()


OPTIMIZERS: dict[str, Callable[[RoadworkModel, OptimConfig, int], Stepper]] = {
    "adamw": AdamWStepper,
    "sophia_h": SophiaStepper,
    "sophia_g": SophiaStepper,
}
"""Each but AdamW becomes an arm of the group `optimizers`, and two claims: about its MCC, and about its steps."""
