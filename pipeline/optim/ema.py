"""Exponential moving average of the trainable weights, with warm-up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

MAX_DECAY = 0.9999


def decay_at(step: int, max_decay: float = MAX_DECAY) -> float:
    """Decay of update `step` (from 0): min(max_decay, (1 + t) / (10 + t)).

    With a constant 0.9999, 60 % of the average would still be the random initial weights after 5,000 steps; with the
    warm-up the average spans about the last tenth of the run, whatever its length.
    """
    return min(max_decay, (1 + step) / (10 + step))


class WeightAverage:
    """Keeps an fp32 average of every trainable parameter of a model, by name.

    For a model that is spread over processes, see `pipeline.distributed.EngineAverage`.
    """

    def __init__(self, model: nn.Module, max_decay: float = MAX_DECAY):
        self.max_decay = max_decay
        self.model = model
        self.tensors = {name: weight.detach().float().clone() for name, weight in self._held().items()}

    def _held(self) -> Mapping[str, torch.Tensor]:
        """The model's present weights, or this process's part of them."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's present weights, after optimizer step `step` (from 0)."""
        weight = 1 - decay_at(step, self.max_decay)
        present = self._held()
        torch._foreach_lerp_(
            list(self.tensors.values()), [present[name].detach().float() for name in self.tensors], weight
        )

    def gathered(self) -> dict[str, torch.Tensor]:
        """The whole average by the names of the unsharded model, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gathered`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Copy `values` into `parameters` by name, in place, so that each parameter keeps its storage."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
