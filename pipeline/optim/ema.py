"""Exponential moving average of the trainable weights, with warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

MAX_DECAY = 0.9999


def decay_at(step: int, max_decay: float = MAX_DECAY) -> float:
    """Decay of update `step` (from 0): min(max_decay, (1 + t) / (10 + t)).

    A constant 0.9999 would still hold 60 % of the random initial weights after 5,000 steps; with the warm-up
    the average spans about the last tenth of the run, whatever its length.
    """
    return min(max_decay, (1 + step) / (10 + step))


class WeightAverage:
    """Keeps an fp32 average of every trainable parameter of a model, by name."""

    def __init__(self, model: nn.Module, max_decay: float = MAX_DECAY):
        self.max_decay = max_decay
        self.tensors = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model's present weights, after optimizer step `step` (from 0)."""
        weight = 1 - decay_at(step, self.max_decay)
        present = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.tensors.values()), [present[name].detach().float() for name in self.tensors], weight
        )

    def gathered(self) -> dict[str, torch.Tensor]:
        """The whole average by the names of the unspread model, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gathered`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Run the body with the averaged weights in `model`; its own come back afterwards, bit for bit."""
        parameters = {n: p for n, p in model.named_parameters() if n in self.tensors}
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            copy_into(parameters, self.tensors)
            yield
        finally:
            copy_into(parameters, own)


@torch.no_grad()
def copy_into(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Copy `values` into `parameters` in place, name by name, so that a parameter's storage stays its own."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
