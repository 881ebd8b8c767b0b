"""Predictions for every sample of a split, each exactly once, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from pipeline.data.allocator import keep_freed_memory
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.sampler import share_of
from pipeline.distributed.agreement import on_all_ranks
from pipeline.evaluation.metrics import best_threshold, binary_metrics
from pipeline.model.roadwork import RoadworkModel


class Validation:
    """Validates a model on this rank's rows and gathers the answers of all ranks."""

    def __init__(self, dataset: ShardDataset, batch_size: int, workers: int, rank: int, world_size: int):
        labels = dataset.split.labels
        rows = [row for row in range(len(dataset)) if labels[row] >= 0]
        mine = [rows[i] for i in share_of(len(rows), rank, world_size)]
        self.world_size = world_size
        self.loader = DataLoader(
            torch.utils.data.Subset(dataset, mine),
            batch_size,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=keep_freed_memory,
        )

    def __call__(self, model: RoadworkModel, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """MCC and the other scores with all metadata NULL, at the best threshold. Collective.

        Args:
            model: The model to validate.
            alive: Called at every batch.
        """
        model.eval()
        mine = on_all_ranks(lambda: self._answers(model, alive))
        model.train()
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        labels = np.concatenate([part[0] for part in parts]).astype(int)
        probabilities = np.concatenate([part[1] for part in parts])
        metrics = binary_metrics(labels, probabilities, best_threshold(labels, probabilities))
        return {"loss": sum(part[2] for part in parts) / sum(part[3] for part in parts), **metrics}

    @torch.no_grad()
    def _answers(self, model: RoadworkModel, alive: Callable[[], None]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Labels, probabilities, sum of the loss and number of this rank's photos."""
        labels, probabilities, loss, count = [np.empty(0)], [np.empty(0)], 0.0, 0
        for batch in self.loader:
            alive()
            output = model(batch, null_metadata=True, with_loss=True)
            labels.append(batch["labels"].numpy())
            probabilities.append(model.probability(output.logits, decision_bias=0.0).cpu().numpy())
            loss += float(output.loss_terms["roadwork"].sum())
            count += len(batch["labels"])
        return np.concatenate(labels), np.concatenate(probabilities), loss, count
