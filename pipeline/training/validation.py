"""Predictions for every sample of a split, each exactly once, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from pipeline.data.batch import batches_of
from pipeline.data.dataset import ShardDataset
from pipeline.data.sampler import share_of
from pipeline.distributed.agreement import gather, on_all_ranks
from pipeline.evaluation.metrics import best_threshold, binary_metrics
from pipeline.model.roadwork import RoadworkModel


class Validation:
    """Validates a model on this rank's rows and gathers the answers of all ranks."""

    def __init__(self, dataset: ShardDataset, batch_size: int, workers: int, rank: int, world_size: int):
        rows = np.flatnonzero(dataset.split.labels >= 0).tolist()
        mine = [rows[i] for i in share_of(len(rows), rank, world_size)]
        self.loader = batches_of(Subset(dataset, mine), batch_size, workers)

    def __call__(self, model: RoadworkModel, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """MCC and the other scores with all metadata NULL, at the best threshold. Collective.

        Args:
            model: The model to validate.
            alive: Called at every batch.
        """
        model.eval()
        mine = on_all_ranks(lambda: self._answers(model, alive))
        model.train()
        parts = gather(mine)
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
