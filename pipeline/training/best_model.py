"""The model folder of a run: the averaged weights of the best validation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_NAME

from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.checkpoints.files import read_tensors
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
        return self._whole(self.average.gathered()).to(self.model.backbone.device)

    def save(self, model: RoadworkModel) -> None:
        """Replace the best model so far."""
        if self.folder and self.rank == 0:
            replace_folder(self.folder.model, model.save_pretrained)

    def restore(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Let the model folder hold the best weights that a checkpoint knows of. Collective.

        It has others where the checkpoint comes from another machine, or where the run was killed between a validation
        and the end of the save after it.

        Raises:
            UserError: The best weights are neither here nor in a checkpoint.
        """
        on_rank_zero(lambda: self._restore(state, checkpoints))

    def _restore(self, state: TrainState, checkpoints: Checkpoints) -> None:
        assert self.folder is not None
        if state.best is None:
            return
        held, weights = self._held(), checkpoints.best_average()
        if weights is None:
            if held and not checkpoints.fetched:
                return
            raise UserError(
                f"the best weights so far, those of step {state.best['step']}, are neither in {self.folder.model} nor "
                "in a checkpoint; copy that folder here, or choose another --train.run"
            )
        if held.keys() != weights.keys() or any(not torch.equal(held[name], weights[name]) for name in weights):
            self.save(self._whole(weights))

    def _held(self) -> dict[str, torch.Tensor]:
        """The tensors in the model folder; none where it is not whole."""
        assert self.folder is not None
        with suppress(FileNotFoundError, SafetensorError):
            return read_tensors(self.folder.model / SAFE_WEIGHTS_NAME)
        return {}

    def _whole(self, weights: dict[str, torch.Tensor]) -> RoadworkModel:
        """A whole head with the given weights, on the backbone of training."""
        config: Any = self.model.config
        model = RoadworkModel(config, self.model.loss_config)
        model.load_state_dict(weights)
        return model.attach(self.model.backbone)
