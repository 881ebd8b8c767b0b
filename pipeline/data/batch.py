"""A batch: tensors by name, samples stacked. See `RoadworkModel.forward` for the names."""

from __future__ import annotations

import torch
from torch.utils.data import default_collate

Batch = dict[str, torch.Tensor]


def collate(samples: list[Batch]) -> Batch:
    """Stack samples into a batch, key by key; in a worker directly into memory that is shared with the trainer."""
    return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """Stack, and keep views channels last in memory, which a stack of permuted tensors would undo at great cost."""
    if values[0].dim() != 4:
        return default_collate(values)
    return default_collate([value.movedim(1, -1) for value in values]).movedim(-1, 2)
