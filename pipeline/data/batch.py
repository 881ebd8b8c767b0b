"""A batch: tensors by name, samples stacked. See `RoadworkModel.forward` for the names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.data.workers import begin_worker
from pipeline.devices import uses_gpu

Batch = dict[str, torch.Tensor]


class BatchSource(Dataset[Batch], ABC):
    """A data set in memory that makes whole batches itself, where the model wants them."""

    @abstractmethod
    def __getitems__(self, numbers: list[int]) -> Batch:
        """The batch of the samples with these numbers."""


def collate(samples: list[Batch]) -> Batch:
    """Stack samples into a batch, key by key; in a worker directly into memory that is shared with the trainer."""
    return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """Stack, and keep views channels last in memory, which a stack of permuted tensors would undo at great cost."""
    if values[0].dim() != 4:
        return default_collate(values)
    return default_collate([value.movedim(1, -1) for value in values]).movedim(-1, 2)


def batches_of(
    data: Any, batch_size: int, workers: int, collate_fn: Callable[..., Any] = collate, **options: Any
) -> DataLoader[Any]:
    """The loader of a dataset's batches; see `begin_worker` for its worker processes.

    Batches are in pinned memory if a GPU will read them, so that they can be copied while it computes.

    Args:
        data: The dataset, or a `Subset` of one. A `BatchSource` is used in this process.
        batch_size: Samples per batch.
        workers: Processes that read; 0 reads in this one.
        collate_fn: Makes a batch of a list of samples.
        options: More arguments of `DataLoader`.
    """
    if isinstance(getattr(data, "dataset", data), BatchSource):
        return DataLoader(data, batch_size, collate_fn=_unchanged, **options)
    options = {"pin_memory": uses_gpu(), **options}
    return DataLoader(
        data, batch_size, num_workers=workers, collate_fn=collate_fn, worker_init_fn=begin_worker, **options
    )


def _unchanged(batch: Any) -> Any:
    return batch
