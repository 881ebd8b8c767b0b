"""Predictions for every sample of a split, each exactly once, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from pipeline.data.batch import batches_of
from pipeline.data.dataset import ShardDataset
from pipeline.data.sampler import share_of
from pipeline.distributed.agreement import gather, on_all_ranks
from pipeline.evaluation.calibration import check_finite, cross_fit, fit
from pipeline.evaluation.metrics import binary_metrics
from pipeline.model.roadwork import RoadworkModel


class Validation:
    """Validates a model on this rank's rows and gathers the answers of all ranks."""

    def __init__(self, dataset: ShardDataset, batch_size: int, workers: int, rank: int, world_size: int):
        self.samples = dataset.split.samples
        rows = np.flatnonzero(dataset.split.labels >= 0).tolist()
        mine = [rows[i] for i in share_of(len(rows), rank, world_size)]
        self.loader = batches_of(Subset(dataset, mine), batch_size, workers)

    def __call__(self, model: RoadworkModel, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The loss and the scores of the model's whole answer with all metadata NULL. Collective.

        Args:
            model: The model to validate.
            alive: Called at every batch.

        Returns:
            The scores of `binary_metrics` on cross-fitted probabilities; `loss`, their negative log-likelihood, by
            which the best validation is chosen; and `cut` and `slope`, the calibration by all photos. The focal loss
            would not do: it grows as the answers become surer, while calibration makes them good probabilities.

        Raises:
            UserError: Some of the answers are no numbers; on every rank.
        """
        model.eval()
        mine = on_all_ranks(lambda: self._answers(model, alive))
        model.train()
        parts = [np.concatenate(part) for part in zip(*gather(mine), strict=True)]
        # In the order of the shards, so that the folds do not depend on the number of ranks.
        rows, log_odds = (part[np.argsort(parts[0])] for part in parts)
        samples = [self.samples[row] for row in rows.astype(int)]
        check_finite(log_odds, [sample.key for sample in samples], "the model, at this validation,")
        labels, groups = (np.array([getattr(sample, name) for sample in samples]) for name in ("label", "group"))
        metrics = binary_metrics(labels, cross_fit(labels, log_odds, groups), ranking=log_odds)
        return {"loss": metrics["nll"], **metrics, **asdict(fit(labels, log_odds))}

    @torch.no_grad()
    def _answers(self, model: RoadworkModel, alive: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and log-odds of this rank's photos."""
        rows, log_odds = [np.empty(0)], [np.empty(0)]
        for batch in self.loader:
            alive()
            output = model(batch, null_metadata=True)
            rows.append(batch["row"].numpy())
            log_odds.append(model.log_odds(output).double().cpu().numpy())
        return np.concatenate(rows), np.concatenate(log_odds)
