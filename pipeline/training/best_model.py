"""The model folder of a run: the averaged weights of the best validation."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.distributed.agreement import on_rank_zero
from pipeline.distributed.engine_tensors import EngineAverage
from pipeline.errors import UserError
from pipeline.files import replace_folder
from pipeline.model.roadwork import RoadworkModel
from pipeline.training.run_folder import RunFolder
from pipeline.training.state import TrainState


class BestModel:
    """Builds whole models of averaged weights, and keeps the best in the run folder; rank 0 writes."""

    def __init__(self, model: RoadworkModel, average: EngineAverage, folder: RunFolder | None, rank: int):
        """Take the sizes, the loss and the backbone of `model`; without a folder nothing is written."""
        self.model, self.average, self.folder, self.rank = model, average, folder, rank

    def averaged(self) -> RoadworkModel:
        """A whole model with the averaged weights in fp32, however the one in training is sharded. Collective.

        The model's forward pass needs no other rank, so ranks may validate different numbers of photos.
        """
        model = self._whole(self.average.gathered()).attach(self.model.backbone)
        return model.to(self.model.backbone.device)

    def save(self, model: RoadworkModel) -> None:
        """Replace the best model so far."""
        if self.folder and self.rank == 0:
            replace_folder(self.folder.model, model.save_pretrained)

    def restore(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Write the model folder again where the checkpoint comes from another machine. Collective.

        Raises:
            UserError: The best weights are neither here nor in a checkpoint.
        """
        on_rank_zero(lambda: self._restore(state, checkpoints))

    def _restore(self, state: TrainState, checkpoints: Checkpoints) -> None:
        assert self.folder is not None
        if state.best is None or ((self.folder.model / "config.json").exists() and not checkpoints.fetched):
            return
        weights = checkpoints.best_average()
        if weights is None:
            raise UserError(
                f"the best weights so far, those of step {state.best['step']}, are neither in {self.folder.model} nor "
                "in a checkpoint; copy that folder here, or choose another --train.run"
            )
        self.save(self._whole(weights))

    def _whole(self, weights: dict[str, torch.Tensor]) -> RoadworkModel:
        """A whole head with the given weights, without a backbone."""
        config: Any = self.model.config
        model = RoadworkModel(config, self.model.loss_config)
        model.load_state_dict(weights)
        return model
